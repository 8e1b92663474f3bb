"""Long strings of JSON bodies: what their pieces are, and that nothing else waits while they are decoded."""

from __future__ import annotations

import hashlib
import json
import os
from base64 import b64encode
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.api.routing import LARGE, SMALL_BODY
from sandboxd.messages.long_text import LONG, LongText, cut_out
from tests.client import Api
from tests.waiting import within

#: Units that a piece must not end in, each several times as likely as others.
UNITS = ["a", "\u00fc", "\u20ac", "\U0001f600", "\\", '"', "\n", "\\\\u00e4", "\\ud83d", "\x00", "\udcff", "/"]


def text_of(body: bytes) -> tuple[bytes, LongText]:
    short, text = cut_out(body)
    assert text is not None
    return short, text


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.sampled_from(UNITS), min_size=1, max_size=12),
    st.integers(0, 7),
    st.booleans(),
    st.sampled_from([(",", ":"), (" ,\n", " :\t")]),
)
@pytest.mark.slow
def test_the_pieces_are_the_text(units: list[str], shift: int, ascii: bool, separators: tuple[str, str]) -> None:
    unit = "".join(units)
    content = "x" * shift + unit * (LONG // len(unit) + 1)
    value = {"path": 'a "path" \\', "content": content, "more": [1, "b"]}
    body = json.dumps(value, ensure_ascii=ascii, separators=separators).encode("utf-8", "surrogatepass")
    if not ascii and "\udcff" in unit:
        return  # not UTF-8, which is refused
    short, text = text_of(body)
    assert json.loads(short) == {**value, "content": text.mark}
    pieces = list(text.pieces())
    assert b"".join(pieces) == content.encode("utf-8", "surrogateescape")
    assert max(map(len, pieces)) <= 256 * 1024


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b'{"content":"short"}',
        b'"' + b"x" * LONG,
        b'"' + b"x" * LONG + b"\\",
        b'{"content":"' + b"x" * LONG + b'\\"}',
        b'{"content":"' + b"x" * LONG + b'\\ud83d"}',
        b'{"content":"' + b"x" * LONG + b'\\u12"}',
        b"[" + b'"x",' * 200 + b'"' + b"x" * LONG + b'"]',
    ],
    ids=range(9),
)
def test_what_has_no_long_text_or_is_malformed_stays_as_it_is(body: bytes) -> None:
    assert cut_out(body) == (body, None)


@pytest.mark.parametrize("inside", [b"\xff", b"\\ud912\\u0041", b"\\x"], ids=["utf-8", "half", "escape"])
async def test_malformed_long_text_is_refused_and_changes_nothing(api: Api, tmp_path: Path, inside: bytes) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    body = b'{"path":"%b","content":"%b%b"}' % (os.fsencode(path), b"x" * LARGE, inside)
    response = await within(10, api.call("POST", "/write_file", body))
    assert response.status == 400, response
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.slow
async def test_long_text_is_written_and_read_back(api: Api, tmp_path: Path) -> None:
    content = 'quote" euro\u20ac line\n' * (LARGE // 20)
    assert (await within(10, api.post("/write_file", {"path": str(tmp_path / "f"), "content": content}))).json() == {
        "success": True
    }
    assert (tmp_path / "f").read_text() == content


@pytest.mark.slow
async def test_long_text_is_written_in_place_too(api: Api, tmp_path: Path) -> None:
    content = "\u20ac" * (LARGE // 6)
    assert (await within(10, api.post("/write_file", {"path": "/dev/null", "content": content}))).json()["success"]
    assert (await within(10, api.post("/write_file", {"path": content, "content": "x"}))).status == 400
    assert (await within(10, api.post("/write_file", {"path": str(tmp_path), "content": content}))).json() == {
        "success": False,
        "error": f"open {tmp_path}: is a directory",
    }


@pytest.mark.parametrize("field", ["input", "input_base64", "cmd"])
@pytest.mark.slow
async def test_long_text_reaches_a_command(api: Api, field: str) -> None:
    text = 'euro\u20ac "line"\n' * (LARGE // 17)
    digest = hashlib.sha256(text.encode()).hexdigest()
    body = {"cmd": "sha256sum"}
    if field == "cmd":
        body["cmd"] = f"sha256sum << 'END'\n{text}END\n"
    else:
        body[field] = text if field == "input" else b64encode(text.encode()).decode()
    reply = await within(20, api.post("/run", body, {"Idempotency-Key": field}))
    assert (reply.status, reply.json()["stdout"]) == (200, f"{digest}  -\n")
    if field == "cmd":
        reply = await within(20, api.post("/run", {**body, "cmd": body["cmd"] + " "}, {"Idempotency-Key": field}))
        assert reply.status == 409


@pytest.mark.parametrize("text", ["A" * LARGE + "=", "A" * 7 + "=" + "A" * LARGE, "A" * LARGE + "\u20ac"], ids=range(3))
async def test_long_base64_that_is_malformed_is_refused(api: Api, text: str) -> None:
    reply = await within(10, api.post("/run", {"cmd": "true", "input_base64": text}))
    assert reply.status == 400
    assert reply.json()["error"].startswith("input_base64: ")


@pytest.mark.slow
async def test_long_text_is_appended(api: Api, tmp_path: Path) -> None:
    path = str(tmp_path / "f")
    reply = await within(10, api.post("/files/append", {"path": path, "content": "\u20ac" * (LARGE // 6)}))
    assert reply.json()["size"] == LARGE // 6 * 3
    reply = await within(10, api.post("/files/append", {"path": path, "base64": "eHh4" * (LARGE // 4)}))
    assert reply.json()["size"] == LARGE // 6 * 3 + LARGE // 4 * 3


@pytest.mark.slow
async def test_where_a_body_may_be_long(api: Api, tmp_path: Path) -> None:
    long = "x" * LARGE
    reply = await within(10, api.post("/run", {"cmd": "true", "env": {"A": long}}))
    assert reply.status == 400
    assert "cmd or input or input_base64" in reply.json()["error"]
    reply = await within(10, api.post("/run", {"argv": ["true"] + ["x"] * (LARGE // 4)}))
    assert reply.status == 413
    reply = await within(10, api.post("/delete_file", {"path": str(tmp_path), "more": "x" * SMALL_BODY}))
    assert (reply.status, reply.json()["success"]) == (413, False)
