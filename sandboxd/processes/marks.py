"""
The mark by which the processes of an execution are found, and the walk that finds them.

A child can leave its process group and session, clear its environment and outlive its parents. What it cannot
shed by accident is a resource limit: every execution is started with its own number as the soft limit on
real-time CPU time (``RLIMIT_RTTIME``, in microseconds). The numbers are so large that the limit never bites;
fork, exec and setsid keep it; and ``prlimit`` reads it from any process. So a walk over ``/proc`` finds a
tree whatever its members did, except one that sets this very limit for itself.

It imports the standard library only, and little of it, because :mod:`sandboxd.processes.spawn_server` uses it too.
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager, suppress

#: Marks are ``base + n``: the base is random for each daemon, so that two of them never touch each other's.
_BASE_SHIFT = 32
#: Signals that ask a process to end; a stopped one would not see them until it goes on.
_PENDING_WHILE_STOPPED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

_SURVIVE = 1 << 31
_INFINITY = resource.RLIM_INFINITY


class Marks:
    """Numbers that mark the processes of this daemon's executions, and the way to give them out."""

    def __init__(self) -> None:
        # Bit 61 keeps the limit above 70,000 years of CPU time.
        self.base = (1 << 61) | (int.from_bytes(os.urandom(3), "big") << _BASE_SHIFT)
        self._last = 0

    def new(self, survive: bool = False) -> int:
        """
        A mark that no execution has had.

        :param survive: for one that the guardian spares.
        """
        self._last += 1
        return self.base + self._last + (_SURVIVE if survive else 0)

    def owns(self, mark: int) -> bool:
        """Whether ``mark`` was given out here."""
        return given_by(self.base, mark)


def given_by(base: int, mark: int) -> bool:
    """Whether ``mark`` was given out by the daemon whose base is ``base``."""
    return mark > base and mark >> _BASE_SHIFT == base >> _BASE_SHIFT


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


def sweep(choose: Callable[[int], int | None], patience: float, spared: Container[int] = ()) -> dict[int, list[int]]:
    """
    Walk over all processes once, signal those that are chosen, and give them a moment to end. Blocks.

    :param choose: for a mark, the signal that its processes get: 0 for none, None to pass them over.
    :param patience: seconds to wait, at most, for all that were signalled to be gone.
    :param spared: pids that are passed over, beside our own.
    :return: the live pids that were met, by mark. One that is missing here has no process left.
    """
    found: dict[int, list[int]] = {}
    pidfds: list[int] = []
    try:
        for mark, pid, pidfd in _chosen(choose, spared):
            found.setdefault(mark, []).append(pid)
            pidfds.append(pidfd)
            signum = choose(mark)
            if signum:
                with suppress(ProcessLookupError, PermissionError):
                    signal.pidfd_send_signal(pidfd, signum)
                    if signum in _PENDING_WHILE_STOPPED:
                        signal.pidfd_send_signal(pidfd, signal.SIGCONT)
        deadline = time.monotonic() + patience
        for pidfd in pidfds:
            if not _exited(pidfd, max(deadline - time.monotonic(), 0)):
                break
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    return found


def _chosen(choose: Callable[[int], int | None], spared: Container[int]) -> Iterator[tuple[int, int, int]]:
    """Mark, pid and pidfd of each live process that is chosen. Zombies are not alive."""
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        pid = int(name)
        # While it starts a child, a process has the child's mark.
        if pid == os.getpid() or pid in spared or choose(mark_of(pid)) is None:
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


def guard(base: int) -> None:
    """
    Kill what a daemon that is gone has left. Blocks, for a minute at most.

    :param base: the base of the daemon's marks. Executions that were started to survive are spared.
    """

    def choose(mark: int) -> int | None:
        return signal.SIGKILL if given_by(base, mark) and not mark & _SURVIVE else None

    deadline = time.monotonic() + 60
    while sweep(choose, 0.1) and time.monotonic() < deadline:
        pass
