"""Request bodies: decoded and checked, or refused with the field's name."""

from __future__ import annotations

import json
import signal
from contextlib import suppress

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.messages.daemon import BindPortRequest, UnbindPortRequest
from sandboxd.messages.decoding import BadRequest, PathRequest, decode, decode_query
from sandboxd.messages.executions import CommandRequest, KillProcessRequest
from sandboxd.messages.files import WriteFileRequest
from sandboxd.processes.command import Command


def command(**fields: object) -> Command:
    """What a body with these fields asks for."""
    return decode(json.dumps(fields).encode(), CommandRequest).command()


def test_a_command_with_everything() -> None:
    made = command(cmd="ls", cwd="/tmp", env={"A": "b=c"}, timeout=1.5)
    assert made == Command("ls", "/tmp", {"A": "b=c"}, 1.5)


def test_a_command_alone() -> None:
    assert command(cmd="") == Command("", None, {}, None)


def test_null_and_empty_are_as_good_as_left_out() -> None:
    assert command(cmd="ls", cwd=None, env=None, timeout=None) == Command("ls")
    assert command(cmd="ls", cwd="", env={}, timeout=0) == Command("ls")


def test_unknown_fields_are_ignored() -> None:
    assert command(cmd="ls", recursive=True, more={"a": [1]}) == Command("ls")


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "cmd"),
        ({"cmd": None}, "cmd"),
        ({"cmd": 1}, "cmd"),
        ({"cmd": "a\0"}, "cmd"),
        ({"cmd": "a", "cwd": 1}, "cwd"),
        ({"cmd": "a", "cwd": "/\0"}, "cwd"),
        ({"cmd": "a", "env": []}, "env"),
        ({"cmd": "a", "env": {"A": 1}}, "env"),
        ({"cmd": "a", "env": {"": "b"}}, "env"),
        ({"cmd": "a", "env": {"A=B": "c"}}, "env"),
        ({"cmd": "a", "env": {"A\0": "b"}}, "env"),
        ({"cmd": "a", "env": {"A": "\0"}}, "env.A"),
        ({"cmd": "a", "timeout": "1"}, "timeout"),
        ({"cmd": "a", "timeout": -1}, "timeout"),
        ({"cmd": "a", "max_output": -1}, "max_output"),
    ],
)
def test_a_malformed_command_is_refused_with_the_field(fields: dict[str, object], field: str) -> None:
    with pytest.raises(BadRequest, match=rf"^{field}\b|`{field}`"):
        command(**fields)


