"""Batches of output as Server-Sent Events."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NamedTuple, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.task import Clock
from twisted.internet.testing import StringTransport
from twisted.web.resource import Resource
from twisted.web.server import NOT_DONE_YET, Request, Site

from sandboxd.api.streaming import follow, log_events, output_events
from sandboxd.execution.lines import PIECE
from sandboxd.execution.log import Batch, Cursor, OutputLog
from sandboxd.reactor.timestamps import rfc3339
from sandboxd.reactor.turn_budget import TurnBudget
from sandboxd.web.sse import HEAD_DELAY, Streams, event
from tests.test_lines import chunked

LINE_LIMIT = 64 * 1024


class Event(NamedTuple):
    """One event, parsed."""

    name: str
    id: int | None
    data: Any


def parse(stream: bytes) -> list[Event]:
    """The events of a stream; fails on any framing but the one that all clients understand."""
    blocks = stream.split(b"\n\n")
    assert blocks.pop() == b""
    found = []
    for block in blocks:
        assert block.isascii()
        assert b"\r" not in block
        fields = [line.partition(b": ")[::2] for line in block.split(b"\n")]
        assert [name for name, _ in fields] in ([b"event", b"data"], [b"event", b"id", b"data"])
        values = dict(fields)
        assert len(b"data: " + values[b"data"]) < LINE_LIMIT
        number = int(values[b"id"]) if b"id" in values else None
        found.append(Event(values[b"event"].decode(), number, json.loads(values[b"data"])))
    return found


def batches(chunks: list[bytes]) -> list[Batch]:
    """What a log makes of one stream's output."""
    log = OutputLog(max_records=10**9, max_bytes=10**9)
    for chunk in chunks:
        log.append("stdout", chunk, 0.0)
    log.close(0.0)
    found = iter(log.cursor().read, None)
    return [batch for batch in found if isinstance(batch, Batch)]


def lines_of(output: bytes) -> list[str]:
    """The lines of some output, without their line ends: what the events must say."""
    lines = output.split(b"\n")
    last = lines.pop()
    whole = [line[:-1] if line.endswith(b"\r") else line for line in lines]
    return [line.decode("utf-8", "replace") for line in whole + [last] * bool(last)]


@pytest.mark.slow
@settings(deadline=None)
@given(chunked())
def test_joined_by_partial_the_events_are_the_lines(chunks: list[bytes]) -> None:
    events = parse(b"".join(output_events(batch) for batch in batches(chunks)))
    lines, line = [], ""
    for one in events:
        line += str(one.data["data"])
        if not one.data.get("partial"):
            lines.append(line)
            line = ""
    assert line == ""
    assert lines == lines_of(b"".join(chunks))


@pytest.mark.slow
@settings(deadline=None)
@given(chunked())
def test_ids_are_consecutive_from_one(chunks: list[bytes]) -> None:
    events = parse(b"".join(log_events(batch) for batch in batches(chunks)))
    assert [one.id for one in events] == list(range(1, len(events) + 1))


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(chunked(), st.integers(0, 40))
def test_resumed_behind_an_id_the_events_are_the_rest(chunks: list[bytes], after: int) -> None:
    log = OutputLog(max_records=10**9, max_bytes=10**9)
    for chunk in chunks:
        log.append("stdout", chunk, 0.0)
    log.close(0.0)

    def events(after: int) -> list[Event]:
        found = iter(log.cursor(after).read, None)
        return parse(b"".join(output_events(batch) for batch in found if isinstance(batch, Batch)))

    assert events(after) == events(0)[after:]


@given(st.lists(st.text(st.characters(exclude_characters="\n", exclude_categories=["Cs"]))))
def test_any_text_comes_through(lines: list[str]) -> None:
    output = "".join(f"{line}\n" for line in lines).encode()
    events = parse(b"".join(output_events(batch) for batch in batches([output])))
    assert [one.data["data"] for one in events] == [line.removesuffix("\r") for line in lines]


