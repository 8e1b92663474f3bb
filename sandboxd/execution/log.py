"""
The output log of one execution: bounded, numbered, read by any number of cursors.

A reader holds a position, not a queue. History and live output are the same read, so there is no hand-over
between them that could lose or double a line, and a slow reader costs no memory beyond the log's own bound.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from twisted.internet.defer import Deferred, succeed
from twisted.internet.interfaces import IPushProducer

from sandboxd.execution.lines import Lines, LineSplitter

Stream = Literal["stdout", "stderr"]

#: What the Python objects of one batch cost beside its bytes; counted so that many tiny batches are bounded too.
BATCH_OVERHEAD = 256

#: How many of the newest batches keep their encoded form for the other followers.
REMEMBERED = 16

#: Bytes that a lossless reader may be behind before the producer is paused, and where it goes on.
HIGH_WATER = 512 * 1024
LOW_WATER = 128 * 1024


class Batch:
    """
    Consecutive records of one stream that arrived together.

    :ivar stream: where they came from.
    :ivar time: when, in seconds since the epoch.
    :ivar first: sequence number of the first record.
    :ivar lines: the records.
    :ivar offset: how much the log had been given before it, as :attr:`cost` counts.
    """

    __slots__ = ("_encoded", "_new", "first", "lines", "offset", "stream", "time")

    def __init__(self, stream: Stream, time: float, first: int, lines: Lines, offset: int = 0) -> None:
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
        """How many records."""
        return self.lines.count

    @property
    def partial(self) -> bool:
        """Whether these are pieces of a line that goes on in the next record of the stream."""
        return self.lines.partial

    @property
    def end(self) -> int:
        """The sequence number after the last record."""
        return self.first + self.lines.count

    @property
    def cost(self) -> int:
        """Bytes of memory that it stands for."""
        return len(self.lines.data) + BATCH_OVERHEAD

    def since(self, position: int) -> Batch:
        """The records from ``position`` on, which must be one of this batch's."""
        if position == self.first:
            return self
        return Batch(self.stream, self.time, position, self.lines.since(position - self.first))

    def encoded(self, encode: Callable[[Batch], bytes]) -> bytes:
        """``encode(self)``, done once for all the followers that want it while the batch is among the newest."""
        if self._encoded is not None and self._encoded[0] is encode:
            return self._encoded[1]
        encoded = encode(self)
        if self._new:
            self._encoded = (encode, encoded)
        return encoded

    def grow_old(self) -> None:
        """Free the encoded form, and keep none from now on."""
        self._encoded = None
        self._new = False


@dataclass(frozen=True)
class DroppedRecords:
    """
    Records that a reader can no longer get, because the log has dropped them.

    :ivar dropped: how many.
    :ivar after: the sequence number of the last one.
    """

    dropped: int
    after: int


