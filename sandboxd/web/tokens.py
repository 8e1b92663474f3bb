"""
The files that tokens are kept in. All functions block, and no error or log has a token in it.

A file has one token a line: more than one while they are being rotated.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

#: Most bytes of such a file.
MAX_FILE = 64 * 1024

#: errno of link(2) on file systems without hard links.
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)

#: Most characters of a token that claims the daemon.
MAX_TOKEN = 4096


class BadTokens(Exception):
    """A token file cannot be used; the text names it and says why."""


@dataclass(frozen=True)
class Credentials:
    """
    The tokens that are accepted when the daemon starts, and the file that they come from.

    :ivar tokens: the tokens; empty if the daemon waits to be claimed.
    :ivar path: the file that they came from, or None.
    :ivar pool: whether the first token that is sent claims the daemon, and is stored at ``path``.
    """

    tokens: tuple[str, ...] = field(repr=False)
    path: Path | None = None
    pool: bool = False


def check_token(token: str) -> str:
    """
    Return a token if it can be sent in a header.

    :raise ValueError: if it cannot be sent.
    """
    if not token:
        raise ValueError("must not be empty")
    if any(character.isspace() or not character.isprintable() for character in token):
        raise ValueError("must not have white space or control characters in it")
    return token


def read_tokens(path: Path) -> tuple[str, ...]:
    """
    Read the tokens of a file. Blocks.

    :raise BadTokens: if it cannot be read, holds no token, or holds an invalid one.
    """
    try:
        # O_NONBLOCK: opening a FIFO would wait for a writer.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
                raise BadTokens(f"{path}: is a FIFO, which cannot be read again")
            data = file.read(MAX_FILE + 1) or b""
    except OSError as error:
        raise BadTokens(f"{path}: {(error.strerror or 'cannot be read').lower()}") from None
    if len(data) > MAX_FILE:
        raise BadTokens(f"{path}: is larger than {MAX_FILE} bytes")
    try:
        lines = data.decode("utf-8").split("\n")
    except UnicodeDecodeError:
        raise BadTokens(f"{path}: is not UTF-8") from None
    tokens = []
    for number, line in enumerate(lines, 1):
        if token := line.strip():
            try:
                tokens.append(check_token(token))
            except ValueError as error:
                raise BadTokens(f"{path}: line {number} {error}") from None
    if not tokens:
        raise BadTokens(f"{path}: has no token in it")
    return tuple(tokens)


def stored_tokens(path: Path) -> tuple[str, ...]:
    """
    Read the tokens that a claim has stored; none if there was no claim.

    :raise BadTokens: if the file exists but cannot be used.
    """
    # A path through a file that is not a directory is no claim either; storing one there fails, and says so.
    return read_tokens(path) if os.path.lexists(path) else ()


def store_token(path: Path, token: str) -> bool:
    """
    Store a token with mode 0600, so that a crash at any moment leaves all of it or nothing. Blocks.

    :return: whether it was stored; False if the file exists by now.
    :raise OSError: if it could not be stored.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(8)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(token.encode("utf-8") + b"\n")
            file.flush()
            os.fsync(fd)
        try:
            os.link(temporary, path)  # where rename(2) would replace what another daemon has put there
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.rename(temporary, path)
    finally:
        with suppress(OSError):
            os.unlink(temporary)
    _sync_directory(path.parent)
    return True


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
