"""
Marks: the numbers by which the processes of an execution are found, and the walk over ``/proc`` that finds them.

A child can leave its process group and session, clear its environment and outlive its parents. It keeps its resource
limits: each execution is started with a number of its own as the soft limit on real-time CPU time (``RLIMIT_RTTIME``,
in microseconds). The numbers are so large that the limit is never reached; fork, exec and setsid keep it; prlimit(2)
reads it from any process. So a walk finds a tree whatever its members did, unless they set this very limit.

Where the limit cannot be set (an administrator has lowered it, or the kernel refuses it, as under gVisor), the mark is
a variable of the environment. Then a walk finds the processes that have it, their descendants and their sessions: all
but those that have left their session, lost their parents and cleared their environment. If a cgroup was delegated to
the daemon, each execution also gets one of its own there, which has the mark in its name: then a walk finds all
processes but those that have moved to another cgroup.

Imports little of the standard library and nothing else, for :mod:`sandboxd.processes.spawn_server` uses it.
"""

from __future__ import annotations

import errno
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, nullcontext

from sandboxd.processes.limits import InheritedLimit

#: Marks are ``base + n``. Each daemon has a random base, so that two never signal each other's processes.
_BASE_SHIFT = 32
#: Signals that a stopped process gets only once it continues; they are followed by SIGCONT.
_PENDING_WHILE_STOPPED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)

_SURVIVE = 1 << 31
#: The variable that holds a mark, where marks are not resource limits.
_VARIABLE = "SANDBOXD_MARK"
#: How the name of a cgroup that has a mark begins.
_CGROUP = "sandboxd-mark-"
_INFINITY = resource.RLIM_INFINITY

#: In place of the mark of a process that is gone: nobody knows which one it had.
_GONE = -2
#: Most listings of ``/proc`` in one walk, and the first of them, in which it matters that an unknown process is gone.
_LISTINGS = 50
_UNKNOWN_MATTERS = 5


class Marks:
    """The allocator of the marks of this daemon's executions."""

    def __init__(self) -> None:
        # Bit 61 keeps the limit above 70,000 years of CPU time.
        self.base = (1 << 61) | (int.from_bytes(os.urandom(3), "big") << _BASE_SHIFT)
        self._last = 0

    def new(self, survive: bool = False) -> int:
        """
        Return an unused mark.

        :param survive: whether :func:`kill_remaining` spares the processes that have it.
        """
        self._last += 1
        return self.base + self._last + (_SURVIVE if survive else 0)

    def owns(self, mark: int) -> bool:
        """Return whether a mark is of this daemon."""
        return is_mark_of(self.base, mark)


def is_mark_of(base: int, mark: int) -> bool:
    """Return whether a mark is of the daemon whose base is ``base``."""
    return mark > base and mark >> _BASE_SHIFT == base >> _BASE_SHIFT


def survives(mark: int) -> bool:
    """Return whether the processes that have a mark are to survive the daemon."""
    return bool(mark & _SURVIVE)


_by_limit: bool | None = None


def marks_by_limit() -> bool:
    """Return whether marks are kept in a resource limit; else they are kept in a variable of the environment."""
    global _by_limit
    if _by_limit is None:
        soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
        _by_limit = hard == _INFINITY
        try:
            if _by_limit:
                resource.setrlimit(resource.RLIMIT_RTTIME, (1 << 61, hard))
                resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))
        except (OSError, ValueError):  # Python raises ValueError for EPERM
            _by_limit = False
    return _by_limit


def inherited_mark(mark: int) -> AbstractContextManager[None]:
    """
    Return a context manager that sets a mark for processes that are started inside, which inherit it from their first
    moment on, if marks are resource limits.
    """
    return InheritedLimit(resource.RLIMIT_RTTIME, mark) if marks_by_limit() else nullcontext()


def mark_variable(mark: int) -> dict[str, str]:
    """Return the variable that a marked process needs in its environment; none if marks are resource limits."""
    return {} if marks_by_limit() else {_VARIABLE: str(mark)}


