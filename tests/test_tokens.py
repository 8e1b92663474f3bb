"""Where tokens come from: options, the environment, files; and how a claim is stored."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import pytest
from twisted.internet.defer import maybeDeferred

from sandboxd.options import SECRET_PATH, ServiceOptions
from sandboxd.web import tokens
from sandboxd.web.auth import DaemonAuth
from sandboxd.web.tokens import BadTokens, Credentials, read_tokens, store_token, stored_tokens

GIVEN = "given-token-0b1d"
STORED = "stored-token-77fe"


def credentials(*arguments: str, **variables: str) -> Credentials:
    """What the options make of a command line and an environment."""

    class Options(ServiceOptions):
        environ: ClassVar[Mapping[str, str]] = variables

    options = Options()
    options.parseOptions(arguments)
    found: Credentials = options["credentials"]
    return found


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file with a token."""
    file = tmp_path / "sandbox-secret"
    file.write_text(STORED)
    return file


# Files


@pytest.mark.parametrize("text", ["one", "one\n", "\n one \r\n\n", "one\ntwo", "two\none\none"])
def test_a_token_a_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "file"
    file.write_text(text, newline="")
    assert list(read_tokens(file)) == text.split()


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no token"),
        (b"\n \n", "no token"),
        (b"fine\nnot fine", "line 2"),
        (b"a\0b", "line 1"),
        (b"\xff", "UTF-8"),
        (b"x" * 70_000, "larger"),
    ],
)
def test_what_is_no_token_is_told_without_telling_it(tmp_path: Path, data: bytes, why: str) -> None:
    file = tmp_path / "file"
    file.write_bytes(data)
    with pytest.raises(BadTokens, match=why) as told:
        read_tokens(file)
    assert "fine" not in str(told.value)


def test_a_file_that_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadTokens, match="no such file"):
        read_tokens(tmp_path / "file")
    with pytest.raises(BadTokens, match="is a directory"):
        read_tokens(tmp_path)


def test_a_fifo_is_no_token_file_and_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(BadTokens, match="is a FIFO"):
        read_tokens(tmp_path / "fifo")


def test_a_claim_is_stored_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "new" / "folder" / "secret"
    assert stored_tokens(file) == ()
    umask = os.umask(0)
    try:
        assert store_token(file, "first")
    finally:
        os.umask(umask)
    assert not store_token(file, "second")
    assert stored_tokens(file) == ("first",)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700
    assert os.listdir(file.parent) == ["secret"]


def test_a_claim_is_stored_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(tokens.os, "link", link)
    assert store_token(tmp_path / "secret", "first")
    assert os.listdir(tmp_path) == ["secret"]


def test_nothing_is_left_of_a_claim_that_could_not_be_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tokens.os, "fsync", fsync)
    with pytest.raises(OSError, match="No space"):
        store_token(tmp_path / "secret", "first")
    assert os.listdir(tmp_path) == []


async def test_a_token_that_another_daemon_has_stored_meanwhile_is_the_one(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    auth = DaemonAuth(Credentials((), file, pool=True), maybeDeferred)  # type: ignore[arg-type]
    assert auth.may_claim(b"Bearer second")
    store_token(file, "first")
    assert not await auth.claim(b"Bearer second")
    assert not auth.unclaimed
    assert auth.allows(b"Bearer first")
    assert not auth.allows(b"Bearer second")


@pytest.mark.parametrize("token", ["", "x" * 5000, "pässwört", "a b", "a\tb", "a\x7fb"])
def test_a_token_that_cannot_claim(tmp_path: Path, token: str) -> None:
    auth = DaemonAuth(Credentials((), tmp_path / "secret", pool=True), maybeDeferred)  # type: ignore[arg-type]
    assert not auth.may_claim(f"Bearer {token}".encode())


async def test_a_token_that_was_put_there_is_found_by_a_reload(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    auth = DaemonAuth(Credentials((), file, pool=True), maybeDeferred)  # type: ignore[arg-type]
    await auth.reload()
    assert auth.unclaimed
    store_token(file, "first")
    await auth.reload()
    assert not auth.unclaimed
    assert auth.allows(b"Bearer first")


# Options


def test_the_command_line_wins_over_the_environment_over_systemd(file: Path) -> None:
    systemd = {"CREDENTIALS_DIRECTORY": str(file.parent)}
    assert credentials(**systemd) == Credentials((STORED,), file)
    assert credentials(SANDBOX_SECRET=GIVEN, **systemd) == Credentials((GIVEN,))
    assert credentials(f"--secret-file={file}", SANDBOX_SECRET=GIVEN) == Credentials((STORED,), file)
    assert credentials("--secret=option", SANDBOX_SECRET=GIVEN, SANDBOX_SECRET_FILE=str(file)).tokens == ("option",)
    assert credentials(SANDBOX_SECRET_FILE=str(file), SANDBOX_SECRET="") == Credentials((STORED,), file)
    assert credentials(SANDBOX_SECRET=GIVEN, CREDENTIALS_DIRECTORY="/nope", SANDBOX_AUTH_MODE="static").path is None


def test_pool(file: Path, tmp_path: Path) -> None:
    pool = {"SANDBOX_AUTH_MODE": "Pool"}
    assert credentials(**pool).path == Path(SECRET_PATH)
    assert credentials(**pool, SANDBOX_SECRET_PATH=str(file)) == Credentials((STORED,), file, pool=True)
    new = tmp_path / "new"
    assert credentials("--auth-mode=pool", f"--secret-path={new}") == Credentials((), new, pool=True)


@pytest.mark.parametrize(
    ("variables", "why"),
    [
        ({}, "SANDBOX_SECRET is required"),
        ({"SANDBOX_SECRET": "", "CREDENTIALS_DIRECTORY": "/nope"}, "SANDBOX_SECRET is required"),
        ({"SANDBOX_SECRET": GIVEN, "SANDBOX_SECRET_FILE": "FILE"}, "both"),
        ({"SANDBOX_SECRET_FILE": "/nope"}, "/nope: no such file"),
        ({"SANDBOX_AUTH_MODE": "open"}, "SANDBOX_AUTH_MODE .*'open'"),
        ({"SANDBOX_AUTH_MODE": "pool", "SANDBOX_SECRET": GIVEN}, "unset SANDBOX_SECRET"),
        ({"SANDBOX_AUTH_MODE": "pool", "SANDBOX_SECRET_FILE": "FILE"}, "unset .*SANDBOX_SECRET_FILE"),
        ({"SANDBOX_AUTH_MODE": "pool", "CREDENTIALS_DIRECTORY": "FOLDER"}, "unset .*credential"),
        ({"SANDBOX_AUTH_MODE": "pool", "SANDBOX_SECRET_PATH": "/dev/null"}, "/dev/null: has no token"),
    ],
)
def test_what_cannot_be_meant_is_refused(file: Path, variables: dict[str, str], why: str) -> None:
    places = {"FILE": str(file), "FOLDER": str(file.parent)}
    with pytest.raises(SystemExit, match=why) as told:
        credentials(**{name: places.get(value, value) for name, value in variables.items()})
    assert GIVEN not in str(told.value)
    assert STORED not in str(told.value)


def test_tokens_are_not_shown() -> None:
    assert GIVEN not in repr(Credentials((GIVEN,)))
