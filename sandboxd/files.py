"""
File operations. All of them block: call them in a thread.

Errors are told as Go tells them, ``<op> <path>: <strerror in lower case>``, because the clients match that text.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat as modes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone

#: Most bytes that :func:`read` takes into memory.
MAX_READ = 64 * 1024 * 1024

#: The end of the year 9999, the last that :class:`datetime` knows; a file's time may be later.
_LAST_SECOND = 253_402_300_799

#: Why a file that can be written may have no room for a temporary one beside it, or cannot be replaced: the
#: directory is not ours, or the file is a mount point (as ``/etc/hosts`` is in a container).
_CANNOT_REPLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


class FileError(Exception):
    """What the file system refused, in words for the client."""

    def __init__(self, op: str, path: str, why: str) -> None:
        super().__init__(f"{op} {path}: {why}")


@contextmanager
def _told(op: str, path: str) -> Iterator[None]:
    """Turn an :class:`OSError` into a :class:`FileError`."""
    try:
        yield
    except OSError as error:
        raise FileError(op, path, (error.strerror or str(error)).lower()) from None


def read(path: str) -> bytes:
    """
    A regular file's contents.

    :raise FileError: if it cannot be read, is not a regular file, or has more than :data:`MAX_READ` bytes.
    """
    with _told("open", path):
        # O_NONBLOCK, or opening a FIFO would wait for a writer that may never come.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with _told("read", path), open(fd, "rb") as file:
        info = os.fstat(fd)
        if modes.S_ISDIR(info.st_mode):
            raise FileError("read", path, "is a directory")
        if not modes.S_ISREG(info.st_mode):
            raise FileError("read", path, "not a regular file")
        data = file.read(MAX_READ + 1) if info.st_size <= MAX_READ else b""
    if info.st_size > MAX_READ or len(data) > MAX_READ:
        raise FileError("read", path, f"file too large: the limit is {MAX_READ} bytes")
    return data


def write(path: str, content: str) -> None:
    """
    Replace a file's contents, or make a new one with mode 0644.

    A reader sees the old file or the new one, and a failure leaves the old one: the text goes to a temporary
    file beside it, which then takes its name, owner and mode. Where that cannot be done (see
    :data:`_CANNOT_REPLACE`) the file is overwritten in place.

    :raise FileError: if it cannot be written, or is there and is not a regular file.
    """
    data = content.encode("utf-8", "surrogatepass")
    with _told("open", path):
        target = os.path.realpath(path)  # a link keeps pointing to the file
        try:
            old = os.stat(target)
        except FileNotFoundError:
            old = None
        if old is not None and modes.S_ISDIR(old.st_mode):
            raise FileError("open", path, "is a directory")
        if old is not None and not modes.S_ISREG(old.st_mode):
            raise FileError("open", path, "not a regular file")
        if path.endswith("/"):
            raise FileError("open", path, "is a directory")
        if old is not None and not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            _replace(target, data, old, path)
        except OSError as error:
            if old is None or error.errno not in _CANNOT_REPLACE:
                raise
            with open(target, "r+b", buffering=0) as file, _told("write", path):
                _write_all(file.fileno(), data)
                file.truncate()


def _replace(target: str, data: bytes, old: os.stat_result | None, path: str) -> None:
    temporary = os.path.join(os.path.dirname(target), f".sandboxd-{secrets.token_hex(8)}.tmp")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            with _told("write", path):
                _write_all(fd, data)
            if old is not None and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(fd, old.st_uid, old.st_gid)
            os.fchmod(fd, 0o644 if old is None else modes.S_IMODE(old.st_mode))
        finally:
            os.close(fd)
        os.rename(temporary, target)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def delete(path: str) -> None:
    """
    Remove a file, a link, or an empty directory.

    :raise FileError: if it cannot be removed.
    """
    with _told("remove", path):
        if modes.S_ISDIR(os.lstat(path).st_mode):
            os.rmdir(path)
        else:
            os.unlink(path)


def delete_tree(path: str) -> None:
    """
    Remove whatever is there, as ``rm -rf`` does; nothing there is no error. Links are not followed.

    :raise FileError: if something cannot be removed, or if it is the root directory.
    """
    with _told("remove", path):
        try:
            info = os.lstat(path)
        except FileNotFoundError:
            return
        if os.path.realpath(path) == "/":
            raise FileError("remove", path, "the root directory is never removed")
        if modes.S_ISDIR(info.st_mode):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def make_directories(path: str) -> None:
    """
    Make a directory, mode 0755, and those above it; one that is there is no error.

    :raise FileError: if it cannot be made, or if something else is there.
    """
    with _told("mkdir", path):
        try:
            os.makedirs(path, 0o755, exist_ok=True)
        except FileExistsError:
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None


def names(path: str) -> list[str]:
    """
    The names in a directory, sorted; what is not UTF-8 in them becomes U+FFFD.

    :raise FileError: if it cannot be read.
    """
    with _told("open", path):
        return sorted(os.fsencode(name).decode("utf-8", "replace") for name in os.listdir(path))


def stat(path: str) -> dict[str, object]:
    """
    What is known of a file: ``name``, ``is_dir``, ``size`` (bytes), ``mod_time`` (RFC 3339), ``mode`` (as ``ls``).

    :raise FileError: if there is none.
    """
    with _told("stat", path):
        info = os.stat(path)
    changed = datetime.fromtimestamp(min(info.st_mtime, _LAST_SECOND), timezone.utc)
    return {
        "name": os.path.basename(os.path.abspath(path)) or "/",
        "is_dir": modes.S_ISDIR(info.st_mode),
        "size": info.st_size,
        "mod_time": changed.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "mode": modes.filemode(info.st_mode),
    }
