"""
Server-Sent Events: batches of output as events, and an execution's log as a stream of them.

Framing as in the WHATWG HTML standard, section 9.2, with ``\\n`` line ends and one ``data:`` line per event. A
batch is encoded with a handful of C-speed calls, whatever its number of lines.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from itertools import chain, repeat
from json.encoder import encode_basestring_ascii

from twisted.web.server import Request

from sandboxd.execution.log import Batch, Cursor, Gap
from sandboxd.jsontext import dumps
from sandboxd.responses import ResponseStream


def event(name: str, data: object) -> bytes:
    """One event without an id."""
    return b"event: %s\ndata: %s\n\n" % (name.encode("ascii"), dumps(data))


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


def _strings(batch: Batch) -> list[str]:
    """Each record as a JSON string, without its line end."""
    data = batch.data
    if not data.endswith(b"\n"):
        return [encode_basestring_ascii(data.decode("utf-8", "replace"))]
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
    text = data[:-1].decode("utf-8", "replace")
    if "\\" in text:
        # An escaped backslash before an "n" would look like an escaped newline below.
        return list(map(encode_basestring_ascii, text.split("\n")))
    return encode_basestring_ascii(text).replace("\\n", '"\n"').split("\n")


class EventStream(ResponseStream):
    """A response of type ``text/event-stream``. Its headers go out at once."""

    def __init__(self, request: Request) -> None:
        request.setHeader(b"Content-Type", b"text/event-stream")
        request.setHeader(b"Cache-Control", b"no-cache")
        request.setHeader(b"X-Accel-Buffering", b"no")  # or nginx would hold events back
        super().__init__(request)
        self.write(b"")

    async def follow(self, cursor: Cursor, encode: Callable[[Batch], bytes]) -> None:
        """Send all that ``cursor`` reads, as it comes, until the log has ended and all is sent."""
        while not cursor.ended:
            await self.send_available(cursor, encode)
            if not cursor.ended:
                await cursor.when_more()

    async def send_available(self, cursor: Cursor, encode: Callable[[Batch], bytes]) -> None:
        """Send what there is to read now."""
        while True:
            await self.when_ready()
            found = cursor.read()
            if found is None:
                return
            if isinstance(found, Gap):
                self.write(b"event: gap\nid: %d\ndata: %s\n\n" % (found.after, dumps({"dropped": found.dropped})))
            else:
                self.write(found.encoded(encode))
