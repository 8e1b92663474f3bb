"""``/ready`` and ``idle``: what the daemon says of itself is what a client would find."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
from collections.abc import Callable
from typing import Any, cast

from twisted.internet.defer import Deferred
from twisted.internet.task import Clock

from sandboxd.api.health import INTERVAL, ReadyCheck
from sandboxd.processes.child import SpawnError
from tests.client import Api
from tests.daemon import SECRET, Daemon
from tests.waiting import within


async def idle(api: Api) -> float:
    return cast(float, (await api.get("/status")).json()["idle"])


class Table:
    """Trial starts that end when the test says so."""

    full = False

    def __init__(self) -> None:
        self.trials: list[Deferred[None]] = []

    async def try_start(self) -> None:
        self.trials.append(Deferred())
        await self.trials[-1]


def check(ready: ReadyCheck) -> Deferred[str | None]:
    return Deferred.fromCoroutine(ready.check())


async def test_a_trial_start_serves_all_who_ask_in_five_seconds() -> None:
    clock, table = Clock(), Table()
    ready = ReadyCheck(clock, cast(Any, table), lambda: True)
    first, second, gone = check(ready), check(ready), check(ready)
    gone.addErrback(lambda _: None)
    gone.cancel()
    assert (len(table.trials), first.called) == (1, False)
    table.trials[0].callback(None)
    assert (await first, await second) == (None, None)
    clock.advance(INTERVAL - 0.1)
    assert await ready.check() is None
    clock.advance(0.2)
    third = check(ready)
    assert len(table.trials) == 2
    table.trials[1].errback(SpawnError(OSError(24, "Too many open files")))
    assert await third == "no command can be started: Too many open files"
    assert await ready.check() == ready.why_not() == "no command can be started: Too many open files"
    clock.advance(INTERVAL + 0.1)
    fourth = check(ready)
    table.trials[2].callback(None)
    assert await fourth is None


async def test_a_daemon_that_cannot_start_commands_is_not_ready(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    client = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=20)

    def ready() -> tuple[int, Any]:
        client.request("GET", "/ready")
        response = client.getresponse()
        return response.status, json.loads(response.read())

    client.request("GET", "/health")
    assert client.getresponse().read()
    limits = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (3, limits[1]))
    status, body = ready()
    assert (status, body["ready"]) == (503, False)
    assert "open files" in body["error"]
    resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, limits)

    async def until_ready() -> None:
        while ready()[0] != 200:
            pass

    await within(20, until_ready())
    client.close()


async def test_a_trial_start_is_neither_work_nor_counted(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api, anybody = Api(daemon.url, SECRET), Api(daemon.url, None)
    before = await idle(api)
    assert (await anybody.get("/ready")).status == 200
    assert (await anybody.get("/nope")).status == 401
    assert (await api.get("/nope")).status == 404
    assert (await api.call("BREW", "/run")).status == 405
    assert await idle(api) > before
    metrics = (await api.get("/metrics")).body
    assert b'sandboxd_executions_started_total{kind="foreground"} 0.0' in metrics
    assert b'sandboxd_executions_ended_total{status="completed"} 0.0' in metrics


async def test_a_survivor_is_work(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, SECRET)
    pid = int((await api.run("sleep 300 >/dev/null 2>&1 & echo $!"))["stdout"])
    assert await idle(api) == 0
    os.kill(pid, signal.SIGKILL)

    async def until_idle() -> None:
        while not await idle(api):
            pass

    await within(10, until_idle())
    assert await idle(api) < 5  # counted from when the survivor was last seen