def marked_cgroup(mark: int) -> str:
    """Return the name of the cgroup for the processes of a mark, where marks are not resource limits."""
    return f"{_CGROUP}{mark}"


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _mark_by_limit(pid: int) -> int:
    """
    Return the mark of a process, -1 if it has none, or :data:`_GONE`. That of a zombie can be read until it is reaped.

    prlimit(2) requires the same user or CAP_SYS_RESOURCE; ``/proc/<pid>/limits`` requires neither.

    :raise OSError: if there are no descriptors or no memory for that.
    """
    try:
        return resource.prlimit(pid, resource.RLIMIT_RTTIME)[0]
    except PermissionError:
        pass
    except ProcessLookupError:
        return _GONE
    try:
        with open(f"/proc/{pid}/limits", "rb") as limits:
            for line in limits:
                if line.startswith(b"Max realtime timeout"):
                    soft = line.split()[3]
                    return int(soft) if soft.isdigit() else -1
    except (FileNotFoundError, ProcessLookupError):
        return _GONE
    except PermissionError:
        pass
    return -1


class _MarksByEnvironment:
    """
    A snapshot of the marks of all processes by their cgroups, environments, parents and sessions.

    :raise OSError: if there are no descriptors or no memory for that.
    """

    def __init__(self) -> None:
        stats = {pid: stat for pid in _pids() if (stat := _stat(pid)) is not None}
        self._started = {pid: started for pid, (_, _, started) in stats.items()}
        self._marks = {pid: mark for pid in stats if (mark := _mark_by_environment(pid)) >= 0}
        own = os.getsid(0)
        left = True
        while left:
            sessions = {stats[pid][1]: mark for pid, mark in self._marks.items() if stats[pid][1] != own}
            left = False
            for pid, (parent, session, _) in stats.items():
                if pid not in self._marks and (mark := self._marks.get(parent, sessions.get(session, -1))) >= 0:
                    self._marks[pid] = mark
                    left = True

    def __call__(self, pid: int) -> int:
        """Return the mark of a process, -1 if it has none, or :data:`_GONE`, also if its pid is another's now."""
        stat = _stat(pid)
        return self._marks.get(pid, -1) if stat is not None and stat[2] == self._started.get(pid) else _GONE


