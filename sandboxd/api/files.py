"""File routes of the contract: text in JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

from sandboxd.api.routing import Reply, Routes, send_json_parts
from sandboxd.execution.lines import character_border
from sandboxd.files import text
from sandboxd.files.access import Files
from sandboxd.files.errors import FileError
from sandboxd.messages.decoding import Done, Error, Failure, PathRequest
from sandboxd.messages.files import Content, Entries, Stat, WriteFileRequest
from sandboxd.reactor.oneshot import OneShot
from sandboxd.web.ascii_json import escaped
from sandboxd.web.idempotency import IdempotencyStore
from sandboxd.web.request import Request

T = TypeVar("T", bound=PathRequest)


def add_file_routes(routes: Routes, files: Files, store: IdempotencyStore) -> None:
    """
    Add them to the API.

    :param files: the files that requests reach.
    :param store: knows which requests have come before.
    """

    cached = files.cached_reader()

    def post(path: str, type: type[T], work: Callable[[T], dict[str, object]], reply: Any) -> None:
        """A route that does ``work`` in a thread, and answers a failure of the file system with 200."""
        success = issubclass(reply, Done)

        async def route(request: Request, body: T) -> Reply:
            try:
                result = await files.threads(body.path, work, body)
            except FileError as error:
                return _failed(error, success)
            return Reply({"success": True, **result} if success else result)

        route.__doc__ = work.__doc__
        routes.post(path, type, success=success, reply=(reply, Failure if success else Error))(route)

    def delete_file(body: PathRequest) -> dict[str, object]:
        """Remove a file, a link, or an empty directory."""
        text.delete(files.root, body.path)
        return {}

    def delete_dir(body: PathRequest) -> dict[str, object]:
        """Remove whatever is there, as ``rm -rf`` does; nothing there is no error."""
        text.delete_tree(files.root, body.path)
        return {}

    def make_dir(body: PathRequest) -> dict[str, object]:
        """Make a directory, and those above it."""
        text.make_directories(files.root, body.path)
        return {}

    def list_dir(body: PathRequest) -> dict[str, object]:
        """The names in a directory."""
        return {"entries": text.names(files.root, body.path)}

    def stat_file(body: PathRequest) -> dict[str, object]:
        """What is known of a file or directory."""
        return {"entry": text.stat(files.root, body.path)}

    @routes.post(
        "/write_file",
        WriteFileRequest,
        success=True,
        reply=(Done, Failure),
        errors=(409,),
        headers=("Idempotency-Key",),
    )
    async def write_file(request: Request, body: WriteFileRequest) -> Reply:
        """Make a file, or replace one; a reader sees the old text or the new."""

        def start() -> OneShot[None]:
            written: OneShot[None] = OneShot()
            files.call(text.write, body.path, body.content).addBoth(written.fire)
            return written

        written = store.once(request.idempotency_key, request.fingerprint, start).value
        assert written is not None
        try:
            await written.when_fired()
        except FileError as error:
            return _failed(error, True)
        return Reply({"success": True})

    post("/delete_file", PathRequest, delete_file, Done)
    post("/delete_dir", PathRequest, delete_dir, Done)
    post("/make_dir", PathRequest, make_dir, Done)
    post("/list_dir", PathRequest, list_dir, Entries)
    post("/stat_file", PathRequest, stat_file, Stat)

    @routes.post("/read_file", PathRequest, reply=(Content, Error))
    async def read_file(request: Request, body: PathRequest) -> Reply | None:
        """A file's text, up to 64 MiB."""
        data = cached.read(body.path)
        if data is None:
            try:
                data = await files.call(text.read, body.path)
            except FileError as error:
                return _failed(error, False)
        if len(data) <= CHUNK:
            return Reply({"content": data.decode("utf-8", "replace")})
        await send_json_parts(request, chain((b'{"content":"',), escaped_chunks(data), (b'"}',)))
        return None


def _failed(error: FileError, success: bool) -> Reply:
    """The clients throw away the body of a 4xx and match this text, so it comes with 200."""
    return Reply({"success": False, "error": str(error)} if success else {"error": str(error)})


#: Bytes of text that are encoded at a time, so that no single call holds the interpreter for long.
CHUNK = 256 * 1024


def escaped_chunks(data: bytes) -> Iterator[bytes]:
    """:func:`escaped`, a chunk at a time, for text of any size."""
    position = 0
    while position < len(data):
        end = character_border(data, min(position + CHUNK, len(data)))
        yield escaped(data[position:end])
        position = end
