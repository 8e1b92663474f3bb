"""``GET /process_logs_streaming``: what a background process has written, and goes on writing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import gatherResults
from twisted.internet.threads import deferToThread

from tests.client import Api, Event, Events
from tests.daemon import Daemon, alive
from tests.waiting import Gate, until, within

#: Lines that a log keeps.
KEPT = 10_000

COMPLETE = ("complete", {"message": "stream ended"})

#: Bytes that the daemon may need for one log, its followers included, beyond what it has.
MEMORY = 48 * 1024 * 1024


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.close()


async def finished(api: Api, cmd: str) -> str:
    """The id of a process that has ended."""
    id = await api.start(cmd)
    await (await api.logs(id)).all()
    return id


async def events_of(api: Api, id: str, query: str = "", headers: dict[str, str] | None = None) -> list[Event]:
    return await (await api.logs(id, query, headers)).all()


def lines_in(events: list[Event]) -> list[str]:
    return [event.data["data"] for event in events if event.name == "log"]


def dropped_in(events: list[Event]) -> list[int]:
    return [event.data["dropped"] for event in events if event.name == "gap"]


def numbers(first: int, last: int) -> list[str]:
    return [str(n) for n in range(first, last + 1)]


# Events


async def test_lines_then_complete_then_the_end(api: Api) -> None:
    events = await events_of(api, await api.start("echo one; echo two"))
    assert [event.name for event in events] == ["log", "log", "complete"]
    assert lines_in(events) == ["one", "two"]
    assert (events[-1].name, events[-1].data) == COMPLETE


async def test_a_log_event_has_timestamp_stream_and_data(api: Api) -> None:
    events = await events_of(api, await api.start("echo bad >&2; echo good"))
    assert all(set(event.data) == {"timestamp", "stream", "data"} for event in events[:-1])
    assert {(event.data["stream"], event.data["data"]) for event in events[:-1]} == {
        ("stderr", "bad"),
        ("stdout", "good"),
    }


async def test_timestamps_are_rfc_3339_in_utc_with_fractions(api: Api) -> None:
    id = await api.start("echo one; sleep 0.2; echo two")
    one, two = (event.data["timestamp"] for event in (await events_of(api, id))[:2])
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+(Z|\+00:00)", time) for time in (one, two))
    began = (await api.process(id))["started_at"]
    times = [datetime.fromisoformat(time.replace("Z", "+00:00")) for time in (began, one, two)]
    assert times == sorted(times)
    assert 0.15 < (times[2] - times[1]).total_seconds() < 3


async def test_every_event_has_an_id_of_its_own_and_they_grow(api: Api) -> None:
    events = await events_of(api, await finished(api, "seq 1 12000"), "&after=1")
    ids = [event.id for event in events if event.name != "complete"]
    assert None not in ids
    assert [int(id or 0) for id in ids] == sorted({int(id or 0) for id in ids})


async def test_the_last_event_has_an_id_too(api: Api) -> None:
    events = await events_of(api, await api.start("echo one"))
    assert events[-1].name == "complete"
    assert events[-1].id is not None


async def test_a_process_without_output(api: Api) -> None:
    events = await events_of(api, await api.start("true"))
    assert [(event.name, event.data) for event in events] == [COMPLETE]


async def test_unknown_id_is_one_error_event(api: Api) -> None:
    stream = await api.logs("no-such-id-%C3%A9")
    events = await stream.all()
    assert stream.status == 200
    assert stream.headers.getRawHeaders("Content-Type")[0].startswith("text/event-stream")
    assert [(event.name, event.data) for event in events] == [("error", {"error": "process not found: no-such-id-é"})]


@pytest.mark.parametrize("query", ["", "?id=", "?follow=false"])
async def test_missing_id_is_a_400(api: Api, query: str) -> None:
    response = await api.get(f"/process_logs_streaming{query}")
    assert response.status == 400
    assert "id" in response.json()["error"]


@pytest.mark.parametrize("after", ["x", "-1", "1.5", "%C2%B2", "9" * 400])
async def test_a_bad_after_is_named(api: Api, after: str) -> None:
    response = await api.get(f"/process_logs_streaming?id={await api.start('true')}&after={after}")
    assert response.status == 400
    assert "after" in response.json()["error"]


async def test_the_prefix(api: Api) -> None:
    id = await api.start("echo hi")
    stream = Events(await api.request("GET", f"/koyeb-sandbox/process_logs_streaming?id={id}"))
    assert lines_in(await stream.all()) == ["hi"]


async def test_text_is_ascii_and_line_ends_are_gone(api: Api) -> None:
    id = await api.start(r"printf 'a\r\n\302\205 \342\200\250 \360\237\230\200 \377\n\nlast'")
    stream = await api.logs(id)
    assert lines_in(await stream.all()) == ["a", "\u0085 \u2028 \U0001f600 \ufffd", "", "last"]
    assert stream.raw.isascii()


async def test_a_line_over_a_mebibyte_does_not_stop_the_log(api: Api) -> None:
    id = await api.start("head -c 2000000 /dev/zero | tr '\\0' x; echo; echo after")
    events = (await events_of(api, id))[:-1]
    *pieces, last_piece, after = events
    assert all(piece.data["partial"] is True for piece in pieces)
    assert "partial" not in last_piece.data
    assert "".join(lines_in([*pieces, last_piece])) == "x" * 2_000_000
    assert after.data["data"] == "after"


async def test_long_lines_come_in_pieces_that_clients_can_take(api: Api) -> None:
    stream = await api.logs(await api.start("head -c 300000 /dev/zero"))
    data = b"".join([chunk async for chunk in stream.chunks()])
    assert max(map(len, data.split(b"\n"))) < 65_536


# History and live


async def test_history_then_live_lines(api: Api, gate: Gate) -> None:
    id = await api.start(f"echo one; {gate.wait}; echo two; {gate.wait}; echo three")
    events = aiter(await api.logs(id))
    assert (await anext(events)).data["data"] == "one"
    gate.open()
    assert (await anext(events)).data["data"] == "two"
    late = aiter(await api.logs(id))
    assert [(await anext(late)).data["data"] for _ in range(2)] == ["one", "two"]
    gate.open()
    for follower in (events, late):
        assert [event.data.get("data") async for event in follower] == ["three", None]


async def test_a_stream_of_a_silent_process_opens_at_once(api: Api) -> None:
    id = await api.start("sleep 300")
    stream = await within(3, api.logs(id))
    assert stream.status == 200
    await api.post("/kill_process", {"id": id})
    assert [(event.name, event.data) for event in await within(5, stream.all())] == [COMPLETE]


async def test_stdout_and_stderr_in_the_order_of_their_arrival(api: Api, gate: Gate) -> None:
    id = await api.start(f"for n in 1 2 3 4 5; do echo $n; {gate.wait}; echo $n >&2; {gate.wait}; done")
    expected = [(stream, str(n)) for n in range(1, 6) for stream in ("stdout", "stderr")]
    events = aiter(await api.logs(id))
    for stream, line in expected:
        event = await anext(events)
        assert (event.data["stream"], event.data["data"]) == (stream, line)
        gate.open()
    replay = (await events_of(api, id))[:-1]
    assert [(event.data["stream"], event.data["data"]) for event in replay] == expected


@pytest.mark.parametrize("follow", ["false", "0"])
async def test_without_follow_history_only(api: Api, gate: Gate, follow: str) -> None:
    id = await api.start(f"echo one; {gate.wait}; echo two")
    await anext(aiter(await api.logs(id)))
    events = await within(3, events_of(api, id, f"&follow={follow}"))
    assert lines_in(events) == ["one"]
    assert (events[-1].name, events[-1].data) == COMPLETE
    gate.open()
    assert lines_in(await events_of(api, id)) == ["one", "two"]


async def test_a_follower_that_leaves_changes_nothing(api: Api, gate: Gate) -> None:
    id = await api.start(f"echo one; {gate.wait}; echo two")
    leaver, stayer = await api.logs(id), await api.logs(id)
    await anext(aiter(leaver))
    leaver.close()
    gate.open()
    assert lines_in(await stayer.all()) == ["one", "two"]
    assert (await api.process(id))["status"] == "completed"


@pytest.mark.slow
@pytest.mark.parametrize("_round", range(5))
async def test_followers_see_every_line_once_and_a_slow_one_holds_nobody_up(
    api: Api, daemon: Daemon, gate: Gate, _round: int
) -> None:
    id = await api.start(f"{gate.wait}; seq 1 100000")
    daemon.reset_peak()
    before = daemon.memory()
    fast, other, slow = [await api.logs(id) for _ in range(3)]
    slow.pause()
    gate.open()
    for events in await gatherResults([within(20, fast.all()), within(20, other.all())]):
        assert lines_in(events) == numbers(1, 100_000)
        assert [event.name for event in events[-2:]] == ["log", "complete"]
    slow.resume()
    events = await within(20, slow.all())
    lines = list(map(int, lines_in(events)))
    assert lines == sorted(set(lines))
    assert len(dropped_in(events)) <= 1
    assert len(lines) + sum(dropped_in(events)) == 100_000
    assert lines[-1] == 100_000
    assert daemon.peak_memory() - before < MEMORY


@pytest.mark.slow
async def test_a_follower_that_comes_in_the_middle_misses_nothing(api: Api) -> None:
    id = await api.start("for n in $(seq 1 8); do seq 1 1000; done")
    everything = numbers(1, 1000) * 8
    followers = [within(20, events_of(api, id)) for _ in range(20)]
    assert all(lines_in(events) == everything for events in await gatherResults(followers))


async def test_a_slow_reader_of_a_finished_log(api: Api, daemon: Daemon) -> None:
    id = await finished(api, "yes 0123456789 | head -n 10000")
    readers = [await api.logs(id) for _ in range(5)]
    for reader in readers:
        reader.pause()
    assert (await api.get("/health")).status == 200
    for reader in readers:
        reader.resume()
        assert lines_in(await within(20, reader.all())) == ["0123456789"] * KEPT
    assert alive(daemon.pid)


@pytest.mark.slow
async def test_a_follower_that_does_not_read_costs_little_and_is_told_each_gap(
    api: Api, daemon: Daemon, gate: Gate
) -> None:
    id = await api.start(f"{gate.wait}; seq -f %0999.0f 60000")
    pid = (await api.process(id))["pid"]
    daemon.reset_peak()
    before = daemon.memory()
    slow = await api.logs(id)
    slow.pause()
    gate.open()
    await until(lambda: not alive(pid), 20)
    slow.resume()
    *events, _complete = await within(30, slow.all())
    assert dropped_in(events)
    position = 0
    for event in events:
        if event.name == "gap":
            position += event.data["dropped"]
        else:
            position += 1
            assert int(event.data["data"]) == position
    assert position == 60_000
    assert daemon.peak_memory() - before < MEMORY


@pytest.mark.slow
async def test_a_process_that_nobody_follows_costs_little(api: Api, daemon: Daemon) -> None:
    daemon.reset_peak()
    before = daemon.memory()
    id = await api.start("head -c 100000000 /dev/zero | tr '\\0' x; echo; echo last")
    pid = (await api.process(id))["pid"]
    await until(lambda: not alive(pid), 20)
    assert lines_in(await within(20, events_of(api, id)))[-1] == "last"
    assert daemon.peak_memory() - before < MEMORY


# Retention and resumption


async def test_the_newest_10000_lines_are_kept(api: Api) -> None:
    events = await events_of(api, await finished(api, "seq 1 30000"))
    assert lines_in(events) == numbers(20_001, 30_000)


async def test_10000_lines_are_kept_whole(api: Api) -> None:
    events = await events_of(api, await finished(api, "seq 1 10000"))
    assert lines_in(events) == numbers(1, 10_000)
    assert dropped_in(events) == []


@pytest.mark.parametrize("how", ["after", "Last-Event-ID"])
async def test_resumes_behind_an_event(api: Api, how: str) -> None:
    id = await finished(api, "seq 1 100")
    seen = (await events_of(api, id))[:40]
    query, headers = (f"&after={seen[-1].id}", None) if how == "after" else ("", {"Last-Event-ID": seen[-1].id or ""})
    events = await events_of(api, id, query, headers)
    assert lines_in(events) == numbers(41, 100)
    assert dropped_in(events) == []


async def test_resuming_behind_the_last_event_brings_only_the_end(api: Api) -> None:
    id = await finished(api, "seq 1 100")
    last = (await events_of(api, id))[-2].id
    assert [(event.name, event.data) for event in await events_of(api, id, f"&after={last}")] == [COMPLETE]


async def test_resumes_while_the_process_runs(api: Api, gate: Gate) -> None:
    id = await api.start(f"echo one; echo two; {gate.wait}; echo three")
    first = await api.logs(id)
    seen = await anext(aiter(first))
    first.close()
    second = aiter(await api.logs(id, headers={"Last-Event-ID": seen.id or ""}))
    assert (await anext(second)).data["data"] == "two"
    gate.open()
    assert [event.data.get("data") async for event in second] == ["three", None]


@pytest.mark.parametrize("how", ["after", "Last-Event-ID"])
async def test_resuming_behind_lines_that_are_gone_tells_how_many(api: Api, gate: Gate, how: str) -> None:
    id = await api.start(f"seq 1 100; {gate.wait}; seq 101 30000")
    first = await api.logs(id)
    seen = await anext(aiter(first))
    assert seen.data["data"] == "1"
    first.close()
    gate.open()
    await (await api.logs(id)).all()
    query, headers = (f"&after={seen.id}", None) if how == "after" else ("", {"Last-Event-ID": seen.id or ""})
    gap, *events = await events_of(api, id, query, headers)
    assert gap.name == "gap"
    assert set(gap.data) == {"dropped"}
    lines = lines_in(events)
    assert len(lines) >= KEPT
    assert lines == numbers(2 + gap.data["dropped"], 30_000)


async def test_resuming_behind_a_gap_brings_what_followed_it(api: Api) -> None:
    id = await finished(api, "seq 1 30000")
    gap, *events = await events_of(api, id, "&after=1")
    assert lines_in(await events_of(api, id, f"&after={gap.id}")) == lines_in(events)


# The end of the daemon


async def test_complete_comes_also_when_the_daemon_stops(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    events: Any = aiter(await api.logs(await api.start("echo $$; sleep 300")))
    pid = int((await anext(events)).data["data"])
    stopped = deferToThread(daemon.stop)
    assert [(event.name, event.data) async for event in events] == [COMPLETE]
    assert await stopped == 0
    assert not alive(pid)
