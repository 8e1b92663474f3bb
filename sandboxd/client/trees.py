"""
Uploads and downloads of directory trees in one request, as tar archives that are made and unpacked while they are sent.
"""

from __future__ import annotations

import errno
import io
import os
import queue
import shutil
import stat
import tarfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from decimal import Decimal
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, cast

import msgspec

from sandboxd.client.errors import ProtocolError
from sandboxd.client.flow import Flow, HttpRequest, HttpResponse, Writer, call, exchange, target, work
from sandboxd.client.operations import operation
from sandboxd.client.replies import Unpacked
from sandboxd.client.transfers import PIECE, Counter, Progress

#: Pieces that may wait to be unpacked.
WAITING = 16

#: Errors of the operating system for what was removed, or replaced with something of another type: EINVAL is that of
#: readlink(2) for what is no link.
GONE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ESTALE, errno.EINVAL)


class Downloaded(msgspec.Struct, frozen=True):
    """
    The result of a tree's download.

    :ivar entries: files, directories and links that are there now.
    :ivar bytes: bytes of the files.
    :ivar skipped: members that would have led out of the directory, such as links to elsewhere, or are no files.
    """

    entries: int
    bytes: int
    skipped: list[str]


@operation("PUT /archive", Unpacked)
def upload_tree(
    source: str | os.PathLike[str],
    path: str,
    *,
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
) -> Flow[Unpacked]:
    """
    Upload the contents of a local directory into a directory of the sandbox, which is made if necessary.

    Files that are there are replaced, each in one step; others stay. If the connection breaks, it begins anew.

    :param exclude: patterns of what is left out, with all that is in it: of a name, or with a slash of a path.
    """
    top = Path(source)
    entries = yield from work(lambda: list(walk(top, exclude)))
    return (yield from upload_entries(top, entries, path, progress))


