"""``/run`` and ``/run_streaming``: a command whose caller waits for it."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Iterator

from twisted.internet.defer import CancelledError

from sandboxd.api.routing import ApiError, Reply, Routes, send_json_parts
from sandboxd.execution.command import Command
from sandboxd.execution.execution import Execution
from sandboxd.execution.log import Gap, OutputLog
from sandboxd.execution.spawn import SpawnError
from sandboxd.execution.table import ProcessTable
from sandboxd.jsontext import dumps, escaped
from sandboxd.messages import CommandRequest
from sandboxd.site import Request
from sandboxd.sse import EventStream, event, output_events
from sandboxd.workers import Workers

#: Bytes of each stream that ``/run`` keeps: the first half and the last half of them.
MAX_OUTPUT = 128 * 1024 * 1024

#: Bytes of output up to which a reply is made in one piece.
SMALL = 64 * 1024

#: Not the command's fault, and it has not been executed: the client may try again.
_EXHAUSTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class Kept:
    """
    The head and the tail of one stream.

    :param limit: bytes to keep, about.
    """

    def __init__(self, limit: int) -> None:
        self.dropped = 0
        self.size = 0
        self._half = limit // 2
        self._head: list[bytes] = []
        self._head_size = 0
        self._tail: deque[bytes] = deque()
        self._tail_size = 0

    def add(self, data: bytes) -> None:
        """More output."""
        self.size += len(data)
        if self._head_size + len(data) <= self._half and not self._tail:
            self._head.append(data)
            self._head_size += len(data)
            return
        self._tail.append(data)
        self._tail_size += len(data)
        while self._tail_size > self._half and len(self._tail) > 1:
            oldest = self._tail.popleft()
            self._tail_size -= len(oldest)
            self.dropped += len(oldest)

    def pieces(self) -> Iterator[bytes]:
        """What was kept, in order."""
        yield from self._head
        yield from self._tail


async def collect(log: OutputLog, limit: int) -> dict[str, Kept]:
    """All output of a log, once it has ended."""
    kept = {"stdout": Kept(limit), "stderr": Kept(limit)}
    cursor = log.cursor(after=0)
    try:
        while not cursor.ended:
            while (batch := cursor.read()) is not None:
                assert not isinstance(batch, Gap), "a cursor that reads at once cannot fall behind"
                kept[batch.stream].add(batch.data)
            if not cursor.ended:
                await cursor.when_more()
    finally:
        cursor.close()
    return kept


class Starter:
    """
    Starts what a request asks for.

    :param table: where executions live.
    :param in_thread: runs a blocking function off the reactor's thread.
    """

    def __init__(self, table: ProcessTable, in_thread: Workers) -> None:
        self._table = table
        self._in_thread = in_thread

    async def check(self, body: CommandRequest) -> Command:
        """
        The command of a request.

        :raise BadRequest: if it is malformed.
        :raise ApiError: if its working directory is not one.
        """
        command = body.command()
        if command.cwd is not None and not await self._in_thread(os.path.isdir, command.cwd):
            raise _bad_cwd(command)
        return command

    def start(self, command: Command, *, background: bool) -> Execution:
        """
        Start it.

        :raise ApiError: if the working directory cannot be entered.
        :raise SpawnError: if it cannot be started for another reason.
        """
        try:
            return self._table.start(command, background=background)
        except SpawnError as error:
            if error.at_cwd:
                raise _bad_cwd(command) from None
            raise


def _bad_cwd(command: Command) -> ApiError:
    return ApiError(400, f"Invalid working directory: {command.cwd}")


def cannot_start(error: SpawnError) -> ApiError:
    """The answer to a command that could not be started."""
    if error.errno == errno.E2BIG:
        return ApiError(400, "cmd or env: too long for the operating system; write it to a file and run that")
    status = 503 if error.errno in _EXHAUSTED else 500
    return ApiError(status, f"Failed to start command: {error}")


def outcome(execution: Execution) -> dict[str, object]:
    """What became of an execution, as far as it is not plain from its code."""
    return {"timed_out": True} if execution.timed_out else {}


def add_command_routes(routes: Routes, starter: Starter) -> None:
    """Add them to the API."""

    @routes.post("/run", CommandRequest)
    async def run(request: Request, body: CommandRequest) -> Reply | None:
        command = await starter.check(body)
        try:
            execution = starter.start(command, background=False)
        except SpawnError as error:
            raise cannot_start(error) from None
        try:
            kept = await collect(execution.log, body.max_output or MAX_OUTPUT)
            await execution.when_ended()
        except CancelledError:
            execution.abandon()
            raise
        end: dict[str, object] = {"code": execution.exit_code}
        if execution.exit_code != 0:
            end["error"] = "Non-zero exit code"
        end.update(outcome(execution))
        end.update({f"{name}_dropped": stream.dropped for name, stream in kept.items() if stream.dropped})
        if sum(stream.size for stream in kept.values()) <= SMALL:
            text = {name: b"".join(stream.pieces()).decode("utf-8", "replace") for name, stream in kept.items()}
            return Reply({**text, **end})
        await send_json_parts(request, _run_reply(kept, end))
        return None

    @routes.post("/run_streaming", CommandRequest)
    async def run_streaming(request: Request, body: CommandRequest) -> Reply | None:
        command = await starter.check(body)
        try:
            execution = starter.start(command, background=False)
        except SpawnError as error:
            stream = EventStream(request)
            stream.write(event("error", {"error": str(cannot_start(error))}))
            stream.write(event("complete", {"code": -1, "error": True}))
            stream.finish()
            return None
        cursor = execution.log.cursor(after=0, lossless=True)
        stream = EventStream(request)
        try:
            await stream.follow(cursor, output_events)
            await execution.when_ended()
            code = execution.exit_code
            stream.write(event("complete", {"code": code, "error": code != 0, **outcome(execution)}))
        except BaseException:
            execution.abandon()
            raise
        finally:
            cursor.close()
            stream.finish()
        return None


def _run_reply(kept: dict[str, Kept], end: dict[str, object]) -> Iterator[bytes]:
    """The reply of ``/run`` in parts, each encoded when it is needed."""
    for name, stream in kept.items():
        yield b'%s"%s":"' % (b"{" if name == "stdout" else b'",', name.encode("ascii"))
        for piece in stream.pieces():
            yield escaped(piece).encode("ascii")
    yield b'",' + dumps(end)[1:]