@pytest.mark.parametrize(
    "body",
    [b"{", b"null", b"[]", b'"text"', b"{} {}", b'{"cmd": NaN}', b'{"cmd": "\xff"}', b'{"cmd": "\\ud800"}', b"\xff"],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(BadRequest):
        decode(body, CommandRequest)


def test_a_deeply_nested_body_is_refused() -> None:
    with pytest.raises(BadRequest):
        decode(b'{"cmd": "ls", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", CommandRequest)


@given(st.binary())
def test_any_body_is_decoded_or_refused(body: bytes) -> None:
    with suppress(BadRequest):
        assert isinstance(decode(body, CommandRequest).command(), Command)


def test_an_empty_body_is_an_empty_object() -> None:
    assert decode(b"", UnbindPortRequest) == UnbindPortRequest(None)


@pytest.mark.parametrize(("port", "number"), [("8080", 8080), (8080, 8080), ("1", 1), ("65535", 65535), (" 80 ", 80)])
def test_a_port_is_a_string_or_an_integer(port: str | int, number: int) -> None:
    assert decode(json.dumps({"port": port}).encode(), BindPortRequest).number() == number
    assert decode(json.dumps({"port": port}).encode(), UnbindPortRequest).number() == number


@pytest.mark.parametrize(
    "port",
    [
        "0",
        "65536",
        "-1",
        "abc",
        "80a",
        "8 0",
        "80.0",
        "٨٠",
        "²",
        "1e3",
        "9" * 5000,
        "00000199999",
        0,
        65536,
        -80,
        80.5,
        True,
    ],
)
def test_what_is_not_a_port_is_refused(port: object) -> None:
    body = json.dumps({"port": port}).encode()
    with pytest.raises(BadRequest, match=r"^port: "):
        decode(body, BindPortRequest).number()
    with pytest.raises(BadRequest, match=r"^port: "):
        decode(body, UnbindPortRequest).number()


@given(st.text("0123456789", min_size=1, max_size=12))
def test_digits_are_a_port_or_refused(digits: str) -> None:
    try:
        assert 1 <= decode(json.dumps({"port": digits}).encode(), BindPortRequest).number() <= 65535
    except BadRequest:
        assert not 1 <= int(digits) <= 65535 or len(digits) > 5


@pytest.mark.parametrize("body", [b"", b"{}", b'{"port": null}', b'{"port": ""}'])
def test_unbinding_needs_no_port(body: bytes) -> None:
    assert decode(body, UnbindPortRequest).number() is None


@pytest.mark.parametrize("body", [b"{}", b'{"port": ""}', b'{"port": null}'])
def test_binding_needs_a_port(body: bytes) -> None:
    with pytest.raises(BadRequest, match="port"):
        decode(body, BindPortRequest).number()


@pytest.mark.parametrize(
    ("given_signal", "signum"),
    [
        (None, signal.SIGKILL),
        ("TERM", signal.SIGTERM),
        ("SIGTERM", signal.SIGTERM),
        ("sigterm", signal.SIGTERM),
        ("int", signal.SIGINT),
        ("15", signal.SIGTERM),
        (9, signal.SIGKILL),
    ],
)
def test_a_signal_is_a_name_or_a_number(given_signal: str | int | None, signum: int) -> None:
    body = json.dumps({"id": "a", "signal": given_signal}).encode()
    assert decode(body, KillProcessRequest).signum() == signum


@pytest.mark.parametrize("given_signal", ["", "NONE", "SIG", "0", "-9", "²", "9" * 5000, 0, -9, 1000, 10**30, True])
def test_what_is_not_a_signal_is_refused(given_signal: object) -> None:
    with pytest.raises(BadRequest, match=r"^signal: "):
        decode(json.dumps({"id": "a", "signal": given_signal}).encode(), KillProcessRequest).signum()


@pytest.mark.parametrize("body", [b"{}", b'{"id": ""}', b'{"id": null}', b'{"id": 1}'])
def test_killing_needs_an_id(body: bytes) -> None:
    with pytest.raises(BadRequest, match=r"\bid\b"):
        decode(body, KillProcessRequest)


@pytest.mark.parametrize(
    "body",
    [
        b'{"content": ""}',
        b'{"content": "", "path": ""}',
        b'{"content": "", "path": "a\\u0000"}',
        b'{"content": "", "path": 1}',
    ],
)
@pytest.mark.parametrize("type_", [PathRequest, WriteFileRequest])
def test_a_path_must_be_one(body: bytes, type_: type[PathRequest]) -> None:
    with pytest.raises(BadRequest, match=r"\bpath\b"):
        decode(body, type_)


@pytest.mark.parametrize("body", [b'{"path": "/f", "content": ""}', b'{"path": "/f"}'])
def test_content_may_be_empty_or_left_out(body: bytes) -> None:
    assert decode(body, WriteFileRequest).content == ""


class Query(msgspec.Struct):
    path: str = ""
    many: list[str] = []
    number: int | None = None


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (b"path=/d/a;b", Query("/d/a;b")),
        (b"path=/d/a;path=b&number=1", Query("/d/a;path=b", [], 1)),
        (b"path=a+b%26c&path=d", Query("a b&c")),
        (b"many=a;b&many=c", Query("", ["a;b", "c"])),
        (b"%FF=1&path=%ff", Query("\udcff")),
        (b"path", Query()),
        ("path=ä".encode(), Query("ä")),
        (b"", Query()),
    ],
)
def test_only_an_ampersand_separates_the_parameters_of_a_query(query: bytes, expected: Query) -> None:
    assert decode_query(query, Query) == expected


def test_a_number_of_thousands_of_digits_beside_a_lone_surrogate_is_a_bad_request() -> None:
    with pytest.raises(BadRequest, match="not valid JSON"):
        decode(b'{"cmd": "\\udc80", "timeout": ' + b"1" * 5000 + b"}", CommandRequest)
