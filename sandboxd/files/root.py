"""
Resolution of the paths of file requests: in the whole file system, or confined to one directory.

A check of a path, however clever, races with a process that swaps a directory for a link. Here the kernel does it while
it opens: openat2(2) with ``RESOLVE_BENEATH``. What is not an open goes through the descriptor of a directory that was
opened so, and a name without a slash.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat as modes
from collections.abc import Iterator
from contextlib import contextmanager

from sandboxd.files.errors import EXHAUSTED, OutsideRoot, RootItself

#: The system call's number, on all architectures.
_OPENAT2 = 437

# From <linux/openat2.h>.
_NO_MAGICLINKS = 0x02
_NO_SYMLINKS = 0x04
_BENEATH = 0x08

_AT_FDCWD = -100

#: Links on the way of one path, as many as the kernel follows.
_MAX_LINKS = 40

#: Tries of an openat2(2) that concurrent renames disturb (``EAGAIN``).
_TRIES = 100

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class _OpenHow(ctypes.Structure):
    _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))


def _openat2(dir_fd: int, path: bytes, flags: int, mode: int, resolve: int, tries: int = _TRIES) -> int:
    how = _OpenHow(flags, mode, resolve)
    for _ in range(tries):
        fd: int = _libc.syscall(
            ctypes.c_long(_OPENAT2),
            ctypes.c_long(dir_fd),
            ctypes.c_char_p(path),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if fd >= 0:
            return fd
        code = ctypes.get_errno()
        if code not in (errno.EAGAIN, errno.EINTR):
            break
    raise OSError(code, os.strerror(code))


class Root:
    """
    The directory that confines the paths of file requests; no link and no race leads out of it. Or none, for the whole
    file system.

    Paths mean what they mean to commands: an absolute one must lie in the directory, and a relative one starts there,
    or at the daemon's working directory if there is no root. Relative links are followed as far as they stay inside;
    absolute ones if their text begins with the directory's path.

    :param directory: the root, or None for none.
    :raise OSError: if it is not a directory, or the kernel is older than 5.6 (or its seccomp filter is) and has no
        openat2(2).
    :ivar confined: whether there is one.
    :ivar directory: its path, without links.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.confined = directory is not None
        self.directory: str | None = None
        if directory is not None:
            self.directory = os.path.realpath(directory)
            self._fd = os.open(self.directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            #: Its path in components: without links, and as it was given.
            self._names = [_parts(os.fsencode(path)) for path in (self.directory, os.path.abspath(directory))]
            os.close(self._open(b".", os.O_PATH, 0))

    def open(self, path: str | bytes, flags: int, mode: int = 0) -> int:
        """
        Open a file. A link in the last place is followed, unless ``flags`` have ``O_NOFOLLOW``.

        :param flags: as in open(2); ``O_CLOEXEC`` is added.
        :param mode: of a file that is made, less the umask.
        :raise OSError: if it cannot be; :class:`OutsideRoot` if it is not in the root.
        """
        if not self.confined:
            return os.open(path, flags | os.O_CLOEXEC, mode)
        inner = self._inner(os.fsencode(path))
        try:
            return self._open(inner, flags, mode)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        # Out of the root, or by an absolute link that leads into it, which openat2(2) does not follow.
        resolved = self._resolve(inner, follow=not flags & os.O_NOFOLLOW) + inner[len(inner.rstrip(b"/")) :]
        return self._open(resolved, flags, mode, _BENEATH | _NO_SYMLINKS)

    def open_cached(self, path: str, flags: int, cached: int) -> int:
        """
        Open a file if the kernel can resolve its path from caches alone.

        :param cached: ``RESOLVE_CACHED``.
        :raise OSError: ``EAGAIN`` if it cannot; else as :meth:`open` has it, except that links out of the root and back
            are not followed.
        """
        if not self.confined:
            return _openat2(_AT_FDCWD, os.fsencode(path), flags | os.O_CLOEXEC, 0, cached, tries=1)
        resolve = _BENEATH | _NO_MAGICLINKS | cached
        return _openat2(self._fd, self._inner(os.fsencode(path)), flags | os.O_CLOEXEC, 0, resolve, tries=1)

    @contextmanager
    def parent(self, path: str | bytes) -> Iterator[tuple[int, bytes]]:
        """
        Open the parent directory of a path, and return it with the path's last component, which need not exist. A link
        there is not followed. For unlink, rename, mkdir and the like, with ``dir_fd=``.

        :return: an open descriptor (``O_PATH``), and a name without a slash.
        :raise OSError: if there is no such directory; :class:`OutsideRoot` if it is not in the root;
            :class:`RootItself` if the path is that of the root.
        """
        name = self._inner(os.fsencode(path)) if self.confined else os.fsencode(path)
        above, _, last = name.rstrip(b"/").rpartition(b"/")
        if last in (b"", b".", b".."):
            name = self.real(path)
            if self._is_root(name):
                raise RootItself
            above, _, last = name.rpartition(b"/")
        fd = self.open(above or (b"/" if name.startswith(b"/") else b"."), os.O_PATH | os.O_DIRECTORY)
        try:
            if name.endswith(b"/") and _is_link(fd, last):
                # "link/" is what the link leads to, which has its name elsewhere.
                if self._is_root(self.real(path)):
                    raise RootItself
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
            yield fd, last
        finally:
            os.close(fd)

    def real(self, path: str | bytes) -> bytes:
        """
        Return a path's absolute form without links. The last component need not exist.

        :raise OSError: in a root, if a directory on the way is not there; :class:`OutsideRoot` if it leads out.
        """
        name = os.fsencode(path)
        if self.directory is None:
            return os.path.realpath(os.path.join(os.fsencode(working_directory()), name))
        resolved = self._resolve(self._inner(name), follow=True)
        return os.fsencode(self.directory) if resolved == b"." else os.path.join(os.fsencode(self.directory), resolved)

    def absolute(self, path: str) -> str:
        """Return a path's absolute form, by its text alone."""
        path = os.path.join(self.directory or "", path)
        return os.path.abspath(path) if path.startswith("/") else os.path.join(working_directory(), path)

    def holds_working_directory(self, path: str | bytes) -> bool:
        """
        Return whether a path is the daemon's working directory, or an ancestor of it; a link in the last place is
        neither.
        """
        try:
            with self.parent(path) as (directory, name):
                if _is_link(directory, name):
                    return False
            real = self.real(path)
            return (os.fsencode(os.getcwd()) + b"/").startswith(real.rstrip(b"/") + b"/")
        except OSError:
            return False

    def stat(self, path: str | bytes, *, follow: bool = True) -> os.stat_result:
        """
        Return the stat of a file.

        :param follow: whether to follow a link in the last place.
        :raise OSError: if there is none; :class:`OutsideRoot` if it is not in the root.
        """
        if not self.confined:
            return os.stat(path, follow_symlinks=follow)
        fd = self.open(path, os.O_PATH if follow else os.O_PATH | os.O_NOFOLLOW)
        try:
            return os.fstat(fd)
        finally:
            os.close(fd)

    def make_directories(self, path: str | bytes, mode: int = 0o755) -> None:
        """
        Make a directory, and those above it; it is no error if it exists.

        :raise OSError: if one cannot be made, or something else is there; :class:`OutsideRoot` if it is not in the
            root.
        """
        missing = [os.fsencode(path)]
        while not self.is_directory(missing[-1]):
            above = os.path.dirname(missing[-1].rstrip(b"/"))
            if not above or above == missing[-1]:
                break
            missing.append(above)
        for directory in reversed(missing):
            if not self.is_directory(directory):
                try:
                    with self.parent(directory) as (fd, name):
                        os.mkdir(name, mode, dir_fd=fd)
                except FileExistsError:
                    try:
                        os.close(self.open(directory, os.O_PATH | os.O_DIRECTORY))
                    except FileNotFoundError:  # a link to nothing
                        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None

    def is_directory(self, path: str | bytes) -> bool:
        """
        Return whether a path is a directory, inside the root if there is one.

        :raise OSError: if that cannot be found out for lack of resources.
        """
        try:
            os.close(self.open(path, os.O_PATH | os.O_DIRECTORY))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in EXHAUSTED:
                raise
            return False
        return True

    def _is_root(self, real: bytes) -> bool:
        return real == os.fsencode(self.directory or "/")

    def _open(self, inner: bytes, flags: int, mode: int, resolve: int = _BENEATH | _NO_MAGICLINKS) -> int:
        # A mode without a file to make is EINVAL here, where open(2) overlooks it.
        makes = flags & os.O_CREAT or flags & os.O_TMPFILE == os.O_TMPFILE
        return _openat2(self._fd, inner, flags | os.O_CLOEXEC, mode & 0o7777 if makes else 0, resolve)

    def _inner(self, path: bytes) -> bytes:
        """Return a path relative to the root directory, with links and dots still in it."""
        parts = _parts(path)
        if path.startswith(b"/"):
            for name in self._names:
                if parts[: len(name)] == name:
                    parts = parts[len(name) :]
                    break
            else:
                raise OutsideRoot(self.directory or "")
        return (b"/".join(parts) or b".") + (b"/" if path.endswith((b"/", b"/.")) else b"")

    def _resolve(self, inner: bytes, follow: bool) -> bytes:
        """
        Resolve a path link by link, as it is now; the kernel checks it again when it is opened.

        :param follow: whether to follow a link in the last place.
        """
        left = _parts(inner)[::-1]
        done: list[bytes] = []
        links = 0
        while left:
            part = left.pop()
            if part == b"..":
                if not done:
                    raise OutsideRoot(self.directory or "")
                done.pop()
                continue
            try:
                target = None if not left and not follow else self._link(b"/".join([*done, part]))
            except FileNotFoundError:
                if left:
                    raise
                target = None
            if target is None:
                done.append(part)
                continue
            links += 1
            if links > _MAX_LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
            if target.startswith(b"/"):
                target = self._inner(target)
                done = []
            left += _parts(target)[::-1]
        return b"/".join(done) or b"."

    def _link(self, inner: bytes) -> bytes | None:
        """Return the target of a symbolic link, or None if the path is not one."""
        fd = self._open(inner, os.O_PATH | os.O_NOFOLLOW, 0, _BENEATH | _NO_SYMLINKS)
        try:
            return os.readlink(b"", dir_fd=fd) if modes.S_ISLNK(os.fstat(fd).st_mode) else None
        finally:
            os.close(fd)


def working_directory() -> str:
    """
    Return the daemon's working directory; ``/`` if it was removed.

    :func:`os.getcwd` fails then, also where only absolute paths are asked for.
    """
    try:
        return os.getcwd()
    except OSError:
        return "/"


def _parts(path: bytes) -> list[bytes]:
    return [part for part in path.split(b"/") if part not in (b"", b".")]


def _is_link(dir_fd: int, name: bytes) -> bool:
    try:
        return modes.S_ISLNK(os.lstat(name, dir_fd=dir_fd).st_mode)
    except FileNotFoundError:
        return False
