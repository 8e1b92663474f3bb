"""
Server-Sent Events: batches of output as events, and an execution's log as a stream of them.

Framing as in the WHATWG HTML standard, section 9.2, with ``\\n`` line ends and one ``data:`` line per event. A
batch is encoded with a handful of C-speed calls, whatever its number of lines.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime, timezone

from twisted.application.service import Service
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.web.server import Request

from sandboxd.execution.log import Batch, Cursor, Gap
from sandboxd.web.ascii_json import dumps, escaped
from sandboxd.web.response import ResponseStream
from sandboxd.reactor.turn_budget import Turns


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


#: The last three digits of a sequence number.
_DIGITS = [b"%03d" % number for number in range(1000)]


def _events(batch: Batch, name: str, prefix: str) -> bytes:
    """
    The records of a batch as events.

    Sequence numbers are put together from the thousands, which are the same for many, and the last three digits, which
    are there already: to make a million numbers is most of what it takes to make a million events.
    """
    head = f"event: {name}\nid: ".encode("ascii")
    middle = f'\ndata: {prefix}"'.encode("ascii")
    tail = b'","partial":true}\n\n' if batch.partial else b'"}\n\n'
    texts = _escaped(batch)
    pieces: list[bytes] = []
    index = 0
    while index < batch.count:
        thousands, rest = divmod(batch.first + index, 1000)
        count = min(1000 - rest, batch.count - index)
        some = [tail + head + (b"%d" % thousands if thousands else b"")] * (4 * count)
        some[1::4] = _DIGITS[rest : rest + count] if thousands else [b"%d" % n for n in range(rest, rest + count)]
        some[2::4] = [middle] * count
        some[3::4] = texts[index : index + count]
        pieces += some
        index += count
    pieces[0] = pieces[0].removeprefix(tail)
    pieces.append(tail)
    return b"".join(pieces)


def texts(batch: Batch) -> list[str]:
    """The text of each record, without its line end; what is not UTF-8 becomes U+FFFD."""
    return [record.decode("utf-8", "replace") for record in batch.lines.records()]


def _escaped(batch: Batch) -> list[bytes]:
    """
    :func:`texts` as the insides of JSON strings.

    All are encoded with one call, unless a backslash makes it ambiguous where one ends.
    """
    lines = batch.lines
    data = lines.data
    if lines.ends or not data.endswith(b"\n") or b"\\" in data:
        return [escaped(record) for record in lines.records()]
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    data = data[:-1]
    encoded = escaped(data)
    if len(encoded) == len(data) + lines.count - 1:  # nothing had to be escaped but the newlines
        return data.split(b"\n")
    return encoded.split(b"\\n")


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
