"""Ends process trees, and tells when they are gone."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from sandboxd.processes.marks import Marks, sweep
from sandboxd.reactor.threads import ThreadPool

#: Seconds that one sweep waits for what it has signalled before it looks again.
_SWEEP = 0.05


@dataclass
class _Doomed:
    """A tree that is being ended: when KILL is due, when we give up, and who waits."""

    first_signal: int
    kill_at: float
    give_up_at: float
    waiting: list[Deferred[list[int]]] = field(default_factory=list)


class Trees:
    """
    Ends process trees, all those that are due at a time with one walk.

    :param clock: tells the time.
    :param in_thread: runs a walk off the reactor's thread.
    :param spared: tells the pids that a walk passes over, beside our own.
    """

    _log = Logger()

    def __init__(self, clock: IReactorTime, in_thread: ThreadPool, spared: Callable[[], frozenset[int]]) -> None:
        self.marks = Marks()
        self._clock = clock
        self._in_thread = in_thread
        self._spared = spared
        self._doomed: dict[int, _Doomed] = {}
        self._sweeping = False

    def end(
        self, mark: int, signum: int = signal.SIGKILL, grace: float = 0.0, patience: float = 5.0
    ) -> Deferred[list[int]]:
        """
        Signal a tree and see to it that it is gone.

        :param signum: what its processes get first.
        :param grace: seconds until they get SIGKILL, if ``signum`` was another.
        :param patience: seconds after SIGKILL at which it gives up.
        :return: fires with the pids of survivors, normally none.
        """
        now = self._clock.seconds()
        kill_at = now if signum == signal.SIGKILL else now + grace
        doomed = self._doomed.get(mark)
        if doomed is None:
            doomed = self._doomed[mark] = _Doomed(signum, kill_at, kill_at + patience)
        elif kill_at < doomed.kill_at:
            doomed.kill_at, doomed.give_up_at = kill_at, kill_at + patience
        waiter: Deferred[list[int]] = Deferred()
        doomed.waiting.append(waiter)
        if not self._sweeping:
            self._sweeping = True
            Deferred.fromCoroutine(self._sweep_all()).addErrback(self._broke)
        return waiter

    async def signal(self, mark: int, signum: int) -> None:
        """Send a signal once to every process of a tree."""
        await self._sweep(lambda found: signum if found == mark else None, 0.0)

    async def end_all(self, signum: int, patience: float) -> list[int]:
        """
        Signal every process that any execution of this daemon has left, and wait.

        :return: the pids that are still there after ``patience`` seconds.
        """
        deadline = self._clock.seconds() + patience
        send = signum

        def choose(mark: int) -> int | None:
            return send if self.marks.owns(mark) else None

        while True:
            found = await self._sweep(choose, _SWEEP)
            if signum != signal.SIGKILL:
                send = 0  # once is enough; KILL is repeated for what was forked meanwhile
            if not found or self._clock.seconds() >= deadline:
                return sorted(pid for pids in found.values() for pid in pids)

    async def _sweep_all(self) -> None:
        try:
            while self._doomed:
                now = self._clock.seconds()
                send: dict[int, int] = {}
                for mark, doomed in self._doomed.items():
                    send[mark] = signal.SIGKILL if now >= doomed.kill_at else doomed.first_signal
                    doomed.first_signal = 0
                found = await self._sweep(send.get, _SWEEP)
                for mark in send:
                    pids = found.get(mark, [])
                    if not pids or now >= self._doomed[mark].give_up_at:
                        for waiter in self._doomed.pop(mark).waiting:
                            waiter.callback(pids)
        finally:
            self._sweeping = False

    def _sweep(self, choose: Callable[[int], int | None], patience: float) -> Deferred[dict[int, list[int]]]:
        return self._in_thread(sweep, choose, patience, self._spared())

    def _broke(self, failure: Failure) -> None:
        self._log.failure("the walk over the process table failed", failure)
        doomed, self._doomed = self._doomed, {}
        for entry in doomed.values():
            for waiter in entry.waiting:
                waiter.errback(failure)
