"""File operations of the contract: small files of text, directories, names."""

from __future__ import annotations

import errno
import os
import stat as modes
from datetime import datetime, timezone

from sandboxd.files.errors import FileError, RootItself, told
from sandboxd.files.removal import remove_tree
from sandboxd.files.root import Root
from sandboxd.files.swaps import swapping
from sandboxd.files.upload import Check, Incoming, Patch, Replacement

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
    try:
        _write(Replacement(root, path, lambda old: None, durable=False), data)
    except FileError as error:
        if error.errno not in _CANNOT_REPLACE or not _is_file(root, path):
            raise
        _write(Patch(root, path, lambda old: None, offset=0, size=len(data), durable=False), data)


def _write(upload: Incoming, data: bytes) -> None:
    try:
        upload.open(None)
        upload.write(data)
        upload.commit()
    finally:
        upload.discard()


def _is_file(root: Root, path: str) -> bool:
    try:
        return modes.S_ISREG(root.stat(path).st_mode)
    except OSError:
        return False


def delete(root: Root, path: str, check: Check = lambda info: None) -> None:
    """
    Remove a file, a link, or an empty directory.

    :param check: whether it may be.
    :raise FileError: if it cannot be removed.
    """
    with told("remove", path), root.parent(path) as (directory, name), swapping(directory, name):
        info = os.lstat(name, dir_fd=directory)
        check(info)
        if modes.S_ISDIR(info.st_mode):
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
