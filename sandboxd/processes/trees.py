"""The end of process trees: signal them until no process is left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import deferLater
from twisted.logger import Logger

from sandboxd.processes.marks import MarkedProcesses, Marks, sweep
from sandboxd.reactor.threads import ThreadPool

#: Seconds that one walk waits for the processes that it has signalled, before the next walk.
_SWEEP = 0.05

#: Seconds between two walks if the first has failed.
_RETRY = 0.1

#: Descriptors kept for walks, so that they work when this process has no other left.
_RESERVED = 4


class Survivors(NamedTuple):
    """
    The processes that are alive after they were signalled.

    :ivar pids: all of them, in order.
    :ivar denied: the processes that may not be signalled (EPERM).
    """

    pids: list[int]
    denied: list[int]


@dataclass
class _EndingTree:
    """
    A tree that is being ended.

    :ivar signum: the signal to send at the next walk; 0 for none.
    :ivar kill_at: when SIGKILL is due.
    :ivar give_up_at: when to give up.
    :ivar waiting: the Deferreds to fire.
    """

    signum: int
    kill_at: float
    give_up_at: float
    waiting: list[Deferred[Survivors]] = field(default_factory=list)


class Trees:
    """
    The process trees of executions, all found and signalled by the same walks over ``/proc``.

    :param threads: calls a blocking function in a thread.
    :param spared: returns the pids that a walk skips, beside this process's own.
    :param reap: reaps the orphans that have ended: until then they count against limits of processes.
    """

    _log = Logger()

    def __init__(
        self,
        clock: IReactorTime,
        threads: ThreadPool,
        spared: Callable[[], frozenset[int]],
        reap: Callable[[], None] = lambda: None,
    ) -> None:
        self.marks = Marks()
        self._clock = clock
        self._threads = threads
        self._spared = spared
        self._reap = reap
        self._ending: dict[int, _EndingTree] = {}
        self._sweeping = False
        self._reserve = _Reserve()

    def end(
        self, mark: int, signum: int = signal.SIGKILL, grace: float = 0.0, patience: float = 5.0
    ) -> Deferred[Survivors]:
        """
        Signal every process of a tree until none is left, or only such as may not be signalled.

        Called again while that is going on, it sends its own signal too, and SIGKILL at the earlier of the two times.

        :param signum: the first signal.
        :param grace: seconds until they get SIGKILL, if ``signum`` was another.
        :param patience: seconds after SIGKILL at which to give up.
        :return: fires with the survivors, normally none; fails with OSError if they could not be found out by then.
        """
        now = self._clock.seconds()
        kill_at = now if signum == signal.SIGKILL else now + grace
        tree = self._ending.get(mark)
        if tree is None:
            tree = self._ending[mark] = _EndingTree(signum, kill_at, kill_at + patience)
        else:
            tree.signum = signum
            if kill_at < tree.kill_at:
                tree.kill_at, tree.give_up_at = kill_at, kill_at + patience
        waiter: Deferred[Survivors] = Deferred()
        tree.waiting.append(waiter)
        if not self._sweeping:
            self._sweeping = True
            Deferred.fromCoroutine(self._sweep_all()).addErrback(
                lambda failure: self._log.failure("process trees are no longer ended", failure)
            )
        return waiter

    async def signal(self, mark: int, signum: int) -> Survivors:
        """
        Send a signal once to every process of a tree; 0 sends none.

        :return: its live processes.
        :raise OSError: if not all processes could be looked at.
        """
        found = await self._sweep(lambda other: signum if other == mark else None, 0.0)
        return _survivors(found.get(mark))

    async def running(self) -> set[int]:
        """
        Return the marks of all processes of executions of this daemon that run.

        :raise OSError: if not all processes could be looked at.
        """
        return set(await self._sweep(lambda mark: 0 if self.marks.owns(mark) else None, 0.0))

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
            try:
                found = await self._sweep(choose, _SWEEP)
            except OSError as error:
                if self._clock.seconds() >= deadline:
                    self._log.error("the processes that are left are unknown: {error}", error=error)
                    return []
                await self._pause()
                continue
            if signum != signal.SIGKILL:
                send = 0  # sent once; SIGKILL is repeated for processes forked meanwhile
            if not found or self._clock.seconds() >= deadline:
                return sorted(pid for of_mark in found.values() for pid in of_mark.pids)

    async def _sweep_all(self) -> None:
        try:
            while self._ending:
                await self._sweep_ending()
        finally:
            self._sweeping = False

    async def _sweep_ending(self) -> None:
        now = self._clock.seconds()
        send = {mark: signal.SIGKILL if now >= tree.kill_at else tree.signum for mark, tree in self._ending.items()}
        for tree in self._ending.values():
            tree.signum = 0
        try:
            found = await self._sweep(send.get, _SWEEP)
        except OSError as error:
            # No process counts as gone before a walk has found none. Some may not have got their signal.
            self._log.warn("processes cannot be looked at, which is tried again: {error}", error=error)
            for mark, signum in send.items():
                tree = self._ending[mark]
                tree.signum = tree.signum or signum
                if now >= tree.give_up_at:  # it is still ended, but nothing waits for that any more
                    waiting, tree.waiting = tree.waiting, []
                    for waiter in waiting:
                        waiter.errback(error)
            await self._pause()
            return
        self._reap()
        for mark in send:
            survivors = _survivors(found.get(mark))
            tree = self._ending[mark]
            hopeless = now >= tree.kill_at and survivors.pids == survivors.denied
            if not survivors.pids or hopeless or now >= tree.give_up_at:
                del self._ending[mark]
                for waiter in tree.waiting:
                    waiter.callback(survivors)

    async def _pause(self) -> None:
        await deferLater(self._clock, _RETRY)

    def _sweep(self, choose: Callable[[int], int | None], patience: float) -> Deferred[dict[int, MarkedProcesses]]:
        return self._threads(self._reserve.sweep, choose, patience, self._spared())


class _Reserve:
    """Descriptors kept for walks: closed when a walk can get no others, and opened again when there are some."""

    def __init__(self) -> None:
        self._fds: list[int] = []
        self._fill()

    def sweep(
        self, choose: Callable[[int], int | None], patience: float, spared: frozenset[int]
    ) -> dict[int, MarkedProcesses]:
        """
        Walk over all processes; see :func:`sandboxd.processes.marks.sweep`. Blocks.

        :raise OSError: if there are no descriptors or no memory, even so.
        """
        try:
            return sweep(choose, patience, spared)
        except OSError:
            while self._fds:
                os.close(self._fds.pop())
            return sweep(choose, patience, spared)
        finally:
            self._fill()

    def _fill(self) -> None:
        try:
            while len(self._fds) < _RESERVED:
                self._fds.append(os.open("/proc", os.O_PATH | os.O_CLOEXEC))
        except OSError:
            pass  # at the next walk


def _survivors(found: MarkedProcesses | None) -> Survivors:
    return Survivors([], []) if found is None else Survivors(sorted(found.pids), sorted(found.denied))