def _stat(pid: int) -> tuple[int, int, int] | None:
    """Return parent, session and start time of a process; None if it is gone. See proc(5)."""
    try:
        with open(f"/proc/{pid}/stat", "rb", buffering=0) as file:
            fields = file.read().rpartition(b")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[1]), int(fields[3]), int(fields[19])


def _mark_by_environment(pid: int) -> int:
    """Return the mark of a process by its cgroup or else its environment, or -1 if neither has one."""
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as file:
            for line in file:
                name = line.partition(_CGROUP.encode("ascii"))[2].split(b"/")[0].strip()
                if line.startswith(b"0::/") and name.isdigit() and len(name) < 20:
                    return int(name)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            entries = file.read().split(b"\0")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return -1
    values = [entry.partition(b"=")[2] for entry in entries if entry.startswith(_VARIABLE.encode("ascii") + b"=")]
    return int(values[-1]) if values and values[-1].isdigit() and len(values[-1]) < 20 else -1


def mark_of(pid: int) -> int:
    """
    Return the mark of a process, or a negative number if it has none or is gone.

    Where marks are not resource limits, only the process's own is looked at, not its parents'.

    :raise OSError: if there are no descriptors or no memory for that.
    """
    return _mark_by_limit(pid) if marks_by_limit() else _mark_by_environment(pid)


class MarkedProcesses:
    """
    The processes that a walk has found to have one mark.

    :ivar pids: its live processes.
    :ivar denied: the processes that may not be signalled (EPERM).
    """

    __slots__ = ("denied", "pids")

    def __init__(self) -> None:
        self.pids: list[int] = []
        self.denied: list[int] = []


def sweep(
    choose: Callable[[int], int | None], patience: float, spared: Container[int] = ()
) -> dict[int, MarkedProcesses]:
    """
    Walk over all processes once, signal the chosen ones, and wait for their end. Blocks.

    :param choose: returns the signal for the processes of a mark: 0 for none, None to skip them.
    :param patience: longest wait for those that were signalled, in seconds.
    :param spared: pids that are skipped, beside this process's own.
    :return: the chosen processes that were alive, by mark. A mark that is missing has no process left.
    :raise OSError: if there are no descriptors or no memory to see all processes; some may have been signalled.
    """
    found: dict[int, MarkedProcesses] = {}
    pidfds: list[int] = []
    try:
        for mark, pid, pidfd in _chosen(choose, spared, pidfds):
            of_mark = found.setdefault(mark, MarkedProcesses())
            of_mark.pids.append(pid)
            if pidfd >= 0:
                pidfds.append(pidfd)
            signum = choose(mark)
            if signum:
                try:
                    _send(pid, pidfd, signum)
                    if signum in _PENDING_WHILE_STOPPED:
                        _send(pid, pidfd, signal.SIGCONT)
                except PermissionError:
                    of_mark.denied.append(pid)
                except ProcessLookupError:
                    pass
        deadline = time.monotonic() + patience
        for pidfd in pidfds:
            if not _exited(pidfd, max(deadline - time.monotonic(), 0)):
                break
    finally:
        for pidfd in pidfds:
            os.close(pidfd)
    return found


def _send(pid: int, pidfd: int, signum: int) -> None:
    if pidfd >= 0:
        signal.pidfd_send_signal(pidfd, signum)
    else:
        os.kill(pid, signum)


def _look() -> tuple[set[int], Callable[[int], int]]:
    """Return the pids of all processes, and what returns their marks."""
    return set(_pids()), _mark_by_limit if marks_by_limit() else _MarksByEnvironment()


def _chosen(
    choose: Callable[[int], int | None], spared: Container[int], pidfds: list[int]
) -> Iterator[tuple[int, int, int]]:
    """
    Yield mark, pid and pidfd of each live process that is chosen. Zombies are not alive.

    The pidfd is -1 if none can be had; the process may be a zombie then.

    A process may fork after ``/proc`` was listed and be gone before it is looked at: then its child is in no listing.
    So ``/proc`` is listed again until no process that had to be looked at was gone. One that had a chosen mark, a
    zombie, always counts. One whose mark is unknown counts in the first listings only, as processes of others may come
    and go all the time.

    :param pidfds: descriptors that may be closed when no others are left.
    :raise OSError: EAGAIN, if processes with a chosen mark come and go faster than they can be looked at.
    """
    looked_at: set[int] = set()
    for listing in range(_LISTINGS):
        try:
            pids, find_mark = _look()
        except OSError:
            while pidfds:
                os.close(pidfds.pop())
            pids, find_mark = _look()
        inconclusive = False
        # At first the oldest first: a shell that outlived its child would write "Killed" into the output. Then the
        # newest first, as those that go soon are among them.
        for pid in sorted(pids - looked_at, reverse=listing > 0):
            if pid == os.getpid() or pid in spared:  # a process that starts a child has the child's mark meanwhile
                continue
            try:
                mark = find_mark(pid)
            except OSError:
                while pidfds:
                    os.close(pidfds.pop())
                mark = find_mark(pid)
            if mark == _GONE and listing < _UNKNOWN_MATTERS:
                inconclusive = True
            if choose(mark) is None:
                continue
            try:
                pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                inconclusive = True
                continue
            except OSError:  # no descriptor, or no memory
                pidfd = -1
            # Read the mark again: if the pid was reused before pidfd_open, it is another's now; if it is reused later,
            # the descriptor still refers to the process whose mark was read.
            try:
                mark = find_mark(pid)
            except OSError:  # pidfd is the last descriptor that could be had
                if pidfd >= 0:
                    os.close(pidfd)
                    pidfd = -1
                while pidfds:
                    os.close(pidfds.pop())
                mark = find_mark(pid)
            if choose(mark) is not None and (pidfd < 0 or not _exited(pidfd, 0)):
                yield mark, pid, pidfd
                continue
            inconclusive = True
            if pidfd >= 0:
                os.close(pidfd)
        if not inconclusive:
            return
        looked_at = pids
    raise OSError(errno.EAGAIN, "processes come and go faster than they can be looked at")


def _exited(pidfd: int, timeout: float) -> bool:
    """Return whether a process has ended, waiting at most ``timeout`` seconds for it."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout * 1000))


def kill_remaining(base: int) -> None:
    """
    Kill the processes that a daemon has left at its exit, but for those marked to survive it. Blocks, for a minute at
    most.

    :param base: the base of the daemon's marks.
    """

    def choose(mark: int) -> int | None:
        return signal.SIGKILL if is_mark_of(base, mark) and not survives(mark) else None

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if not sweep(choose, 0.1):
                return
        except OSError:  # no memory: try again
            time.sleep(0.1)
