"""``Idempotency-Key``: a request that comes again is not executed again."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet.defer import Deferred, fail, gatherResults
from twisted.internet.task import Clock
from twisted.web.client import ResponseNeverReceived

from sandboxd.api.commands import CommandStarter
from sandboxd.files.access import Files
from sandboxd.files.filesystem_threads import FilesystemThreads
from sandboxd.files.root import Root
from sandboxd.processes.child import SpawnError
from sandboxd.processes.command import Command
from sandboxd.web.idempotency import IdempotencyStore, KeyConflict, KeyedResult
from tests.client import Api, Events, Response
from tests.daemon import Daemon
from tests.waiting import Gate, settled, until, within

KEY = "Idempotency-Key"


# The store


class Started:
    """Counts what is started."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> int:
        self.count += 1
        return self.count


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def start() -> Started:
    return Started()


def held(store: IdempotencyStore, key: str, start: Started, size: int) -> KeyedResult[int]:
    entry = store.once(key, b"request", start)
    store.holds(entry, size)
    return entry


def test_a_request_without_a_key_is_started_each_time(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock)
    entries = [store.once(None, b"request", start) for _ in range(2)]
    assert [(entry.value, entry.keyed) for entry in entries] == [(1, False), (2, False)]


def test_a_key_that_comes_again_gets_what_was_started_first(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock)
    first = store.once("key", b"request", start)
    assert (first.value, first.keyed) == (1, True)
    assert store.once("key", b"request", start) is first
    assert start.count == 1


def test_other_keys_are_other_requests(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock)
    assert [store.once(key, b"request", start).value for key in ("a", "b", "a")] == [1, 2, 1]


def test_a_key_with_another_request_is_a_conflict(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock)
    store.once("key", b"request", start)
    with pytest.raises(KeyConflict, match="another request"):
        store.once("key", b"other", start)
    assert start.count == 1


