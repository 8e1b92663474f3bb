"""Connections that were upgraded from HTTP to another protocol, and the simplest such protocol: a byte stream."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from sandboxd.web.request import Request

#: Bytes that may wait for the reader; with more, the client is not read from.
HIGH_WATER = 256 * 1024


@implementer(IPushProducer)
class UpgradedConnection:
    """
    The base of the protocols of upgraded connections. One coroutine reads, one writes; a disconnect cancels the route.

    Subclasses take what the client sends in :meth:`_data_received`, for which they must be ready before this class's
    ``__init__`` is called.

    :param head: the whole head of the response, whose status is 101.
    :ivar paused: whether the client has yet to take what was sent.
    """

    def __init__(self, request: Request, head: bytes) -> None:
        self.paused = False
        self._request = request
        self._lost = False
        self._reader: Deferred[None] | None = None
        self._writer: Deferred[None] | None = None
        request.notifyFinish().addBoth(self._disconnected)
        behind = request.switch_protocols(head, self._data_received)
        request.registerProducer(self, True)
        if behind:
            self._data_received(behind)

    def pauseProducing(self) -> None:
        """Make the writer wait, as the client reads more slowly than it writes."""
        self.paused = True

    def resumeProducing(self) -> None:
        """Let the writer go on, as the client has caught up."""
        self.paused = False
        self._wake_writer()

    def stopProducing(self) -> None:
        """Do nothing: the client is gone, and the cancellation of the route follows."""

    def _data_received(self, data: bytes) -> None:
        raise NotImplementedError

    def _disconnected(self, _: object) -> None:
        self._lost = True
        self._wake_writer()

    def _wake_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.called:
            reader.callback(None)

    def _wake_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is not None and not writer.called:
            writer.callback(None)


class UpgradedStream(UpgradedConnection):
    """The byte stream from and to the client."""

    def __init__(self, request: Request, head: bytes) -> None:
        self._chunks: list[bytes] = []
        self._size = 0
        super().__init__(request, head)

    async def read(self) -> bytes:
        """Return bytes as soon as some have arrived."""
        while not self._chunks:
            self._reader = Deferred()
            await self._reader
        data = b"".join(self._chunks)
        self._chunks.clear()
        if self._size >= HIGH_WATER and not self._lost:
            self._request.connection.hold(False)
        self._size = 0
        return data

    async def write(self, data: bytes) -> None:
        """Send bytes, once the client has taken what was sent before."""
        await self.when_ready()
        if data and not self._lost:
            self._request.send_raw(data)

    async def when_ready(self) -> None:
        """Wait until the client has taken what was sent."""
        while self.paused and not self._lost:
            self._writer = Deferred()
            await self._writer

    def _data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        if self._size >= HIGH_WATER:
            self._request.connection.hold(True)
        self._wake_reader()
