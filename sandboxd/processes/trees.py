"""End process trees, and wait until they are gone."""

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

#: Seconds that one walk waits for the processes that it has signalled, before the next walk.
_SWEEP = 0.05


@dataclass
class _Doomed:
    """A tree that is being ended: when SIGKILL is due, when to give up, and the Deferreds to fire."""

    first_signal: int
    kill_at: float
    give_up_at: float
    waiting: list[Deferred[list[int]]] = field(default_factory=list)


class Trees:
    """
    End process trees, all that are due with one walk over ``/proc``.

    :param in_thread: calls a blocking function in a thread.
    :param spared: returns the pids that a walk skips, beside this process's own.
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
        Signal every process of a tree until none is left.

        :param signum: the first signal.
        :param grace: seconds until they get SIGKILL, if ``signum`` was another.
        :param patience: seconds after SIGKILL at which to give up.
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
        """Send a signal once to every process of a tree, whatever it does with it."""
        await self._sweep(lambda found: signum if found == mark else None, 0.0)

    async def end_all(self, signum: int, patience: float) -> list[int]:
        """
        Signal the processes of all executions of this daemon, and wait for their end.

        :return: the pids that are left after ``patience`` seconds.
        """
        deadline = self._clock.seconds() + patience
        send = signum

        def choose(mark: int) -> int | None:
            return send if self.marks.owns(mark) else None

        while True:
            found = await self._sweep(choose, _SWEEP)
            if signum != signal.SIGKILL:
                send = 0  # sent once; SIGKILL is repeated for processes forked meanwhile
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
