"""
The unpacking of tar archives into a directory as they arrive. It blocks: call it in a thread.

Whatever an archive says, it writes below the directory that it is for, and nowhere else: names have no ``..`` and do
not begin with ``/``; every directory on the way is opened from the one above it, and no link is followed, whether it
came with the archive or was there; what a hard link leads to is found the same way.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sandboxd.files.archive.compression import MAGIC_SIZE, Decompressor, recognised
from sandboxd.files.archive.tar import Member, MemberType, Reader, Receiver, TarError
from sandboxd.files.errors import FileError, os_errors
from sandboxd.files.renames import name_lock
from sandboxd.files.root import Root
from sandboxd.files.temporary_names import lock_temporary, temporary_name
from sandboxd.files.transfer import Transfer
from sandboxd.files.upload import NO_TMPFILE
from sandboxd.files.walk import DirectoryTree

#: Members that an archive may have.
MAX_ENTRIES = 1_000_000

#: Bytes that a path may have: PATH_MAX less the NUL.
MAX_NAME = 4095

#: Names of what was left out that are remembered.
MAX_SKIPPED = 100

#: Bytes that the names of an archive's directories may have together.
MAX_DIRECTORIES = 64 * 1024 * 1024

#: Bytes that may come out of the decompression before others get their turn in the thread.
STEP = 32 * 1024 * 1024

#: Bytes that are a hole if they are zeros.
_HOLE = 4096


class TooMuch(Exception):
    """An archive exceeds a limit: too many entries, or too many bytes."""


class Unpacking(Transfer):
    """
    The unpacking of one archive.

    :param path: the directory that it is for.
    :param parents: whether to make it, and those above it.
    :param keep_owner: whether files get the owners that the archive names, by number; for root.
    :param max_size: bytes that its files may have together; None for as many as there is room for.
    :param max_entries: members that it may have.
    :ivar entries: members that were unpacked.
    :ivar size: bytes of their contents.
    :ivar skipped: names of members that were left out: devices, FIFOs, and what is unknown.
    :ivar skips: how many those are in all.
    """

    def __init__(
        self,
        root: Root,
        path: str,
        *,
        parents: bool = False,
        keep_owner: bool = False,
        max_size: int | None = None,
        max_entries: int = MAX_ENTRIES,
    ) -> None:
        super().__init__()
        self._root = root
        self._path = path
        self._parents = parents
        self._tree: _Tree | None = None
        self._keep_owner = keep_owner
        self._limits = max_size, max_entries
        self._reader: Reader | None = None
        self._decompressor: Decompressor | None = None
        self._head = b""
        self._pieces: Iterator[bytes] = iter(())

    def open(self) -> None:
        """
        Open the directory to unpack into.

        :raise FileError: if there is no such directory.
        """
        with os_errors("open", self._path), self._step():
            if self._parents:
                self._root.make_directories(self._path)
            top = self._root.open(self._path, os.O_RDONLY | os.O_DIRECTORY)
            self._tree = _Tree(top, self._keep_owner, *self._limits)
            self._reader = Reader(self._tree)

    def feed(self, data: bytes) -> bool:
        """
        Unpack more of the archive.

        :param data: nothing if this returned True.
        :return: whether to call again, with nothing: a little that came in may be a gigabyte that comes out.
        :raise FileError: if it cannot be unpacked.
        :raise TarError: if it is malformed, or would write elsewhere.
        :raise CompressionError: if it is damaged.
        :raise TooMuch: if it has more than it may.
        """
        with self._working():
            if self._decompressor is None:
                self._head += data
                if len(self._head) < MAGIC_SIZE:
                    return False
                data = self._begin()
            return self._take(data)

    def finish(self) -> None:
        """
        Check that the archive is complete, and set the modes and times of its directories.

        :raise TarError: and the others, as :meth:`feed` has them.
        """
        assert self._reader is not None
        assert self._tree is not None
        with self._working():
            if self._decompressor is None:
                self._take(self._begin())  # a few bytes: one step
            assert self._decompressor is not None
            self._decompressor.finish()
            self._reader.finish()
            self._tree.settle()

    def _close(self) -> None:
        if self._tree is not None:
            self._tree.close()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Run one step of the work; a step that fails ends all of it."""
        with self._step():
            try:
                yield
            except BaseException:
                self.over = True
                self._close()
                raise

    def report(self) -> dict[str, object]:
        """Return what was unpacked so far, for the reply."""
        tree = self._tree
        if tree is None:
            return {"entries": 0, "bytes": 0}
        skipped = {"skipped": tree.skipped, "skips": tree.skips} if tree.skips else {}
        return {"entries": tree.entries, "bytes": tree.size, **skipped}

    def _begin(self) -> bytes:
        self._decompressor = Decompressor(recognised(self._head))
        return self._head

    def _take(self, data: bytes) -> bool:
        """Take some bytes, or go on with those before; return whether a step has not been enough for all of them."""
        assert self._reader is not None
        assert self._decompressor is not None
        if data:
            self._pieces = self._decompressor.feed(data)
        size = 0
        for piece in self._pieces:
            self._check_over()
            self._reader.feed(piece)
            size += len(piece)
            if size >= STEP:
                return True
        return False


