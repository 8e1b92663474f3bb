"""OutputLog: bounded, numbered, read by any number of cursors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule
from twisted.internet.defer import CancelledError
from twisted.internet.interfaces import IPushProducer
from zope.interface import implementer

from sandboxd.execution.log import (
    BATCH_OVERHEAD,
    HIGH_WATER,
    LOW_WATER,
    REMEMBERED,
    Batch,
    Cursor,
    DroppedRecords,
    OutputLog,
    Stream,
)

MAX_RECORDS = 20
MAX_BYTES = 4000


@implementer(IPushProducer)
class Pipes:
    """A producer that remembers whether it is paused."""

    def __init__(self) -> None:
        self.paused = False

    def pauseProducing(self) -> None:
        assert not self.paused
        self.paused = True

    def resumeProducing(self) -> None:
        assert self.paused
        self.paused = False

    def stopProducing(self) -> None:
        raise AssertionError("a log never stops its producer")


def filled(lines: int, per_append: int = 1, **limits: int) -> OutputLog:
    """A log of so many lines ``1``, ``2``, ..."""
    log = OutputLog(**limits)
    for start in range(1, lines + 1, per_append):
        chunk = b"".join(b"%d\n" % number for number in range(start, min(start + per_append, lines + 1)))
        log.append("stdout", chunk, 0.0)
    return log


def read_all(cursor: Cursor) -> list[Batch | DroppedRecords]:
    """What there is to read now."""
    return list(iter(cursor.read, None))


def text(found: list[Batch | DroppedRecords]) -> bytes:
    """The bytes of what was read."""
    return b"".join(batch.data for batch in found if isinstance(batch, Batch))


class Reader:
    """A cursor, and how far it has got by its own count."""

    def __init__(self, log: OutputLog, lossless: bool = False, after: int = 0) -> None:
        self.cursor = log.cursor(after, lossless)
        self.position = self.start = self.cursor.position
        self.read = self.dropped = 0


class LogMachine(RuleBasedStateMachine):
    """Any interleaving of appends, reads, closes of readers and of the log."""

    readers = Bundle("readers")

    def __init__(self) -> None:
        super().__init__()
        self.pipes = Pipes()
        self.log = OutputLog(MAX_RECORDS, MAX_BYTES)
        self.log.register_producer(self.pipes)
        self.largest_append = 0
        #: What each record must be, by its number less one, as far as it is known to be complete.
        self.expected: list[tuple[Stream, bytes]] = []
        self.unfinished: dict[Stream, bytes] = {"stdout": b"", "stderr": b""}

    @precondition(lambda self: not self.log.closed)
    @rule(stream=st.sampled_from(["stdout", "stderr"]), chunk=st.text("ab\n", max_size=40).map(str.encode))
    def append_a_little(self, stream: Stream, chunk: bytes) -> None:
        self.append(stream, chunk)

    @precondition(lambda self: not self.log.closed)
    @rule(
        stream=st.sampled_from(["stdout", "stderr"]), lines=st.integers(1, 2 * MAX_RECORDS), width=st.integers(0, 300)
    )
    def append_much(self, stream: Stream, lines: int, width: int) -> None:
        self.append(stream, (b"x" * width + b"\n") * lines)

    def append(self, stream: Stream, chunk: bytes) -> None:
        lines = (self.unfinished[stream] + chunk).split(b"\n")
        self.unfinished[stream] = lines.pop()
        self.expected.extend((stream, line + b"\n") for line in lines)
        size = len(self.unfinished[stream]) + sum(len(line) + 1 for line in lines) + BATCH_OVERHEAD
        self.largest_append = max(self.largest_append, size)
        self.log.append(stream, chunk, 0.0)

    @precondition(lambda self: not self.log.closed)
    @rule()
    def close_log(self) -> None:
        self.expected.extend((stream, rest) for stream, rest in self.unfinished.items() if rest)
        self.log.close(0.0)

    @rule(target=readers)
    def open_for_all(self) -> Reader:
        return Reader(self.log)

    @rule(target=readers, after=st.integers(0, 200))
    def open_after(self, after: int) -> Reader:
        reader = Reader(self.log, after=after)
        assert reader.start == min(after + 1, self.log.next)
        return reader

    @rule(reader=readers)
    def read_once(self, reader: Reader) -> None:
        self.take(reader, reader.cursor.read())

    @rule(reader=readers)
    def read_to_the_end(self, reader: Reader) -> None:
        for found in read_all(reader.cursor):
            self.take(reader, found)
        assert reader.position == self.log.next
        assert reader.cursor.ended == self.log.closed
        assert reader.read + reader.dropped == self.log.next - reader.start

    def take(self, reader: Reader, found: Batch | DroppedRecords | None) -> None:
        """What was read follows on what the reader had, and is what was written."""
        if found is None:
            assert reader.position == self.log.next
        elif isinstance(found, DroppedRecords):
            assert found.dropped > 0
            reader.dropped += found.dropped
            reader.position += found.dropped
            assert found.after == reader.position - 1
        else:
            assert found.first == reader.position
            records = self.expected[found.first - 1 : found.end - 1]
            assert {stream for stream, _ in records} == {found.stream}
            assert b"".join(data for _, data in records) == found.data
            reader.position = found.end
            reader.read += found.count

    @rule(reader=consumes(readers))
    def close_reader(self, reader: Reader) -> None:
        reader.cursor.close()

    @invariant()
    def held_bytes_are_bounded(self) -> None:
        assert self.log.size <= MAX_BYTES + self.largest_append

    @invariant()
    def numbers_are_those_of_the_records(self) -> None:
        assert self.log.next == len(self.expected) + 1

    @invariant()
    def a_new_reader_gets_at_most_the_newest_records_and_is_told_how_many_are_gone(self) -> None:
        cursor = self.log.cursor()
        found = read_all(cursor)
        cursor.close()
        read = sum(one.count for one in found if isinstance(one, Batch))
        assert read <= MAX_RECORDS
        gaps = [one for one in found if isinstance(one, DroppedRecords)]
        assert gaps == found[: len(gaps)]
        assert sum(gap.dropped for gap in gaps) == self.log.last - read


TestAnyInterleaving = LogMachine.TestCase
TestAnyInterleaving.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_log_that_nobody_reads_keeps_the_newest_records() -> None:
    log = filled(100, max_records=10)
    found = read_all(log.cursor())
    assert text(found) == b"".join(b"%d\n" % number for number in range(91, 101))


def test_an_early_reader_still_gets_what_has_grown_old() -> None:
    log = OutputLog(max_records=10)
    cursor = log.cursor()
    for number in range(100):
        log.append("stdout", b"%d\n" % number, 0.0)
    assert text(read_all(cursor)) == b"".join(b"%d\n" % number for number in range(100))


def test_what_only_a_closed_reader_wanted_is_dropped() -> None:
    log = OutputLog(max_records=10)
    cursor = log.cursor()
    for number in range(100):
        log.append("stdout", b"%d\n" % number, 0.0)
    size = log.size
    cursor.close()
    assert log.size < size
    assert log.followers == 0


def test_a_reader_behind_the_byte_limit_is_told_the_gap() -> None:
    log = OutputLog(max_bytes=10 * (100 + BATCH_OVERHEAD))
    cursor = log.cursor()
    for _ in range(50):
        log.append("stdout", b"x" * 99 + b"\n", 0.0)
    assert cursor.read() == DroppedRecords(dropped=40, after=40)
    assert sum(batch.count for batch in read_all(cursor) if isinstance(batch, Batch)) == 10


@pytest.mark.parametrize("after", [0, 50])
def test_a_new_reader_that_resumes_far_back_gets_at_most_the_newest_records(after: int) -> None:
    log = filled(100, per_append=100, max_records=10)
    gap, *rest = read_all(log.cursor(after))
    assert gap == DroppedRecords(dropped=90 - after, after=90)
    assert sum(batch.count for batch in rest if isinstance(batch, Batch)) == 10


def test_a_reader_resumes_behind_a_sequence_number_inside_a_batch() -> None:
    log = filled(100, per_append=100)
    assert text(read_all(log.cursor(after=98))) == b"99\n100\n"


@pytest.mark.parametrize("after", [100, 101, 10**18])
def test_resuming_behind_the_end_reads_what_comes_next(after: int) -> None:
    log = filled(100)
    cursor = log.cursor(after)
    assert cursor.read() is None
    log.append("stdout", b"new\n", 0.0)
    assert text(read_all(cursor)) == b"new\n"


def test_both_streams_keep_the_order_in_which_their_lines_were_complete() -> None:
    log = OutputLog()
    cursor = log.cursor()
    log.append("stdout", b"one, ", 1.0)
    log.append("stderr", b"two\n", 2.0)
    log.append("stdout", b"three\nfour", 3.0)
    log.close(4.0)
    found = [
        (batch.stream, batch.data, batch.time, batch.first) for batch in read_all(cursor) if isinstance(batch, Batch)
    ]
    assert found == [
        ("stderr", b"two\n", 2.0, 1),
        ("stdout", b"one, three\n", 3.0, 2),
        ("stdout", b"four", 4.0, 3),
    ]


def test_a_reader_ends_when_the_log_is_closed_and_all_is_read() -> None:
    log = filled(1)
    cursor = log.cursor()
    log.close(0.0)
    assert not cursor.ended
    read_all(cursor)
    assert cursor.ended


def test_an_empty_log_ends_at_once() -> None:
    log = OutputLog()
    cursor = log.cursor()
    log.close(0.0)
    assert cursor.read() is None
    assert cursor.ended


@given(st.lists(st.integers(1, 200_000), max_size=60), st.integers(1, 20))
@settings(deadline=None)
def test_a_lossless_reader_pauses_the_producer_and_misses_nothing(sizes: list[int], reads: int) -> None:
    """Reads a few batches whenever the pipes are paused, as a slow client does."""
    log = OutputLog(max_records=10)
    pipes = Pipes()
    log.register_producer(pipes)
    cursor = log.cursor(after=0, lossless=True)
    written = b""
    received: list[Batch | DroppedRecords] = []
    for number, size in enumerate(sizes):
        while pipes.paused:
            found = [one for _ in range(reads) if (one := cursor.read())]
            assert found, "paused although all is read"
            received += found
        chunk = b"%d" % number * size + b"\n"
        written += chunk
        log.append("stdout", chunk, 0.0)
        assert log.size <= HIGH_WATER or pipes.paused
    log.close(0.0)
    received += read_all(cursor)
    assert not any(isinstance(one, DroppedRecords) for one in received)
    assert text(received) == written
    assert not pipes.paused


def test_the_producer_is_paused_above_the_high_mark_and_resumed_below_the_low_one() -> None:
    log = OutputLog()
    pipes = Pipes()
    log.register_producer(pipes)
    cursor = log.cursor(lossless=True)
    while log.size <= HIGH_WATER:
        assert not pipes.paused
        log.append("stdout", b"x" * 9999 + b"\n", 0.0)
    assert pipes.paused
    while pipes.paused:
        cursor.read()
    left = text(read_all(cursor))
    assert LOW_WATER - 2 * 10_300 < len(left) < LOW_WATER


def test_the_producer_goes_on_when_the_reader_that_held_it_up_is_closed() -> None:
    log = OutputLog()
    pipes = Pipes()
    log.register_producer(pipes)
    slow, other = log.cursor(lossless=True), log.cursor(lossless=True)
    log.append("stdout", b"x\n" * HIGH_WATER, 0.0)
    assert pipes.paused
    slow.close()
    assert pipes.paused
    other.close()
    assert not pipes.paused


def test_a_reader_that_may_lose_lines_does_not_pause_the_producer() -> None:
    log = OutputLog()
    pipes = Pipes()
    log.register_producer(pipes)
    log.cursor()
    log.append("stdout", b"x\n" * HIGH_WATER, 0.0)
    assert not pipes.paused


@pytest.mark.parametrize(
    "happens", [lambda log: log.append("stdout", b"line\n", 0.0), lambda log: log.close(0.0)], ids=["append", "close"]
)
def test_a_waiting_reader_is_woken(happens: Callable[[OutputLog], None]) -> None:
    log = OutputLog()
    waiting = [log.cursor().when_more() for _ in range(3)]
    assert not any(deferred.called for deferred in waiting)
    happens(log)
    assert all(deferred.called for deferred in waiting)


def test_an_unfinished_line_wakes_nobody() -> None:
    log = OutputLog()
    waiting = log.cursor().when_more()
    log.append("stdout", b"no newline yet", 0.0)
    assert not waiting.called


def test_waiting_can_be_cancelled() -> None:
    log = OutputLog()
    cursor = log.cursor()
    cancelled, other = cursor.when_more(), cursor.when_more()
    failures: list[type[BaseException] | None] = []
    cancelled.addErrback(lambda failure: failures.append(failure.type))
    cancelled.cancel()
    log.append("stdout", b"line\n", 0.0)
    assert failures == [CancelledError]
    assert other.called


def test_a_woken_reader_may_cancel_another_one_that_waits() -> None:
    log = OutputLog()
    first, second, third = (log.cursor().when_more() for _ in range(3))
    second.addErrback(lambda failure: failure.trap(CancelledError))
    first.addCallback(lambda _: second.cancel())
    log.append("stdout", b"line\n", 0.0)
    assert third.called


def test_a_reader_that_waits_again_when_woken_sees_each_record_once() -> None:
    log = OutputLog()
    cursor = log.cursor()
    received: list[bytes] = []

    def read(_: None) -> None:
        received.extend(batch.data for batch in read_all(cursor) if isinstance(batch, Batch))
        if not cursor.ended:
            cursor.when_more().addCallback(read)

    read(None)
    log.append("stdout", b"one\ntwo", 0.0)
    log.append("stderr", b"three", 0.0)
    log.close(0.0)
    assert received == [b"one\n", b"two", b"three"]
    assert cursor.ended


class Encoder:
    """Encodes a batch as its bytes, and counts how often it has to."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, batch: Batch) -> bytes:
        self.calls += 1
        return batch.data


def encode_all(cursor: Cursor, encode: Callable[[Batch], bytes]) -> None:
    for found in read_all(cursor):
        assert isinstance(found, Batch)
        found.encoded(encode)


def test_followers_share_the_encoded_form_of_a_new_batch() -> None:
    log = OutputLog()
    cursors = [log.cursor() for _ in range(5)]
    log.append("stdout", b"line\n", 0.0)
    encode = Encoder()
    for cursor in cursors:
        encode_all(cursor, encode)
    assert encode.calls == 1


def test_reading_the_history_does_not_keep_it_all_encoded() -> None:
    """Encoded, a log can be six times its size; only the newest batches may be remembered."""
    log = filled(100)
    encode = Encoder()
    encode_all(log.cursor(), encode)
    encode.calls = 0
    encode_all(log.cursor(), encode)
    assert encode.calls >= 100 - REMEMBERED
