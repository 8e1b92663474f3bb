"""Any execution by its id: ``/processes/<id>`` and what is under it; how long it is remembered."""

from __future__ import annotations

import json
import os
import socket
import struct
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import ANY

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.threads import deferToThread
from twisted.web.client import ResponseNeverReceived

from sandboxd.execution.table import Finished, ProcessTable
from sandboxd.processes.command import Command
from sandboxd.reactor.threads import ThreadPool
from sandboxd.reactor.turn_budget import TurnBudget
from tests.client import Api, Events, Response
from tests.daemon import Daemon, alive
from tests.waiting import Gate, until, within

#: More than any pipe holds.
LARGE = 5_000_000


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.close()


def id_of(response: Response | Events) -> str:
    """The id that a response names."""
    (id,) = response.headers.getRawHeaders("X-Execution-Id")
    return str(id)


async def described(api: Api, id: str) -> Any:
    response = await api.get(f"/processes/{id}")
    assert response.status == 200, response
    return response.json()


async def wait(api: Api, id: str, **fields: Any) -> Any:
    response = await api.post(f"/processes/{id}/wait", fields)
    assert response.status == 200, response
    return response.json()


async def logs(api: Api, id: str, query: str = "") -> Any:
    response = await api.get(f"/processes/{id}/logs{query}")
    assert response.status == 200, response
    return response.json()


async def lines(api: Api, id: str) -> list[str]:
    return [record["data"] for record in (await logs(api, id))["records"]]


def feed(api: Api, id: str, data: bytes, query: str = "") -> Deferred[Response]:
    return within(30, api.post(f"/processes/{id}/stdin{query}", data))


async def send(api: Api, id: str, signal: Any) -> Response:
    return await api.post(f"/processes/{id}/signal", {"signal": signal})


async def kill(api: Api, id: str) -> None:
    assert (await api.post("/kill_process", {"id": id})).status == 200


async def unfollowed(api: Api, id: str) -> None:
    """Returns once the daemon knows that nobody reads the output."""
    deadline = time.monotonic() + 10
    while (await described(api, id))["output"]["followers"]:
        assert time.monotonic() < deadline


async def unknown(api: Api, id: str) -> None:
    """Returns once the daemon has forgotten an execution."""
    deadline = time.monotonic() + 10
    while (await api.get(f"/processes/{id}")).status != 404:
        assert time.monotonic() < deadline


def seconds(timestamp: str) -> float:
    return datetime.fromisoformat(timestamp.replace("Z", "+00:00")).timestamp()


# The id


async def test_run_names_its_execution(api: Api) -> None:
    response = await api.post("/run", {"cmd": "echo hi"})
    assert await lines(api, id_of(response)) == ["hi"]


async def test_run_streaming_names_its_execution_at_once(api: Api, gate: Gate) -> None:
    stream = await api.stream(gate.wait)
    assert (await described(api, id_of(stream)))["status"] == "running"
    gate.open()
    await stream.all()


async def test_start_process_names_its_execution(api: Api) -> None:
    response = await api.post("/start_process", {"cmd": "true"})
    assert id_of(response) == response.json()["id"]


async def test_a_command_that_is_not_executed_has_no_id(api: Api) -> None:
    response = await api.post("/run", {"cmd": "true", "cwd": "/no/such/folder"})
    assert response.headers.getRawHeaders("X-Execution-Id") is None


async def test_the_prefix(api: Api) -> None:
    id = await api.start("echo hi", stdin=True)
    prefix = f"/koyeb-sandbox/processes/{id}"
    assert (await api.post(f"{prefix}/wait")).json()["status"] == "completed"
    assert (await api.get(prefix)).json()["id"] == id
    assert (await api.get(f"{prefix}/logs")).json()["last"] == 1
    assert (await api.post(f"{prefix}/stdin", b"x")).status == 409
    assert (await api.post(f"{prefix}/signal", {"signal": 15})).status == 409


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "", None),
        ("GET", "/logs", None),
        ("POST", "/stdin", b"x"),
        ("POST", "/signal", {"signal": "TERM"}),
        ("POST", "/wait", {}),
    ],
)
async def test_an_unknown_id_is_404(api: Api, method: str, path: str, body: Any) -> None:
    response = await api.call(method, f"/processes/no-such-id{path}", body)
    assert response.status == 404
    assert response.json()["error"] == "process not found: no-such-id"


