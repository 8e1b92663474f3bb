"""The children that are this process's own: those that it has inherited, and the few that it has started itself."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from sandboxd.processes.pipes import ExitWatch
from sandboxd.reactor.interfaces import Reactor

#: Statuses that are kept of children that nobody has expected.
UNCLAIMED = 1024


class Reaper:
    """
    Reaps all children of this process, which as PID 1 or subreaper inherits every orphan among its descendants.

    Who wants the status of one says so beforehand. (Commands are the spawners' children, as long as those live.)
    """

    def __init__(self) -> None:
        self._expected: dict[int, Callable[[int], None]] = {}
        self._unclaimed: OrderedDict[int, int] = OrderedDict()  # the newest statuses that nobody has expected

    def expect(self, reactor: Reactor, pid: int, exited: Callable[[int], None]) -> None:
        """
        A child whose status is wanted.

        :param exited: called with the status, as waitpid(2) tells it, when it has exited.
        """
        self._expected[pid] = exited
        with suppress(OSError):  # no descriptor to be had: it is reaped when they are looked for the next time
            ExitWatch(reactor, os.pidfd_open(pid), self.reap)

    def adopt(self, reactor: Reactor, pid: int, exited: Callable[[int], None]) -> bool:
        """
        :meth:`expect` a child that this process has inherited, and may have reaped before it was known to be wanted.

        :return: whether it is a child.
        """
        status = self._unclaimed.pop(pid, None)
        if status is not None:
            exited(status)
            return True
        try:
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        self.expect(reactor, pid, exited)
        return True

    def reap(self) -> None:
        """Collect the children that have exited."""
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
