"""
The routes that the Python client of Kubernetes' agent-sandbox speaks: commands and files below one base directory.

That is the root directory, or else the daemon's working directory, which no ``..`` leads out of. All paths are relative
to it, those that begin with a slash too, as that client cuts the slash off where it uploads or downloads.
"""

from __future__ import annotations

import os
import stat as modes
from collections.abc import Iterator

from sandboxd.api.commands import CommandStarter, code_of, run_to_end, with_output
from sandboxd.api.downloads import send_file
from sandboxd.api.operations import RawBody
from sandboxd.api.preconditions import CONDITIONS
from sandboxd.api.routing import ApiError, Reply, Routes, send_json_parts
from sandboxd.api.uploads import receive_form
from sandboxd.files.access import Files
from sandboxd.files.form import Form, FormError, boundary
from sandboxd.files.listing import followed
from sandboxd.files.operations import exists
from sandboxd.files.upload import Replacement, Upload
from sandboxd.messages.agent_sandbox import DirectoryEntry, ExecuteRequest, ExecuteResult, PathExists, Uploaded
from sandboxd.messages.decoding import BadRequest, check_path
from sandboxd.messages.executions import CommandRequest
from sandboxd.web.ascii_json import dumps
from sandboxd.web.body import BodyStream
from sandboxd.web.request import Request

#: What timeout(1) exits with if the time was up.
TIMED_OUT = 124

#: Entries of a directory that are encoded at a time.
PART = 500

_ERRORS = (400, 403, 409)


def add_agent_sandbox_routes(routes: Routes, starter: CommandStarter, files: Files) -> None:
    """
    Add ``/execute``, ``/upload``, ``/download``, ``/list`` and ``/exists`` to the API.

    :param files: the files that requests reach.
    """

    @routes.post("/execute", ExecuteRequest, reply=ExecuteResult, errors=(409, 503), headers=("Idempotency-Key",))
    async def execute(request: Request, body: ExecuteRequest) -> ExecuteResult | None:
        """
        Run a command in the base directory and answer with its output when it has ended.

        As `/run`, in the words of agent-sandbox's client.
        """
        command = CommandRequest(cmd=body.command, timeout=body.timeout_seconds)
        buffered = await run_to_end(request, starter, command)
        execution = buffered.execution
        code = code_of(execution)
        if execution.timed_out:
            code = TIMED_OUT
        elif execution.signal is not None:
            code = 128 + execution.signal
        return await with_output(request, ExecuteResult("", "", code, execution.timed_out), buffered)

    @routes.post("/upload", RawBody("multipart/form-data"), reply=Uploaded, errors=(*_ERRORS, 404, 507))
    async def upload(request: Request, body: BodyStream) -> Uploaded:
        """
        Write the files of a form to the paths that their names say, each atomically once it has arrived.

        Directories that are missing are made.
        """

        def replacement(name: str) -> Upload:
            return Replacement(files.root, _below(name), lambda old: None, parents=True)

        try:
            form = Form(boundary(request.text_header(b"Content-Type")), replacement, nested=True)
            await receive_form(await files.threads.find_pool("."), form, body)
        except FormError as error:
            raise BadRequest(str(error)) from None
        if not form.written:
            raise BadRequest("file: the form has no such part")
        return Uploaded(f"{', '.join(name for name, _ in form.written)} written")

    @routes.get(
        "/download/<path>",
        reply=RawBody(),
        errors=(206, 304, *_ERRORS, 412, 416),
        headers=(*CONDITIONS, "If-Modified-Since", "Range"),
        rest=True,
    )
    async def download(request: Request, path: str) -> Reply | None:
        """Download a file, as `GET /files` does."""
        return await send_file(request, files, _below(path))

    @routes.get("/list/<path>", reply=list[DirectoryEntry], errors=_ERRORS, rest=True)
    async def list_directory(request: Request, path: str) -> None:
        """List the entries of a directory, sorted by name. Links are followed, if not out of the base directory."""
        entries = await files.call(followed, _below(path))
        await send_json_parts(request, _entries(entries))

    @routes.get("/exists/<path>", reply=PathExists, errors=_ERRORS, rest=True)
    async def path_exists(request: Request, path: str) -> PathExists:
        """Report whether a path exists, as a file, a directory or anything else."""
        return PathExists(path, await files.call(exists, _below(path)))


def _below(path: str) -> str:
    """
    Return a path as seen from the base directory.

    :raise BadRequest: if it has a NUL in it.
    :raise ApiError: if it leads out.
    """
    path = path.lstrip("/") or "."
    try:
        check_path("path", path)
    except ValueError as error:
        raise BadRequest(str(error)) from None
    if os.path.normpath(path).split("/")[0] == "..":
        raise ApiError(403, f"path: {path} leads out of the base directory")
    return path


def _entries(entries: list[tuple[str, os.stat_result]]) -> Iterator[bytes]:
    """Encode the entries of a directory in parts, each when it is needed."""
    before = b"["
    for start in range(0, len(entries), PART):
        part = [
            DirectoryEntry(name, info.st_size, "directory" if modes.S_ISDIR(info.st_mode) else "file", info.st_mtime)
            for name, info in entries[start : start + PART]
        ]
        yield before + b",".join(map(dumps, part))
        before = b","
    yield b"[]" if before == b"[" else b"]"
