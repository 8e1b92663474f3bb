"""Encode batches of a log as Server-Sent Events, and send a log as an event stream."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice

from sandboxd.api.routing import ApiError
from sandboxd.execution.log import Batch, Cursor, DroppedRecords
from sandboxd.messages.decoding import BadRequest
from sandboxd.messages.executions import Gap
from sandboxd.reactor.timestamps import rfc3339
from sandboxd.web.ascii_json import escaped
from sandboxd.web.request import Request
from sandboxd.web.sse import EventStream, Streams, event


def output_events(batch: Batch) -> bytes:
    """Encode the records of a batch as ``output`` events, for ``/run_streaming``."""
    return _events(batch, "output", f'{{"stream":"{batch.stream}","data":')


def log_events(batch: Batch) -> bytes:
    """Encode the records of a batch as ``log`` events, for ``/process_logs_streaming``."""
    time = rfc3339(batch.time)
    return _events(batch, "log", f'{{"timestamp":"{time}","stream":"{batch.stream}","data":')


#: The last three digits of a sequence number.
_DIGITS = [b"%03d" % number for number in range(1000)]


def _events(batch: Batch, name: str, prefix: str) -> bytes:
    """
    Encode the records of a batch as events.

    Sequence numbers are put together from the thousands, which are the same for many, and the last three digits, which
    are encoded in advance: formatting the numbers would take most of the time.
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


def texts(batch: Batch, count: int) -> list[str]:
    """Return the text of the first ``count`` records, without line ends; what is not UTF-8 becomes U+FFFD."""
    return [record.decode("utf-8", "replace") for record in islice(batch.lines.records(), count)]


def _escaped(batch: Batch) -> list[bytes]:
    """
    Encode the texts of the records as the insides of JSON strings.

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


def check_streams(streams: Streams) -> None:
    """
    Raise a 503 :class:`ApiError` if as many event streams are open as may be.
    """
    if streams.full:
        raise ApiError(503, f"{len(streams)} event streams are open, which is the limit; try again later")


def resume_after(request: Request, after: int | None) -> int:
    """
    Return the sequence number after which a stream begins; 0 for its beginning.

    :param after: ``after`` of the query; if None, the header ``Last-Event-ID`` counts.
    :raise BadRequest: if that is not a number.
    """
    text = request.text_header(b"Last-Event-ID")
    if text and not (text.isascii() and text.isdigit() and len(text) < 19):
        raise BadRequest(f"Last-Event-ID: {text!r} is not a number")
    return int(text or 0) if after is None else after


async def follow(stream: EventStream, streams: Streams, cursor: Cursor, encode: Callable[[Batch], bytes]) -> None:
    """
    Send all that ``cursor`` reads, as it comes, until the log has ended and everything is sent.

    :param encode: the events of a batch.
    """
    while not cursor.ended:
        await send_available(stream, streams, cursor, encode)
        if not cursor.ended:
            await cursor.when_more()


async def send_available(
    stream: EventStream, streams: Streams, cursor: Cursor, encode: Callable[[Batch], bytes]
) -> None:
    """Send what ``cursor`` can read now. Waits for the client to take it."""
    stream.backlog = lambda: cursor.behind
    while True:
        await stream.when_ready()
        await streams.turns.turn()
        found = cursor.read()
        if found is None:
            return
        if isinstance(found, DroppedRecords):
            streams.dropped += found.dropped
            stream.write(event("gap", Gap(found.dropped), found.after))
        else:
            stream.write(found.encoded(encode))
