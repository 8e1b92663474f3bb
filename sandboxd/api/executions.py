"""Routes of ``/processes/<id>``: inspect, feed, signal and await any execution, also one in the foreground."""

from __future__ import annotations

import signal as signals
from collections.abc import Iterator

import msgspec
from msgspec import UNSET

from sandboxd.api.commands import SMALL, name_execution, not_permitted, signal_name
from sandboxd.api.routing import ApiError, Routes, changing_nothing, send_json_parts
from sandboxd.api.streaming import texts
from sandboxd.api.waits import Waits
from sandboxd.execution.execution import Execution
from sandboxd.execution.log import Batch, DroppedRecords
from sandboxd.execution.table import ProcessTable
from sandboxd.messages.decoding import Done, DoneWithMessage
from sandboxd.messages.executions import (
    ExecutionDetails,
    Logs,
    LogsQuery,
    OutputState,
    Record,
    ResizeRequest,
    SignalRequest,
    StdinQuery,
    StdinWritten,
    TerminalSize,
    Waited,
    WaitRequest,
)
from sandboxd.reactor.timestamps import rfc3339
from sandboxd.web.ascii_json import dumps
from sandboxd.web.request import Request

#: Records that one reply of ``/processes/<id>/logs`` has at most.
MAX_RECORDS = 10_000


async def described(execution: Execution) -> ExecutionDetails:
    """Return the details of an execution."""
    assert execution.pid is not None  # a client learns the id when it was started
    command = execution.command
    log = execution.log
    return ExecutionDetails(
        id=execution.id,
        pid=execution.pid,
        status=execution.status,
        background=execution.background,
        command=command.text,
        argv=None if command.argv is None else list(command.argv),
        tty=None if execution.tty is None else TerminalSize(execution.tty.cols, execution.tty.rows),
        cwd=command.cwd,
        user=None if command.user is None else command.user.name,
        timeout=command.timeout,
        idle_timeout=command.idle_timeout,
        limits={**command.limits, **command.tree_limits},
        survive=command.survive,
        started_at=rfc3339(execution.started_at),
        ended_at=None if execution.ended_at is None else rfc3339(execution.ended_at),
        exit_code=execution.exit_code,
        signal=None if execution.signal is None else signal_name(execution.signal),
        timed_out=execution.timed_out,
        idle_timed_out=execution.idle_timed_out,
        oom_killed=execution.oom_killed,
        survivors=await execution.left(),
        output=OutputState(
            bytes=log.total_bytes,
            records=log.next - 1,
            first=log.first,
            truncated=log.first > 1,
            last_at=None if log.last_output is None else rfc3339(log.last_output),
            followers=log.followers,
        ),
    )


def records(batch: Batch, count: int) -> list[Record]:
    """Return the first ``count`` records of a batch."""
    time = rfc3339(batch.time)
    partial = True if batch.partial else UNSET
    return [
        Record(seq=batch.first + index, timestamp=time, stream=batch.stream, data=text, partial=partial)
        for index, text in enumerate(texts(batch, count))
    ]


