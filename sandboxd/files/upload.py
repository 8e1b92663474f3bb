"""
Uploads: files that are written as they arrive, and replaced atomically. They block: call them in a thread.

The steps are those of :class:`~sandboxd.files.transfer.Transfer`.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat as modes
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import NamedTuple

from sandboxd.files.digests import Digests
from sandboxd.files.errors import os_errors
from sandboxd.files.permissions import Owner
from sandboxd.files.renames import name_lock, target_lock
from sandboxd.files.root import Root
from sandboxd.files.temporary_names import PREFIX, lock_temporary, temporary_for, temporary_name
from sandboxd.files.transfer import BriefWait, Transfer

#: Called with the stat of the existing file (None if absent); raises if it is not to be changed.
Check = Callable[["os.stat_result | None"], None]

#: Seconds since its last change after which a temporary file that no process has locked is removed, as a killed daemon
#: left it. The change is that of the inode (``st_ctime``): the copy of an old file has an old ``st_mtime``.
STALE = 60

#: Bytes that are taken from a socket by one call of :meth:`Upload.receive`, at most.
STEP = 8 * 1024 * 1024

#: Bytes that the pipe between a socket and a file is made to hold.
PIPE_SIZE = 1024 * 1024

#: Errors of file systems without ``O_TMPFILE``.
NO_TMPFILE = (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.ENOENT)


class UploadResult(NamedTuple):
    """
    The result of an upload.

    :ivar created: whether there was no such file before.
    :ivar info: its stat.
    """

    created: bool
    info: os.stat_result


class Corrupt(Exception):
    """A body differs from its ``Content-Digest``."""


class Upload(Transfer):
    """
    The base of uploads to a file.

    :param path: the file.
    :param check: whether it may be changed; asked at the beginning, and once more at the end.
    :param mode: its permissions; None to leave them, or for 0644 if it is new.
    :param owner: its new owner; None to leave it.
    :param digests: of what arrives.
    :param durable: whether it is to outlive a power failure, once it is committed.
    :ivar over: whether it is committed or was closed.
    :ivar direct: whether the kernel can write it by itself: no digest of it is asked for.
    """

    _fd: int  #: the file; set by :meth:`_open`
    _offset: int | None = None  #: where the next byte belongs; None for behind the last one

    def __init__(
        self,
        root: Root,
        path: str,
        check: Check,
        mode: int | None = None,
        owner: Owner | None = None,
        digests: Digests | None = None,
        *,
        durable: bool = True,
    ) -> None:
        super().__init__()
        self._root = root
        self._path = path
        self._check = check
        self._mode = mode
        self._owner = owner
        self._digests = digests or Digests(None)
        self.direct = not self._digests.any
        self._pipe: tuple[int, int] | None = None
        self._durable = durable
        self._resources = ExitStack()

    def open(self, length: int | None) -> None:
        """
        Prepare to write.

        :param length: bytes that will come, if that is known.
        :raise FileError: if it cannot be written, or there is no room for it.
        """
        with os_errors("open", self._path), self._step():
            self._open(length)

    def write(self, data: bytes) -> None:
        """
        Write more of the body.

        :raise FileError: if it cannot be written.
        """
        with os_errors("write", self._path), self._step():
            self._digests.update(data)
            self._write(data)

    def receive(self, socket: int, most: int, data: bytes = b"") -> int:
        """
        Write what comes from a socket, without a copy of it in this process (splice(2)).

        :param socket: a non-blocking socket's descriptor, which is closed.
        :param data: what has come before, to be written first.
        :return: how many bytes, at most ``most`` and :data:`STEP`: as long as they come without a pause. 0 if none can
            be had so, whatever the reason.
        :raise FileError: if they cannot be written, or it was closed.
        """
        try:
            with os_errors("write", self._path), self._step():
                self._write(data)
                return self._receive(socket, min(most, STEP))
        finally:
            os.close(socket)

    def _receive(self, socket: int, most: int) -> int:
        if self._pipe is None:
            self._pipe = os.pipe2(os.O_CLOEXEC)
            for end in self._pipe:
                self._resources.callback(os.close, end)
            with suppress(OSError):  # refused when this user's pipes hold too much already; see pipe(7)
                fcntl.fcntl(self._pipe[0], fcntl.F_SETPIPE_SZ, PIPE_SIZE)
        wait = BriefWait(socket, select.POLLIN)
        done = 0
        while done < most and wait.ready():
            try:
                count = os.splice(socket, self._pipe[1], min(most - done, PIPE_SIZE), flags=os.SPLICE_F_NONBLOCK)
            except OSError:  # of the socket: its reader in the reactor will meet it again
                break
            if count == 0:
                break
            self._drain(self._pipe[0], count)
            done += count
        return done

    def _drain(self, pipe: int, count: int) -> None:
        """Move what is in a pipe to the file."""
        while count:
            try:
                moved = os.splice(pipe, self._fd, count, offset_dst=self._offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._write(data := os.read(pipe, count))  # the file system knows no splice
                count -= len(data)
                continue
            count -= moved
            if self._offset is not None:
                self._offset += moved

    def commit(self) -> UploadResult:
        """
        Check the digests, and put the file in place.

        :raise Corrupt: if it is not what its digest says.
        :raise FileError: if it cannot be.
        """
        with os_errors("write", self._path), self._step():
            mismatch = self._digests.mismatch()
            if mismatch is not None:
                raise Corrupt(mismatch)
            written = self._commit()
        self.close()
        return written

    def _close(self) -> None:
        """Release all resources, and remove the temporary file unless it was committed."""
        self._resources.close()

    @abstractmethod
    def _open(self, length: int | None) -> None: ...

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            done = os.write(self._fd, left) if self._offset is None else os.pwrite(self._fd, left, self._offset)
            left = left[done:]
            if self._offset is not None:
                self._offset += done

    @abstractmethod
    def _commit(self) -> UploadResult: ...


def _regular(info: os.stat_result) -> None:
    """
    Raise unless a stat is that of a regular file.

    :raise OSError: if it is something else.
    """
    if modes.S_ISDIR(info.st_mode):
        raise OSError(errno.EISDIR, "is a directory")
    if modes.S_ISLNK(info.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
    if not modes.S_ISREG(info.st_mode):
        raise OSError(errno.EEXIST, "not a regular file")


def _room(fd: int, needed: int) -> None:
    """
    Raise unless the file system has room.

    :raise OSError: ``ENOSPC`` if there is not.
    """
    disk = os.fstatvfs(fd)
    free = disk.f_bfree if os.geteuid() == 0 else disk.f_bavail
    if disk.f_blocks and needed > free * disk.f_frsize:
        raise OSError(errno.ENOSPC, f"no space left on device: {needed} bytes are needed, {free * disk.f_frsize} free")


class Replacement(Upload):
    """
    An upload of a whole file: a reader sees the old file, or all of the new one.

    It arrives in a file without a name (``O_TMPFILE``), which is gone with the daemon, however that ends. Where the
    file system has none, it has a name that begins with ``.sandboxd-``, and what a killed daemon has left of such is
    removed by the next upload into that directory.

    :param parents: whether to make the directories above it.
    """

    def __init__(
        self,
        root: Root,
        path: str,
        check: Check,
        mode: int | None = None,
        owner: Owner | None = None,
        digests: Digests | None = None,
        *,
        parents: bool = False,
        durable: bool = True,
    ) -> None:
        super().__init__(root, path, check, mode, owner, digests, durable=durable)
        self._parents = parents
        self._named: bytes | None = None

    def _open(self, length: int | None) -> None:
        if self._parents:
            self._root.make_directories(os.path.dirname(os.fsencode(self._path)) or b".")
        # A link keeps pointing to the file.
        target = self._root.parent(self._root.real(self._path))
        self._directory, self._name = self._resources.enter_context(target)
        if self._path.endswith("/"):
            raise OSError(errno.EISDIR, "is a directory")
        old = self._old()
        self._check(old)
        if old is not None and not os.access(self._name, os.W_OK, dir_fd=self._directory):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _room(self._directory, length or 0)
        self._fd = self._temporary()
        self._resources.callback(os.close, self._fd)

    def _old(self) -> os.stat_result | None:
        try:
            info = os.lstat(self._name, dir_fd=self._directory)
        except FileNotFoundError:
            return None
        _regular(info)
        return info

    def _temporary(self) -> int:
        try:
            return os.open(b".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=self._directory)
        except OSError as error:
            if error.errno not in NO_TMPFILE:
                raise
        _remove_stale(self._directory)
        self._named = os.fsencode(temporary_name())
        self._resources.callback(self._unlink, self._named)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        fd = os.open(self._named, flags, 0o600, dir_fd=self._directory)
        lock_temporary(fd)
        return fd

    def _unlink(self, name: bytes) -> None:
        with suppress(OSError):
            os.unlink(name, dir_fd=self._directory)

    def _commit(self) -> UploadResult:
        if self._durable:
            os.fsync(self._fd)
        with name_lock(self._directory, self._name):
            old = self._old()
            self._check(old)
            _set_owner_and_mode(self._fd, old, self._mode, self._owner)
            self._rename(old)
        if self._durable:
            _sync_directory(self._directory)
        return UploadResult(old is None, os.fstat(self._fd))

    def _rename(self, old: os.stat_result | None) -> None:
        if self._named is not None:
            os.rename(self._named, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
            return
        unnamed = f"/proc/self/fd/{self._fd}"
        if old is None:
            # Unlike a rename, this fails if a command has made one meanwhile.
            with suppress(FileExistsError):
                os.link(unnamed, self._name, dst_dir_fd=self._directory)
                return
            self._check(self._old())
        name = temporary_for(self._name)
        self._unlink(name)
        os.link(unnamed, name, dst_dir_fd=self._directory)
        try:
            os.rename(name, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            self._unlink(name)
            raise


class Patch(Upload):
    """
    An upload of a part of a file, written at its offset into an existing file or a new one.

    If the file is replaced or removed meanwhile, what was written is in no file any more, and the commit fails
    (``EBUSY``).

    :param offset: where the part begins, in bytes.
    :param size: bytes that the file has in the end; None for as many as it takes.
    """

    def __init__(
        self,
        root: Root,
        path: str,
        check: Check,
        mode: int | None = None,
        owner: Owner | None = None,
        digests: Digests | None = None,
        *,
        offset: int,
        size: int | None = None,
        durable: bool = True,
    ) -> None:
        super().__init__(root, path, check, mode, owner, digests, durable=durable)
        self._start = self._offset = offset
        self._size = size
        self._created = False

    def _open(self, length: int | None) -> None:
        try:
            old = self._root.stat(self._path)
            _regular(old)
        except FileNotFoundError:
            old = None
        self._check(old)
        self._created = old is None
        if old is None:
            with self._root.parent(self._root.real(self._path)) as (directory, _):
                _room(directory, self._start + (length or 0))
        flags = os.O_WRONLY | os.O_NONBLOCK | (os.O_CREAT if old is None else 0)
        self._fd = self._root.open(self._path, flags, 0o644)
        self._resources.callback(os.close, self._fd)
        info = os.fstat(self._fd)
        _regular(info)
        if self._created:
            os.fchmod(self._fd, 0o644)  # whatever the umask is
        _room(self._fd, max(0, self._start + (length or 0) - info.st_size))

    def _commit(self) -> UploadResult:
        # An edit that has read the file before the last write looks at its stat under the same lock: either it has
        # replaced the file by now, or it will notice that this upload has changed it.
        with self._file_lock():
            if self._size is not None and os.fstat(self._fd).st_size != self._size:
                os.ftruncate(self._fd, self._size)
            if self._owner is not None:
                os.fchown(self._fd, self._owner.uid, self._owner.gid)
            if self._mode is not None:
                os.fchmod(self._fd, self._mode)
        if self._durable:
            os.fsync(self._fd)
        return UploadResult(self._created, os.fstat(self._fd))

    @contextmanager
    def _file_lock(self) -> Iterator[None]:
        """
        Hold the lock of the file's name.

        :raise OSError: ``EBUSY`` if that leads to another file by now, or to none.
        """
        with ExitStack() as lock:
            try:
                lock.enter_context(target_lock(self._root, self._path))
                current: os.stat_result | None = self._root.stat(self._path)
            except (FileNotFoundError, NotADirectoryError):
                current = None
            if current is None or not os.path.samestat(current, os.fstat(self._fd)):
                raise OSError(errno.EBUSY, "it was replaced or removed during the upload; send it again")
            yield


def _set_owner_and_mode(fd: int, old: os.stat_result | None, mode: int | None, owner: Owner | None) -> None:
    """Give a new file owner and mode: those that are asked for, or those of the old file."""
    uid, gid = (-1, -1) if old is None else (old.st_uid, old.st_gid)
    if owner is not None:
        uid, gid = (owner.uid if owner.uid != -1 else uid), (owner.gid if owner.gid != -1 else gid)
    own = os.fstat(fd)
    if uid not in (-1, own.st_uid) or gid not in (-1, own.st_gid):
        os.fchown(fd, uid, gid)
    os.fchmod(fd, mode if mode is not None else 0o644 if old is None else modes.S_IMODE(old.st_mode))


def _sync_directory(directory: int) -> None:
    """Make a new name outlive a power failure (fsync(2) of the directory). One that cannot be read cannot be synced."""
    with suppress(PermissionError):
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _remove_stale(directory: int) -> None:
    """Remove the temporary files that a killed daemon's uploads have left in a directory."""
    with suppress(OSError):
        fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        try:
            names = [name for name in map(os.fsencode, os.listdir(fd)) if name.startswith(PREFIX)]
        finally:
            os.close(fd)
        for name in names:
            with suppress(OSError):
                fd = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if os.fstat(fd).st_ctime < time.time() - STALE:
                        os.unlink(name, dir_fd=directory)
                finally:
                    os.close(fd)
