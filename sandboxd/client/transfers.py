"""
Uploads and downloads of files of any size with constant memory; one that is interrupted is resumed.

A large upload goes to a name of its own beside the target (``PUT /files`` with ``offset``) and is moved into place in
the end, so that others see the old file or the new one. A download goes to such a name on this side. Both names depend
on the file's version, so that a later call continues what an earlier one has begun.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import stat as modes
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, cast

from sandboxd.client.errors import Conflict, NotFound, Unavailable, error_of
from sandboxd.client.file_operations import make_dir, move, stat
from sandboxd.client.flow import (
    ConnectionLost,
    Flow,
    HttpRequest,
    HttpResponse,
    Retry,
    Writer,
    call,
    exchange,
    target,
    work,
)
from sandboxd.client.operations import operation
from sandboxd.client.replies import FileInfo, Stored

#: Bytes that are read from a local file at a time.
PIECE = 256 * 1024

#: Bytes from which on an upload can be resumed.
LARGE = 16 * 1024 * 1024

#: Called with the bytes that have been moved, and those there are in all, or None if that is not known.
Progress = Callable[[int, "int | None"], object]

#: The source of an upload: a path; bytes; an open file, from its position on; or an iterable of bytes.
Source = str | os.PathLike[str] | bytes | IO[bytes] | Iterable[bytes]

#: The destination of a download: a path, or an open file.
Sink = str | os.PathLike[str] | IO[bytes]


class Counter:
    """
    A counter of a transfer's bytes, which reports progress.

    :ivar done: how many have been moved.
    """

    def __init__(self, progress: Progress | None, total: int | None) -> None:
        self.done = 0
        self.total = total
        self._progress = progress

    def add(self, data: bytes) -> bytes:
        """Count some bytes, and return them."""
        self.done += len(data)
        if self._progress is not None:
            self._progress(self.done, self.total)
        return data


def pieces(file: IO[bytes], count: Counter) -> Iterator[bytes]:
    """Yield the contents of a file in pieces."""
    while data := file.read(PIECE):
        yield count.add(data)


def pieces_of_file(local: Path, count: Counter) -> Iterator[bytes]:
    """
    Yield the contents of a file in pieces, from ``count.done`` to ``count.total``, or to its end if that is None.

    What is appended meanwhile is not part of them.

    :raise Conflict: if it ends before that: it was changed.
    """
    with local.open("rb") as file:
        file.seek(count.done)
        if count.total is None:
            yield from pieces(file, count)
            return
        while left := count.total - count.done:
            data = file.read(min(PIECE, left))
            if not data:
                raise _changed(local)
            yield count.add(data)


def _changed(local: Path) -> Conflict:
    return Conflict(f"{local} was changed while it was sent; send it again")


@operation("PUT /files", Stored)
def upload(
    source: Source,
    path: str,
    *,
    mode: str | None = None,
    owner: str | None = None,
    parents: bool = False,
    progress: Progress | None = None,
) -> Flow[Stored]:
    """
    Create a file in the sandbox, or replace one atomically, from a local file or other data.

    A broken upload is resumed if ``source`` is a path, and begun anew if it is bytes; else SandboxGone is raised.

    :param mode: permissions in octal, as ``"0644"``; by default those of the file that is replaced, else those of
        ``source`` if it is a path.
    :param owner: ``user``, ``user:group`` or ``:group``, by name or number.
    :param parents: make the directories above.
    """
    if isinstance(source, (str, os.PathLike)):
        local = Path(source)
        info = yield from work(local.stat)
        if modes.S_ISREG(info.st_mode):
            return (yield from _upload_file(local, info, path, mode, owner, parents, progress))
        with (yield from work(partial(local.open, "rb"))) as file:  # a FIFO, or a device
            pieces_of = cast("IO[bytes]", file)
            return (yield from upload(pieces_of, path, mode=mode, owner=owner, parents=parents, progress=progress))
    count = Counter(progress, len(source) if isinstance(source, bytes) else None)

    def body() -> Iterator[bytes]:
        count.done = 0
        if isinstance(source, bytes):
            for start in range(0, len(source), PIECE):
                yield count.add(source[start : start + PIECE])
        elif hasattr(source, "read"):
            yield from pieces(cast("IO[bytes]", source), count)
        else:
            yield from map(count.add, source)

    where = target("/files", path=path, mode=mode, owner=owner, parents=parents)
    return (yield from call(_put(where, body, count.total, repeatable=count.total is not None), Stored))


def _put(where: str, body: Callable[[], Iterator[bytes]], length: int | None, repeatable: bool = True) -> HttpRequest:
    headers = {"Content-Type": "application/octet-stream"}
    if length is not None:
        headers["Content-Length"] = str(length)
    return HttpRequest("PUT", where, headers, body, timeout=300.0, repeatable=repeatable)


def _upload_file(
    local: Path,
    info: os.stat_result,
    path: str,
    mode: str | None,
    owner: str | None,
    parents: bool,
    progress: Progress | None,
) -> Flow[Stored]:
    old: FileInfo | None = None
    own_mode = f"{info.st_mode & 0o777:04o}"
    if info.st_size >= LARGE or own_mode != "0644":
        try:
            old = yield from stat(path)
        except NotFound:
            mode = mode or own_mode
    if info.st_size >= LARGE and (old is None or old.type == "file"):
        if parents and old is None and (directory := posixpath.dirname(path)):
            yield from make_dir(directory)
        return (yield from _upload_parts(local, info, path, mode, owner, old, progress))
    # One request keeps a link at the path, and replaces what it leads to.
    count = Counter(progress, info.st_size or None)  # files of /proc have contents, but no size

    def body() -> Iterator[bytes]:
        count.done = 0
        return pieces_of_file(local, count)

    where = target("/files", path=path, mode=mode, owner=owner, parents=parents)
    return (yield from call(_put(where, body, count.total), Stored))


def _upload_parts(
    local: Path,
    info: os.stat_result,
    path: str,
    mode: str | None,
    owner: str | None,
    old: FileInfo | None,
    progress: Progress | None,
) -> Flow[Stored]:
    directory, name = posixpath.split(path)
    version = _digest(name, str(local.absolute()), str(info.st_size), str(info.st_mtime_ns))
    part = posixpath.join(directory, f".{version}.part")
    count = Counter(progress, info.st_size)
    body = partial(pieces_of_file, local, count)

    while True:
        count.done = yield from _size(part)
        if count.done > info.st_size:
            count.done = 0
        before = count.done
        if old is not None:  # as one request would do it
            mode, owner = mode or old.mode, owner or f"{old.uid}:{old.gid}"
        where = target("/files", path=part, offset=before, size=info.st_size, mode=mode, owner=owner)
        try:
            yield from call(_put(where, body, info.st_size - before, repeatable=False), Stored)
            break
        except ConnectionLost as error:
            yield Retry(error, progress=count.done > before)
    now = yield from work(local.stat)
    if (now.st_size, now.st_mtime_ns) != (info.st_size, info.st_mtime_ns):
        raise _changed(local)
    yield from _move_into_place(part, path)
    new = yield from stat(path)
    return Stored(path=path, size=new.size, etag=new.etag or "", created=old is None)


def _size(path: str) -> Flow[int]:
    """Return the size of a file of the sandbox; 0 if there is none."""
    try:
        return (yield from stat(path)).size
    except NotFound:
        return 0


def _move_into_place(part: str, path: str) -> Flow[None]:
    """Rename a file; once, even if the reply is lost."""
    while True:
        try:
            yield from move(part, path, overwrite=True)
            return
        except ConnectionLost as error:
            yield Retry(error)
            try:
                yield from stat(part)
            except NotFound:
                return


@operation("HEAD /files")
def head(path: str) -> Flow[HttpResponse]:
    """Return length, date and entity tag from the head of a download's reply."""
    return exchange(HttpRequest("HEAD", target("/files", path=path)))


