"""Route ``/processes/<id>/attach``: a process over one WebSocket, framed as Kubernetes' remote command protocol."""

from __future__ import annotations

from contextlib import suppress

import msgspec

from sandboxd.api.commands import name_execution
from sandboxd.api.routing import ApiError, Routes
from sandboxd.execution.execution import Execution
from sandboxd.execution.log import BytesCursor, DroppedRecords
from sandboxd.execution.table import ProcessTable
from sandboxd.messages.attach import AttachQuery, Cause, Causes, ExitStatus, TerminalSizeMessage
from sandboxd.messages.decoding import BadRequest
from sandboxd.reactor.first_to_end import first_to_end
from sandboxd.reactor.turn_budget import TurnBudget
from sandboxd.web.ascii_json import dumps
from sandboxd.web.request import Request
from sandboxd.web.websocket import NORMAL, POLICY_VIOLATION, WebSocket, WebSocketClosed, WebSockets, check_handshake

V5, V4 = "v5.channel.k8s.io", "v4.channel.k8s.io"

#: Channels: the first byte of each message.
STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255

#: Most bytes of one message.
MESSAGE = 64 * 1024

#: A message is not as the protocol has it.
MALFORMED = 1003


class _Refused(Exception):
    """An error in what the client has sent; the WebSocket is closed with its code and reason."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def add_attach_route(routes: Routes, table: ProcessTable, websockets: WebSockets, turns: TurnBudget) -> None:
    """Add ``GET /processes/<id>/attach`` to the API."""

    @routes.get("/processes/<id>/attach", query=AttachQuery, websocket=True, status=101, errors=(403, 426))
    async def attach(request: Request, id: str, query: AttachQuery) -> None:
        """
        Attach to a process: its output as it is written, its stdin, the size of its terminal, and how it ends.

        The subprotocol is `v5.channel.k8s.io` or `v4.channel.k8s.io`. The first byte of a binary message is the
        channel: 0 is stdin, 1 stdout, 2 stderr, 3 the exit status at the end, 4 the terminal's size, 255 closes one.
        Closing the WebSocket does not end the process.
        """
        try:
            execution = table.get(id)
        except KeyError:
            raise ApiError(404, f"process not found: {id}") from None
        check_handshake(request, [V5, V4])
        name_execution(request, execution)
        log = execution.log
        if query.offset is not None and execution.tty is None:
            raise BadRequest("offset: the process has no terminal")
        after = log.before_last(query.tail) if query.tail is not None else query.after or 0
        cursor = log.bytes_cursor(after, history=query.tail != 0, offset=query.offset)
        try:
            socket = websockets.accept(request, "attach", [V5, V4], V5)
            socket.finishes = True  # with its process
            await _serve(execution, socket, cursor, query, turns)
        finally:
            cursor.close()


async def _serve(
    execution: Execution, socket: WebSocket, cursor: BytesCursor, query: AttachQuery, turns: TurnBudget
) -> None:
    """
    Carry output and input until the process has ended and its output is sent, or the client closes.

    What the client has sent before it closes is still carried out, as long as the closing handshake may take.
    """
    code, reason = NORMAL, ""
    try:
        await first_to_end(
            _output(execution, socket, cursor, query, turns), _input(execution, socket), socket.when_overdue()
        )
    except _Refused as refused:
        code, reason = refused.code, str(refused)
    await socket.close(code, reason)


async def _output(
    execution: Execution, socket: WebSocket, cursor: BytesCursor, query: AttachQuery, turns: TurnBudget
) -> None:
    """Send the process's output and its exit status; once the client has closed, wait until the input is overdue."""
    try:
        await _send_output(execution, socket, cursor, query, turns)
    except WebSocketClosed:
        cursor.close()  # it keeps no record meanwhile
        await socket.when_overdue()


async def _send_output(
    execution: Execution, socket: WebSocket, cursor: BytesCursor, query: AttachQuery, turns: TurnBudget
) -> None:
    """Send the process's output as fast as the client takes it, then its exit status."""
    if query.events:
        tty = execution.tty
        size = None if tty is None else {"cols": tty.cols, "rows": tty.rows}
        started: dict[str, object] = {"event": "started", "id": execution.id, "pid": execution.pid, "tty": size}
        if query.offset is not None:
            started["bytes"] = execution.log.total_bytes
        await socket.send(_text(started))
    while not cursor.ended:
        await socket.when_ready()
        await turns.turn()
        found = cursor.read()
        if found is None:
            await cursor.when_more()
        elif isinstance(found, DroppedRecords):
            if query.events:
                gap: dict[str, object] = {"event": "gap", "dropped": found.dropped}
                if query.offset is not None:
                    gap["offset"] = cursor.offset
                await socket.send(_text(gap))
        else:
            stream, data = found
            channel = bytes([STDOUT if stream == "stdout" else STDERR])
            for start in range(0, len(data), MESSAGE):
                await socket.send(channel + data[start : start + MESSAGE])
    await execution.when_ended()
    await socket.send(bytes([ERROR]) + msgspec.json.encode(exit_status(execution)))


def exit_status(execution: Execution) -> ExitStatus:
    """Return an execution's exit status as shells report it: 128 plus the number of the signal that ended it."""
    code = execution.exit_code
    if execution.signal is not None:
        code = 128 + execution.signal
    if code == 0:
        return ExitStatus("Success")
    text = f"command terminated with non-zero exit code: {code}"
    causes = Causes([Cause("ExitCode", str(code))])
    return ExitStatus("Failure", message=text, reason="NonZeroExitCode", details=causes)


async def _input(execution: Execution, socket: WebSocket) -> None:
    """Carry out the client's messages until it closes."""
    while (message := await socket.receive()) is not None:
        if not message:
            continue
        channel, data = message[0], message[1:]
        if channel == STDIN:
            await _feed(execution, data, close=False)
        elif channel == RESIZE:
            _resize(execution, data)
        elif channel == CLOSE and socket.subprotocol == V5:
            if data == bytes([STDIN]):
                await _feed(execution, b"", close=True)
        else:
            raise _Refused(MALFORMED, f"channel {channel} takes no messages")


async def _feed(execution: Execution, data: bytes, close: bool) -> None:
    if not execution.has_stdin:
        if execution.ended_at is None:
            raise _Refused(POLICY_VIOLATION, "the process was started without stdin")
        return  # its end is about to be reported
    with suppress(BrokenPipeError):  # nobody reads it any more
        await execution.feed(data, close and execution.tty is None)  # a terminal is for all who are attached


def _resize(execution: Execution, data: bytes) -> None:
    try:
        size = msgspec.json.decode(data, type=TerminalSizeMessage)
    except msgspec.DecodeError as error:
        raise _Refused(MALFORMED, f"resize: {error}"[:100]) from None
    if execution.tty is not None and execution.ended_at is None:
        with suppress(OSError):  # its processes have closed the terminal, and run on
            execution.resize(size.Width, size.Height)


def _text(message: dict[str, object]) -> str:
    return dumps(message).decode("ascii")
