"""An execution: one command, from its start to the end of its whole process tree."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

from msgspec.structs import replace
from twisted.internet.defer import Deferred, TimeoutError, fail
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.logger import Logger
from twisted.python.failure import Failure

from sandboxd.execution.log import OutputLog
from sandboxd.execution.protocol import CaptureProtocol
from sandboxd.processes.cgroup import Cgroup
from sandboxd.processes.child import Child, Spawner, SpawnError
from sandboxd.processes.command import Command
from sandboxd.processes.marks import marks_by_limit
from sandboxd.processes.trees import Survivors, Trees
from sandboxd.reactor.oneshot import OneShot

Status = Literal["running", "completed", "failed", "killed"]

#: Seconds after SIGKILL from which on a process that may not be signalled counts as one that cannot be killed.
KILL_PATIENCE = 5.0


class Execution:
    """
    A command that runs, or has ended and is remembered.

    :ivar id: a UUID.
    :ivar pid: process id of its shell; None until :meth:`when_started` fires.
    :ivar started_at: seconds since the epoch.
    :ivar ended_at: likewise; None while it runs.
    :ivar exit_code: exit code of its shell; -1 if a signal ended it; None while it runs.
    :ivar signal: the number of that signal, or None.
    :ivar background: whether it is listed as a background process.
    :ivar timed_out: whether it was killed because its timeout had passed.
    :ivar idle_timed_out: whether it was killed because it had written nothing for its idle timeout.
    :ivar cgroup: the cgroup of its processes, or None.
    :ivar survivors: pids of its tree that its last kill could not end.
    :ivar oom_killed: whether the kernel has killed a process of its cgroup for lack of memory.
    """

    _logger = Logger()

    def __init__(
        self,
        id: str,
        command: Command,
        background: bool,
        mark: int,
        clock: IReactorTime,
        trees: Trees,
        spawner: Spawner,
        ended: Callable[[Execution], None],
        cgroup: Cgroup | None = None,
        collect: bool = False,
    ) -> None:
        """
        Request the start of the command.

        :param mark: the mark of its processes.
        :param collect: whether its output may come some milliseconds late; see :meth:`.Spawner.spawn`.
        :param ended: called when it has ended, or could not be started.
        :raise SpawnError: if the request itself fails.
        """
        self.id = id
        self.command = command
        self.background = background
        self.tty = command.tty
        self.log = OutputLog()
        self.ended_at: float | None = None
        self.exit_code: int | None = None
        self.signal: int | None = None
        self.timed_out = False
        self.idle_timed_out = False
        self.oom_killed = False
        self.survivors: list[int] = []
        self._killed = False
        self._kills = 0
        self._nothing_left = False
        self._clock = clock
        self._trees = trees
        self._ended = ended
        self.cgroup = cgroup
        self._pauses_seen = 0
        self._mark = mark
        self._start: OneShot[None] = OneShot()
        self._end: OneShot[None] = OneShot()
        self._settled: OneShot[None] = OneShot()
        self._timers: list[IDelayedCall] = []
        self.started_at = time.time()
        self._began = clock.seconds()
        self.pid: int | None = None
        self._protocol = CaptureProtocol(self.log, clock, self._started, self._exited, command.flush_after)
        self._child: Child | None = spawner.spawn(self._protocol, command, self._mark, cgroup, collect)
        self.log.register_producer(self._child)
        if command.timeout is not None:
            self._timers.append(clock.callLater(command.timeout, self._time_out))

    @property
    def size(self) -> int:
        """Bytes of memory that the record of the execution holds."""
        return self.log.size + self.command.size

    @property
    def mark(self) -> int:
        """The mark of the execution's processes."""
        return self._mark

    @property
    def status(self) -> Status:
        """The state, as the API names it."""
        if self.ended_at is None:
            return "running"
        if self._killed:
            return "killed"
        return "completed" if self.exit_code == 0 else "failed"

    def when_started(self) -> Deferred[None]:
        """Return a Deferred that fires when the command runs, or fails with :exc:`SpawnError`. Can be cancelled."""
        return self._start.when_fired()

    def when_ended(self) -> Deferred[None]:
        """Return a Deferred that fires when the command has ended and its log is complete. Can be cancelled."""
        return self._end.when_fired()

    def when_settled(self) -> Deferred[None]:
        """
        Return a Deferred that fires when the outcome can be reported: the command has ended, and no kill is going on.
        Can be cancelled.

        That is when it has ended and no kill of it is going on; or when its timeout has passed but it cannot be killed.
        """
        return self._settled.when_fired()

    async def kill(self, signum: int = signal.SIGKILL, grace: float = 0.0) -> Survivors:
        """
        End the whole process tree, and wait until it is gone and the exit status is known.

        :param signum: the first signal.
        :param grace: seconds until SIGKILL follows, if ``signum`` was another.
        :return: the processes that could not be killed, normally none.
        """
        running = self.ended_at is None
        self._killed = self._killed or running
        self._kills += 1
        try:
            if signum == signal.SIGKILL:
                if self.cgroup is not None:
                    self.cgroup.kill()
                # At once, unless the walk can find those that left the process group by their parents only.
                if self._child is not None and (marks_by_limit() or self.pid is None):
                    with suppress(ProcessExitedAlready):
                        self._child.signalProcess(signum)
            if not self._start.fired:
                with suppress(SpawnError):
                    await self.when_started()
            if self.pid is None:
                return Survivors([], [])
            survivors = await self._trees.end(self._mark, signum, grace)
            if not survivors.pids:
                survivors = await self.end_unmarked(signum, grace)
            self.survivors = survivors.pids
            if survivors.pids and (self.timed_out or self.idle_timed_out):
                self.log.close(time.time())  # its readers get their answer now
                self._settled.fire(None)
            return survivors
        finally:
            self._kills -= 1
            self._settle()

    async def end_unmarked(self, signum: int, grace: float) -> Survivors:
        """
        End the command's own process though it may have lost its mark, and wait until the exit status is known.

        To be called when no process of the tree has its mark any more. Then that process has nearly always ended, and
        its exit status is on the way: a signal does nothing. But it may also have set the limit that was its mark, or
        executed another program with an empty environment where marks are variables.

        :param grace: seconds until SIGKILL follows, if ``signum`` was another.
        :return: that process, if it may not be signalled; normally none.
        """
        pid = self.pid
        if pid is None:
            return Survivors([], [])
        for number, seconds in ((signum, grace), (signal.SIGKILL, KILL_PATIENCE)):
            if self._child is not None and self.ended_at is None:
                with suppress(ProcessExitedAlready):
                    self._child.signalProcess(number)
                with suppress(TimeoutError):
                    await self.when_ended().addTimeout(seconds, self._clock)
        if self.ended_at is None:
            try:
                os.kill(pid, 0)
            except PermissionError:
                return Survivors([pid], [pid])
            except ProcessLookupError:
                pass
            await self.when_ended()
        return Survivors([], [])

    def _settle(self) -> None:
        if self.ended_at is not None and self._kills == 0 and not self._settled.fired:
            self._settled.fire(None)

    async def send_signal(self, signum: int) -> Survivors:
        """
        Send a signal to the process tree.

        :param signum: 0 to send none.
        :return: the processes of the tree, those that its shell has left included.
        :raise OSError: if not all processes could be looked at.
        """
        if self._nothing_left:
            return Survivors([], [])
        ended = self.ended_at is not None
        found = await self._trees.signal(self._mark, signum)
        self._nothing_left = ended and not found.pids
        return found

    async def left(self) -> list[int]:
        """
        Return the pids of the process tree that still run although the shell has ended; none while the shell runs.
        """
        return [] if self.ended_at is None else (await self.send_signal(0)).pids

    def feed(self, data: bytes, close: bool) -> Deferred[None]:
        """
        Write to the command's stdin.

        :param close: whether to close stdin afterwards.
        :return: fires when the pipe has taken all; fails with :exc:`BrokenPipeError` if stdin is closed.
        """
        if self._child is None:
            return fail(BrokenPipeError(errno.EPIPE, "the process has ended"))
        taken = self._child.feed(data)
        if close:
            self._child.closeStdin()
        return taken

    def resize(self, cols: int, rows: int) -> None:
        """
        Set the size of the command's terminal.

        :raise OSError: if it has no terminal, or has ended.
        """
        if self.tty is None:
            raise OSError(errno.ENOTTY, "the process has no terminal")
        if self._child is None:
            raise OSError(errno.EIO, "the process has ended")
        self._child.resize(cols, rows)
        self.tty = replace(self.tty, cols=cols, rows=rows)

    @property
    def has_stdin(self) -> bool:
        """Whether the command's stdin can be written to now."""
        return self._child is not None and (self.command.stdin or self.tty is not None)

    def kill_without_waiting(self) -> None:
        """
        Start to kill the process tree if the command runs; a failure is logged.

        Processes that an ended one has left in the background are not killed.
        """
        if self.ended_at is not None:
            return
        Deferred.fromCoroutine(self.kill()).addCallbacks(self._log_survivors, self._log_kill_failure)

    def _log_survivors(self, survivors: Survivors) -> None:
        if survivors.pids:
            self._logger.error("{id}: could not be killed: pids {pids}", id=self.id, pids=survivors.pids)

    def _log_kill_failure(self, failure: Failure) -> None:
        self._logger.failure("{id}: could not be killed", failure, id=self.id)

    def _time_out(self) -> None:
        self.timed_out = True
        self.kill_without_waiting()

    def _watch_idle(self, limit: float, wait: float) -> None:
        """Check in ``wait`` seconds whether the command has written nothing for ``limit`` seconds."""
        call = self._clock.callLater(wait, self._look_idle, limit)
        self._timers = [timer for timer in self._timers if timer.active()] + [call]

    def _look_idle(self, limit: float) -> None:
        idle = self._clock.seconds() - (self._protocol.last_output or self._began)
        if self.log.paused or self.log.pauses != self._pauses_seen:
            # It may have been blocked by a slow reader, not silent.
            self._pauses_seen = self.log.pauses
            self._watch_idle(limit, limit)
        elif idle < limit:
            self._watch_idle(limit, limit - idle)
        else:
            self.idle_timed_out = True
            self.kill_without_waiting()

    def _started(self) -> None:
        assert self._child is not None
        self.pid = self._child.pid
        if self.command.idle_timeout is not None:
            self._watch_idle(self.command.idle_timeout, self.command.idle_timeout)
        self._start.fire(None)

    def _exited(self, reason: Failure) -> None:
        for timer in self._timers:
            if timer.active():
                timer.cancel()
        self._timers.clear()
        self.exit_code = 0 if isinstance(reason.value, ProcessDone) else -1
        if isinstance(reason.value, ProcessTerminated):
            self.signal = reason.value.signal
            self.exit_code = -1 if reason.value.exitCode is None else reason.value.exitCode
        if self.timed_out or self.idle_timed_out:
            self.exit_code = -1
        if self.cgroup is not None:
            self.oom_killed = self.cgroup.oom_killed
        self._child = None
        self.ended_at = time.time()
        self._ended(self)
        if self.pid is None:
            self._start.fire(reason)
        self._end.fire(None)
        self._settle()
