"""Operations on whole files and directories: read, write, append, delete, make, list names, stat, touch."""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import datetime, timezone
from time import time_ns
from typing import TypedDict

from sandboxd.files.errors import FileError, RootItself, os_errors
from sandboxd.files.kernel_files import is_kernel_file
from sandboxd.files.renames import make_parents, name_lock, target_lock
from sandboxd.files.root import Root
from sandboxd.files.temporary_names import temporary_for
from sandboxd.files.upload import Check, Patch, Replacement, Upload
from sandboxd.files.walk import remove_tree
from sandboxd.reactor.timestamps import rfc3339

#: Most bytes that :func:`read` takes into memory.
MAX_READ = 64 * 1024 * 1024

#: Bytes up to which a file is written in the short way.
SMALL = 64 * 1024

#: Bytes of which a file is read at a time if its size is not known.
_PIECE = 64 * 1024

#: Why a file that can be written may have no room for a temporary one beside it, or cannot be replaced: the
#: directory is not ours, or the file is a mount point (as ``/etc/hosts`` is in a container).
_CANNOT_REPLACE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EBUSY, errno.EXDEV)


def read(root: Root, path: str) -> bytes:
    """
    Return the contents of a regular file.

    :raise FileError: if it cannot be read, is not a regular file, or has more than :data:`MAX_READ` bytes.
    """
    fd = open_regular(root, path)
    with os_errors("read", path), open(fd, "rb"):
        size = os.fstat(fd).st_size
        data = read_all(fd, size) if size <= MAX_READ else None
    if data is None:
        raise FileError("read", path, f"file too large: the limit is {MAX_READ} bytes")
    return data


def open_regular(root: Root, path: str) -> int:
    """
    Open a regular file to read, and return its descriptor.

    :raise FileError: if it cannot be read, or is not a regular file.
    """
    with os_errors("open", path):
        # O_NONBLOCK, or opening a FIFO would wait for a writer that may never come.
        fd = root.open(path, os.O_RDONLY | os.O_NONBLOCK)
    mode = os.fstat(fd).st_mode
    if modes.S_ISREG(mode):
        return fd
    os.close(fd)
    raise FileError("read", path, "is a directory" if modes.S_ISDIR(mode) else "not a regular file")


def read_all(fd: int, size: int) -> bytes | None:
    """
    Return a file's contents from its current offset on; None if they are more than :data:`MAX_READ` bytes.

    Files of /proc and /sys have a size of 0 or of a page whatever is in them, and refuse large reads.

    :param size: what stat(2) says of its size, in bytes.
    :raise OSError: if it cannot be read.
    """
    pieces: list[bytes] = []
    total = 0
    while piece := os.read(fd, max(size + 1 - total, _PIECE)):
        pieces.append(piece)
        total += len(piece)
        if total > MAX_READ:
            return None
    return b"".join(pieces)


def write(root: Root, path: str, content: str | Callable[[], Iterable[bytes]]) -> None:
    """
    Replace a file's contents atomically, or create a file with mode 0644.

    A reader sees the old file or the new one, and a failure leaves the old one: the text goes to a temporary
    file beside it, which then takes its name, owner and mode. Where that cannot be done (see
    :data:`_CANNOT_REPLACE`) the file is overwritten in place. Devices, and files of the kernel's own file systems such
    as /proc and /sys, are always written to, with one write(2), and never replaced.

    :param content: text, or what returns the bytes in pieces each time it is called; what that raises ends it.
    :raise FileError: if it cannot be written, or is there and is neither a regular file nor a device.
    """
    if isinstance(content, str):
        data = content.encode("utf-8", "surrogateescape")
        if len(data) <= SMALL and _write_small(root, path, data):
            return
        pieces: Callable[[], Iterable[bytes]] = lambda: (data,)  # noqa: E731
    else:
        pieces = content
    if _is_written_in_place(root, path):
        _write_in_place(root, path, pieces())
        return
    try:
        _write(Replacement(root, path, lambda old: None, durable=False), pieces())
    except FileError as error:
        if error.errno not in _CANNOT_REPLACE or not _is_file(root, path):
            raise
        size = sum(map(len, pieces()))
        _write(Patch(root, path, lambda old: None, offset=0, size=size, durable=False), pieces())