def upload_entries(
    top: Path, entries: Sequence[tuple[str, os.stat_result]], path: str, progress: Progress | None = None
) -> Flow[Unpacked]:
    """
    Upload some entries of a local directory into a directory of the sandbox.

    :param entries: names relative to ``top``, each directory before what is in it.
    """
    count = Counter(progress, sum(512 + -(-_size(info) // 512) * 512 for _, info in entries))

    def body() -> Iterator[bytes]:
        count.done = 0
        yield from map(count.add, pack(top, entries))

    where = target("/archive", path=path, parents=True)
    headers = {"Content-Type": "application/x-tar"}
    return (yield from call(HttpRequest("PUT", where, headers, body, timeout=300.0), Unpacked))


@operation("GET /archive")
def download_tree(
    path: str,
    sink: str | os.PathLike[str],
    *,
    exclude: Sequence[str] = (),
    compress: bool = False,
    progress: Progress | None = None,
) -> Flow[Downloaded]:
    """
    Download the contents of a directory of the sandbox into a local directory, which is made if necessary.

    Nothing is written outside of it, whatever the sandbox sends. If the connection breaks, it begins anew.

    :param exclude: patterns of what is left out, with all that is in it: of a name, or with a slash of a path.
    :param compress: whether it is compressed on its way.
    """
    top = Path(sink)
    yield from work(lambda: top.mkdir(parents=True, exist_ok=True))
    count = Counter(progress, None)
    unpacking: list[Unpacking] = []

    def opened(response: HttpResponse) -> Writer:
        for broken in unpacking:
            broken.cancel()
        count.done = 0
        unpacking[:] = [Unpacking(top)]

        def write(data: bytes) -> None:
            unpacking[0].write(count.add(data))

        return write

    format = "tar.gz" if compress else "tar"
    request = HttpRequest("GET", target("/archive", path=path, exclude=list(exclude), format=format), sink=opened)
    try:
        yield from exchange(request)
        return (yield from work(unpacking[0].finish))
    finally:
        for each in unpacking:
            each.cancel()


def walk(top: Path, exclude: Sequence[str] = ()) -> Iterator[tuple[str, os.stat_result]]:
    """
    Yield the files, directories and links below a directory, by their relative names, with their stat.

    What is removed meanwhile is left out.
    """
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(top / directory) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError as error:
            if not (directory and is_gone(error, top)):
                raise
            continue
        for entry in entries:
            name = os.path.join(directory, entry.name)
            if excluded(name, exclude):
                continue
            try:
                info = entry.stat(follow_symlinks=False)
            except OSError as error:
                if not is_gone(error, top):
                    raise
                continue
            yield name, info
            if stat.S_ISDIR(info.st_mode):
                waiting.append(name)


def is_gone(error: OSError, top: Path) -> bool:
    """Return whether an error says that something below a directory is gone, or replaced, and the directory is not."""
    return error.errno in GONE and top.is_dir()


def excluded(name: str, patterns: Sequence[str]) -> bool:
    """Return whether a pattern matches a name: its last part or, if the pattern has a slash, all of it."""
    base = os.path.basename(name)
    return any(fnmatchcase(name if "/" in pattern else base, pattern.strip("/")) for pattern in patterns)


def pack(top: Path, entries: Sequence[tuple[str, os.stat_result]]) -> Iterator[bytes]:
    """
    Yield a tar archive in pieces.

    What is gone by now is left out. A file that changes its size meanwhile is cut, or filled up with zeros.
    """
    archive = tarfile.TarFile(fileobj=io.BytesIO(), mode="w", format=tarfile.PAX_FORMAT)
    small: list[bytes] = []
    waiting = 0
    for name, _ in entries:
        for data in _member(archive, top, name):
            small.append(data)
            waiting += len(data)
            if waiting >= PIECE:
                yield b"".join(small)
                small, waiting = [], 0
    yield b"".join(small) + bytes(1024)


def _member(archive: tarfile.TarFile, top: Path, name: str) -> Iterator[bytes]:
    """Yield the header and the contents of an entry; nothing if it is gone, or no file, directory or link."""
    path = top / name
    with ExitStack() as stack:
        file = None
        try:
            info = os.lstat(path)
            if stat.S_ISREG(info.st_mode):
                file = stack.enter_context(open(path, "rb", opener=_open))
                info = os.fstat(file.fileno())
            member = archive.gettarinfo(path, name, file)
        except OSError as error:
            if not is_gone(error, top):
                raise
            return
        if member is None or not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
            return
        # tarfile itself rounds to what a float can hold.
        seconds, rest = divmod(info.st_mtime_ns, 10**9)
        member.pax_headers = {"mtime": f"{seconds}.{rest:09}"}
        if member.isfile() or member.islnk():  # another name of a file may be left out: each gets the contents
            if file is None:
                return  # it has just taken the place of something else
            member.type, member.linkname, member.size = tarfile.REGTYPE, "", info.st_size
        yield member.tobuf(tarfile.PAX_FORMAT, "utf-8", "surrogateescape")
        if file is not None:
            yield from _contents(file, member.size)


def _open(path: str, flags: int) -> int:
    """Open what was a regular file just now; by now it may be a link, or a FIFO, on which an open would wait."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _contents(file: IO[bytes], size: int) -> Iterator[bytes]:
    """Yield as many bytes as the header says, and the padding to whole blocks."""
    left = size
    while left > 0 and (data := file.read(min(left, PIECE))):
        left -= len(data)
        yield data
    padding = left + -size % 512
    for start in range(0, padding, PIECE):
        yield bytes(min(PIECE, padding - start))


def _size(info: os.stat_result) -> int:
    return info.st_size if stat.S_ISREG(info.st_mode) else 0


class Unpacking:
    """
    The unpacking of an archive that arrives in pieces, in a thread of its own, as tarfile reads where this is written
    to.

    :param top: the directory to unpack into.
    """

    def __init__(self, top: Path) -> None:
        self._top = top
        self._pieces: queue.Queue[bytes | None] = queue.Queue(WAITING)
        self._rest = b""
        self._ended = False
        self._error: BaseException | None = None
        self._entries = 0
        self._bytes = 0
        self._skipped: list[str] = []
        self._thread = threading.Thread(target=self._run, name="unpack", daemon=True)
        self._thread.start()

    def write(self, data: bytes) -> None:
        """
        Add a piece; wait while many pieces are not unpacked.

        :raise Exception: why it cannot be unpacked.
        """
        self._put(data)
        if self._error is not None:
            raise self._error

    def finish(self) -> Downloaded:
        """
        Wait until all is unpacked, and return the result.

        :raise Exception: why it cannot be unpacked.
        """
        self._put(b"")
        self._thread.join()
        if self._error is not None:
            raise self._error
        return Downloaded(self._entries, self._bytes, self._skipped)

    def cancel(self) -> None:
        """End without the rest of the archive; what was unpacked stays."""
        self._put(None)

    def _put(self, data: bytes | None) -> None:
        while self._thread.is_alive():
            try:
                self._pieces.put(data, timeout=0.1)
                return
            except queue.Full:
                continue

    def read(self, size: int) -> bytes:
        """Return bytes of the archive. Called by tarfile."""
        while len(self._rest) < size and not self._ended:
            piece = self._pieces.get()
            if piece is None:
                raise EOFError
            self._ended = not piece
            self._rest += piece
        data, self._rest = self._rest[:size], self._rest[size:]
        return data

    def _run(self) -> None:
        try:
            self._unpack()
            while not self._ended:
                self.read(PIECE)
        except EOFError:
            pass
        except tarfile.TarError as error:
            self._error = ProtocolError(f"what came is no archive: {error}")
        except BaseException as error:
            self._error = error

    def _unpack(self) -> None:
        tree = _Tree(self._top)
        with tarfile.open(fileobj=cast("IO[bytes]", self), mode="r|*") as archive:
            for member in archive:
                if tree.add(member, archive.extractfile(member) if member.isreg() else None):
                    self._entries += 1
                    self._bytes += member.size if member.isreg() else 0
                else:
                    self._skipped.append(member.name)
        left_out = tree.make_links()
        self._entries -= len(left_out)
        self._skipped += left_out


class _Tree:
    """
    The local directory that an archive is unpacked into; no member gets out of it.

    Symbolic links are made when all else is there, so that nothing is written through one of the archive, and only such
    as lead to a place within. What an older download may have left is looked at before a directory is written into.
    Python's own filter (PEP 706) is not used: that of many versions in use can be evaded.

    :ivar links: the symbolic links that are still to be made.
    """

    def __init__(self, top: Path) -> None:
        self._top = top
        self._real_top = os.path.realpath(top)
        self._checked: set[Path] = set()
        self.links: list[tuple[tuple[str, ...], str]] = []

    def add(self, member: tarfile.TarInfo, contents: IO[bytes] | None) -> bool:
        """Unpack a member. Return False if it is left out."""
        parts = _parts(member.name)
        if parts is None:
            return False
        place = self._top.joinpath(*parts)
        if member.isdir():
            return self._directory(place)
        if not parts or not self._directory(place.parent):
            return False
        if member.issym():
            self.links.append((parts, member.linkname))
        elif member.islnk():
            return self._hard_link(place, member.linkname)
        elif contents is not None:
            self._remove(place)
            with open(place, "xb") as file:
                shutil.copyfileobj(contents, file, PIECE)
                file.flush()  # or what is written later would be its last change
                os.fchmod(file.fileno(), member.mode & 0o755 | 0o600)
                os.utime(file.fileno(), ns=(_mtime(member), _mtime(member)))
        else:
            return False
        return True

    def make_links(self) -> list[str]:
        """Make the symbolic links; return the names of those that are left out."""
        left_out = []
        for parts, to in self.links:
            steps = to.split("/")
            ups = next((number for number, step in enumerate(steps) if step != ".."), len(steps))
            if not to or to.startswith("/") or ".." in steps[ups:] or ups > len(parts) - 1:
                left_out.append("/".join(parts))
                continue
            place = self._top.joinpath(*parts)
            self._remove(place)
            os.symlink(to, place)
        return left_out

    def _hard_link(self, place: Path, name: str) -> bool:
        parts = _parts(name)
        if not parts:
            return False
        first = self._top.joinpath(*parts)
        if first == place:
            return True
        if not self._directory(first.parent) or first.is_symlink() or not first.is_file():
            return False
        self._remove(place)
        os.link(first, place)
        return True

    def _directory(self, path: Path) -> bool:
        """Make a directory and those above it. Return False if a link leads it out of the tree."""
        if path in self._checked:
            return True
        if path != self._top:
            if not self._directory(path.parent):
                return False
            if not path.is_dir():
                self._remove(path)
                path.mkdir()
        real = os.path.realpath(path)
        if real != self._real_top and not real.startswith(self._real_top.rstrip("/") + "/"):
            return False
        self._checked.add(path)
        return True

    def _remove(self, place: Path) -> None:
        """Remove a file or a link that is there, but no directory."""
        with suppress(FileNotFoundError):
            place.unlink()


def _mtime(member: tarfile.TarInfo) -> int:
    """Return the modification time of a member, in nanoseconds."""
    text = member.pax_headers.get("mtime", "")
    try:
        return int(Decimal(text) * 10**9)
    except (ArithmeticError, ValueError):
        return int(member.mtime * 10**9)


def _parts(name: str) -> tuple[str, ...] | None:
    """Split a member's name at its slashes; return None if it leads out of the directory."""
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    return None if ".." in parts or name.startswith("/") else parts
