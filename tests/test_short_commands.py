"""Short commands, whose output and exit come in one record: each gets its own, whatever it does meanwhile."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from tests.client import Api
from tests.daemon import Daemon
from tests.test_spawn_server import guardians_of
from tests.waiting import until, within

#: How many commands run at a time, and how many in all; `make soak` has more.
CLIENTS = 16
COMMANDS = int(os.environ.get("SHORT_COMMANDS", "1500"))


def command(number: int) -> tuple[dict[str, Any], str, str, int]:
    """A command that differs from all others in what it writes: its request, stdout, stderr and exit code."""
    out, err, code = f"out {number}\n", f"err {number}\n", number % 200
    write = f"echo out {number}; echo err {number} >&2; exit {code}"
    kind = number % 12
    if kind == 0:
        return {"cmd": f"sleep 0.0{number % 4}; {write}"}, out, err, code
    if kind == 1:
        return {"cmd": f"echo first; sleep 0.0{number % 4}; {write}"}, f"first\n{out}", err, code
    if kind == 2:  # more than one record holds
        return (
            {"cmd": f"head -c 20000 /dev/zero | tr '\\0' x; echo; head -c 20000 /dev/zero | tr '\\0' y >&2; {write}"},
            (f"{'x' * 20000}\n{out}"),
            f"{'y' * 20000}{err}",
            code,
        )
    if kind == 3:  # more than a pipe holds
        return {"cmd": f"head -c 200000 /dev/zero | tr '\\0' x; {write}"}, f"{'x' * 200000}{out}", err, code
    if kind == 4:  # its child holds the pipes
        return {"cmd": f"sleep 0.3 & {write}"}, out, err, code
    if kind == 5:
        return {"cmd": write, "cwd": "/"}, out, err, code
    if kind == 6:
        return {"cmd": f"kill -9 $$ #{number}"}, "", "", -1
    if kind == 7:
        return {"cmd": f"sleep 300; {number}", "timeout": 0.01}, "", "", -1
    if kind == 8:  # a character in two pieces
        return {"cmd": f"printf '\\303'; sleep 0.01; printf '\\244'; {write}"}, f"ä{out}", err, code
    if kind == 9:
        return {"cmd": write, "env": {"NUMBER": str(number)}, "limits": {"core": 0}}, out, err, code
    return {"cmd": write}, out, err, code


async def ran(api: Api, number: int) -> None:
    """Run one, and compare."""
    body, stdout, stderr, code = command(number)
    reply = await within(30, api.post("/run", body))
    assert reply.status == 200, (body, reply)
    found = reply.json()
    assert (found["stdout"], found["stderr"], found["code"]) == (stdout, stderr, code), (body, reply.body[:500])


def cpu_ticks(pid: int) -> int:
    """Clock ticks of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wake_ups(pid: int) -> int:
    """How often the main thread of a process has waited for something."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])


async def test_each_command_gets_its_own_output_and_nothing_spins_afterwards(
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    numbers = iter(range(COMMANDS))

    async def client() -> None:
        for number in numbers:
            await ran(api, number)

    for each in [Deferred.fromCoroutine(client()) for _ in range(CLIENTS)]:
        await each
    spawners = await guardians_of(daemon)
    await deferLater(reactor, 0.5)  # sleepers that were left
    for spawner in spawners:
        before = wake_ups(spawner), cpu_ticks(spawner)
        await deferLater(reactor, 0.5)
        assert wake_ups(spawner) - before[0] <= 1
        assert cpu_ticks(spawner) == before[1]
        assert len(os.listdir(f"/proc/{spawner}/fd")) < 12
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


async def test_a_spawn_server_that_dies_loses_no_output_of_others(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    await guardians_of(daemon)
    chance = random.Random(5)
    done = [0]
    statuses: list[int] = []

    async def client(first: int) -> None:
        for number in range(first, first + 40):
            body, stdout, stderr, code = command(number)
            reply = await within(30, api.post("/run", body))
            statuses.append(reply.status)
            if reply.status == 200:
                found = reply.json()
                # One that ran on without its spawn server is whole; its exit code may be that of a kill.
                assert (found["stdout"], found["stderr"], found["code"]) == (stdout, stderr, code), body
            else:
                assert reply.status in (500, 503), reply
                assert "start" in reply.json()["error"]
            done[0] += 1

    clients = [Deferred.fromCoroutine(client(1000 * each)) for each in range(8)]
    for deaths in range(1, 7):
        await until(lambda deaths=deaths: done[0] >= deaths * 40)  # type: ignore[misc]
        os.kill(chance.choice(await until(daemon.spawn_servers)), signal.SIGKILL)
    for each in clients:
        await each
    assert statuses.count(200) > 250
    assert len(await guardians_of(daemon)) == 2
    assert (await api.get("/status")).json()["executions"] == 0
    assert daemon.stop() == 0


@pytest.mark.slow
async def test_what_is_collected_is_seen_after_a_moment(api: Api) -> None:
    """A command that goes on gives what it has written so far to those who follow it."""
    run = Deferred.fromCoroutine(api.post("/run", {"cmd": "echo out; sleep 0.7; echo more"}))
    reply = await run.addTimeout(10, reactor)
    (id,) = reply.headers.getRawHeaders("X-Execution-Id") or []
    records = (await api.get(f"/processes/{id}/logs")).json()["records"]
    assert [record["data"] for record in records] == ["out", "more"]
    first, last = (record["timestamp"] for record in records)
    assert first < last