def add_execution_routes(routes: Routes, table: ProcessTable, waits: Waits) -> None:
    """Add the routes below ``/processes/<id>`` to the API, but for ``attach``."""

    def get(id: str) -> Execution:
        try:
            return table.get(id)
        except KeyError:
            raise ApiError(404, f"process not found: {id}") from None

    @routes.get("/processes/<id>", reply=ExecutionDetails)
    async def process(request: Request, id: str) -> ExecutionDetails:
        """Describe an execution, also one of ``/run`` or ``/run_streaming``, by its ``X-Execution-Id``."""
        return await described(get(id))

    @routes.get("/processes/<id>/logs", query=LogsQuery, reply=Logs)
    async def logs(request: Request, id: str, query: LogsQuery) -> Logs | None:
        """Return records of an execution's log, at once."""
        execution = get(id)
        limit = MAX_RECORDS if query.limit is None else min(query.limit, MAX_RECORDS)
        log = execution.log
        after = query.after or 0 if query.tail is None else log.before_last(query.tail, query.stream)
        cursor = log.cursor(after, stream=query.stream)
        parts: list[tuple[Batch, int]] = []  # batches, and how many records of each
        left, size, dropped = limit, 0, 0
        ended = False
        try:
            while left and (item := cursor.read()) is not None:
                if isinstance(item, DroppedRecords):
                    dropped += item.dropped
                    continue
                count = min(item.count, left)
                parts.append((item, count))
                left -= count
                size += len(item.data)
                ended = count == item.count
            ended = (ended or not parts) and log.closed and cursor.ended
        finally:
            cursor.close()
        last = min(after + dropped, log.last)
        if parts:
            last = parts[-1][0].first + parts[-1][1] - 1
        reply = Logs([], dropped, last, ended)
        if size > SMALL:
            await send_json_parts(request, _in_parts(reply, parts))
            return None
        for batch, count in parts:
            reply.records += records(batch, count)
        return reply

    @routes.post("/processes/<id>/stdin", bytes, query=StdinQuery, success=True, reply=StdinWritten, errors=(409,))
    async def stdin(request: Request, body: bytes, id: str, query: StdinQuery) -> StdinWritten:
        """
        Write to the stdin of a command that was started with ``"stdin": true``.

        Answers when the pipe has taken all, or with 409 if nobody reads it.
        """
        execution = get(id)
        name_execution(request, execution)
        try:
            await execution.feed(body, query.close)
        except BrokenPipeError as error:
            raise ApiError(409, f"stdin of {id}: {error.strerror}") from None
        return StdinWritten(True, len(body))

    @routes.post("/processes/<id>/resize", ResizeRequest, success=True, reply=Done, errors=(409,))
    async def resize(request: Request, body: ResizeRequest, id: str) -> Done:
        """Set the size of a process's terminal. Answers 409 if it has none, or has ended."""
        try:
            get(id).resize(body.cols, body.rows)
        except OSError as error:
            raise ApiError(409, f"{id}: {error.strerror}") from None
        return Done(success=True)

    @routes.post("/processes/<id>/signal", SignalRequest, success=True, reply=DoneWithMessage, errors=(409,))
    async def signal(request: Request, body: SignalRequest, id: str) -> DoneWithMessage:
        """
        Send a signal to all processes of an execution, also to those that its shell has left behind.

        Answers 409 if none runs any more, or if one may not be signalled.
        """
        signum = body.signum()
        execution = get(id)
        found = await execution.send_signal(signum)
        if found.denied:
            raise not_permitted(found)
        if execution.status != "running" and not found.pids:
            raise ApiError(409, f"process is not running (status: {execution.status})")
        return DoneWithMessage(True, f"{signals.Signals(signum).name} sent")

    @routes.post("/processes/<id>/wait", WaitRequest, reply=Waited)
    async def wait(request: Request, body: WaitRequest, id: str) -> Waited:
        """
        Wait until a line of an execution's output contains `output`, one of its processes listens on `port`, or it
        ends.

        With `http`, a path, the port is ready once it answers a `GET` of that with 2xx or 3xx. Answers with what is
        known of the execution and the `reason`, the first in this order that holds when asked; `timeout` if none does
        in time.
        """
        execution = get(id)
        with changing_nothing():
            found = await waits.wait(execution, body)
        return Waited(**msgspec.structs.asdict(await described(execution)), **found)


def _in_parts(reply: Logs, parts: list[tuple[Batch, int]]) -> Iterator[bytes]:
    """Encode the reply of ``/processes/<id>/logs`` in parts, each when it is needed; ``reply`` has no records."""
    before = b'{"records":['
    for batch, count in parts:
        yield before + dumps(records(batch, count))[1:-1]
        before = b","
    yield dumps(reply).removeprefix(b'{"records":[')
