"""
The companion: a command that runs beside the daemon, which stops when the companion exits.

It is no execution: its output goes where the daemon's goes, and it shares the daemon's terminal, session and process
group. Like all others it has a mark, by which its whole tree is found and killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress

from twisted.internet.defer import Deferred, TimeoutError
from twisted.logger import Logger

from sandboxd.processes.limits import inherited_nofile, own_nofile
from sandboxd.processes.marks import inherited_mark, mark_variable
from sandboxd.processes.reaper import Reaper
from sandboxd.processes.trees import Trees
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.oneshot import OneShot

#: Seconds between the signal that ends it and SIGKILL, when the daemon stops.
GRACE = 5.0

#: Seconds to wait for its end after SIGKILL.
KILL_PATIENCE = 5.0

#: Exit codes of a shell (POSIX XCU 2.8.2): killed by a signal (plus its number), not found, not executable.
SIGNALLED = 128
NOT_FOUND = 127
NOT_EXECUTABLE = 126


class Companion:
    """
    The companion while it runs.

    :ivar mark: the mark of its processes.
    :ivar exit_code: the daemon's own exit code, None while the command runs: that of the command, or 128 plus the
        number of the signal that ended it; 0 if that signal was the one that :meth:`ask_to_end` sent.
    """

    _log = Logger()

    def __init__(
        self, reactor: Reactor, trees: Trees, orphans: Reaper, argv: Sequence[str], env: Mapping[str, str]
    ) -> None:
        """
        Start the companion.

        :raise OSError: if it cannot be started.
        """
        self._reactor = reactor
        self._trees = trees
        self.mark = trees.marks.new()
        self._asked: int | None = None
        self._end: OneShot[None] = OneShot()
        self.exit_code: int | None = None
        with inherited_mark(self.mark), inherited_nofile(own_nofile()):
            popen = subprocess.Popen(argv, env={**env, **mark_variable(self.mark)})
        popen.returncode = 0  # reaped by the Reaper, not by subprocess
        self.pid: int = popen.pid
        orphans.expect(reactor, self.pid, self._exited)
        self._log.info("the command {argv} runs beside, as pid {pid}", argv=argv[0], pid=self.pid)

    def when_ended(self) -> Deferred[None]:
        """Return a Deferred that fires when the companion has exited."""
        return self._end.when_fired()

    def signal(self, signum: int) -> None:
        """Send a signal to the companion, if it runs and may be signalled."""
        if self.exit_code is None:
            try:
                os.kill(self.pid, signum)
            except PermissionError:  # it has become another user
                self._log.error(
                    "the command may not be signalled: pid {pid}, signal {signum}", pid=self.pid, signum=signum
                )

    def ask_to_end(self, signum: int) -> None:
        """Send a signal after which the companion is expected to end."""
        self._asked = signum
        self.signal(signum)

    async def stop(self) -> None:
        """
        End the companion, by SIGTERM unless :meth:`ask_to_end` has sent a signal; by SIGKILL :data:`GRACE` seconds
        later.

        Its processes that are left then are ended with those of all executions.
        """
        if self.exit_code is None and self._asked is None:
            self.ask_to_end(signal.SIGTERM)
        with suppress(TimeoutError):
            await self.when_ended().addTimeout(GRACE, self._reactor)
        if self.exit_code is None:
            self._log.warn("the command has not ended within {grace} seconds, and is killed", grace=GRACE)
            self.signal(signal.SIGKILL)
            left: list[int] = []
            with suppress(OSError):  # not all processes can be looked at
                left = (await self._trees.end(self.mark)).pids
            if not left:
                with suppress(TimeoutError):
                    await self.when_ended().addTimeout(KILL_PATIENCE, self._reactor)

    def _exited(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            code = 0 if -code == self._asked else SIGNALLED - code
        self.exit_code = code
        self._log.info("the command has ended with code {code}", code=code)
        self._end.fire(None)


def why_not_started(error: OSError) -> int:
    """Return the exit code with which a shell reports that a command cannot be started."""
    return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
