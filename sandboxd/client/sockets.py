"""The WebSockets of the blocking client: attachments, tunnels and forwarded ports."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.sync.client import ClientConnection, connect

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
from sandboxd.client.errors import SandboxGone, Unavailable
from sandboxd.client.flow import Backoff, ConnectionLost, Flow
from sandboxd.client.replies import Gap
from sandboxd.client.websocket import FAILURES, arguments, failure

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")


class SandboxClient(Protocol):
    """The attributes of :class:`~sandboxd.client.blocking.Sandbox` that its WebSockets use."""

    url: str
    secret: str | None
    headers: dict[str, str]
    patience: float

    def carry_out(self, flow: Flow[T]) -> T:
        """Carry out the steps of a flow."""


@contextmanager
def opened(sandbox: SandboxClient, path: str, subprotocol: str) -> Iterator[ClientConnection]:
    """
    Open a WebSocket, and close it at the end of the ``with`` statement.

    :raise SandboxError: if it cannot be opened, or breaks.
    """
    try:
        socket = connect(**arguments(sandbox.url, path, sandbox.headers, subprotocol))
    except FAILURES as error:
        raise failure(error, sandbox.url) from None
    try:
        with socket:
            yield socket
    except WebSocketException as error:  # not OSError: that may be one of the statement's own
        raise failure(error, sandbox.url) from None


class Attachment:
    """
    An attachment to a process: iterate over it for output, and write to it from another thread or in between.

    It reconnects by itself. Closing it does not end the process.
    """

    def __init__(self, sandbox: SandboxClient, attaching: Attaching) -> None:
        self._sandbox = sandbox
        self._attaching = attaching
        self._changed = threading.Condition()
        self._socket: ClientConnection | None = None
        self._events = self._iterate()

    @property
    def exit_code(self) -> int | None:
        """The exit code of the process, once it has ended; 128 and the number of the signal that ended it."""
        return self._attaching.exit_code

    def write(self, data: bytes) -> None:
        """Write to the process's stdin. The iteration over the output must have begun, or run in another thread."""
        for message in input_messages(data):
            self._send(message)

    def close_stdin(self) -> None:
        """Close the process's stdin."""
        self._send(END_OF_INPUT)

    def resize(self, cols: int, rows: int) -> None:
        """Set the size of the process's terminal, in characters."""
        self._attaching.size = (cols, rows)
        if self._socket is not None:
            self._send(resize_message(cols, rows))

    def _send(self, message: bytes) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: self._socket is not None, self._sandbox.patience):
                raise SandboxGone(f"{self._sandbox.url}: there is no connection to write to")
            socket = self._socket
        assert socket is not None
        try:
            socket.send(message)
        except FAILURES as error:
            if not self._attaching.ended:
                raise failure(error, self._sandbox.url) from None

    def __iter__(self) -> Iterator[Chunk | Gap | Lost]:
        return self

    def __next__(self) -> Chunk | Gap | Lost:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the process runs on."""
        self._events.close()

    def _set(self, socket: ClientConnection | None) -> None:
        with self._changed:
            self._socket = socket
            self._changed.notify_all()

    def _iterate(self) -> Generator[Chunk | Gap | Lost, None, None]:
        attaching, backoff = self._attaching, Backoff(self._sandbox.patience)
        while not attaching.ended:
            try:
                path = self._sandbox.carry_out(attaching.path())
                with opened(self._sandbox, path, ATTACH) as socket:
                    if attaching.size is not None:
                        socket.send(resize_message(*attaching.size))
                    self._set(socket)
                    try:
                        while not attaching.ended:
                            message = socket.recv()
                            backoff.reset()
                            yield from attaching.feed(message)
                    finally:
                        self._set(None)
            except (ConnectionLost, Unavailable) as error:
                if attaching.ended:
                    return
                time.sleep(backoff.next(error))


class Tunnel:
    """One TCP connection to a port of the sandbox."""

    def __init__(self, sandbox: SandboxClient, socket: ClientConnection) -> None:
        self._sandbox = sandbox
        self._socket = socket

    def send(self, data: bytes) -> None:
        """Send bytes; wait while the other side takes none."""
        try:
            for start in range(0, len(data), MESSAGE):
                self._socket.send(data[start : start + MESSAGE])
        except FAILURES as error:
            raise failure(error, self._sandbox.url) from None

    def receive(self) -> bytes:
        """Return some bytes; none at the end."""
        while True:
            try:
                message = self._socket.recv()
            except ConnectionClosed as error:
                if error.rcvd is not None and error.rcvd.code == 1000:
                    return b""
                raise failure(error, self._sandbox.url) from None
            if message:
                return message.encode() if isinstance(message, str) else message


@contextmanager
def tunnel(sandbox: SandboxClient, port: int) -> Iterator[Tunnel]:
    """Open a connection to a port of the sandbox, and close it at the end of the ``with`` statement."""
    with opened(sandbox, tunnel_path(port), BYTES) as socket:
        yield Tunnel(sandbox, socket)


class Forward:
    """
    A local port that is forwarded to a port of the sandbox, by a thread with an event loop.

    :ivar port: the local one.
    """

    def __init__(self, sandbox: SandboxClient, port: int, local: int, host: str) -> None:
        self._sandbox = sandbox
        self._remote = port
        self.port = local
        self._host = host
        self._ready: threading.Event = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._forward, name="forward", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        if self._error is not None:
            self._thread.join()
            raise self._error
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()

    def _forward(self) -> None:
        try:
            asyncio.run(self._run())
        except BaseException as error:
            if self._ready.is_set():
                raise
            self._error = error
        finally:
            self._ready.set()

    async def _run(self) -> None:
        from sandboxd.client.async_sockets import AsyncForward
        from sandboxd.client.asynchronous import AsyncSandbox

        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        async with (
            AsyncSandbox(self._sandbox.url, self._sandbox.secret, patience=self._sandbox.patience) as sandbox,
            AsyncForward(sandbox, self._remote, self.port, self._host) as forward,
        ):
            self.port = forward.port
            self._ready.set()
            await self._over.wait()