# What is known of it


async def test_a_running_background_process_in_full(api: Api, tmp_path: Path, gate: Gate) -> None:
    cmd = f"echo out; echo err >&2; {gate.wait}"
    surroundings = {"cwd": str(tmp_path), "timeout": 30, "idle_timeout": 20.5, "limits": {"core": 0}, "survive": True}
    began = time.time()
    id = await api.start(cmd, **surroundings)
    while (found := await described(api, id))["output"]["records"] < 2:
        assert time.time() < began + 10
    assert began - 0.1 <= seconds(found.pop("started_at")) <= seconds(found["output"].pop("last_at")) <= time.time()
    assert found == {
        "id": id,
        "pid": (await api.process(id))["pid"],
        "status": "running",
        "background": True,
        "argv": None,
        "tty": None,
        "command": cmd,
        "user": None,
        **surroundings,
        "ended_at": None,
        "exit_code": None,
        "signal": None,
        "timed_out": False,
        "idle_timed_out": False,
        "oom_killed": False,
        "survivors": [],
        "output": {"bytes": 8, "records": 2, "first": 1, "truncated": False, "followers": 0},
    }
    await kill(api, id)


async def test_an_ended_foreground_command_in_full(api: Api) -> None:
    began = time.time()
    response = await api.post("/run", {"cmd": "echo out; exit 3"})
    found = await described(api, id_of(response))
    assert found.pop("pid") > 1
    times = [found.pop("started_at"), found["output"].pop("last_at"), found.pop("ended_at")]
    assert [began - 0.1, *map(seconds, times)] == sorted([began - 0.1, *map(seconds, times)])
    assert found == {
        "id": id_of(response),
        "status": "failed",
        "background": False,
        "argv": None,
        "tty": None,
        "command": "echo out; exit 3",
        "cwd": None,
        "user": None,
        "timeout": None,
        "idle_timeout": None,
        "limits": {},
        "survive": False,
        "exit_code": 3,
        "signal": None,
        "timed_out": False,
        "idle_timed_out": False,
        "oom_killed": False,
        "survivors": [],
        "output": {"bytes": 4, "records": 1, "first": 1, "truncated": False, "followers": 0},
    }


async def test_a_running_foreground_command(api: Api, gate: Gate) -> None:
    stream = await api.stream(gate.wait)
    found = await described(api, id_of(stream))
    assert (found["status"], found["background"], found["output"]["followers"]) == ("running", False, 1)
    assert found["output"]["last_at"] is None
    gate.open()
    await stream.all()


@pytest.mark.parametrize(
    ("fields", "telling"),
    [
        ({"cmd": "kill -SEGV $$"}, {"status": "failed", "signal": "SIGSEGV"}),
        ({"cmd": "sleep 300", "timeout": 0.1}, {"status": "killed", "signal": "SIGKILL", "timed_out": True}),
        ({"cmd": "sleep 300", "idle_timeout": 0.1}, {"status": "killed", "signal": "SIGKILL", "idle_timed_out": True}),
    ],
)
async def test_how_it_ended_is_told(api: Api, fields: dict[str, Any], telling: dict[str, Any]) -> None:
    found = await wait(api, await api.start(**fields))
    quiet = {"timed_out": False, "idle_timed_out": False, "exit_code": -1}
    assert {name: found[name] for name in (*quiet, "status", "signal")} == {**quiet, **telling}


