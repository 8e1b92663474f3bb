"""
Reads of small files on the reactor's thread, where the kernel answers from its caches and so cannot block.

A thread takes longer to hand a small file over than the kernel takes to copy it. So a path is resolved from the
kernel's cache alone (openat2(2), ``RESOLVE_CACHED``), and a file is read only if it is on a file system of
:data:`LOCAL` and its pages are in memory (preadv2(2), ``RWF_NOWAIT``; mincore(2) where a file system has no such
reads). Whatever is not so is left to a thread.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat as modes
import struct

from sandboxd.files.mounts import Mounts
from sandboxd.files.root import Root

#: Most bytes of a file that is read so.
LARGEST = 64 * 1024

#: File systems in which opening a file waits for no server, by their names in proc_pid_mountinfo(5).
LOCAL = frozenset((b"ext2", b"ext3", b"ext4", b"xfs", b"btrfs", b"tmpfs", b"overlay"))

#: Errors of file systems without ``RWF_NOWAIT``; there mincore(2) is asked first.
_WITHOUT_NOWAIT = (errno.EOPNOTSUPP, errno.EINVAL)

# From <linux/stat.h> and <linux/fcntl.h>.
_AT_EMPTY_PATH = 0x1000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_TYPE_AND_SIZE = 0x0201
_MODE_AND_SIZE = struct.Struct("=28xH10xQ88xII")

_RESOLVE_CACHED = 0x20

_PAGE = mmap.PAGESIZE

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]

#: Written to by statx(2), which fills 256 bytes. The reactor has one thread, so one buffer does.
_buffer = ctypes.create_string_buffer(256)


class CachedReader:
    """
    A reader of small files that are in the page cache, and of directories that are in the kernel's.

    :param mounts: knows the file systems by their devices.
    """

    def __init__(self, root: Root, mounts: Mounts) -> None:
        self._root = root
        self._mounts = mounts

    def read(self, path: str) -> bytes | None:
        """
        Return a file's contents, or None if only a thread can read it. An error is None too: the thread will meet it
        again.

        Does not block.
        """
        try:
            fd = self._root.open_cached(path, os.O_PATH, _RESOLVE_CACHED)
        except (OSError, ValueError):
            return None
        try:
            size = self._size(fd)
            return None if size is None else self._read(fd, size)
        except OSError:
            return None
        finally:
            os.close(fd)

    def open_directory(self, path: str) -> int | None:
        """
        Return a descriptor (``O_PATH``) of a directory in which a process can begin to work without a wait; None if
        that is for another process to try, or if there is a root: it confines no commands.

        Does not block.
        """
        if self._root.confined:
            return None
        try:
            fd = self._root.open_cached(path, os.O_PATH | os.O_DIRECTORY, _RESOLVE_CACHED)
        except (OSError, ValueError):
            return None
        if self._local(fd) is None:
            os.close(fd)
            return None
        return fd

    def is_directory(self, path: str) -> bool:
        """Return whether :meth:`open_directory` would return one. Does not block."""
        fd = self.open_directory(path)
        if fd is not None:
            os.close(fd)
        return fd is not None

    def _size(self, fd: int) -> int | None:
        """Return the size of a small regular file on a local file system; None for anything else."""
        found = self._local(fd)
        if found is None or not modes.S_ISREG(found[0]):
            return None
        return found[1] if 0 < found[1] <= LARGEST else None  # files of /proc have a size of 0

    def _local(self, fd: int) -> tuple[int, int] | None:
        """Return mode and size of a file on a local file system; None if it is on another."""
        # Without AT_STATX_DONT_SYNC the kernel might ask a server.
        flags = _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC
        if _libc.statx(fd, b"", flags, _STATX_TYPE_AND_SIZE, _buffer) != 0:
            return None
        mode, size, major, minor = _MODE_AND_SIZE.unpack_from(_buffer.raw)
        return (mode, size) if self._mounts.type_of(b"%d:%d" % (major, minor)) in LOCAL else None

    @staticmethod
    def _read(path_fd: int, size: int) -> bytes | None:
        fd = os.open(f"/proc/self/fd/{path_fd}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            data = bytearray(size + 1)
            try:
                done = os.preadv(fd, [data], 0, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno not in _WITHOUT_NOWAIT or not _is_in_memory(fd, size):
                    return None
                done = os.preadv(fd, [data], 0)
            # A page that is missing cuts a read short, and so does a file that has become shorter.
            return bytes(data[:done]) if done == size else None
        finally:
            os.close(fd)


def _is_in_memory(fd: int, size: int) -> bool:
    """Return whether all pages of a file are in the page cache, as far as this process may know."""
    address = _libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        return False
    try:
        pages = ctypes.create_string_buffer((size + _PAGE - 1) // _PAGE)
        return _libc.mincore(address, size, pages) == 0 and all(page & 1 for page in pages.raw)
    finally:
        _libc.munmap(address, size)
