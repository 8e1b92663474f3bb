"""
The process trees of executions: who belongs to one, and how it is made to go away.

A child can leave its process group and session, clear its environment and outlive its parents. What it cannot
shed by accident is a resource limit: every execution is started with its own number as the soft limit on
real-time CPU time (``RLIMIT_RTTIME``, in microseconds). The numbers are so large that the limit never bites;
fork, exec and setsid keep it; and ``prlimit`` reads it from any process. So a walk over ``/proc`` finds a
tree whatever its members did, except one that sets this very limit for itself.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from twisted.internet.defer import Deferred, ensureDeferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from sandboxd.workers import Workers

#: Marks are ``base + n``: the base is random for each daemon, so that two of them never touch each other's.
_BASE_SHIFT = 32
_INFINITY = resource.RLIM_INFINITY

#: Seconds that one sweep waits for what it has signalled before it looks again.
_SWEEP = 0.05


class Marks:
    """Numbers that mark the processes of this daemon's executions, and the way to give them out."""

    def __init__(self) -> None:
        # Bit 61 keeps the limit above 70,000 years of CPU time.
        self.base = (1 << 61) | (int.from_bytes(os.urandom(3), "big") << _BASE_SHIFT)
        self._last = 0

    def new(self) -> int:
        """A mark that no execution has had."""
        self._last += 1
        return self.base + self._last

    def owns(self, mark: int) -> bool:
        """Whether ``mark`` was given out here."""
        return mark > self.base and mark >> _BASE_SHIFT == self.base >> _BASE_SHIFT


@contextmanager
def inherited_mark(mark: int) -> Iterator[None]:
    """A process that is started inside is born with ``mark``; there is no moment at which it has none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
    if hard == _INFINITY:
        resource.setrlimit(resource.RLIMIT_RTTIME, (mark, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))
    else:  # An administrator has limited it: the process group is all that we can follow.
        yield


def mark_of(pid: int) -> int:
    """
    The mark of a process, or -1 if it has none or is gone.

    ``prlimit`` asks for the same user or CAP_SYS_RESOURCE; ``/proc/<pid>/limits`` asks for neither.
    """
    try:
        return resource.prlimit(pid, resource.RLIMIT_RTTIME)[0]
    except PermissionError:
        pass
    except OSError:
        return -1
    try:
        with open(f"/proc/{pid}/limits", "rb") as limits:
            for line in limits:
                if line.startswith(b"Max realtime timeout"):
                    soft = line.split()[3]
                    return int(soft) if soft.isdigit() else -1
    except OSError:
        pass
    return -1


def sweep(choose: Callable[[int], int | None], patience: float) -> dict[int, list[int]]:
    """
    Walk over all processes once, signal those that are chosen, and give them a moment to end. Blocks.

    :param choose: for a mark, the signal that its processes get: 0 for none, None to pass them over.
    :param patience: seconds to wait, at most, for all that were signalled to be gone.
    :return: the live pids that were met, by mark. One that is missing here has no process left.
    """
    found: dict[int, list[int]] = {}
    pidfds: list[int] = []
    try:
        for mark, pid, pidfd in _chosen(choose):
            found.setdefault(mark, []).append(pid)
            pidfds.append(pidfd)
            signum = choose(mark)
            if signum:
                with suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(pidfd, signum)
                    if signum != signal.SIGKILL:  # which a stopped process would not see until it goes on
                        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        deadline = time.monotonic() + patience
        for pidfd in pidfds:
            if not _exited(pidfd, max(deadline - time.monotonic(), 0)):
                break
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    return found


def _chosen(choose: Callable[[int], int | None]) -> Iterator[tuple[int, int, int]]:
    """Mark, pid and pidfd of each live process that is chosen. Zombies are not alive."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        pid = int(name)
        if choose(mark_of(pid)) is None:
            continue
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            continue
        # Asked again now that the descriptor pins the process: had the pid been reused before, the mark would
        # be another's; if it is reused after, the descriptor still means the one that we looked at.
        mark = mark_of(pid)
        if choose(mark) is not None and not _exited(pidfd, 0):
            yield mark, pid, pidfd
        else:
            os.close(pidfd)


def _exited(pidfd: int, timeout: float) -> bool:
    """Whether the process has ended, waiting ``timeout`` seconds for it."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


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
    """

    _log = Logger()

    def __init__(self, clock: IReactorTime, in_thread: Workers) -> None:
        self.marks = Marks()
        self._clock = clock
        self._in_thread = in_thread
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
            ensureDeferred(self._sweep_all()).addErrback(self._broke)
        return waiter

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
            found = await self._in_thread(sweep, choose, _SWEEP)
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
                found = await self._in_thread(sweep, send.get, _SWEEP)
                for mark in send:
                    pids = found.get(mark, [])
                    if not pids or now >= self._doomed[mark].give_up_at:
                        for waiter in self._doomed.pop(mark).waiting:
                            waiter.callback(pids)
        finally:
            self._sweeping = False

    def _broke(self, failure: Failure) -> None:
        self._log.failure("the walk over the process table failed", failure)
        doomed, self._doomed = self._doomed, {}
        for entry in doomed.values():
            for waiter in entry.waiting:
                waiter.errback(failure)