async def test_dropped_output_is_told(api: Api) -> None:
    output = (await wait(api, await api.start("seq 25000")))["output"]
    assert (output["records"], output["first"], output["truncated"]) == (25_000, 15_001, True)
    assert output["bytes"] == sum(len(str(n)) + 1 for n in range(1, 25_001))


# Its log


async def test_a_record_in_full(api: Api) -> None:
    id = await api.start("echo 'é\\'; sleep 0.05; printf err >&2")
    await wait(api, id)
    found = await logs(api, id)
    for record in found["records"]:
        assert abs(seconds(record.pop("timestamp")) - time.time()) < 60
    assert found == {
        "records": [{"seq": 1, "stream": "stdout", "data": "é\\"}, {"seq": 2, "stream": "stderr", "data": "err"}],
        "dropped": 0,
        "last": 2,
        "ended": True,
    }


async def test_a_line_in_pieces_says_so(api: Api) -> None:
    id = await api.start("head -c 25000 /dev/zero | tr '\\0' x; echo")
    await wait(api, id)
    *pieces, last = (await logs(api, id))["records"]
    assert [piece["partial"] for piece in pieces] == [True] * len(pieces) != []
    assert "partial" not in last
    assert "".join(record["data"] for record in (*pieces, last)) == "x" * 25_000


async def test_a_log_that_grows_has_not_ended(api: Api, gate: Gate) -> None:
    stream = await api.stream(f"echo a; {gate.wait}; echo b")
    async for _ in stream:
        break
    found = await logs(api, id_of(stream))
    assert (found["last"], found["ended"]) == (1, False)
    found = await logs(api, id_of(stream), "?after=1")
    assert (found["records"], found["last"], found["ended"]) == ([], 1, False)
    gate.open()
    await stream.all()
    found = await logs(api, id_of(stream), "?after=1")
    assert ([record["data"] for record in found["records"]], found["last"], found["ended"]) == (["b"], 2, True)


