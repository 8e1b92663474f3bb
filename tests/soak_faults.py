# ruff: noqa: T201
"""Faults that are injected into a daemon while it is soaked. Each is over when its coroutine returns."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from tests.clock_shift import ClockShift
from tests.daemon import Daemon
from tests.hanging import HangingDirectory

#: Seconds that a fault lasts.
HOLD = 2.0

#: Seconds after which the daemon has to start commands again.
RECOVERY = 10.0

#: Most processes and threads of the daemon's user; a command takes what others have left of them.
MAX_PROCESSES = 600

TWO_HOURS = 7200


Fault = Callable[[], Awaitable[None]]


class Client(Protocol):
    """What sends requests to the daemon."""

    async def post(self, route: str, expected: int = 200, **fields: Any) -> Any:
        """The reply to a request, which must have that status."""

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """The response to a request."""

    async def broken_off(self, method: str, path: str, body: Any, after: float) -> None:
        """Send a request, and hang up."""


class Faults:
    """
    The faults.

    :param clock: moves the daemon's wall clock, if that is possible.
    :param own_user: whether the daemon has a user of its own, with :data:`MAX_PROCESSES`.
    :ivar short_of_descriptors: whether the daemon may close new connections without an answer.
    :ivar strict: those after which no process is left.
    :ivar others: those after which commands may have left some, as they have ended by themselves.
    :ivar untested: what cannot be done here, and why.
    """

    def __init__(
        self, daemon: Daemon, client: Client, folder: Path, rng: random.Random, clock: ClockShift | None, own_user: bool
    ) -> None:
        self.short_of_descriptors = False
        self.untested: list[str] = []
        self._daemon = daemon
        self._client = client
        self._folder = folder
        self._rng = rng
        self._clock = clock
        self.strict: list[Fault] = [
            self._one_is_killed,
            self._all_are_killed,
            self._stopped,
            self._starved,
            self._no_descriptors,
            self._daemon_stopped,
            self._hanging,
        ]
        self.others: list[Fault] = []
        if clock is not None:
            self.strict.append(self._clock_jumps)
        else:
            self.untested.append("the clock jumps: this needs cc")
        if own_user:
            self.others.append(self._no_processes)
        else:
            self.untested.append("no more processes: this needs root")

    async def rounds(self, faults: Sequence[Fault], count: int) -> None:
        """Inject each of some faults so many times, one after the other, in any order."""
        for _ in range(count):
            for fault in self._rng.sample(faults, len(faults)):
                print(f"  {fault.__doc__}", flush=True)
                await fault()
                await self._recovered()

    async def _recovered(self) -> None:
        """Wait until the daemon starts commands again. Fails if it does not within some seconds."""
        deadline = time.monotonic() + RECOVERY
        while True:
            with suppress(OSError):
                response = await self._client.call("POST", "/run", {"cmd": "echo on"})
                if response.status == 200 and response.json()["stdout"] == "on\n":
                    return
            assert time.monotonic() < deadline, response
            await asyncio.sleep(0.1)

    def _kill(self, pids: list[int], signum: int) -> None:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    async def _one_is_killed(self) -> None:
        """A spawn server is killed."""
        self._kill(self._rng.sample(self._daemon.spawn_servers(), 1), signal.SIGKILL)
        await asyncio.sleep(HOLD)

    async def _all_are_killed(self) -> None:
        """All spawn servers are killed, thrice."""
        for _ in range(3):
            self._kill(self._daemon.spawn_servers(), signal.SIGKILL)
            await asyncio.sleep(HOLD / 3)

    async def _stopped(self) -> None:
        """Spawn servers are stopped."""
        # Longer than the daemon waits for their answers, though it lets them continue each second.
        for _ in range(40):
            self._kill(self._daemon.spawn_servers(), signal.SIGSTOP)
            await asyncio.sleep(0.1)
        await asyncio.sleep(HOLD / 2)

    async def _starved(self) -> None:
        """Spawn servers have no descriptors."""
        pids = self._daemon.spawn_servers()
        # A command may do it, as it runs as the same user. It may be killed for that before it has an answer.
        attack = "; ".join(f"prlimit --pid {pid} --nofile=3:3" for pid in pids)
        await self._client.call("POST", "/run", {"cmd": attack})
        await asyncio.sleep(HOLD)

    async def _no_descriptors(self) -> None:
        """The daemon has no descriptors."""
        pid = self._daemon.pid
        before = self._daemon.max_descriptors()
        highest = max(map(int, os.listdir(f"/proc/{pid}/fd")))
        limit = f"prlimit --pid {pid} --nofile="
        self.short_of_descriptors = True
        await self._client.post("/start_process", 201, cmd=f"{limit}{highest + 2}:; sleep {HOLD}; {limit}{before}:")
        await asyncio.sleep(HOLD * 1.5)
        while self._daemon.max_descriptors() != before:
            await asyncio.sleep(0.1)
        self.short_of_descriptors = False

    async def _no_processes(self) -> None:
        """A command takes all processes, and a spawn server dies meanwhile."""
        # The inner shell ends when it cannot fork; the execution does not, so the daemon does not forget it meanwhile.
        body = {"cmd": "(while sleep 300 & do :; done); exec sleep 300"}
        while (started := await self._client.call("POST", "/start_process", body)).status == 503:  # not one to be had
            await asyncio.sleep(0.05)
        assert started.status == 201, started
        deadline = time.monotonic() + RECOVERY
        while (await self._client.call("POST", "/run", {"cmd": "sleep 0 & wait"})).json().get("code") == 0:
            assert time.monotonic() < deadline, "there are still processes to be had"
        self._kill(self._rng.sample(self._daemon.spawn_servers(), 1), signal.SIGKILL)
        await asyncio.sleep(HOLD / 2)
        await self._client.post("/kill_process", id=started.json()["id"])

    async def _daemon_stopped(self) -> None:
        """The daemon is stopped."""
        os.kill(self._daemon.pid, signal.SIGSTOP)
        await asyncio.sleep(HOLD)
        os.kill(self._daemon.pid, signal.SIGCONT)

    async def _clock_jumps(self) -> None:
        """The clock jumps."""
        assert self._clock is not None
        for hours in (1, -1, 0):
            self._clock.set(hours * TWO_HOURS)
            await asyncio.sleep(HOLD / 3)

    async def _hanging(self) -> None:
        """A file system hangs."""
        path = self._folder / "hanging"
        path.mkdir(exist_ok=True)
        try:
            hanging = HangingDirectory(path)
        except OSError as error:
            self.untested.append(f"a file system hangs: {error}")
            self.strict.remove(self._hanging)
            return
        try:
            inside = {"path": str(path / "name")}
            routes = ("/read_file", "/write_file", "/stat_file", "/list_dir", "/delete_file")
            requests = [  # which hang up
                *(("POST", route, inside) for route in routes for _ in range(4)),
                *(("POST", "/run", {"cmd": "true", "cwd": str(path)}) for _ in range(4)),
                ("GET", f"/files?path={path}/name", None),
            ]
            # These wait until the file system is gone.
            waiting = [asyncio.ensure_future(self._client.call("POST", route, inside)) for route in routes]
            await asyncio.gather(*(self._client.broken_off(*each, self._rng.uniform(0.1, HOLD)) for each in requests))
            stuck = [task for task in waiting if task.done()]
            assert not stuck, f"{[task.result() for task in stuck]}"
        finally:
            hanging.close()
        for response in await asyncio.gather(*waiting):
            found = response.json()
            assert response.status == 200, response
            assert found.get("success") is not True, response
            assert found["error"], response