@operation("GET /files")
def download(path: str, sink: Sink, *, progress: Progress | None = None) -> Flow[int]:
    """
    Download a file of the sandbox; return its size.

    A broken download is resumed if the file is still the same. If it is not, it begins anew if ``sink`` is a path;
    else PreconditionFailed is raised.

    :param sink: a path, where the old file is replaced in one step; or an open file, to which the bytes are written as
        they come.
    """
    if not isinstance(sink, (str, os.PathLike)):
        fetching = _Fetching(path, sink.write, None, progress)
        yield from fetching.run()
        return fetching.count.done
    part = _PartFile(Path(sink), path)
    fetching = _Fetching(path, part.write, part.begin, progress)
    try:
        if (yield from work(part.is_there)):
            answer = yield from head(path)
            fetching.count.done = yield from work(partial(part.resume, answer.headers.get("etag", "")))
            fetching.etag = part.etag
        yield from fetching.run()
        yield from work(part.commit)
    finally:
        part.close()
    return fetching.count.done


class _Fetching:
    """
    A download in progress.

    :param write: takes the bytes.
    :param begin: called with the entity tag before the first byte, also if all comes anew; None if what was written
        cannot be taken back.
    :ivar etag: of the version that was begun.
    """

    def __init__(
        self,
        path: str,
        write: Callable[[bytes], object],
        begin: Callable[[str], None] | None,
        progress: Progress | None,
    ) -> None:
        self.count = Counter(progress, None)
        self.etag = ""
        self._path = path
        self._write = write
        self._begin = begin

    def run(self) -> Flow[None]:
        while True:
            before = self.count.done
            try:
                response: HttpResponse = yield self._request()
            except ConnectionLost as error:
                if self.count.done and not self.etag and self._begin is None:
                    raise  # a file without versions, as those of /proc are
                yield Retry(error, progress=self.count.done > before)
                continue
            if response.status < 400 or (response.status == 416 and before):  # 416: all of it is here
                return
            refused = error_of(response.status, response.body)
            if not isinstance(refused, Unavailable):
                raise refused
            yield Retry(refused)

    def _request(self) -> HttpRequest:
        headers = {"Accept-Encoding": "identity"}
        if self.count.done and self.etag:
            headers["Range"] = f"bytes={self.count.done}-"
            headers["If-Match" if self._begin is None else "If-Range"] = self.etag
        return HttpRequest("GET", target("/files", path=self._path), headers, sink=self._opened)

    def _opened(self, response: HttpResponse) -> Writer:
        if response.status != 206:
            self.count.done = 0
            self.etag = response.headers.get("etag", "")
            if self._begin is not None:
                self._begin(self.etag)
        length = response.headers.get("content-length")
        self.count.total = None if length is None else self.count.done + int(length)

        def write(data: bytes) -> None:
            self._write(data)
            self.count.add(data)

        return write


