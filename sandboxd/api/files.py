"""File routes of the contract: text in JSON."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import TypeVar

from sandboxd import files
from sandboxd.api.routing import Reply, Routes, send_json_parts
from sandboxd.execution.oneshot import OneShot
from sandboxd.idempotency import IdempotencyStore
from sandboxd.jsontext import escaped_chunks
from sandboxd.messages import PathRequest, WriteFileRequest
from sandboxd.site import Request
from sandboxd.workers import Workers

T = TypeVar("T")


def add_file_routes(routes: Routes, in_thread: Workers, store: IdempotencyStore) -> None:
    """
    Add them to the API.

    :param in_thread: runs a blocking function off the reactor's thread.
    :param store: knows which requests have come before.
    """

    def post(path: str, type: type[T], work: Callable[[T], dict[str, object]], *, success: bool) -> None:
        """A route that does ``work`` in a thread, and answers a failure of the file system with 200."""

        @routes.post(path, type, success=success)
        async def route(request: Request, body: T) -> Reply:
            try:
                result = await in_thread(work, body)
            except files.FileError as error:
                return _failed(error, success)
            return Reply({"success": True, **result} if success else result)

    def delete_file(body: PathRequest) -> dict[str, object]:
        files.delete(body.path)
        return {}

    def delete_dir(body: PathRequest) -> dict[str, object]:
        files.delete_tree(body.path)
        return {}

    def make_dir(body: PathRequest) -> dict[str, object]:
        files.make_directories(body.path)
        return {}

    @routes.post("/write_file", WriteFileRequest, success=True)
    async def write_file(request: Request, body: WriteFileRequest) -> Reply:
        def start() -> OneShot[None]:
            written: OneShot[None] = OneShot()
            in_thread(files.write, body.path, body.content).addBoth(written.fire)
            return written

        written = store.once(request.idempotency_key, request.fingerprint, start).value
        assert written is not None
        try:
            await written.when_fired()
        except files.FileError as error:
            return _failed(error, True)
        return Reply({"success": True})

    post("/delete_file", PathRequest, delete_file, success=True)
    post("/delete_dir", PathRequest, delete_dir, success=True)
    post("/make_dir", PathRequest, make_dir, success=True)
    post("/list_dir", PathRequest, lambda body: {"entries": files.names(body.path)}, success=False)
    post("/stat_file", PathRequest, lambda body: {"entry": files.stat(body.path)}, success=False)

    @routes.post("/read_file", PathRequest)
    async def read_file(request: Request, body: PathRequest) -> Reply | None:
        try:
            data = await in_thread(files.read, body.path)
        except files.FileError as error:
            return _failed(error, False)
        await send_json_parts(request, chain((b'{"content":"',), escaped_chunks(data), (b'"}',)))
        return None


def _failed(error: files.FileError, success: bool) -> Reply:
    """The clients throw away the body of a 4xx and match this text, so it comes with 200."""
    return Reply({"success": False, "error": str(error)} if success else {"error": str(error)})