class _File:
    """A regular file that is being written, without a name or under a temporary one."""

    def __init__(self, member: Member, directory: int, name: str) -> None:
        self.member = member
        self.directory = directory
        self.name = name
        self.temporary: str | None = None
        try:
            # A file without a name is gone with the daemon, however that ends.
            self.fd = os.open(".", os.O_TMPFILE | os.O_WRONLY | os.O_CLOEXEC, 0o600, dir_fd=directory)
            return
        except OSError as error:
            if error.errno not in NO_TMPFILE:
                raise
        self.temporary = temporary_name()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self.fd = os.open(self.temporary, flags, 0o600, dir_fd=directory)
        lock_temporary(self.fd)

    def write(self, data: bytes) -> None:
        """Write more data; pages of zeros become holes."""
        if len(data) >= _HOLE and not data.strip(b"\0"):
            os.lseek(self.fd, len(data), os.SEEK_CUR)
            return
        left = memoryview(data)
        while left:
            left = left[os.write(self.fd, left) :]

    def discard(self) -> None:
        """Remove the file."""
        os.close(self.fd)
        if self.temporary is not None:
            with suppress(OSError):
                os.unlink(self.temporary, dir_fd=self.directory)
        os.close(self.directory)

    def put_in_place(self) -> None:
        """
        Rename the file to its name, replacing what is there atomically.

        :raise OSError: if that cannot be done.
        """
        if self.temporary is None:
            unnamed = f"/proc/self/fd/{self.fd}"
            with suppress(FileExistsError):
                os.link(unnamed, self.name, dst_dir_fd=self.directory)
                return
            temporary = temporary_name()
            os.link(unnamed, temporary, dst_dir_fd=self.directory)
            self.temporary = temporary
        with name_lock(self.directory, os.fsencode(self.name)):
            os.rename(self.temporary, self.name, src_dir_fd=self.directory, dst_dir_fd=self.directory)


