"""The WebSockets of the asyncio client: attachments, tunnels and forwarded ports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Protocol, TypeVar

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from sandboxd.client.attaching import (
    ATTACH,
    BYTES,
    END_OF_INPUT,
    MESSAGE,
    Attaching,
    Chunk,
    Lost,
    input_messages,
    resize_message,
)
from sandboxd.client.attaching import connect as tunnel_path
from sandboxd.client.errors import SandboxError, SandboxGone, Unavailable
from sandboxd.client.flow import Backoff, ConnectionLost, Flow
from sandboxd.client.replies import Gap
from sandboxd.client.websocket import FAILURES, arguments, failure

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

#: Seconds for which a port may be silent after its client has ended its side. A tunnel cannot say that it has.
LINGER = 10.0


class AsyncSandboxClient(Protocol):
    """The attributes of :class:`~sandboxd.client.asynchronous.AsyncSandbox` that its WebSockets use."""

    url: str
    headers: dict[str, str]
    patience: float

    async def carry_out(self, flow: Flow[T]) -> T:
        """Carry out the steps of a flow."""


@asynccontextmanager
async def opened(sandbox: AsyncSandboxClient, path: str, subprotocol: str) -> AsyncIterator[ClientConnection]:
    """
    Open a WebSocket, and close it at the end of the ``async with`` statement.

    :raise SandboxError: if it cannot be opened, or breaks.
    """
    try:
        socket = await connect(**arguments(sandbox.url, path, sandbox.headers, subprotocol))
    except FAILURES as error:
        raise failure(error, sandbox.url) from None
    try:
        async with socket:
            yield socket
    except WebSocketException as error:  # not OSError: that may be one of the statement's own
        raise failure(error, sandbox.url) from None


class AsyncAttachment:
    """
    An attachment to a process: iterate over it for output, and write to it. It reconnects by itself.

    Closing it does not end the process.
    """

    def __init__(self, sandbox: AsyncSandboxClient, attaching: Attaching) -> None:
        self._sandbox = sandbox
        self._attaching = attaching
        self._socket: asyncio.Future[ClientConnection] | None = None
        self._events = self._iterate()

    @property
    def exit_code(self) -> int | None:
        """The exit code of the process, once it has ended; 128 and the number of the signal that ended it."""
        return self._attaching.exit_code

    async def write(self, data: bytes) -> None:
        """Write to the process's stdin."""
        for message in input_messages(data):
            await self._send(message)

    async def close_stdin(self) -> None:
        """Close the process's stdin."""
        await self._send(END_OF_INPUT)

    async def resize(self, cols: int, rows: int) -> None:
        """Set the size of the process's terminal, in characters."""
        self._attaching.size = (cols, rows)
        if self._connected:
            await self._send(resize_message(cols, rows))

    @property
    def _connected(self) -> bool:
        return self._socket is not None and self._socket.done()

    async def connected(self) -> ClientConnection:
        """
        Return the connection, once there is one; it is made when the attachment is iterated over.

        :raise SandboxGone: if there is none in time.
        """
        if self._socket is None:
            self._socket = asyncio.get_running_loop().create_future()
        # Not wait_for, which in Python 3.11 may swallow that this is cancelled.
        connected, _ = await asyncio.wait([self._socket], timeout=self._sandbox.patience)
        if not connected:
            raise SandboxGone(f"{self._sandbox.url}: there is no connection to write to")
        return connected.pop().result()

    async def _send(self, message: bytes) -> None:
        socket = await self.connected()
        try:
            await socket.send(message)
        except FAILURES as error:
            if not self._attaching.ended:
                raise failure(error, self._sandbox.url) from None

    def __aiter__(self) -> AsyncIterator[Chunk | Gap | Lost]:
        return self

    async def __anext__(self) -> Chunk | Gap | Lost:
        return await self._events.__anext__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; the process runs on."""
        await self._events.aclose()

    async def _iterate(self) -> AsyncGenerator[Chunk | Gap | Lost, None]:
        attaching, backoff = self._attaching, Backoff(self._sandbox.patience)
        while not attaching.ended:
            try:
                path = await self._sandbox.carry_out(attaching.path())
                async with opened(self._sandbox, path, ATTACH) as socket:
                    if attaching.size is not None:
                        await socket.send(resize_message(*attaching.size))
                    if self._socket is None or self._socket.done():
                        self._socket = asyncio.get_running_loop().create_future()
                    self._socket.set_result(socket)
                    try:
                        while not attaching.ended:
                            message = await socket.recv()
                            backoff.reset()
                            for each in attaching.feed(message):
                                yield each
                    finally:
                        self._socket = None
            except (ConnectionLost, Unavailable) as error:
                if attaching.ended:
                    return
                await asyncio.sleep(backoff.next(error))


class AsyncTunnel:
    """One TCP connection to a port of the sandbox."""

    def __init__(self, sandbox: AsyncSandboxClient, socket: ClientConnection) -> None:
        self._sandbox = sandbox
        self._socket = socket

    async def send(self, data: bytes) -> None:
        """Send bytes; wait while the other side takes none."""
        try:
            for start in range(0, len(data), MESSAGE):
                await self._socket.send(data[start : start + MESSAGE])
        except FAILURES as error:
            raise failure(error, self._sandbox.url) from None

    async def receive(self) -> bytes:
        """Return some bytes; none at the end."""
        while True:
            try:
                message = await self._socket.recv()
            except ConnectionClosed as error:
                if error.rcvd is not None and error.rcvd.code == 1000:
                    return b""
                raise failure(error, self._sandbox.url) from None
            if message:
                return message.encode() if isinstance(message, str) else message

    def abort(self) -> None:
        """Close the connection at once. A close in order waits for the other side, while what has come is not read."""
        self._socket.transport.abort()


@asynccontextmanager
async def tunnel(sandbox: AsyncSandboxClient, port: int) -> AsyncIterator[AsyncTunnel]:
    """Open a connection to a port of the sandbox, and close it at the end of the ``async with`` statement."""
    async with opened(sandbox, tunnel_path(port), BYTES) as socket:
        yield AsyncTunnel(sandbox, socket)


class AsyncForward:
    """
    A local port that is forwarded to a port of the sandbox.

    :ivar port: the local one.
    :ivar on_error: called with what is wrong, when a connection cannot be forwarded.
    """

    def __init__(self, sandbox: AsyncSandboxClient, port: int, local: int, host: str) -> None:
        self._sandbox = sandbox
        self._remote = port
        self._local = local
        self._host = host
        self._connections: set[asyncio.Task[None]] = set()
        self.port = local
        self.on_error: Callable[[SandboxError], object] = lambda error: None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self._host, self._local)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            try:
                async with tunnel(self._sandbox, self._remote) as remote:
                    await self._carry(reader, writer, remote)
            except SandboxError as error:
                self.on_error(error)
            writer.close()
            await writer.wait_closed()  # until the client has read all, which it may never do
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()
        finally:
            self._connections.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, remote: AsyncTunnel) -> None:
        """Copy bytes both ways until the port's owner has ended its side."""

        async def down() -> None:
            while data := await remote.receive():
                writer.write(data)
                await writer.drain()

        async def up() -> None:
            while data := await reader.read(MESSAGE):
                await remote.send(data)

        tasks = [asyncio.ensure_future(down()), asyncio.ensure_future(up())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done() and tasks[1].exception() is None:
                await asyncio.wait(tasks[:1], timeout=LINGER)
            for task in tasks:
                if task.done() and (error := task.exception()) is not None:
                    raise error
        except asyncio.CancelledError:
            remote.abort()
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
