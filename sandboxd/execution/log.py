"""
The output log of one execution: bounded, numbered, read by any number of cursors.

A reader holds a position, not a queue. History and live output are the same read, so there is no hand-over
between them that could lose or double a line, and a slow reader costs no memory beyond the log's own bound.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from typing import Literal, NamedTuple

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer

from sandboxd.execution.lines import LineSplitter, SplitLines

Stream = Literal["stdout", "stderr"]

#: Bytes of the Python objects of one batch, counted so that many tiny batches are bounded too.
BATCH_OVERHEAD = 256

#: Number of the newest batches whose encoded form is cached for other followers.
REMEMBERED = 16

#: Bytes that a lossless reader is behind when the producer is paused, and when it is resumed.
HIGH_WATER = 512 * 1024
LOW_WATER = 128 * 1024


class Batch:
    """
    Consecutive records of one stream that arrived together.

    :ivar time: seconds since the epoch.
    :ivar first: sequence number of the first record.
    :ivar lines: the records.
    :ivar at: bytes of the stream before it.
    :ivar offset: sum of the :attr:`cost` of all batches before it.
    """

    __slots__ = ("_encoded", "_new", "at", "first", "lines", "offset", "stream", "time")

    def __init__(
        self, stream: Stream, time: float, first: int, lines: SplitLines, offset: int = 0, at: int = 0
    ) -> None:
        self.at = at
        self.stream: Stream = stream
        self.time = time
        self.first = first
        self.lines = lines
        self.offset = offset
        self._encoded: tuple[Callable[[Batch], bytes], bytes] | None = None
        self._new = True

    @property
    def data(self) -> bytes:
        """The bytes of the records, as they came."""
        return self.lines.data

    @property
    def count(self) -> int:
        """Number of records."""
        return self.lines.count

    @property
    def partial(self) -> bool:
        """Whether the line of each record continues in the next record of the stream."""
        return self.lines.partial

    @property
    def end(self) -> int:
        """The sequence number after the last record."""
        return self.first + self.lines.count

    @property
    def cost(self) -> int:
        """Bytes of memory that the batch counts for."""
        return len(self.lines.data) + BATCH_OVERHEAD

    def since(self, position: int) -> Batch:
        """Return the records from ``position`` on, a sequence number of this batch."""
        if position == self.first:
            return self
        lines = self.lines.since(position - self.first)
        at = self.at + len(self.lines.data) - len(lines.data)
        return Batch(self.stream, self.time, position, lines, at=at)

    def encoded(self, encode: Callable[[Batch], bytes]) -> bytes:
        """Return ``encode(self)``, cached while the batch is among the newest."""
        if self._encoded is not None and self._encoded[0] is encode:
            return self._encoded[1]
        encoded = encode(self)
        if self._new:
            self._encoded = (encode, encoded)
        return encoded

    def grow_old(self) -> None:
        """Drop the cached encoded form, and cache none from now on."""
        self._encoded = None
        self._new = False


class DroppedRecords(NamedTuple):
    """
    The number of records that a reader has missed, because the log has dropped them.

    :ivar dropped: their number.
    :ivar after: sequence number of the last one.
    """

    dropped: int
    after: int


class OutputLog:
    """
    The output of an execution, newest last.

    Records are numbered from 1. The newest ``max_records`` are kept, and older ones only while a cursor that was
    opened before they were outdated has yet to read them; all within ``max_bytes``.

    :param max_records: most records that a new reader gets.
    :param max_bytes: most bytes held.
    :ivar next: sequence number of the next record.
    :ivar closed: whether no more output will come.
    :ivar total_bytes: bytes written so far.
    :ivar paused: whether the producer is paused for a lossless reader.
    :ivar pauses: how often it has been.
    :ivar last_output: time of the last output in seconds since the epoch, or None.
    :ivar listener: called with each batch when it is appended, which costs less than a cursor; or None.
    """

    def __init__(self, max_records: int = 10_000, max_bytes: int = 16 * 1024 * 1024) -> None:
        self.max_records = max_records
        self.max_bytes = max_bytes
        self.next = 1
        self.closed = False
        self.total_bytes = 0
        self.last_output: float | None = None
        self.listener: Callable[[Batch], None] | None = None
        self._taken = 0
        self._batches: list[Batch] = []
        self._splitters: dict[Stream, LineSplitter] = {"stdout": LineSplitter(), "stderr": LineSplitter()}
        self._cursors: set[Cursor] = set()
        self._waiting: list[Deferred[None]] = []
        self._waiting_for_bytes: list[Deferred[None]] = []
        self._recorded: dict[Stream, int] = {"stdout": 0, "stderr": 0}  # bytes that are in records
        self._producer: IPushProducer | None = None
        self.paused = False
        self.pauses = 0

    def append(self, stream: Stream, chunk: bytes, time: float) -> bool:
        """
        Append output.

        :param time: seconds since the epoch.
        :return: whether an unfinished line, or the next piece of one, begins with this chunk.
        """
        if self.closed:
            return False
        self.total_bytes += len(chunk)
        self.last_output = time
        splitter = self._splitters[stream]
        self._add(stream, splitter.feed(chunk), time)
        self._wake_all(self._waiting_for_bytes)
        return splitter.begins and bool(splitter.unfinished)

    def flush(self, stream: Stream, time: float) -> None:
        """Make a record of the unfinished line, as far as it has arrived."""
        self._add(stream, self._splitters[stream].take_unfinished(), time)

    def close(self, time: float) -> None:
        """End the log, unless it has ended: later output is dropped. An unfinished last line becomes a record."""
        if self.closed:
            return
        for stream, splitter in self._splitters.items():
            self._add(stream, splitter.flush(), time)
        self.closed = True
        if self.paused and self._producer is not None:
            self.paused = False
            self._producer.resumeProducing()
        self._producer = self.listener = None  # which may hold the execution, and that holds this log
        self._wake()

    @property
    def last(self) -> int:
        """Sequence number of the newest record; 0 if there is none."""
        return self.next - 1

    def before_last(self, count: int, stream: Stream | None = None) -> int:
        """Return the sequence number before the last ``count`` records, of all streams or of ``stream``."""
        if count == 0:
            return self.last
        for batch in reversed(self._batches):
            if batch.end <= self.first:
                break
            if stream not in (None, batch.stream):
                continue
            if batch.count >= count:
                return max(batch.end - count, self.first) - 1
            count -= batch.count
        return self.first - 1

    def bytes_cursor(self, after: int = 0, history: bool = True, offset: int | None = None) -> BytesCursor:
        """
        Open a reader of the bytes as they came, unfinished lines included; close it when done.

        :param after: the sequence number to read after.
        :param history: whether it also reads an unfinished line that has begun already.
        :param offset: read after so many bytes of stdout instead, of a log that has no stderr.
        """
        sent = {} if history else {name: self._arrived(name) for name in self._splitters}
        if offset is not None:
            sent = {"stdout": offset}
            index = bisect_right(self._batches, offset, key=_at) - 1
            after = self._batches[index].first - 1 if index >= 0 else 0
        return BytesCursor(self, self.cursor(after), sent)

    def _bytes_before(self, position: int) -> int:
        """Return the bytes of its stream before a record, in a log that has one stream only."""
        index = self._find(position)
        if position >= self.next or index >= len(self._batches):
            return self._recorded["stdout"]
        batch = self._batches[index]
        return batch.since(max(position, batch.first)).at

    def _arrived(self, stream: Stream) -> int:
        return self._recorded[stream] + len(self._splitters[stream].unfinished)

    def cursor(self, after: int = 0, lossless: bool = False, stream: Stream | None = None) -> Cursor:
        """
        Open a reader; close it when done.

        :param after: the sequence number to read after; :class:`DroppedRecords` stand for records that are not kept.
        :param lossless: whether the producer is paused while this reader is far behind.
        :param stream: the only stream that it reads; None for both.
        """
        cursor = Cursor(self, min(after + 1, self.next), self.first, lossless, stream)
        self._cursors.add(cursor)
        return cursor

    def register_producer(self, producer: IPushProducer) -> None:
        """Pause ``producer``, the child's pipes, when a lossless reader falls behind, until the log is closed."""
        self._producer = producer

    @property
    def first(self) -> int:
        """Sequence number of the first record that a new reader gets."""
        oldest = self._batches[0].first if self._batches else self.next
        return max(oldest, self.next - self.max_records)

    @property
    def size(self) -> int:
        """Bytes of memory held."""
        return self._taken - self._batches[0].offset if self._batches else 0

    @property
    def followers(self) -> int:
        """Number of open cursors."""
        return len(self._cursors)

    def _add(self, stream: Stream, found: list[SplitLines], time: float) -> None:
        if not found:
            return
        for lines in found:
            batch = Batch(stream, time, self.next, lines, self._taken, self._recorded[stream])
            self._recorded[stream] += len(lines.data)
            self._batches.append(batch)
            self.next = batch.end
            self._taken += batch.cost
            if len(self._batches) > REMEMBERED:
                self._batches[-REMEMBERED - 1].grow_old()
            if self.listener is not None:
                self.listener(batch)
        self._trim()
        self._wake()
        self._balance()

    def _trim(self) -> None:
        """Drop batches that are outdated and that no cursor has yet to read, and those beyond ``max_bytes``."""
        wanted = min((cursor.position for cursor in self._cursors), default=self.next)
        keep_from = min(wanted, self.next - self.max_records)
        drop = 0
        while drop < len(self._batches) - 1:
            batch = self._batches[drop]
            if batch.end > keep_from and self._taken - batch.offset <= self.max_bytes:
                break
            drop += 1
        if drop:
            del self._batches[:drop]

    def _wake(self) -> None:
        self._wake_all(self._waiting)
        self._wake_all(self._waiting_for_bytes)

    def _wake_all(self, waiting: list[Deferred[None]]) -> None:
        woken = waiting.copy()
        waiting.clear()
        for deferred in woken:
            if not deferred.called:  # an earlier callback may have cancelled it
                deferred.callback(None)

    def _balance(self) -> None:
        """Pause the producer when a lossless reader is far behind; resume it when none is."""
        if self._producer is None:
            return
        behind = max((self._behind(cursor) for cursor in self._cursors if cursor.lossless), default=0)
        if not self.paused and behind > HIGH_WATER:
            self.paused = True
            self.pauses += 1
            self._producer.pauseProducing()
        elif self.paused and behind < LOW_WATER:
            self.paused = False
            self._producer.resumeProducing()

    def _behind(self, cursor: Cursor) -> int:
        """Return the bytes that ``cursor`` has yet to read."""
        index = self._find(cursor.position)
        return self._taken - self._batches[index].offset if index < len(self._batches) else 0

    def _find(self, position: int) -> int:
        """Return the index of the batch that holds ``position``, or of the next one to come."""
        index = bisect_right(self._batches, position, key=_first)
        return index if index and position >= self._batches[index - 1].end else max(index - 1, 0)

    def _read(self, cursor: Cursor) -> Batch | DroppedRecords | None:
        position = cursor.position
        if position >= self.next:
            return None
        oldest = max(self._batches[0].first, cursor.oldest)
        if position < oldest:
            cursor.position = oldest
            return DroppedRecords(oldest - position, oldest - 1)
        index = self._find(position)
        if cursor.stream is not None:
            while self._batches[index].stream != cursor.stream:
                position = cursor.position = self._batches[index].end
                index += 1
                if index == len(self._batches):
                    return None
        batch = self._batches[index].since(position)
        cursor.position = batch.end
        if cursor.lossless and self.paused:
            self._balance()
        return batch

    def _when_more(self, cursor: Cursor) -> Deferred[None]:
        if self.closed or cursor.position < self.next:
            return succeed(None)
        deferred: Deferred[None] = Deferred(self._waiting_cancelled)
        self._waiting.append(deferred)
        return deferred

    def _waiting_cancelled(self, deferred: Deferred[None]) -> None:
        _discard(self._waiting, deferred)

    def _close_cursor(self, cursor: Cursor) -> None:
        self._cursors.discard(cursor)
        if self._batches:
            self._trim()
        self._balance()