def test_what_could_not_be_started_may_be_tried_again(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock)
    with pytest.raises(ZeroDivisionError):
        store.once("key", b"request", lambda: 1 // 0)
    assert store.once("key", b"other", start).value == 1


def test_a_key_is_remembered_for_a_time(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock, seconds=10)
    store.once("key", b"request", start)
    clock.advance(9)
    assert store.once("key", b"request", start).value == 1
    clock.advance(1)
    assert store.once("key", b"other", start).value == 2


def test_so_many_keys_are_remembered(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock, count=3)
    for key in "abcd":
        store.once(key, b"request", start)
    assert [store.once(key, b"request", start).value for key in "dcb"] == [4, 3, 2]
    assert store.once("a", b"request", start).value == 5


def test_a_key_that_comes_again_pushes_no_other_one_out(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock, count=2)
    for key in "abbba":
        store.once(key, b"request", start)
    assert start.count == 2


def test_answers_over_the_limit_are_dropped_oldest_first_but_not_their_keys(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock, max_bytes=100)
    for key in "abc":
        held(store, key, start, 40)
    with pytest.raises(KeyConflict, match="no longer kept"):
        store.once("a", b"request", start)
    assert [store.once(key, b"request", start).value for key in "bc"] == [2, 3]
    assert start.count == 3


def test_answers_within_the_limit_are_kept(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock, max_bytes=100)
    for key in "ab":
        held(store, key, start, 50)
    assert [store.once(key, b"request", start).value for key in "ab"] == [1, 2]


def test_an_answer_that_is_told_of_twice_counts_once(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock, max_bytes=100)
    for _ in range(3):
        held(store, "a", start, 60)
    held(store, "b", start, 40)
    assert store.once("a", b"request", start).value == 1


def test_what_is_forgotten_holds_nothing_any_more(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock, seconds=10, max_bytes=100)
    held(store, "a", start, 100)
    clock.advance(10)
    held(store, "b", start, 100)
    assert store.once("b", b"request", start).value == 2


def test_what_is_forgotten_before_its_end_holds_nothing_either(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock, seconds=10, max_bytes=100)
    slow = store.once("a", b"request", start)
    clock.advance(10)
    store.once("b", b"request", start)
    store.holds(slow, 100)
    held(store, "b", start, 50)
    assert store.once("b", b"request", start).value == 2


def test_what_may_have_been_executed_is_refused_from_then_on(clock: Clock, start: Started) -> None:
    store = IdempotencyStore(clock)
    entry = held(store, "a", start, 1000)
    store.lose(entry, "it is unknown")
    with pytest.raises(KeyConflict, match="it is unknown"):
        store.once("a", b"request", start)
    assert (start.count, store._bytes) == (1, 0)


async def test_a_start_whose_outcome_is_unknown_keeps_its_key(clock: Clock) -> None:
    class Unknown:
        command = Command("true")
        timed_out = False

        def when_started(self) -> Deferred[None]:
            return fail(SpawnError(OSError(errno.EIO, "the process that starts commands has died")))

    store = IdempotencyStore(clock)
    files = Files(Root(), FilesystemThreads(cast(Any, clock)))
    starter = CommandStarter(cast(Any, None), files, cast(Any, None), store)
    entry = store.once("a", b"request", lambda: "id")
    with pytest.raises(SpawnError):
        await starter.until_started(cast(Any, Unknown()), entry)
    with pytest.raises(KeyConflict, match="unknown whether the command was executed"):
        store.once("a", b"request", lambda: "other")


# Over HTTP


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.close()


@pytest.fixture
def key(tmp_path: Path) -> dict[str, str]:
    """A header that no other test sends."""
    return {KEY: str(tmp_path)}


class Counted:
    """A command that leaves a trace of each time that it is executed."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "traces"
        self.cmd = f"echo x >> {self.file}"

    @property
    def count(self) -> int:
        return len(self.file.read_text().splitlines()) if self.file.exists() else 0


@pytest.fixture
def counted(tmp_path: Path) -> Counted:
    return Counted(tmp_path)


def ids(responses: list[Response]) -> set[str]:
    return {id for response in responses for id in response.headers.getRawHeaders("X-Execution-Id")}


async def test_run_without_a_key_is_executed_each_time(api: Api, counted: Counted) -> None:
    for _ in range(2):
        await api.run(counted.cmd)
    assert counted.count == 2


async def test_run_again_gets_the_answer_of_the_first(api: Api, counted: Counted, key: dict[str, str]) -> None:
    body = {"cmd": f"{counted.cmd}; date +%N; echo err >&2; exit 3"}
    responses = [await api.post("/run", body, key) for _ in range(3)]
    assert counted.count == 1
    assert {(response.status, response.body) for response in responses} == {(200, responses[0].body)}
    assert responses[0].json()["code"] == 3
    assert len(ids(responses)) == 1


async def test_run_at_the_same_time_joins_the_first(
    api: Api, counted: Counted, key: dict[str, str], gate: Gate
) -> None:
    body = {"cmd": f"{counted.cmd}; {gate.wait}; date +%N"}
    calls = [within(10, api.post("/run", body, key)) for _ in range(5)]
    await until(lambda: counted.count)
    gate.open()
    responses = await gatherResults(calls)
    assert counted.count == 1
    assert len({response.body for response in responses}) == len(ids(responses)) == 1


async def test_a_large_answer_comes_again_whole(api: Api, counted: Counted, key: dict[str, str]) -> None:
    body = {"cmd": f"{counted.cmd}; seq 200000"}
    responses = [await api.post("/run", body, key) for _ in range(2)]
    assert responses[0].json()["stdout"].endswith("\n199999\n200000\n")
    assert responses[0].body == responses[1].body
    assert counted.count == 1


@pytest.mark.slow
async def test_run_goes_on_when_its_client_hangs_up_and_the_retry_gets_the_answer(
    api: Api, daemon: Daemon, counted: Counted, key: dict[str, str], gate: Gate
) -> None:
    body = {"cmd": f"{counted.cmd}; {gate.wait}; echo done"}
    call = api.request("POST", "/run", body, key)
    await until(lambda: counted.count)
    connected = await settled(daemon.descriptors)
    call.cancel()
    with pytest.raises(ResponseNeverReceived):
        await call
    await until(lambda: daemon.descriptors() < connected)
    retry = within(10, api.post("/run", body, key))
    gate.open()
    assert (await retry).json() == {"stdout": "done\n", "stderr": "", "code": 0}
    assert counted.count == 1


@pytest.mark.slow
async def test_run_that_ended_after_its_client_hung_up_is_answered_later(
    api: Api, daemon: Daemon, counted: Counted, key: dict[str, str], gate: Gate, tmp_path: Path
) -> None:
    body = {"cmd": f"{counted.cmd}; {gate.wait}; echo done; touch {tmp_path}/done"}
    call = api.request("POST", "/run", body, key)
    await until(lambda: counted.count)
    connected = await settled(daemon.descriptors)
    call.cancel()
    with pytest.raises(ResponseNeverReceived):
        await call
    await until(lambda: daemon.descriptors() < connected)
    gate.open()
    await until((tmp_path / "done").exists)
    assert (await api.post("/run", body, key)).json() == {"stdout": "done\n", "stderr": "", "code": 0}
    assert counted.count == 1


async def test_a_stream_is_joined_and_replayed(api: Api, counted: Counted, key: dict[str, str], gate: Gate) -> None:
    body = {"cmd": f"{counted.cmd}; echo a; {gate.wait}; echo b; exit 3"}
    first = Events(await api.request("POST", "/run_streaming", body, key))
    async for event in first:
        seen = [event]
        break
    joined = Events(await api.request("POST", "/run_streaming", body, key))
    gate.open()
    seen += await within(10, first.all())
    replayed = Events(await api.request("POST", "/run_streaming", body, key))
    assert await within(10, joined.all()) == await within(10, replayed.all()) == seen
    assert [event.data.get("data", event.data.get("code")) for event in seen] == ["a", "b", 3]
    assert counted.count == 1


@pytest.mark.slow
async def test_a_stream_whose_client_hung_up_goes_on_and_is_resumed(
    api: Api, daemon: Daemon, counted: Counted, key: dict[str, str], gate: Gate
) -> None:
    body = {"cmd": f"{counted.cmd}; echo a; {gate.wait}; echo b"}
    stream = Events(await api.request("POST", "/run_streaming", body, key))
    async for event in stream:
        last = event.id
        break
    connected = await settled(daemon.descriptors)
    stream.close()
    await until(lambda: daemon.descriptors() < connected)
    again = Events(await api.request("POST", "/run_streaming", body, {**key, "Last-Event-ID": str(last)}))
    gate.open()
    events = await within(10, again.all())
    assert [event.data.get("data", event.data.get("code")) for event in events] == ["b", 0]
    assert counted.count == 1


async def test_a_process_is_started_once(api: Api, counted: Counted, key: dict[str, str]) -> None:
    body = {"cmd": f"{counted.cmd}; exec sleep 300"}
    responses = await gatherResults([within(10, api.post("/start_process", body, key)) for _ in range(3)])
    responses.append(await api.post("/start_process", body, key))
    assert {response.status for response in responses} == {201}
    (id,) = {response.json()["id"] for response in responses}
    await until(lambda: counted.count)
    await api.post("/kill_process", {"id": id})
    assert (await api.post("/start_process", body, key)).json()["id"] == id
    assert counted.count == 1


async def test_a_file_is_written_once(api: Api, tmp_path: Path, key: dict[str, str]) -> None:
    body = {"path": str(tmp_path / "file"), "content": "first"}
    assert (await api.post("/write_file", body, key)).json() == {"success": True}
    (tmp_path / "file").write_text("changed since")
    assert (await api.post("/write_file", body, key)).json() == {"success": True}
    assert (tmp_path / "file").read_text() == "changed since"


async def test_a_file_that_could_not_be_written_is_told_again(api: Api, tmp_path: Path, key: dict[str, str]) -> None:
    body = {"path": str(tmp_path), "content": "x"}
    responses = [await api.post("/write_file", body, key) for _ in range(2)]
    assert responses[0].json()["success"] is False
    assert responses[0].body == responses[1].body


async def test_a_file_that_could_not_be_written_is_written_when_the_cause_has_gone(
    api: Api, tmp_path: Path, key: dict[str, str]
) -> None:
    body = {"path": str(tmp_path / "folder/file"), "content": "x"}
    assert (await api.post("/write_file", body, key)).json()["success"] is False
    (tmp_path / "folder").mkdir()
    assert (await api.post("/write_file", body, key)).json() == {"success": True}
    (tmp_path / "folder/file").write_text("changed since")
    assert (await api.post("/write_file", body, key)).json() == {"success": True}
    assert (tmp_path / "folder/file").read_text() == "changed since"


@pytest.mark.parametrize("route", ["/run", "/run_streaming", "/start_process"])
async def test_another_body_is_a_conflict_that_names_the_header(
    api: Api, counted: Counted, key: dict[str, str], route: str
) -> None:
    await api.post("/run", {"cmd": "true"}, key)
    response = await api.post(route, {"cmd": counted.cmd}, key)
    assert response.status == 409
    assert KEY in response.json()["error"]
    assert counted.count == 0


async def test_another_route_is_a_conflict(api: Api, counted: Counted, key: dict[str, str]) -> None:
    body = {"cmd": counted.cmd}
    await api.post("/run", body, key)
    assert (await api.post("/run_streaming", body, key)).status == 409
    assert (await api.post("/start_process", body, key)).status == 409
    assert counted.count == 1


async def test_a_file_with_another_content_is_a_conflict(api: Api, tmp_path: Path, key: dict[str, str]) -> None:
    path = str(tmp_path / "file")
    await api.post("/write_file", {"path": path, "content": "a"}, key)
    response = await api.post("/write_file", {"path": path, "content": "b"}, key)
    assert response.status == 409
    assert response.json()["success"] is False
    assert KEY in response.json()["error"]
    assert (tmp_path / "file").read_text() == "a"


async def test_the_prefix_makes_no_other_request(api: Api, counted: Counted, key: dict[str, str]) -> None:
    body = {"cmd": f"{counted.cmd}; date +%N"}
    responses = [await api.post(f"{prefix}/run", body, key) for prefix in ("", "/koyeb-sandbox", "")]
    assert len({response.body for response in responses}) == 1
    assert counted.count == 1


async def test_a_request_that_was_refused_may_come_again(
    api: Api, counted: Counted, key: dict[str, str], tmp_path: Path
) -> None:
    body = {"cmd": counted.cmd, "cwd": str(tmp_path / "folder")}
    assert (await api.post("/run", body, key)).status == 400
    (tmp_path / "folder").mkdir()
    assert (await api.post("/run", body, key)).status == 200
    assert counted.count == 1


@pytest.mark.parametrize("name", ["Idempotency-Key", "Last-Event-ID"])
def test_a_header_that_is_not_utf8_is_no_failure_of_the_daemon(daemon: Daemon, name: str) -> None:
    body = b'{"cmd": "true"}'
    head = f"POST /run_streaming HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {daemon.secret}\r\n{name}: ".encode()
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as sock:
        sock.sendall(head + b"\xff\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        status = int(sock.recv(100).split()[1])
    assert status in (200, 400)


@pytest.mark.parametrize("route", ["/run_streaming", "/start_process"])
async def test_a_command_that_is_forgotten_is_not_executed_again(
    start_daemon: Callable[..., Daemon], counted: Counted, key: dict[str, str], route: str
) -> None:
    daemon = start_daemon(SANDBOX_KEEP_FINISHED="1")
    api = Api(daemon.url, daemon.secret)
    for headers in (key, {}):
        response = await api.post(route, {"cmd": counted.cmd}, headers)
        (id,) = response.headers.getRawHeaders("X-Execution-Id")
        await api.post(f"/processes/{id}/wait")
    response = await api.post(route, {"cmd": counted.cmd}, key)
    assert response.status == 409
    assert KEY in response.json()["error"]
    assert counted.count == 2