async def test_a_process_without_output_has_an_empty_log(api: Api) -> None:
    id = await api.start("true")
    await wait(api, id)
    assert await logs(api, id) == {"records": [], "dropped": 0, "last": 0, "ended": True}


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
async def test_paging_brings_every_record_once(api: Api, limit: int) -> None:
    id = await api.start("seq 6")
    await wait(api, id)
    pages = [await logs(api, id, f"?limit={limit}")]
    while not pages[-1]["ended"]:
        assert len(pages[-1]["records"]) == limit
        pages.append(await logs(api, id, f"?limit={limit}&after={pages[-1]['last']}"))
    assert [record["seq"] for page in pages for record in page["records"]] == [1, 2, 3, 4, 5, 6]
    assert [record["data"] for page in pages for record in page["records"]] == ["1", "2", "3", "4", "5", "6"]
    assert len(pages) == -(-6 // limit)


async def test_paging_through_25000_lines_brings_the_newest_10000_and_tells_what_was_dropped(api: Api) -> None:
    id = await api.start("seq 25000")
    await wait(api, id)
    pages = [await logs(api, id, "?limit=4000")]
    while not pages[-1]["ended"]:
        pages.append(await logs(api, id, f"?limit=4000&after={pages[-1]['last']}"))
    records = [record for page in pages for record in page["records"]]
    assert [page["dropped"] for page in pages] == [15_000, 0, 0]
    assert [record["data"] for record in records] == [str(n) for n in range(15_001, 25_001)]
    assert [record["seq"] for record in records] == list(range(15_001, 25_001))


async def test_a_limit_above_the_highest_is_the_highest(api: Api) -> None:
    id = await api.start("seq 25000")
    await wait(api, id)
    found = await logs(api, id, "?limit=20000&after=3")
    assert (len(found["records"]), found["dropped"], found["last"], found["ended"]) == (10_000, 14_997, 25_000, True)


@pytest.mark.parametrize("query", ["after=x", "after=-1", "limit=x", "limit=-1", "limit=1.5", "after=%C2%B2"])
async def test_a_bad_number_is_named(api: Api, query: str) -> None:
    id = await api.start("true")
    response = await api.get(f"/processes/{id}/logs?{query}")
    assert response.status == 400
    assert query.partition("=")[0] in response.json()["error"]


# Its stdin


async def test_any_bytes_arrive_as_they_were_sent(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "file"
    data = bytes(range(256)) * 40
    id = await api.start(f"cat > {file}", stdin=True)
    response = await feed(api, id, data)
    assert (response.status, response.json()) == (200, {"success": True, "bytes": len(data)})
    await until(lambda: file.exists() and file.read_bytes() == data)
    assert (await wait(api, id, timeout=0))["status"] == "running"
    await feed(api, id, b'{"not": "decoded"}\r\n', "?close=1")
    assert (await wait(api, id))["status"] == "completed"
    assert file.read_bytes() == data + b'{"not": "decoded"}\r\n'


async def test_what_is_sent_is_echoed_while_stdin_is_open(api: Api) -> None:
    id = await api.start("cat", stdin=True)
    events = aiter(await api.logs(id))
    for word in ("one", "two"):
        await feed(api, id, f"{word}\n".encode())
        assert (await within(10, anext(events))).data["data"] == word
    await feed(api, id, b"", "?close=1")
    assert (await wait(api, id))["exit_code"] == 0


async def test_a_foreground_command_can_be_fed(api: Api) -> None:
    stream = await api.stream("echo ready; cat", stdin=True)
    assert (await feed(api, id_of(stream), b"hi\n", "?close=1")).status == 200
    assert [event.data.get("data") for event in await stream.all()] == ["ready", "hi", None]


@pytest.mark.parametrize("query", ["", "?close=0", "?close=false"])
async def test_stdin_stays_open_unless_it_is_to_be_closed(api: Api, query: str) -> None:
    id = await api.start("cat", stdin=True)
    await feed(api, id, b"a", query)
    assert (await feed(api, id, b"b", query)).status == 200
    await kill(api, id)


@pytest.mark.slow
async def test_megabytes_wait_for_a_child_that_reads_nothing_and_hold_nobody_up(
    api: Api, tmp_path: Path, gate: Gate
) -> None:
    file = tmp_path / "file"
    data = os.urandom(LARGE)
    id = await api.start(f"{gate.wait}; cat > {file}", stdin=True)
    fed = feed(api, id, data, "?close=1")
    assert (await wait(api, id, timeout=0.5))["status"] == "running"
    assert (await within(2, api.run("echo hi")))["stdout"] == "hi\n"
    assert not fed.called
    gate.open()
    assert (await fed).json() == {"success": True, "bytes": LARGE}
    assert (await within(10, wait(api, id)))["exit_code"] == 0
    assert file.read_bytes() == data


@pytest.mark.slow
async def test_what_is_sent_in_turn_arrives_in_turn(api: Api, tmp_path: Path, gate: Gate) -> None:
    file = tmp_path / "file"
    id = await api.start(f"{gate.wait}; cat > {file}", stdin=True)
    first = feed(api, id, b"a" * LARGE)
    await wait(api, id, timeout=0.3)
    second = feed(api, id, b"b" * LARGE, "?close=1")
    await wait(api, id, timeout=0.2)
    gate.open()
    assert [(await first).status, (await second).status] == [200, 200]
    await wait(api, id)
    assert file.read_bytes() == b"a" * LARGE + b"b" * LARGE


@pytest.mark.slow
async def test_the_end_of_the_process_ends_a_post_that_waits(api: Api, gate: Gate) -> None:
    id = await api.start(f"{gate.wait}; exit 3", stdin=True)
    fed = feed(api, id, b"x" * LARGE)
    assert (await wait(api, id, timeout=0.3))["status"] == "running"
    assert not fed.called
    gate.open()
    response = await fed
    assert response.status == 409
    assert "stdin" in response.json()["error"]
    assert (await within(10, wait(api, id)))["exit_code"] == 3


@pytest.mark.slow
async def test_a_client_that_stops_waiting_for_its_post_does_no_harm(api: Api, gate: Gate) -> None:
    id = await api.start(f"{gate.wait}; head -c 5 > /dev/null; echo read", stdin=True)
    call = api.request("POST", f"/processes/{id}/stdin", b"x" * LARGE)
    await wait(api, id, timeout=0.3)
    call.cancel()
    with pytest.raises(ResponseNeverReceived):
        await call
    gate.open()
    assert (await within(5, wait(api, id)))["exit_code"] == 0
    assert await lines(api, id) == ["read"]


@pytest.mark.parametrize(("data", "query"), [(b"x", ""), (b"x", "?close=1"), (b"", "?close=1")])
async def test_a_process_without_stdin_cannot_be_fed(api: Api, data: bytes, query: str) -> None:
    id = await api.start("sleep 300")
    response = await feed(api, id, data, query)
    await kill(api, id)
    assert response.status == 409
    assert "stdin" in response.json()["error"]


async def test_a_closed_stdin_takes_nothing_more(api: Api, gate: Gate) -> None:
    id = await api.start(f"cat; {gate.wait}", stdin=True)
    await feed(api, id, b"x\n", "?close=1")
    response = await feed(api, id, b"y\n")
    gate.open()
    await wait(api, id)
    assert (response.status, await lines(api, id)) == (409, ["x"])


async def test_an_ended_process_cannot_be_fed(api: Api) -> None:
    id = await api.start("true", stdin=True)
    await wait(api, id)
    assert (await feed(api, id, b"x")).status == 409


async def test_a_process_that_has_closed_its_stdin_cannot_be_fed(api: Api) -> None:
    id = await api.start("exec <&-; echo closed; sleep 300", stdin=True)
    async for _ in await api.logs(id):
        break
    assert (await feed(api, id, b"x" * LARGE)).status == 409
    await kill(api, id)


# Signals


@pytest.mark.parametrize("signal", ["USR1", "SIGUSR1", "usr1", 10, "10"])
async def test_a_handler_sees_the_signal(api: Api, signal: str | int) -> None:
    id = await api.start('trap "echo got it; exit 7" USR1; echo ready; while :; do sleep 300 & wait; done')
    events = aiter(await api.logs(id))
    assert (await within(10, anext(events))).data["data"] == "ready"
    response = await send(api, id, signal)
    assert (response.status, response.json()) == (200, {"success": True, "message": "SIGUSR1 sent"})
    found = await within(10, wait(api, id))
    assert (found["status"], found["exit_code"], found["signal"]) == ("failed", 7, None)
    assert await lines(api, id) == ["ready", "got it"]


async def test_a_signal_that_ends_it_is_told_and_is_no_kill(api: Api) -> None:
    id = await api.start("exec sleep 300")
    await send(api, id, "TERM")
    found = await within(10, wait(api, id))
    assert (found["status"], found["exit_code"], found["signal"]) == ("failed", -1, "SIGTERM")


async def test_a_signal_that_is_ignored_ends_nothing(api: Api) -> None:
    id = await api.start('trap "" HUP; echo ready; sleep 300')
    async for _ in await api.logs(id):
        break
    assert (await send(api, id, "HUP")).status == 200
    assert (await wait(api, id, timeout=0.2))["status"] == "running"
    await kill(api, id)


async def test_a_foreground_command_can_be_signalled(api: Api) -> None:
    stream = await api.stream("exec sleep 300")
    comm = Path(f"/proc/{(await described(api, id_of(stream)))['pid']}/comm")
    await until(lambda: comm.read_text() == "sleep\n")  # dash loses an INT that comes while it is about to exec
    await send(api, id_of(stream), "INT")
    *_, end = await within(10, stream.all())
    assert end.data == {"code": -1, "error": True, "signal": "SIGINT"}


@pytest.mark.parametrize("signal", ["NOPE", "", 0, -1, 99_999, "²", True, 1.5, None, ["TERM"]])
async def test_no_signal_of_that_name(api: Api, signal: Any) -> None:
    id = await api.start("sleep 300")
    response = await send(api, id, signal)
    assert response.status == 400
    assert response.json()["success"] is False
    assert "signal" in response.json()["error"]
    assert (await described(api, id))["status"] == "running"
    await kill(api, id)


async def test_an_ended_process_cannot_be_signalled(api: Api) -> None:
    id = await api.start("true")
    await wait(api, id)
    response = await send(api, id, "TERM")
    assert response.status == 409
    assert response.json() == {"success": False, "error": "process is not running (status: completed)"}


# Waiting


@pytest.mark.parametrize("fields", [{}, {"timeout": None}, {"timeout": 30}])
async def test_waiting_ends_with_the_process(api: Api, gate: Gate, fields: dict[str, Any]) -> None:
    id = await api.start(f"{gate.wait}; exit 3")
    waited = within(10, wait(api, id, **fields))
    assert (await wait(api, id, timeout=0.2))["status"] == "running"
    assert not waited.called
    gate.open()
    found = await waited
    assert (found["status"], found["exit_code"]) == ("failed", 3)
    assert found == {**await described(api, id), "reason": "exit"}


@pytest.mark.parametrize("timeout", [0, 0.3])
@pytest.mark.slow
async def test_waiting_ends_at_its_deadline(api: Api, timeout: float) -> None:
    id = await api.start("sleep 300")
    began = time.monotonic()
    found = await within(timeout + 3, wait(api, id, timeout=timeout))
    assert time.monotonic() - began >= timeout
    assert (found["status"], found["exit_code"], found["ended_at"]) == ("running", None, None)
    await kill(api, id)


async def test_waiting_for_what_has_ended_takes_no_time(api: Api) -> None:
    id = id_of(await api.post("/run", {"cmd": "true"}))
    assert (await within(2, wait(api, id, timeout=30)))["status"] == "completed"


@pytest.mark.parametrize("timeout", [-1, "1", True])
async def test_a_bad_deadline_is_named(api: Api, timeout: Any) -> None:
    id = await api.start("true")
    response = await api.post(f"/processes/{id}/wait", {"timeout": timeout})
    assert response.status == 400
    assert "timeout" in response.json()["error"]


# Detached


async def test_a_detached_command_outlives_its_client(api: Api, gate: Gate) -> None:
    stream = await api.stream(f"echo before; {gate.wait}; echo after", detach=True)
    async for _ in stream:
        break
    stream.close()
    await unfollowed(api, id_of(stream))
    gate.open()
    assert (await within(10, wait(api, id_of(stream))))["status"] == "completed"
    assert await lines(api, id_of(stream)) == ["before", "after"]


@pytest.mark.slow
async def test_a_detached_command_whose_client_stopped_reading_outlives_it(api: Api) -> None:
    stream = await api.stream("seq 2000000", detach=True)
    stream.pause()
    assert (await wait(api, id_of(stream), timeout=0.5))["status"] == "running"
    stream.close()
    found = await within(20, wait(api, id_of(stream)))
    assert (found["exit_code"], found["output"]["records"]) == (0, 2_000_000)


async def test_reattached_to_a_detached_command_nothing_is_lost(api: Api, gate: Gate) -> None:
    stream = await api.stream(f"seq 1 500; {gate.wait}; seq 501 1000", detach=True)
    seen = []
    async for event in stream:
        seen.append(event)
        if len(seen) == 300:
            break
    stream.close()
    await unfollowed(api, id_of(stream))
    again = await api.logs(id_of(stream), headers={"Last-Event-ID": str(seen[-1].id)})
    gate.open()
    *rest, end = await within(10, again.all())
    assert [event.data["data"] for event in (*seen, *rest)] == [str(n) for n in range(1, 1001)]
    assert [int(str(event.id)) for event in (*seen, *rest)] == list(range(1, 1001))
    assert end.name == "complete"


# How long it is remembered


async def test_the_newest_of_each_kind_are_kept(start_daemon: Callable[..., Daemon], gate: Gate) -> None:
    daemon = start_daemon(SANDBOX_KEEP_FINISHED="3")
    api = Api(daemon.url, daemon.secret)
    running = await api.start(gate.wait)
    background = []
    for _ in range(5):
        background.append(await api.start("echo hi"))
        await wait(api, background[-1])
    foreground = [id_of(await api.post("/run", {"cmd": "echo hi"})) for _ in range(5)]
    for ids in (background, foreground):
        known = [(await api.get(f"/processes/{id}")).status for id in ids]
        assert known == [404, 404, 200, 200, 200]
    listed = [process["id"] for process in (await api.get("/list_processes")).json()["processes"]]
    assert listed == [running, *background[2:]]
    gate.open()


async def test_what_has_left_processes_behind_is_kept_apart_so_that_they_can_be_ended(
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon = start_daemon(SANDBOX_KEEP_FINISHED="3")
    api = Api(daemon.url, daemon.secret)

    async def run(cmd: str) -> str:
        return id_of(await api.post("/run", {"cmd": cmd}))

    leaving = [await run("setsid sleep 300 < /dev/null > /dev/null 2>&1 &") for _ in range(5)]
    plain = [await run("true") for _ in range(6)]
    for id in (*leaving[:2], *plain[:3]):
        await unknown(api, id)
    assert [(await api.get(f"/processes/{id}")).status for id in (*leaving[2:], *plain[3:])] == [200] * 6
    for id in leaving[2:]:
        (pid,) = (await described(api, id))["survivors"]
        assert (await api.post("/kill_process", {"id": id})).status == 200
        assert not alive(pid)
    plain = [await run("true") for _ in range(4)]
    for id in (*leaving[2:], plain[0]):
        await unknown(api, id)


async def test_what_is_too_old_is_forgotten_and_what_runs_is_not(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(SANDBOX_KEEP_SECONDS="1")
    api = Api(daemon.url, daemon.secret)
    running = await api.start("sleep 300")
    background = await api.start("true")
    foreground = id_of(await api.post("/run", {"cmd": "true"}))
    assert (await described(api, foreground))["status"] == "completed"
    await unknown(api, foreground)
    await unknown(api, background)
    listed = (await api.get("/list_processes")).json()["processes"]
    assert [process["id"] for process in listed] == [running]
    assert (await described(api, running))["status"] == "running"


async def test_what_is_forgotten_holds_no_memory(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(SANDBOX_KEEP_FINISHED="1")
    api = Api(daemon.url, daemon.secret)
    before = daemon.memory()
    for _ in range(12):
        await api.run("head -c 16000000 /dev/zero | tr '\\0' x | fold -w 5000", max_output=10)
    assert daemon.memory() - before < 80_000_000


async def test_stdin_that_nobody_reads_is_dropped_when_its_client_hangs_up(
    start_daemon: Callable[..., Daemon], gate: Gate
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    id = await api.start(f"{gate.wait}; cat", stdin=True)
    head = (
        f"POST /processes/{id}/stdin HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {daemon.secret}\r\n"
        f"Content-Length: {4 * LARGE}\r\n\r\n"
    )

    def send_and_hang_up() -> None:
        with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as sock:
            sock.sendall(head.encode() + bytes(4 * LARGE))

    await deferToThread(send_and_hang_up)
    await idle(api)
    before = daemon.memory()
    for _ in range(12):
        await deferToThread(send_and_hang_up)
    await idle(api)
    assert daemon.memory() - before < 3 * 4 * LARGE
    gate.open()
    assert (await feed(api, id, b"", "?close=1")).status == 200
    assert (await within(10, wait(api, id)))["status"] == "completed"


async def idle(api: Api) -> None:
    """Return once no request is open."""

    async def none_open() -> None:
        while b"sandboxd_http_requests_open 0.0" not in (await api.get("/metrics")).body:
            pass

    await within(10, none_open())


async def test_a_log_of_control_characters_costs_neither_time_nor_memory(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    line = "\x01" * 1500
    id = (await api.post("/start_process", {"cmd": f"yes '{line}' | head -n 10000"})).json()["id"]
    assert (await wait(api, id))["status"] == "completed"
    before = daemon.memory()
    client = socket.create_connection(("127.0.0.1", daemon.port), timeout=10)
    with client:
        client.sendall(
            f"GET /processes/{id}/logs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {daemon.secret}\r\n\r\n".encode()
        )
        began = time.monotonic()
        assert (await api.get("/health")).status == 200
        assert time.monotonic() - began < 0.8  # it took more than that to encode all at once
        assert daemon.memory() - before < 30_000_000
    found = await logs(api, id)
    assert len(found["records"]) == min(10_000, found["last"] - found["records"][0]["seq"] + 1)
    assert found["records"][-1] == {**found["records"][0], "seq": found["last"], "timestamp": ANY}
    assert found["ended"]


@pytest.mark.parametrize("route", ["/start_process", "/run_streaming"])
async def test_what_outlives_its_connection_is_started_though_that_is_lost(
    api: Api, daemon: Daemon, tmp_path: Path, route: str
) -> None:
    for number in range(20):
        file = tmp_path / str(number)
        body = json.dumps({"cmd": f"sleep 0.05; touch {file}", "cwd": str(tmp_path), "detach": True}).encode()
        head = (
            f"POST {route} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {daemon.secret}\r\nContent-Length: {len(body)}"
        )
        with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as sock:
            sock.sendall(head.encode() + b"\r\n\r\n" + body)
            time.sleep(number / 10_000)  # up to 2 ms, in which it is started
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # a reset
    await until(lambda: len(list(tmp_path.iterdir())) == 20)


def test_the_bytes_of_records_include_scripts_and_variables() -> None:
    command = Command("x" * 10, env={"name": "value"})
    assert command.size == 19
    finished = Finished(count=10, size=100, age=1000)
    for _ in range(6):
        finished.add(cast(Any, SimpleNamespace(size=command.size)), 0.0)
    assert len(list(finished.take_excess(0.0))) == 1


def test_housekeeping_goes_on_though_a_part_of_it_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = cast(Any, reactor)
    table = ProcessTable(loop, {}, ThreadPool(loop, 1, "test"), TurnBudget(loop), reap=True)
    done: list[str] = []

    def fail() -> None:
        done.append("check")
        raise RuntimeError("this is a test")

    monkeypatch.setattr(table._spawn_client, "check", fail)
    monkeypatch.setattr(table._reaper, "reap", lambda: done.append("reap"))
    for _ in range(2):
        table._housekeep()
    assert done == ["check", "reap"] * 2


async def test_a_start_whose_client_hangs_up_keeps_its_key_for_the_same_request(
    api: Api, daemon: Daemon, tmp_path: Path
) -> None:
    for number in range(5):
        body = {"cmd": f"echo >> {tmp_path}/{number}; exec sleep 30", "cwd": str(tmp_path), "user": "root"}
        data = json.dumps(body).encode()
        head = (
            f"POST /start_process HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {daemon.secret}\r\n"
            f"Idempotency-Key: hangs-up-{number}\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as sock:
            sock.sendall(head.encode() + data)
        await until((tmp_path / str(number)).exists)
        again = await api.post("/start_process", body, {"Idempotency-Key": f"hangs-up-{number}"})
        assert again.status == 201, again
        await kill(api, again.json()["id"])
        assert (tmp_path / str(number)).read_text() == "\n"
