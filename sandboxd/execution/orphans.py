"""The children that are this process's own: those that it has inherited, and the few that it has started itself."""

from __future__ import annotations

import os
from collections.abc import Callable

from sandboxd.execution.pipes import ExitWatch, Reactor


class Orphans:
    """
    Reaps all children of this process, which as PID 1 or subreaper inherits every orphan among its descendants.

    Who wants the status of one says so beforehand. (Commands are the spawners' children, as long as those live.)
    """

    def __init__(self) -> None:
        self._expected: dict[int, Callable[[int], None]] = {}

    def expect(self, reactor: Reactor, pid: int, exited: Callable[[int], None]) -> None:
        """
        A child whose status is wanted.

        :param exited: called with the status, as waitpid(2) tells it, when it has exited.
        """
        self._expected[pid] = exited
        ExitWatch(reactor, pid, self.reap)

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