class _Directories:
    """
    The directories of an archive, with the mode and the time (ns) that each is to get; packed, as there may be a
    million.
    """

    _TAIL = struct.Struct("=HqH")

    def __init__(self) -> None:
        self._packed = bytearray()

    def add(self, name: str, mode: int, mtime: int) -> None:
        """
        Add a directory.

        :raise TooMuch: if the names take more than :data:`MAX_DIRECTORIES` bytes.
        """
        data = os.fsencode(name)
        mtime = max(-(1 << 63), min(mtime, (1 << 63) - 1))
        self._packed += data + self._TAIL.pack(mode, mtime, len(data))
        if len(self._packed) > MAX_DIRECTORIES:
            raise TooMuch(f"the names of the archive's directories have more than {MAX_DIRECTORIES} bytes")

    def newest_first(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, mode and time of each directory, and forget it."""
        while self._packed:
            mode, mtime, length = self._TAIL.unpack(self._packed[-self._TAIL.size :])
            del self._packed[-self._TAIL.size :]
            name = os.fsdecode(bytes(self._packed[len(self._packed) - length :]))
            del self._packed[len(self._packed) - length :]
            yield name, mode, mtime


class _Tree(Receiver):
    """The directory tree that an archive is unpacked into."""

    def __init__(self, top: int, keep_owner: bool, max_size: int | None, max_entries: int) -> None:
        self.entries = 0
        self.size = 0
        self.skipped: list[str] = []
        self.skips = 0
        self._below = DirectoryTree(top)
        self._keep_owner = keep_owner
        self._max_size = max_size
        self._max_entries = max_entries
        self._file: _File | None = None
        self._directories = _Directories()

    def begin(self, member: Member) -> None:
        if self.entries + self.skips >= self._max_entries:
            raise TooMuch(f"the archive has more than {self._max_entries} entries")
        if self._max_size is not None and self.size + member.size > self._max_size:
            raise TooMuch(f"the archive has more than {self._max_size} bytes; {member.name!r} would be too much")
        parts = _parts(member.name)
        try:
            self._begin(member, parts)
        except OSError as error:
            raise _because(member, error) from None

    def _begin(self, member: Member, parts: list[str]) -> None:
        if member.kind is MemberType.OTHER:
            self.skips += 1
            if len(self.skipped) < MAX_SKIPPED:
                self.skipped.append(member.name)
        elif not parts:  # the directory itself
            if member.kind is not MemberType.DIRECTORY:
                raise TarError(f"{member.name!r}: it has no name")
        elif member.kind is MemberType.DIRECTORY:
            self._make_directory(member, parts)
        elif member.kind is MemberType.FILE:
            directory = os.dup(self._below.directory(parts[:-1], make=True))
            try:
                self._file = _File(member, directory, parts[-1])
            except BaseException:
                os.close(directory)
                raise
        else:
            self._link(member, parts)
        self.entries += member.kind is not MemberType.OTHER and member.kind is not MemberType.FILE

    def data(self, data: bytes) -> None:
        file = self._file
        if file is not None:
            try:
                file.write(data)
            except OSError as error:
                raise _because(file.member, error) from None

    def end(self) -> None:
        file = self._file
        if file is None:
            return
        try:
            os.ftruncate(file.fd, file.member.size)
            self._set_owner_and_mode(file.fd, file.member)
            file.put_in_place()
        except OSError as error:
            raise _because(file.member, error) from None
        self._file = None
        os.close(file.fd)
        os.close(file.directory)
        self.entries += 1
        self.size += file.member.size

    def settle(self) -> None:
        """Set the modes and times of the directories, last, as writing into them changes their times."""
        for name, mode, mtime in self._directories.newest_first():
            with suppress(OSError):
                self._below.settle(_parts(name), mode, mtime)

    def close(self) -> None:
        """Close all descriptors, and remove an incomplete file."""
        if self._file is not None:
            self._file.discard()
            self._file = None
        self._below.close()

    def _set_owner_and_mode(self, fd: int, member: Member) -> None:
        """Set owner, mode and time of a file; the owner first, as a change of it clears set-user-id."""
        if self._keep_owner:
            os.fchown(fd, member.uid, member.gid)
        os.fchmod(fd, member.mode & 0o777)
        os.utime(fd, ns=(member.mtime, member.mtime))

    def _make_directory(self, member: Member, parts: list[str]) -> None:
        self._below.directory(parts, make=True)
        if self._keep_owner:
            parent = self._below.directory(parts[:-1])
            os.chown(parts[-1], member.uid, member.gid, dir_fd=parent, follow_symlinks=False)
        self._directories.add("/".join(parts), member.mode & 0o777, member.mtime)

    def _link(self, member: Member, parts: list[str]) -> None:
        """Make a link, replacing what is there unless it is a directory."""
        directory = os.dup(self._below.directory(parts[:-1], make=True))
        temporary = temporary_name()
        try:
            if member.kind is MemberType.SYMLINK:
                os.symlink(member.target, temporary, dir_fd=directory)
                if self._keep_owner:
                    os.chown(temporary, member.uid, member.gid, dir_fd=directory, follow_symlinks=False)
                os.utime(temporary, ns=(member.mtime, member.mtime), dir_fd=directory, follow_symlinks=False)
            else:
                target = _parts(member.target)
                if not target:
                    raise TarError(f"{member.name!r}: a hard link to nothing")
                source = self._below.directory(target[:-1])
                os.link(target[-1], temporary, src_dir_fd=source, dst_dir_fd=directory, follow_symlinks=False)
            with name_lock(directory, os.fsencode(parts[-1])):
                os.rename(temporary, parts[-1], src_dir_fd=directory, dst_dir_fd=directory)
        finally:
            with suppress(OSError):  # it is still there if both were links to the same file already, see rename(2)
                os.unlink(temporary, dir_fd=directory)
            os.close(directory)


def _parts(name: str) -> list[str]:
    """
    Split a member's name at its slashes.

    :raise TarError: if it leads out of the directory, or is malformed.
    """
    if name.startswith("/"):
        raise TarError(f"{name!r}: an absolute name; only names below the directory are unpacked")
    if len(os.fsencode(name)) > MAX_NAME:
        raise TarError(f"{name[:80]!r}...: the name has more than {MAX_NAME} bytes")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise TarError(f"{name!r}: a name with '..' in it; only names below the directory are unpacked")
    if "\0" in name:
        raise TarError(f"{name!r}: a name with NUL in it")
    return parts


def _because(member: Member, error: OSError) -> FileError:
    """Return the error in the words of the other routes, with the member's name."""
    why = (error.strerror or str(error)).lower()
    if error.errno in (errno.ENOTDIR, errno.ELOOP):
        why = "a link, or no directory, is in the way; nothing is written through links"
    conflict = error.errno in (errno.ENOENT, errno.ELOOP)  # it is not what was asked for that is not there
    return FileError("unpack", member.name, why, errno.ENOTDIR if conflict else error.errno or 0)