def _write_small(root: Root, path: str, data: bytes) -> bool:
    """
    Write a small file like :func:`write`, with as few system calls as possible.

    The temporary file has a name from the start: that takes fewer system calls than one without (``O_TMPFILE``). It is
    the same name each time, so that what a killed daemon leaves is gone after the next write.

    :return: whether it was written; if not, nothing has changed, and the long way is to be taken.
    """
    if path.endswith("/"):
        return False
    try:
        with root.parent(path) as (directory, name):
            return _put_small(directory, name, data)
    except (OSError, ValueError):
        return False


def _put_small(directory: int, name: bytes, data: bytes) -> bool:
    if os.fstat(directory).st_mode & modes.S_ISGID:  # which would give the new file another group
        return False
    with name_lock(directory, name):
        mode = 0o644
        with suppress(FileNotFoundError):
            old = os.lstat(name, dir_fd=directory)
            if not modes.S_ISREG(old.st_mode) or (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                return False
            if not os.access(name, os.W_OK, dir_fd=directory):
                return False
            mode = modes.S_IMODE(old.st_mode)
        temporary = temporary_for(name)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            fd = os.open(temporary, flags, 0o600, dir_fd=directory)
        except FileExistsError:
            os.unlink(temporary, dir_fd=directory)
            return False
        try:
            os.fchmod(fd, mode)
            if os.write(fd, data) == len(data):
                os.rename(temporary, name, src_dir_fd=directory, dst_dir_fd=directory)
                return True
        except OSError:
            pass  # the long way will meet it again, and say what it is
        finally:
            os.close(fd)
        with suppress(OSError):
            os.unlink(temporary, dir_fd=directory)
    return False


def _is_written_in_place(root: Root, path: str) -> bool:
    """Return whether a path leads to a device, or to a file of the kernel's, where write(2) is a request."""
    try:
        fd = root.open(path, os.O_PATH)
    except (OSError, ValueError):
        return False
    try:
        mode = os.fstat(fd).st_mode
        return modes.S_ISCHR(mode) or modes.S_ISBLK(mode) or (modes.S_ISREG(mode) and is_kernel_file(fd))
    finally:
        os.close(fd)


def _write_in_place(root: Root, path: str, pieces: Iterable[bytes]) -> None:
    with os_errors("open", path):
        fd = root.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_NOCTTY)
    with os_errors("write", path):
        try:
            for piece in pieces:
                left = memoryview(piece)
                while True:
                    left = left[os.write(fd, left) :]
                    if not left:
                        break
        finally:
            os.close(fd)


def _write(upload: Upload, pieces: Iterable[bytes]) -> None:
    try:
        upload.open(None)
        for piece in pieces:
            upload.write(piece)
        upload.commit()
    finally:
        upload.close()


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
    with os_errors("remove", path), root.parent(path) as (directory, name), name_lock(directory, name):
        info = os.lstat(name, dir_fd=directory)
        check(info)
        if modes.S_ISDIR(info.st_mode):
            os.rmdir(name, dir_fd=directory)
        else:
            os.unlink(name, dir_fd=directory)


def delete_tree(root: Root, path: str) -> None:
    """
    Remove a file or a directory tree, as ``rm -rf`` does; it is no error if there is none. Links are not followed.

    :raise FileError: if something cannot be removed, or if it is the root directory, the daemon's working directory, or
        an ancestor of that.
    """
    with os_errors("remove", path):
        try:
            with root.parent(path) as (directory, name):
                if root.holds_working_directory(path):
                    raise FileError("remove", path, "the daemon's working directory is in it, and is never removed")
                remove_tree(directory, name)
        except FileNotFoundError:
            return
        except RootItself:
            raise FileError("remove", path, "the root directory is never removed") from None


def make_directories(root: Root, path: str) -> None:
    """
    Make a directory with mode 0755, and those above it; it is no error if it exists.

    :raise FileError: if it cannot be made, or if something else is there.
    """
    with os_errors("mkdir", path):
        root.make_directories(path)


