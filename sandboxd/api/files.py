"""Routes of the Koyeb contract for files: text files and directories, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

from msgspec import Struct
from twisted.internet.defer import CancelledError

from sandboxd.api.routing import LongFields, Routes, send_json_parts
from sandboxd.execution.lines import character_border
from sandboxd.files import operations
from sandboxd.files.access import Files
from sandboxd.files.errors import FileError
from sandboxd.files.line_range import LineRange
from sandboxd.files.operations import write
from sandboxd.files.root import Root
from sandboxd.messages.decoding import Done, Error, Failure, PathRequest
from sandboxd.messages.files import Content, Entries, FileEntry, Lines, ReadFileRequest, Stat, WriteFileRequest
from sandboxd.messages.long_text import LongText
from sandboxd.reactor.oneshot import OneShot
from sandboxd.web.ascii_json import escaped
from sandboxd.web.idempotency import IdempotencyStore
from sandboxd.web.request import Request


def add_file_routes(routes: Routes, files: Files, store: IdempotencyStore) -> None:
    """
    Add ``/write_file``, ``/read_file``, ``/list_dir`` and the other file routes of the contract to the API.

    :param files: the files that requests reach.
    :param store: knows which requests have come before.
    """

    cached = files.cached_reader()

    def post(path: str, work: Callable[[Root, str], Struct], reply: type[Struct]) -> None:
        """Add a route that calls ``work`` in a thread, and answers an error of the file system with status 200."""
        success = issubclass(reply, Done)

        async def route(request: Request, body: PathRequest) -> Struct:
            try:
                return await files.call(work, body.path)
            except FileError as error:
                return _failed(error, success)

        route.__doc__ = work.__doc__
        routes.post(path, PathRequest, success=success, reply=(reply, Failure if success else Error))(route)

    def delete_file(root: Root, path: str) -> Struct:
        """Remove a file, a link, or an empty directory."""
        operations.delete(root, path)
        return Done(True)

    def delete_dir(root: Root, path: str) -> Struct:
        """Remove a file or a directory tree, as ``rm -rf`` does; it is no error if there is none."""
        operations.delete_tree(root, path)
        return Done(True)

    def make_dir(root: Root, path: str) -> Struct:
        """Make a directory, and those above it."""
        operations.make_directories(root, path)
        return Done(True)

    def list_dir(root: Root, path: str) -> Struct:
        """List the names in a directory."""
        return Entries(operations.names(root, path))

    def stat_file(root: Root, path: str) -> Struct:
        """Describe a file or a directory."""
        return Stat(FileEntry(**operations.stat(root, path)))

    post("/delete_file", delete_file, Done)
    post("/delete_dir", delete_dir, Done)
    post("/make_dir", make_dir, Done)
    post("/list_dir", list_dir, Entries)
    post("/stat_file", stat_file, Stat)

    @routes.post(
        "/write_file",
        WriteFileRequest,
        success=True,
        reply=(Done, Failure),
        errors=(409,),
        headers=("Idempotency-Key",),
        long=LongFields(files.decode, ("content",), in_pieces=True),
    )
    async def write_file(request: Request, body: WriteFileRequest, text: LongText | None = None) -> Struct:
        """Create a file, or replace one atomically: a reader sees the old text or the new."""
        content: str | Callable[[], Iterator[bytes]] = body.content
        if text is not None:
            content = text.pieces

        def start() -> OneShot[None]:
            written: OneShot[None] = OneShot()
            files.call(write, body.path, content).addBoth(written.fire)
            return written

        entry = store.once(request.idempotency_key, request.make_fingerprint(), start)
        assert entry.value is not None
        try:
            await entry.value.when_fired()
        except CancelledError:
            raise
        except Exception as error:
            store.forget(entry)  # nothing was written, and the cause may go away
            if isinstance(error, FileError):
                return _failed(error, True)
            raise
        return Done(True)

    @routes.post("/read_file", ReadFileRequest, reply=(Content, Lines, Error))
    async def read_file(request: Request, body: ReadFileRequest) -> Struct | None:
        """
        Return a file's text, up to 64 MiB.

        With `offset` or `limit` only those lines are answered, of a file of any size.
        """
        try:
            if body.offset is not None or body.limit is not None:
                return await _lines(request, files, body)
            data = cached.read(body.path)
            if data is None:
                data = await files.call(operations.read, body.path)
        except FileError as error:
            return _failed(error, False)
        if len(data) <= CHUNK:
            return Content(data.decode("utf-8", "replace"))
        await send_json_parts(request, chain((b'{"content":"',), escaped_chunks(data), (b'"}',)))
        return None


async def _lines(request: Request, files: Files, body: ReadFileRequest) -> Struct | None:
    """Answer with a range of a file's lines."""
    offset = body.offset or 1
    reading = LineRange(files.root, body.path, offset, body.limit)
    try:
        data, count, total = await files.threads(body.path, reading.read)
    except CancelledError:
        reading.stop()
        raise
    if len(data) <= CHUNK:
        return Lines(data.decode("utf-8", "replace"), offset, count, total)
    rest = b'","offset":%d,"lines":%d,"total_lines":%d}' % (offset, count, total)
    await send_json_parts(request, chain((b'{"content":"',), escaped_chunks(data), (rest,)))
    return None


def _failed(error: FileError, success: bool) -> Struct:
    """
    Return the reply to a file operation that failed, with status 200: clients discard the body of a 4xx, and match this
    text.
    """
    return Failure(False, str(error)) if success else Error(str(error))


#: Bytes of text that are encoded at a time, so that no single call holds the interpreter for long.
CHUNK = 256 * 1024


def escaped_chunks(data: bytes) -> Iterator[bytes]:
    """Yield the text of :func:`escaped` in chunks, for text of any size."""
    position = 0
    while position < len(data):
        end = character_border(data, min(position + CHUNK, len(data)))
        yield escaped(data[position:end])
        position = end
