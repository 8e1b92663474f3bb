"""
Server-Sent Events: the encoding of an event, a response as an event stream, and all streams that are open.

Framing as in the WHATWG HTML standard, section 9.2, with ``\\n`` line ends and one ``data:`` line per event. A
batch is encoded with a handful of C-speed calls, whatever its number of lines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from sandboxd.reactor.turn_budget import TurnBudget
from sandboxd.web.ascii_json import dumps
from sandboxd.web.request import Request
from sandboxd.web.response import ResponseStream

#: Seconds for which the head of a response waits for the first event, to be sent with it.
HEAD_DELAY = 0.005


def event(name: str, data: object, id: int) -> bytes:
    """
    Return an encoded event.

    :param id: the sequence number behind which a stream that broke here is to go on.
    """
    return b"event: %s\nid: %d\ndata: %s\n\n" % (name.encode("ascii"), id, dumps(data))


class EventStream(ResponseStream):
    """
    A response of type ``text/event-stream``. Its headers are sent with the first event, or after :data:`HEAD_DELAY`;
    open it with :meth:`Streams.open`.

    :ivar backlog: returns how many records of what is streamed were not sent yet.
    """

    def __init__(self, request: Request, streams: Streams) -> None:
        request.setHeader(b"Content-Type", b"text/event-stream")
        request.setHeader(b"Cache-Control", b"no-cache")
        request.setHeader(b"X-Accel-Buffering", b"no")  # or nginx would hold events back
        super().__init__(request)
        self._streams = streams
        self._written = False
        self.backlog: Callable[[], int] = lambda: 0
        self._head: IDelayedCall | None = streams.clock.callLater(HEAD_DELAY, self._send_head)

    def _send_head(self) -> None:
        self._head = None
        super().write(b"")

    def _keep_head(self) -> None:
        head, self._head = self._head, None
        if head is not None:
            head.cancel()

    def write(self, data: bytes) -> None:
        """Send whole events."""
        self._keep_head()
        self._written = True
        super().write(data)

    def beat(self) -> None:
        """Send a comment if nothing was sent since the last call, and nothing waits to be sent."""
        if not self._written and not self.paused:
            self.write(b":\n\n")
        self._written = False

    def finish(self) -> None:
        """End the stream."""
        self._keep_head()
        self._streams.closed(self)
        super().finish()


class Streams(Service):
    """
    The open event streams.

    One timer sends a comment on each stream that was silent since its last tick, so that proxies keep them and the
    kernel notices a client that is gone.

    :param turns: shares out the time of the reactor.
    :param limit: how many may be open.
    :param heartbeat: seconds between ticks.
    :ivar dropped: records that were gone from a log when a stream got to them.
    :ivar clock: schedules what is sent late.
    """

    _log = Logger()

    def __init__(self, clock: IReactorTime, turns: TurnBudget, limit: int, heartbeat: float) -> None:
        self.turns = turns
        self.clock = clock
        self._limit = limit
        self._open: set[EventStream] = set()
        self._interval = heartbeat
        self.dropped = 0
        self._beats = LoopingCall(self._beat)
        self._beats.clock = clock

    def __len__(self) -> int:
        return len(self._open)

    @property
    def open_streams(self) -> Collection[EventStream]:
        """The open streams."""
        return self._open

    @property
    def full(self) -> bool:
        """Whether no more streams may be opened."""
        return len(self._open) >= self._limit

    def open(self, request: Request) -> EventStream:
        """Turn a request's response into an event stream."""
        stream = EventStream(request, self)
        self._open.add(stream)
        return stream

    def closed(self, stream: EventStream) -> None:
        """Forget a stream that has ended."""
        self._open.discard(stream)

    def startService(self) -> None:
        """Start to send heartbeats."""
        super().startService()
        self._beats.start(self._interval, now=False).addErrback(
            lambda failure: self._log.failure("heartbeats have stopped", failure)
        )

    def stopService(self) -> None:
        """Stop the heartbeats."""
        super().stopService()
        if self._beats.running:
            self._beats.stop()

    def _beat(self) -> None:
        for stream in list(self._open):
            stream.beat()