@pytest.mark.parametrize(
    "unit", [b"a", b"\0", b"\xff", b'"', b"\\", "😀".encode(), "€".encode(), b"\xe2\x82"], ids=repr
)
def test_a_line_that_grows_when_it_is_escaped_stays_under_the_limit(unit: bytes) -> None:
    output = unit * (3 * PIECE // len(unit)) + b"\n"
    found = batches([output])
    events = parse(b"".join(log_events(batch) for batch in found))
    assert "".join(str(one.data["data"]) for one in events) == lines_of(output)[0]


def test_output_events_look_like_this() -> None:
    log = OutputLog()
    log.append("stderr", b"one\r\ntwo\n", 0.0)
    batch = log.cursor().read()
    assert isinstance(batch, Batch)
    assert output_events(batch) == (
        b'event: output\nid: 1\ndata: {"stream":"stderr","data":"one"}\n\n'
        b'event: output\nid: 2\ndata: {"stream":"stderr","data":"two"}\n\n'
    )


def test_log_events_look_like_this() -> None:
    log = OutputLog()
    log.append("stdout", b"line\n", 1_700_000_000.25)
    batch = log.cursor().read()
    assert isinstance(batch, Batch)
    assert log_events(batch) == (
        b'event: log\nid: 1\ndata: {"timestamp":"2023-11-14T22:13:20.250000Z","stream":"stdout","data":"line"}\n\n'
    )


def test_all_pieces_of_a_line_but_the_last_are_partial() -> None:
    found = batches([b"x" * (2 * PIECE + 1) + b"\nnext\n"])
    events = parse(b"".join(output_events(batch) for batch in found))
    assert [one.data.get("partial", False) for one in events] == [True, True, False, False]


def test_an_event_of_its_own() -> None:
    encoded = event("complete", {"code": 0, "error": False}, 7)
    assert encoded == b'event: complete\nid: 7\ndata: {"code":0,"error":false}\n\n'


@given(st.floats(0, 4e9))
def test_timestamps_are_rfc_3339_in_utc_with_fractions(seconds: float) -> None:
    text = rfc3339(seconds)
    assert text.endswith("Z")
    assert len(text) == len("2023-11-14T22:13:20.250000Z")
    assert datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() == pytest.approx(seconds, abs=1e-5)


class FollowResource(Resource):
    """Streams a log to whoever asks."""

    isLeaf = True

    def __init__(self, cursor: Cursor, clock: Clock) -> None:
        super().__init__()
        self.cursor = cursor
        self.clock = clock
        self.result: Deferred[None] | None = None

    def render_GET(self, request: Request) -> int:
        streams = Streams(self.clock, TurnBudget(Clock()), 1, 15)
        self.result = Deferred.fromCoroutine(
            follow(streams.open(cast(Any, request)), streams, self.cursor, output_events)
        )
        return NOT_DONE_YET


class Follower:
    """An HTTP client that follows a log, on a transport without a network."""

    def __init__(self, cursor: Cursor) -> None:
        self.clock = Clock()
        self._resource = FollowResource(cursor, self.clock)
        self.transport = StringTransport()
        channel = Site(self._resource, reactor=Clock()).buildProtocol(None)
        channel.makeConnection(self.transport)
        channel.dataReceived(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")
        assert self._resource.result is not None
        self.result = self._resource.result

    @property
    def head(self) -> bytes:
        """The response's status and headers."""
        return self.transport.value().partition(b"\r\n\r\n")[0]

    def events(self) -> list[Event]:
        """What has been received; undoes the chunked transfer coding."""
        rest = self.transport.value().partition(b"\r\n\r\n")[2]
        body = b""
        while rest:
            size, _, rest = rest.partition(b"\r\n")
            body += rest[: int(size, 16)]
            rest = rest[int(size, 16) + 2 :]
        return parse(body)

    def lines(self) -> list[object]:
        """The lines that have been received."""
        return [one.data["data"] for one in self.events() if one.name == "output"]


def test_the_headers_go_out_before_there_is_any_output() -> None:
    follower = Follower(OutputLog().cursor())
    follower.clock.advance(HEAD_DELAY)
    assert follower.head.startswith(b"HTTP/1.1 200 OK\r\n")
    assert b"content-type: text/event-stream" in follower.head.lower()


def test_the_headers_go_out_with_the_first_event_if_that_comes_soon() -> None:
    log = OutputLog()
    follower = Follower(log.cursor())
    assert follower.transport.value() == b""
    log.append("stdout", b"soon\n", 0.0)
    received = follower.transport.value()
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    assert follower.lines() == ["soon"]
    follower.clock.advance(HEAD_DELAY)
    assert follower.transport.value() == received
    assert not follower.clock.getDelayedCalls()


def test_history_and_live_lines_come_once_each_and_then_it_ends() -> None:
    log = OutputLog()
    log.append("stdout", b"old\n", 0.0)
    follower = Follower(log.cursor())
    assert follower.lines() == ["old"]
    log.append("stdout", b"new\nunfinished", 0.0)
    assert follower.lines() == ["old", "new"]
    assert not follower.result.called
    log.close(0.0)
    assert follower.lines() == ["old", "new", "unfinished"]
    assert follower.result.called


def test_a_paused_client_gets_nothing_until_it_resumes() -> None:
    log = OutputLog()
    follower = Follower(log.cursor())
    assert follower.transport.producer is not None
    follower.transport.producer.pauseProducing()
    for number in range(10):
        log.append("stdout", b"%d\n" % number, 0.0)
    log.close(0.0)
    assert follower.lines() == []
    follower.transport.producer.resumeProducing()
    assert follower.lines() == [str(number) for number in range(10)]
    assert follower.result.called


def test_lines_that_a_slow_client_has_missed_are_told_as_a_gap() -> None:
    log = OutputLog(max_records=1, max_bytes=1000)
    follower = Follower(log.cursor())
    assert follower.transport.producer is not None
    follower.transport.producer.pauseProducing()
    for number in range(1, 101):
        log.append("stdout", b"%d\n" % number, 0.0)
    follower.transport.producer.resumeProducing()
    gap, *rest = follower.events()
    dropped = gap.data["dropped"]
    assert gap == Event("gap", dropped, {"dropped": dropped})
    assert [one.id for one in rest] == list(range(dropped + 1, 101))


@pytest.mark.parametrize("paused", [False, True])
def test_following_can_be_cancelled(paused: bool) -> None:
    log = OutputLog()
    follower = Follower(log.cursor())
    if paused:
        assert follower.transport.producer is not None
        follower.transport.producer.pauseProducing()
        log.append("stdout", b"line\n", 0.0)
    failures: list[type[BaseException] | None] = []
    follower.result.addErrback(lambda failure: failures.append(failure.type))
    follower.result.cancel()
    assert failures == [CancelledError]
    log.append("stdout", b"more\n", 0.0)
    assert follower.lines() == []
