"""File operations of the contract: small files of text, directories, names."""

from __future__ import annotations

import errno
import os
import secrets
import stat as modes
from contextlib import suppress
from datetime import datetime, timezone

from sandboxd.files.errors import FileError, RootItself, told
from sandboxd.files.removal import remove_tree
from sandboxd.files.root import Root

#: Most bytes that :func:`read` takes into memory.
MAX_READ = 64 * 1024 * 1024

#: The end of the year 9999, the last that :class:`datetime` knows; a file's time may be later.
_LAST_SECOND = 253_402_300_799

#: Why a file that can be written may have no room for a temporary one beside it, or cannot be replaced: the
#: directory is not ours, or the file is a mount point (as ``/etc/hosts`` is in a container).
_CANNOT_REPLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


def read(root: Root, path: str) -> bytes:
    """
    A regular file's contents.

    :raise FileError: if it cannot be read, is not a regular file, or has more than :data:`MAX_READ` bytes.
    """
    with told("open", path):
        # O_NONBLOCK, or opening a FIFO would wait for a writer that may never come.
        fd = root.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with told("read", path), open(fd, "rb") as file:
        info = os.fstat(fd)
        if modes.S_ISDIR(info.st_mode):
            raise FileError("read", path, "is a directory")
        if not modes.S_ISREG(info.st_mode):
            raise FileError("read", path, "not a regular file")
        data = file.read(MAX_READ + 1) if info.st_size <= MAX_READ else b""
    if info.st_size > MAX_READ or len(data) > MAX_READ:
        raise FileError("read", path, f"file too large: the limit is {MAX_READ} bytes")
    return data


def write(root: Root, path: str, content: str) -> None:
    """
    Replace a file's contents, or make a new one with mode 0644.

    A reader sees the old file or the new one, and a failure leaves the old one: the text goes to a temporary
    file beside it, which then takes its name, owner and mode. Where that cannot be done (see
    :data:`_CANNOT_REPLACE`) the file is overwritten in place.

    :raise FileError: if it cannot be written, or is there and is not a regular file.
    """
    data = content.encode("utf-8", "surrogateescape")
    # A link keeps pointing to the file.
    with told("open", path), root.parent(root.real(path)) as (directory, name):
        try:
            old = os.lstat(name, dir_fd=directory)
        except FileNotFoundError:
            old = None
        if old is not None and modes.S_ISLNK(old.st_mode):
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
        if path.endswith("/") or (old is not None and modes.S_ISDIR(old.st_mode)):
            raise FileError("open", path, "is a directory")
        if old is not None and not modes.S_ISREG(old.st_mode):
            raise FileError("open", path, "not a regular file")
        if old is not None and not os.access(name, os.W_OK, dir_fd=directory):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        try:
            _replace(directory, name, data, old, path)
        except OSError as error:
            if old is None or error.errno not in _CANNOT_REPLACE:
                raise
            fd = os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
            with open(fd, "r+b", buffering=0) as file, told("write", path):
                _write_all(fd, data)
                file.truncate()


def _replace(directory: int, name: bytes, data: bytes, old: os.stat_result | None, path: str) -> None:
    temporary = f".sandboxd-{secrets.token_hex(8)}.tmp"
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=directory)
    try:
        try:
            with told("write", path):
                _write_all(fd, data)
            if old is not None and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                os.fchown(fd, old.st_uid, old.st_gid)
            os.fchmod(fd, 0o644 if old is None else modes.S_IMODE(old.st_mode))
        finally:
            os.close(fd)
        os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
        raise


def _write_all(fd: int, data: bytes) -> None:
    left = memoryview(data)
    while left:
        left = left[os.write(fd, left) :]


def delete(root: Root, path: str) -> None:
    """
    Remove a file, a link, or an empty directory.

    :raise FileError: if it cannot be removed.
    """
    with told("remove", path), root.parent(path) as (directory, name):
        if modes.S_ISDIR(os.lstat(name, dir_fd=directory).st_mode):
            os.rmdir(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)


def delete_tree(root: Root, path: str) -> None:
    """
    Remove whatever is there, as ``rm -rf`` does; nothing there is no error. Links are not followed.

    :raise FileError: if something cannot be removed, or if it is the root directory.
    """
    with told("remove", path):
        try:
            with root.parent(path) as (directory, name):
                remove_tree(directory, name)
        except FileNotFoundError:
            return
        except RootItself:
            raise FileError("remove", path, "the root directory is never removed") from None


def make_directories(root: Root, path: str) -> None:
    """
    Make a directory, mode 0755, and those above it; one that is there is no error.

    :raise FileError: if it cannot be made, or if something else is there.
    """
    with told("mkdir", path):
        root.make_directories(path)


def names(root: Root, path: str) -> list[str]:
    """
    The names in a directory, sorted; what is not UTF-8 in them becomes U+FFFD.

    :raise FileError: if it cannot be read.
    """
    with told("open", path):
        fd = root.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return sorted(os.fsencode(name).decode("utf-8", "replace") for name in os.listdir(fd))
        finally:
            os.close(fd)


def stat(root: Root, path: str) -> dict[str, object]:
    """
    What is known of a file: ``name``, ``is_dir``, ``size`` (bytes), ``mod_time`` (RFC 3339), ``mode`` (as ``ls``).

    :raise FileError: if there is none.
    """
    with told("stat", path):
        info = root.stat(path)
    changed = datetime.fromtimestamp(min(info.st_mtime, _LAST_SECOND), timezone.utc)
    return {
        "name": os.path.basename(root.absolute(path)) or "/",
        "is_dir": modes.S_ISDIR(info.st_mode),
        "size": info.st_size,
        "mod_time": changed.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "mode": modes.filemode(info.st_mode),
    }
