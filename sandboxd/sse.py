"""
Server-Sent Events: batches of output as events, and an execution's log as a stream of them.

Framing as in the WHATWG HTML standard, section 9.2, with ``\\n`` line ends and one ``data:`` line per event. A
batch is encoded with a handful of C-speed calls, whatever its number of lines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timezone
from itertools import chain, repeat
from json.encoder import encode_basestring_ascii

from twisted.application.service import Service
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.web.server import Request

from sandboxd.execution.log import Batch, Cursor, Gap
from sandboxd.jsontext import dumps
from sandboxd.responses import ResponseStream
from sandboxd.turns import Turns


def event(name: str, data: object, id: int) -> bytes:
    """
    One event.

    :param id: the sequence number behind which a stream that broke here is to go on.
    """
    return b"event: %s\nid: %d\ndata: %s\n\n" % (name.encode("ascii"), id, dumps(data))


def output_events(batch: Batch) -> bytes:
    """The records of a batch as ``output`` events, for ``/run_streaming``."""
    return _events(batch, "output", f'{{"stream":"{batch.stream}","data":')


def log_events(batch: Batch) -> bytes:
    """The records of a batch as ``log`` events, for ``/process_logs_streaming``."""
    time = timestamp(batch.time)
    return _events(batch, "log", f'{{"timestamp":"{time}","stream":"{batch.stream}","data":')


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as RFC 3339 in UTC, with microseconds."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _events(batch: Batch, name: str, prefix: str) -> bytes:
    head = f"event: {name}\nid: "
    middle = f"\ndata: {prefix}"
    tail = ',"partial":true}\n\n' if batch.partial else "}\n\n"
    numbers = map(str, range(batch.first, batch.end))
    pieces = zip(repeat(head), numbers, repeat(middle), _strings(batch), repeat(tail))
    return "".join(chain.from_iterable(pieces)).encode("ascii")


def texts(batch: Batch) -> list[str]:
    """The text of each record, without its line end; what is not UTF-8 becomes U+FFFD."""
    data = batch.data
    if not data.endswith(b"\n"):
        return [data.decode("utf-8", "replace")]
    return data[:-1].replace(b"\r\n", b"\n").removesuffix(b"\r").decode("utf-8", "replace").split("\n")


def _strings(batch: Batch) -> list[str]:
    """:func:`texts` as JSON strings. Encodes them all with one call, unless a backslash makes that ambiguous."""
    if batch.count == 1 or b"\\" in batch.data:
        return list(map(encode_basestring_ascii, texts(batch)))
    data = batch.data[:-1].replace(b"\r\n", b"\n").removesuffix(b"\r")
    return encode_basestring_ascii(data.decode("utf-8", "replace")).replace("\\n", '"\n"').split("\n")


class EventStream(ResponseStream):
    """A response of type ``text/event-stream``. Its headers go out at once; open it with :meth:`Streams.open`."""

    def __init__(self, request: Request, streams: Streams) -> None:
        request.setHeader(b"Content-Type", b"text/event-stream")
        request.setHeader(b"Cache-Control", b"no-cache")
        request.setHeader(b"X-Accel-Buffering", b"no")  # or nginx would hold events back
        super().__init__(request)
        self._streams = streams
        self._written = False
        self._cursor: Cursor | None = None
        super().write(b"")

    @property
    def lag(self) -> int:
        """Records of the log that were not sent yet."""
        return 0 if self._cursor is None else self._cursor.behind

    def write(self, data: bytes) -> None:
        """Send whole events."""
        self._written = True
        super().write(data)

    def beat(self) -> None:
        """Send a comment if nothing was sent since the last beat, and nothing waits to be."""
        if not self._written and not self.paused:
            super().write(b":\n\n")
        self._written = False

    def finish(self) -> None:
        """The stream has ended."""
        self._streams.closed(self)
        super().finish()

    async def follow(self, cursor: Cursor, encode: Callable[[Batch], bytes]) -> None:
        """Send all that ``cursor`` reads, as it comes, until the log has ended and all is sent."""
        while not cursor.ended:
            await self.send_available(cursor, encode)
            if not cursor.ended:
                await cursor.when_more()

    async def send_available(self, cursor: Cursor, encode: Callable[[Batch], bytes]) -> None:
        """Send what there is to read now."""
        self._cursor = cursor
        while True:
            await self.when_ready()
            await self._streams.turns.turn()
            found = cursor.read()
            if found is None:
                return
            if isinstance(found, Gap):
                self._streams.dropped += found.dropped
                self.write(event("gap", {"dropped": found.dropped}, found.after))
            else:
                self.write(found.encoded(encode))


class Streams(Service):
    """
    The event streams that are open.

    One timer sends a comment on each stream that was silent since its last tick, so that proxies keep them and the
    kernel notices a client that is gone.

    :param turns: shares out the time of the reactor.
    :param limit: how many may be open.
    :param heartbeat: seconds between ticks.
    :ivar dropped: records that were gone from a log when a stream got to them.
    """

    _log = Logger()

    def __init__(self, clock: IReactorTime, turns: Turns, limit: int, heartbeat: float) -> None:
        self.turns = turns
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
        """Those that are open."""
        return self._open

    @property
    def full(self) -> bool:
        """Whether no more may be opened."""
        return len(self._open) >= self._limit

    def open(self, request: Request) -> EventStream:
        """Make a request's response an event stream."""
        stream = EventStream(request, self)
        self._open.add(stream)
        return stream

    def closed(self, stream: EventStream) -> None:
        """One has ended."""
        self._open.discard(stream)

    def startService(self) -> None:
        """Begin to send heartbeats."""
        super().startService()
        self._beats.start(self._interval, now=False).addErrback(
            lambda failure: self._log.failure("heartbeats have stopped", failure)
        )

    def stopService(self) -> None:
        """Send no more heartbeats."""
        super().stopService()
        if self._beats.running:
            self._beats.stop()

    def _beat(self) -> None:
        for stream in list(self._open):
            stream.beat()