class _PartFile:
    """
    The local file of an incomplete download, beside its destination.

    :param path: the file of the sandbox.
    """

    def __init__(self, target: Path, path: str) -> None:
        self._target = target
        self._prefix = f".{_digest(target.name, path)}-"
        self._file: IO[bytes] | None = None
        self._path: Path | None = None
        self.etag = ""

    def is_there(self) -> bool:
        """Return whether an earlier download was interrupted."""
        return any(self._target.parent.glob(f"{self._prefix}*.part"))

    def resume(self, etag: str) -> int:
        """Open the part that exists of a version of the file, if any, and return its size."""
        path = self._name(etag)
        if not etag or not path.exists():
            return 0
        self.etag, self._path = etag, path
        self._file = path.open("ab")
        return self._file.tell()

    def begin(self, etag: str) -> None:
        """Start a new file for a version."""
        self.close()
        for old in self._target.parent.glob(f"{self._prefix}*.part"):
            old.unlink(missing_ok=True)
        self.etag, self._path = etag, self._name(etag)
        self._file = self._path.open("wb")

    def write(self, data: bytes) -> None:
        """Append data."""
        assert self._file is not None
        self._file.write(data)

    def commit(self) -> None:
        """Rename the file to its destination."""
        assert self._file is not None
        assert self._path is not None
        self.close()
        if self._target.exists():
            os.chmod(self._path, modes.S_IMODE(self._target.stat().st_mode))
        # Through a link, as a write would go.
        os.replace(self._path, self._target.resolve() if self._target.is_symlink() else self._target)
        self._path = None

    def close(self) -> None:
        """Close the file; what it has stays, to be resumed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _name(self, etag: str) -> Path:
        return self._target.parent / f"{self._prefix}{_digest(etag)}.part"


def _digest(*texts: str) -> str:
    """Return a short name made from texts, as the length of a file's name is limited."""
    return hashlib.sha256(os.fsencode("\0".join(texts))).hexdigest()[:16]