def names(root: Root, path: str) -> list[str]:
    """
    Return the names in a directory, sorted; bytes that are not UTF-8 become U+FFFD.

    :raise FileError: if it cannot be read.
    """
    with os_errors("open", path):
        fd = root.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            return sorted(os.fsencode(name).decode("utf-8", "replace") for name in os.listdir(fd))
        finally:
            os.close(fd)


class FileStat(TypedDict):
    """A file's name, size in bytes, time of the last change (RFC 3339), and mode as ``ls`` shows it."""

    name: str
    is_dir: bool
    size: int
    mod_time: str
    mode: str


def exists(root: Root, path: str) -> bool:
    """
    Return whether a path leads to anything.

    :raise FileError: if that cannot be seen, or is not in the root.
    """
    with os_errors("stat", path):
        try:
            root.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def stat(root: Root, path: str) -> FileStat:
    """
    Describe a file.

    :raise FileError: if there is no such file.
    """
    with os_errors("stat", path):
        info = root.stat(path)
    return {
        "name": os.path.basename(root.absolute(path)) or "/",
        "is_dir": modes.S_ISDIR(info.st_mode),
        "size": info.st_size,
        "mod_time": rfc3339(info.st_mtime),
        "mode": modes.filemode(info.st_mode),
    }


def append(root: Root, path: str, data: bytes, parents: bool = False) -> os.stat_result:
    """
    Append to a file with one write(2), which the writes of others precede or follow.

    :param parents: whether to make the directories above it.
    :return: the stat of the file afterwards.
    :raise FileError: if it cannot be written, or not all of it.
    """
    with os_errors("append", path):
        if parents:
            make_parents(root, path)
        # Without the lock, an edit could replace the file after it was opened, and what is appended would be lost.
        with target_lock(root, path):
            fd = _open(root, path, os.O_WRONLY | os.O_APPEND)
            try:
                _regular(fd)
                written = os.write(fd, data)
                if written < len(data):
                    raise OSError(errno.ENOSPC, f"only {written} of {len(data)} bytes were written: no space left")
                return os.fstat(fd)
            finally:
                os.close(fd)


def touch(root: Root, path: str, mtime: datetime | None, parents: bool = False) -> os.stat_result:
    """
    Set a file's time to now or to another, and create it if it does not exist.

    :param mtime: the time of its last change.
    :param parents: whether to make the directories above it.
    :return: the stat of the file afterwards.
    :raise FileError: if it cannot be.
    """
    with os_errors("touch", path):
        if parents:
            make_parents(root, path)
        try:
            fd = root.open(path, os.O_PATH)
        except FileNotFoundError:
            fd = _open(root, path, os.O_WRONLY)
        try:
            time = time_ns() if mtime is None else _nanoseconds(mtime)
            os.utime(f"/proc/self/fd/{fd}", ns=(time, time))
            return os.fstat(fd)
        finally:
            os.close(fd)


def _open(root: Root, path: str, flags: int) -> int:
    """Open a file, or create it with mode 0644 whatever the umask is."""
    while True:
        try:
            # O_NONBLOCK, or opening a FIFO would wait for a reader that may never come.
            return root.open(path, flags | os.O_NONBLOCK)
        except FileNotFoundError:
            pass
        try:
            fd = root.open(path, flags | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            if modes.S_ISLNK(root.stat(path, follow=False).st_mode):
                return root.open(path, flags | os.O_CREAT | os.O_NONBLOCK, 0o644)  # a link to what is not there yet
            continue
        os.fchmod(fd, 0o644)
        return fd


def _regular(fd: int) -> None:
    info = os.fstat(fd)
    if not modes.S_ISREG(info.st_mode):
        raise OSError(errno.EEXIST, "not a regular file")


def _nanoseconds(time: datetime) -> int:
    since = time - datetime(1970, 1, 1, tzinfo=timezone.utc)  # in UTC it may be before the year 1, or after 9999
    return (since.days * 86400 + since.seconds) * 10**9 + since.microseconds * 1000
