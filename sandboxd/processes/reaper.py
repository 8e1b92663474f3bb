"""The reaping of this process's own children: the orphans that it inherits, and the few that it starts itself."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sandboxd.processes.pipes import ExitWatch
from sandboxd.reactor.interfaces import Reactor

#: Exit statuses kept of children that nothing expected, newest last.
UNCLAIMED = 1024


def children() -> list[int]:
    """
    Return the pids of this process's children, those included that have ended and are not reaped.

    :raise OSError: if the kernel does not tell, or there are no descriptors.
    """
    found: list[int] = []
    for thread in Path("/proc/self/task").iterdir():
        try:
            found += map(int, (thread / "children").read_text().split())
        except FileNotFoundError:  # the thread has ended: another one has its children
            if thread.exists():
                raise
    return found


class Reaper:
    """
    The reaper of all children of this process, which as PID 1 or subreaper inherits every orphan among its descendants.

    :meth:`expect` asks for the exit status of one. Commands are children of the spawn servers while those live.
    """

    def __init__(self) -> None:
        self._expected: dict[int, Callable[[int], None]] = {}
        self._unclaimed: OrderedDict[int, int] = OrderedDict()

    def expect(self, reactor: Reactor, pid: int, exited: Callable[[int], None]) -> None:
        """
        Call ``exited`` once a child of this process has exited.

        :param exited: gets the wait status, as of waitpid(2).
        """
        self._expected[pid] = exited
        with suppress(OSError):  # no descriptor: :meth:`reap` finds it at the next look
            ExitWatch(reactor, os.pidfd_open(pid), self.reap)

    def adopt(self, reactor: Reactor, pid: int, exited: Callable[[int], None]) -> bool:
        """
        Call ``exited`` once a child that this process has inherited, and may have reaped already, has exited.

        :return: whether it is, or was, a child of this process.
        """
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            # The newest status of that pid: an older one is of another process that had the same pid.
            status = self._unclaimed.pop(pid, None)
            if status is None:
                return False
            exited(status)
        else:
            self.expect(reactor, pid, exited)
        return True

    def reap(self) -> None:
        """Reap every child that has exited."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            exited = self._expected.pop(pid, None)
            if exited is not None:
                exited(status)
                continue
            self._unclaimed[pid] = status
            if len(self._unclaimed) > UNCLAIMED:
                self._unclaimed.popitem(last=False)