def _first(batch: Batch) -> int:
    return batch.first


def _at(batch: Batch) -> int:
    return batch.at


class Cursor:
    """
    A reader's position in an :class:`OutputLog`.

    :ivar position: sequence number of the next record to read.
    :ivar oldest: sequence number of the oldest record within the log's bound when the cursor was opened.
    :ivar lossless: whether the producer is paused while this reader is far behind.
    """

    def __init__(
        self, log: OutputLog, position: int, oldest: int, lossless: bool, stream: Stream | None = None
    ) -> None:
        self.stream: Stream | None = stream
        self.position = position
        self.oldest = oldest
        self.lossless = lossless
        self._log = log

    def read(self) -> Batch | DroppedRecords | None:
        """Return the next records and advance past them; None if there is nothing new."""
        return self._log._read(self)

    @property
    def ended(self) -> bool:
        """Whether the log is closed and all of it has been read."""
        return self._log.closed and self.position >= self._log.next

    @property
    def behind(self) -> int:
        """Number of records that the reader has yet to read."""
        return self._log.next - self.position

    def when_more(self) -> Deferred[None]:
        """Return a Deferred that fires when there may be more to read or the log was closed. Can be cancelled."""
        return self._log._when_more(self)

    def close(self) -> None:
        """Stop reading: no record is kept, and no producer paused, for this reader any more."""
        self._log._close_cursor(self)


