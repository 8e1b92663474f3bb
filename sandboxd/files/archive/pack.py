"""The packing of directories and files into tar archives, piece by piece. It blocks: call it in a thread."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat as modes
from collections.abc import Callable, Generator
from functools import cache

from sandboxd.files.archive.compression import Compressor
from sandboxd.files.archive.tar import END, Member, MemberType, header, padding
from sandboxd.files.errors import FileError, os_errors
from sandboxd.files.root import Root
from sandboxd.files.transfer import Transfer
from sandboxd.files.walk import GONE, TreeEntry, walk

#: Bytes that one step makes, about.
PIECE = 256 * 1024

#: Bytes that it compresses for that, at most.
STEP = 8 * 1024 * 1024

#: Files with several names that are remembered, to be put in once.
_MAX_LINKS = 100_000

_KINDS = {modes.S_IFREG: MemberType.FILE, modes.S_IFDIR: MemberType.DIRECTORY, modes.S_IFLNK: MemberType.SYMLINK}


class Packing(Transfer):
    """
    The making of one archive.

    :param path: a directory, whose contents it is made of, or a file.
    :param excluded: whether something is left out, by its path from the top.
    :param compressor: compresses the archive.
    :param skip_unreadable: whether what may not be read is left out, instead of ending it all.
    """

    def __init__(
        self,
        root: Root,
        path: str,
        excluded: Callable[[str], bool],
        compressor: Compressor,
        skip_unreadable: bool = False,
    ) -> None:
        super().__init__()
        self._root = root
        self._path = path
        self._excluded = excluded
        self._compressor = compressor
        self._skip_unreadable = skip_unreadable
        self._links: dict[tuple[int, int], str] = {}
        self._fd = -1  # until the generator closes it
        self._pieces: Generator[bytes, None, None] = _nothing()
        self._complete = False
        self._user = cache(lambda uid: _name(lambda: pwd.getpwuid(uid).pw_name))
        self._group = cache(lambda gid: _name(lambda: grp.getgrgid(gid).gr_name))

    def open(self) -> None:
        """
        Open the directory or file to pack.

        :raise FileError: if it cannot be read.
        """
        with os_errors("open", self._path), self._step():
            self._fd = self._root.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
            if modes.S_ISDIR(os.fstat(self._fd).st_mode):
                self._pieces = self._directory()
                return
            name = os.fsdecode(os.path.basename(self._root.real(self._path)))
            self._pieces = self._one(name)

    def read(self) -> bytes | None:
        """
        Return the next piece of the archive; empty if the compressor has none ready, None at the end.

        :raise FileError: if something cannot be read.
        """
        with os_errors("read", self._path), self._step():
            return None if self._complete else self._read()

    def _read(self) -> bytes:
        made: list[bytes] = []
        taken = size = 0
        for piece in self._pieces:
            made.append(self._compressor.compress(piece))
            taken += len(piece)
            size += len(made[-1])
            if size >= PIECE or taken >= STEP:
                return b"".join(made)
        self._complete = True
        made.append(self._compressor.flush())
        return b"".join(made)

    def _close(self) -> None:
        self._pieces.close()
        if self._fd >= 0:  # the generator was not started
            os.close(self._taken())

    def _taken(self) -> int:
        """Return the descriptor, which the caller closes."""
        fd, self._fd = self._fd, -1
        return fd

    def _one(self, name: str) -> Generator[bytes, None, None]:
        fd = self._taken()
        try:
            info = os.fstat(fd)
            if not modes.S_ISREG(info.st_mode):
                raise FileError("read", self._path, "not a regular file", errno.EEXIST)
            yield from self._file(self._member(name, MemberType.FILE, info), fd)
            yield END
        finally:
            os.close(fd)

    def _directory(self) -> Generator[bytes, None, None]:
        for entry in walk(self._taken(), failed=self._failed):
            if self._excluded(entry.path):
                entry.enter = False
                continue
            try:
                yield from self._entry(entry)
            except OSError as error:
                if error.errno in (*GONE, errno.ENXIO):
                    continue
                self._failed(entry.path, error)
                entry.enter = False
        yield END

    def _entry(self, entry: TreeEntry) -> Generator[bytes, None, None]:
        if entry.is_file:
            yield from self._opened(entry)
            return
        info = entry.lstat()
        kind = _KINDS.get(modes.S_IFMT(info.st_mode))
        if kind is None:
            return  # a socket, a FIFO or a device, which none would unpack
        if kind is MemberType.FILE:
            yield from self._opened(entry)
            return
        member = self._member(entry.path, kind, info)
        if kind is MemberType.SYMLINK:
            member.target = os.readlink(entry.name, dir_fd=entry.dir_fd)
        yield header(member)

    def _opened(self, entry: TreeEntry) -> Generator[bytes, None, None]:
        """Yield the blocks of a regular file of a tree, or of a hard link to one that the archive already has."""
        fd = entry.open(os.O_RDONLY | os.O_NONBLOCK)
        try:
            info = os.fstat(fd)
            if not modes.S_ISREG(info.st_mode):
                return
            # The header promises this size, whatever becomes of the file.
            member = self._member(entry.path, MemberType.FILE, info)
            if info.st_nlink > 1 and self._is_known(info, member):
                yield header(member)
            else:
                yield from self._file(member, fd)
        finally:
            os.close(fd)

    def _is_known(self, info: os.stat_result, member: Member) -> bool:
        """Return whether the archive has this file under another name, after making the member a hard link to that."""
        key = info.st_dev, info.st_ino
        first = self._links.get(key)
        if first is None:
            if len(self._links) < _MAX_LINKS:
                self._links[key] = member.name
            return False
        member.kind, member.target, member.size = MemberType.HARD_LINK, first, 0
        return True

    def _member(self, name: str, kind: MemberType, info: os.stat_result) -> Member:
        return Member(
            name,
            kind,
            modes.S_IMODE(info.st_mode),
            info.st_mtime_ns,
            info.st_size if kind is MemberType.FILE else 0,
            "",
            info.st_uid,
            info.st_gid,
            self._user(info.st_uid),
            self._group(info.st_gid),
        )

    def _file(self, member: Member, fd: int) -> Generator[bytes, None, None]:
        """
        Yield the blocks of a file, as many as its header says: a file that has grown is cut, and one that has shrunk is
        filled up with zeros, as tar(1) does. A small one comes in one piece.
        """
        made = header(member)
        left = member.size
        while left:
            try:
                data = os.read(fd, min(left, PIECE))
            except OSError as error:
                with os_errors("read", os.path.join(self._path, member.name)):
                    raise error
            data = data or bytes(min(left, PIECE))
            left -= len(data)
            made += data
            if left:
                yield made
                made = b""
        yield made + padding(member.size)

    def _failed(self, path: str, error: OSError) -> None:
        if not (self._skip_unreadable and isinstance(error, PermissionError)):
            with os_errors("read", os.path.join(self._path, path)):
                raise error


def _nothing() -> Generator[bytes, None, None]:
    yield from ()


def _name(look_up: Callable[[], str]) -> str:
    try:
        return look_up()
    except KeyError:
        return ""
