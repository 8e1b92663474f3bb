"""
Routes ``/start_process``, ``/list_processes``, ``/kill_process`` and ``/process_logs_streaming``: background processes.
"""

from __future__ import annotations

from sandboxd.api.commands import CommandStarter, cannot_start, name_execution, not_permitted
from sandboxd.api.operations import Events
from sandboxd.api.routing import ApiError, Routes
from sandboxd.api.streaming import check_streams, follow, log_events, resume_after, send_available
from sandboxd.execution.execution import Execution
from sandboxd.execution.table import ProcessTable
from sandboxd.messages.decoding import BadRequest, DoneWithMessage, Error
from sandboxd.messages.executions import (
    CommandRequest,
    Gap,
    KillProcessRequest,
    LogLine,
    Process,
    Processes,
    ProcessLogsQuery,
    Started,
    StreamEnded,
)
from sandboxd.processes.child import SpawnError
from sandboxd.reactor.timestamps import rfc3339
from sandboxd.web.request import Request
from sandboxd.web.sse import Streams, event


def listed(execution: Execution) -> Process:
    """Return a process as ``/list_processes`` shows it."""
    assert execution.pid is not None  # only what was started is listed
    entry = Process(
        id=execution.id,
        pid=execution.pid,
        status=execution.status,
        command=execution.command.text,
        started_at=rfc3339(execution.started_at),
    )
    if execution.ended_at is not None and execution.exit_code is not None:
        entry.exit_code = execution.exit_code
        entry.completed_at = rfc3339(execution.ended_at)
    return entry


def add_process_routes(routes: Routes, table: ProcessTable, starter: CommandStarter, streams: Streams) -> None:
    """Add the routes of the contract for background processes to the API."""

    @routes.post(
        "/start_process",
        CommandRequest,
        reply=Started,
        status=201,
        errors=(409, 503),
        headers=("Idempotency-Key",),
        long=starter.long_fields,
    )
    async def start_process(request: Request, body: CommandRequest) -> Started:
        """Start a background process. With `tty` and no command it is the user's login shell."""
        if body.cmd == "" and body.argv is None:
            raise BadRequest("Command is required")
        try:
            execution, _ = await starter.start(request, body, background=True)
        except SpawnError as error:
            raise cannot_start(error) from None
        if execution.pid is None:
            raise ApiError(503, "Failed to start command: its timeout has passed")
        name_execution(request, execution)
        return Started(execution.id, execution.pid, execution.status)

    @routes.get("/list_processes", reply=Processes)
    async def list_processes(request: Request) -> Processes:
        """List the background processes that run or are remembered, in the order of their start."""
        return Processes([listed(execution) for execution in table.background()])

    @routes.post("/kill_process", KillProcessRequest, success=True, reply=DoneWithMessage, errors=(409,))
    async def kill_process(request: Request, body: KillProcessRequest) -> DoneWithMessage:
        """
        End a process and all that it has started; answer when they are gone.

        ``signal`` is sent first, and SIGKILL ``grace`` seconds later. One that has ended but has left processes running
        is killed, too; its status stays. Answers 409 if one may not be signalled.
        """
        signum = body.signum()
        try:
            execution = table.get(body.id)
        except KeyError:
            raise ApiError(400, f"process not found: {body.id}") from None
        if execution.status != "running" and not await execution.left():
            raise ApiError(400, f"process is not running (status: {execution.status})")
        survivors = await execution.kill(signum, body.grace)
        if survivors.denied:
            raise not_permitted(survivors)
        if survivors.pids:
            raise ApiError(500, f"could not be killed: pids {survivors.pids}", survivors=survivors.pids)
        return DoneWithMessage(True, "Process killed successfully")

    @routes.get(
        "/process_logs_streaming",
        query=ProcessLogsQuery,
        reply=Events(log=LogLine, gap=Gap, complete=StreamEnded, error=Error),
        errors=(503,),
        headers=("Last-Event-ID",),
    )
    async def process_logs_streaming(request: Request, query: ProcessLogsQuery) -> None:
        """
        Send a process's log as Server-Sent Events: first the lines that are kept, then new ones as they come.

        Every event has an ``id``, with which a stream that broke can be resumed.
        """
        after = resume_after(request, query.after)
        if query.tail is not None and request.text_header(b"Last-Event-ID"):
            raise BadRequest("tail: give it or Last-Event-ID, not both")
        check_streams(streams)
        try:
            execution = table.get(query.id)
        except KeyError:
            stream = streams.open(request)
            stream.write(event("error", Error(f"process not found: {query.id}"), 0))
            stream.finish()
            return
        if query.tail is not None:
            after = execution.log.before_last(query.tail, query.stream)
        cursor = execution.log.cursor(after, stream=query.stream)
        stream = streams.open(request)
        try:
            if request.method != b"HEAD":
                await (follow if query.follow else send_available)(stream, streams, cursor, log_events)
            stream.write(event("complete", StreamEnded("stream ended"), cursor.position - 1))
        finally:
            cursor.close()
            stream.finish()