class BytesCursor:
    """
    One reader's position in the bytes of an :class:`OutputLog`: of its records, and of the lines that are unfinished.

    :param sent: how many bytes of each stream it has no need of.
    """

    def __init__(self, log: OutputLog, cursor: Cursor, sent: dict[Stream, int]) -> None:
        self._log = log
        self._cursor = cursor
        self._sent = sent

    def read(self) -> tuple[Stream, bytes] | DroppedRecords | None:
        """Return what comes next, of one stream; None if there is nothing new."""
        while isinstance(found := self._cursor.read(), Batch):
            data = self._unsent(found.stream, found.at, found.data)
            if data:
                return found.stream, data
        if found is not None:
            return found
        for stream, splitter in self._log._splitters.items():
            data = self._unsent(stream, self._log._recorded[stream], splitter.unfinished)
            if data:
                return stream, data
        return None

    def _unsent(self, stream: Stream, at: int, data: bytes) -> bytes:
        sent = self._sent.get(stream, 0)
        self._sent[stream] = max(sent, at + len(data))
        return data[max(0, sent - at) :]

    @property
    def offset(self) -> int:
        """Bytes of stdout before what is read next, of a log that has no stderr."""
        return max(self._log._bytes_before(self._cursor.position), self._sent.get("stdout", 0))

    @property
    def ended(self) -> bool:
        """Whether all has been read and no more will come."""
        return self._cursor.ended

    def when_more(self) -> Deferred[None]:
        """Return a Deferred that fires when more has arrived, or the log was closed. Can be cancelled."""
        log = self._log
        unread = any(log._arrived(stream) > self._sent.get(stream, 0) for stream in log._splitters)
        if log.closed or self._cursor.behind or unread:
            return succeed(None)
        deferred: Deferred[None] = Deferred(lambda cancelled: _discard(log._waiting_for_bytes, cancelled))
        log._waiting_for_bytes.append(deferred)
        return deferred

    def close(self) -> None:
        """Stop reading."""
        self._cursor.close()


def _discard(waiting: list[Deferred[None]], deferred: Deferred[None]) -> None:
    if deferred in waiting:
        waiting.remove(deferred)
