"""Route ``/ports/<port>/connect``: a TCP connection to a port of the sandbox, over a WebSocket."""

from __future__ import annotations

from contextlib import suppress

from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError
from twisted.logger import Logger
from twisted.python.failure import Failure

from sandboxd.api.routing import ApiError, Routes
from sandboxd.files.errors import EXHAUSTED
from sandboxd.messages.decoding import BadRequest
from sandboxd.proxy.socket_stream import SocketStream, connect
from sandboxd.reactor.first_to_end import first_to_end
from sandboxd.reactor.interfaces import Reactor
from sandboxd.web.request import Request
from sandboxd.web.websocket import (
    CLOSE_TIMEOUT,
    NORMAL,
    WebSocket,
    WebSocketClosed,
    WebSockets,
    check_handshake,
)

#: The subprotocol whose binary messages are the bytes of the connection.
BYTES = "sandboxd.bytes"

#: Close code: the connection broke.
BROKEN = 1011

#: What ends a tunnel: the target has ended; the client has closed, and the target has taken all that it had sent
#: before, or has not done so in time.
TARGET, CLIENT, OVERDUE = range(3)

_log = Logger()


def port_number(text: str) -> int:
    """
    Return the port that a path names.

    :raise BadRequest: if it is not a number from 1 to 65535.
    """
    if not (text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535):
        raise BadRequest(f"port: {text!r} is not a number from 1 to 65535")
    return int(text)


def unreachable(port: int, error: ConnectError) -> ApiError:
    """Return the error of a request for a port that cannot be connected to."""
    return ApiError(503 if error.osError in EXHAUSTED else 502, f"port {port} is not reachable: {error}")


def add_tunnel_route(routes: Routes, reactor: Reactor, websockets: WebSockets, own_ports: frozenset[int]) -> None:
    """
    Add ``GET /ports/<port>/connect`` to the API.

    :param own_ports: the ports that the daemon listens on, to which no tunnel leads.
    """

    @routes.get("/ports/<port>/connect", websocket=True, status=101, errors=(400, 403, 426, 502))
    async def tunnel(request: Request, port: str) -> None:
        """
        Open a TCP connection to a port of the sandbox, on 127.0.0.1 or else ::1, through a WebSocket.

        Binary messages are its bytes, both ways. The WebSocket is closed with 1000 when the port's owner ends the
        connection, with 1011 when that breaks. The subprotocol, if one is asked for, is `sandboxd.bytes`.
        """
        number = port_number(port)
        if number in own_ports:
            raise ApiError(403, f"port: {number} is the daemon's own")
        check_handshake(request, [BYTES])
        try:
            target = await connect(reactor, number)
        except ConnectError as error:
            raise unreachable(number, error) from None
        try:
            socket = websockets.accept(request, "tunnel", [BYTES])
            ended = await first_to_end(_to_client(target, socket), _to_target(socket, target), socket.when_overdue())
            if target.error is None:
                await socket.close(NORMAL)
            else:
                await socket.close(BROKEN, "the connection broke")
        except BaseException:
            target.close()
            raise
        if ended == TARGET:
            target.finish()
        elif ended == CLIENT:  # which does not wait for this
            Deferred.fromCoroutine(target.linger(CLOSE_TIMEOUT)).addErrback(_linger_failed)
        else:
            target.close()


def _linger_failed(failure: Failure) -> None:
    _log.failure("a tunnel's connection was not closed", failure)


async def _to_client(target: SocketStream, socket: WebSocket) -> None:
    """Send the bytes that the port's owner sends, until it ends; drop them once the client has closed."""
    while data := await target.read():
        with suppress(WebSocketClosed):
            await socket.send(data)


async def _to_target(socket: WebSocket, target: SocketStream) -> None:
    """Write the bytes that the client sends, until it closes."""
    while (data := await socket.receive()) is not None:
        await target.write(data)
