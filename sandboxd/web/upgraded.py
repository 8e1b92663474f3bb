"""The byte stream of a connection that was upgraded from HTTP to another protocol."""

from __future__ import annotations

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from sandboxd.web.request import Request

#: Bytes that may wait for the reader; with more, the client is not read from.
HIGH_WATER = 256 * 1024


@implementer(IPushProducer)
class UpgradedStream:
    """
    The byte stream from and to the client. One coroutine reads, one writes; a disconnect cancels the route.

    :param head: the whole head of the response, whose status is 101.
    """

    def __init__(self, request: Request, head: bytes) -> None:
        self._request = request
        self._chunks: list[bytes] = []
        self._size = 0
        self._lost = False
        self._paused = False
        self._reader: Deferred[None] | None = None
        self._writer: Deferred[None] | None = None
        request.notifyFinish().addBoth(self._disconnected)
        behind = request.switch_protocols(head, self._data_received)
        request.registerProducer(self, True)
        if behind:
            self._data_received(behind)

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
        while self._paused and not self._lost:
            self._writer = Deferred()
            await self._writer

    def pauseProducing(self) -> None:
        """Make the writer wait, as the client reads more slowly than it writes."""
        self._paused = True

    def resumeProducing(self) -> None:
        """Let the writer go on, as the client has caught up."""
        self._paused = False
        writer, self._writer = self._writer, None
        if writer is not None and not writer.called:
            writer.callback(None)

    def stopProducing(self) -> None:
        """Do nothing: the client is gone, and the cancellation of the route follows."""

    def _data_received(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        if self._size >= HIGH_WATER:
            self._request.connection.hold(True)
        reader, self._reader = self._reader, None
        if reader is not None and not reader.called:
            reader.callback(None)

    def _disconnected(self, _: object) -> None:
        self._lost = True
        self.resumeProducing()