class OutputLog:
    """
    What an execution has written, newest last.

    Records are numbered from 1. The newest ``max_records`` are kept, and older ones only while a cursor that
    was opened before they grew old has yet to read them; all within ``max_bytes``.

    :param max_records: how many records a new reader can get.
    :param max_bytes: most bytes held, whoever reads.
    :ivar next: sequence number that the next record will get.
    :ivar closed: whether no more output will come.
    :ivar total_bytes: how much has been written to it, in all.
    :ivar paused: whether the producer waits for a lossless reader.
    :ivar pauses: how often it has had to.
    :ivar last_output: when it was last written to, in seconds since the epoch, or None.
    """

    def __init__(self, max_records: int = 10_000, max_bytes: int = 16 * 1024 * 1024) -> None:
        self.max_records = max_records
        self.max_bytes = max_bytes
        self.next = 1
        self.closed = False
        self.total_bytes = 0
        self.last_output: float | None = None
        self._taken = 0
        self._batches: list[Batch] = []
        self._splitters: dict[Stream, LineSplitter] = {"stdout": LineSplitter(), "stderr": LineSplitter()}
        self._cursors: set[Cursor] = set()
        self._waiting: list[Deferred[None]] = []
        self._producer: IPushProducer | None = None
        self.paused = False
        self.pauses = 0

    def append(self, stream: Stream, chunk: bytes, time: float) -> None:
        """
        Add what a pipe delivered.

        :param time: when, in seconds since the epoch.
        """
        self.total_bytes += len(chunk)
        self.last_output = time
        self._add(stream, self._splitters[stream].feed(chunk), time)

    def close(self, time: float) -> None:
        """No more output will come. An unfinished last line becomes a record."""
        for stream, splitter in self._splitters.items():
            self._add(stream, splitter.flush(), time)
        self.closed = True
        if self.paused and self._producer is not None:
            self.paused = False
            self._producer.resumeProducing()
        self._producer = None
        self._wake()

    @property
    def last(self) -> int:
        """Sequence number of the newest record; 0 if there is none."""
        return self.next - 1

    def cursor(self, after: int = 0, lossless: bool = False) -> Cursor:
        """
        Open a reader; close it when done.

        :param after: read the records behind this sequence number. Those that are no longer kept are told as a gap.
        :param lossless: pause the producer rather than run ahead of this reader.
        """
        cursor = Cursor(self, min(after + 1, self.next), self.first, lossless)
        self._cursors.add(cursor)
        return cursor

    def register_producer(self, producer: IPushProducer) -> None:
        """Name what is paused when a lossless reader falls behind: the child's pipes. Until the log is closed."""
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
        """How many cursors are open."""
        return len(self._cursors)

    def _add(self, stream: Stream, found: list[Lines], time: float) -> None:
        if not found:
            return
        for lines in found:
            batch = Batch(stream, time, self.next, lines, self._taken)
            self._batches.append(batch)
            self.next = batch.end
            self._taken += batch.cost
            if len(self._batches) > REMEMBERED:
                self._batches[-REMEMBERED - 1].grow_old()
        self._trim()
        self._wake()
        self._balance()

    def _trim(self) -> None:
        """Drop what is too old and no cursor waits for, and what is too much."""
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
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            if not deferred.called:  # one that was woken may have cancelled another
                deferred.callback(None)

    def _balance(self) -> None:
        """Pause the producer when a lossless reader is far behind; let it go on when none is."""
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
        """Bytes that ``cursor`` has yet to read."""
        index = self._find(cursor.position)
        return self._taken - self._batches[index].offset if index < len(self._batches) else 0

    def _find(self, position: int) -> int:
        """Index of the batch that holds ``position``, or of the next one to come."""
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
        batch = self._batches[self._find(position)].since(position)
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
        if deferred in self._waiting:
            self._waiting.remove(deferred)

    def _close_cursor(self, cursor: Cursor) -> None:
        self._cursors.discard(cursor)
        if self._batches:
            self._trim()
        self._balance()


def _first(batch: Batch) -> int:
    return batch.first


class Cursor:
    """
    One reader's place in an :class:`OutputLog`.

    :ivar position: sequence number of the next record to read.
    :ivar oldest: sequence number of the first record that was within the log's bound when it was opened.
    :ivar lossless: whether the producer waits for this reader.
    """

    def __init__(self, log: OutputLog, position: int, oldest: int, lossless: bool) -> None:
        self.position = position
        self.oldest = oldest
        self.lossless = lossless
        self._log = log

    def read(self) -> Batch | DroppedRecords | None:
        """What comes next, moving on behind it; None if there is nothing new."""
        return self._log._read(self)

    @property
    def ended(self) -> bool:
        """Whether all has been read and no more will come."""
        return self._log.closed and self.position >= self._log.next

    @property
    def behind(self) -> int:
        """Records that it has yet to read."""
        return self._log.next - self.position

    def when_more(self) -> Deferred[None]:
        """Fires when there may be more to read, or the log was closed. Can be cancelled."""
        return self._log._when_more(self)

    def close(self) -> None:
        """Stop reading. Nothing is kept, and nobody is held up, for this reader any more."""
        self._log._close_cursor(self)
