"""Reloading: all of it, one after the other, and whatever happens."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from functools import partial
from typing import cast

from twisted.internet.defer import Deferred
from twisted.logger import ILogObserver, LogEvent, Logger

from sandboxd.daemon.reload import Reloads
from tests.client import Api
from tests.daemon import SECRET, Daemon
from tests.waiting import until


class Recorded:
    """Reloads that record what happens, and wait where they are told to."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.logged: list[LogEvent] = []
        self.reloads = Reloads(lambda: self.seen.append("began"), lambda: self.seen.append("ended"))
        self.reloads._log = Logger(observer=cast(ILogObserver, self.logged.append))

    def add(self, name: str, wait: Deferred[None] | None = None, error: Exception | None = None) -> None:
        async def reload() -> None:
            self.seen.append(name)
            if wait is not None and not wait.called:
                await wait
            if error is not None:
                raise error

        self.reloads.add(name, reload)


def test_everything_is_reloaded_though_one_fails() -> None:
    recorded = Recorded()
    recorded.add("one", error=OSError("gone"))
    recorded.add("two")
    recorded.reloads.run()
    assert recorded.seen == ["began", "one", "two", "ended"]
    (failure,) = [event["log_failure"] for event in recorded.logged if "log_failure" in event]
    assert failure.check(OSError)


def test_requests_during_a_reload_cause_one_more_after_it() -> None:
    recorded, wait = Recorded(), Deferred[None]()
    recorded.add("slow", wait)
    for _ in range(3):
        recorded.reloads.run()
    assert recorded.seen == ["began", "slow"]
    wait.callback(None)
    assert recorded.seen == ["began", "slow", "ended", "began", "slow", "ended"]


def _has_reloaded(daemon: Daemon, count: int) -> bool:
    return daemon.log.read_text().count("sandboxd reloads") == count


async def test_sighup_reloads_and_does_not_end_the_daemon(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, SECRET)
    id = await api.start("sleep 300")
    for count in (1, 2):
        os.kill(daemon.pid, signal.SIGHUP)
        await until(partial(_has_reloaded, daemon, count))
    assert (await api.process(id))["status"] == "running"
    assert daemon.stop() == 0
