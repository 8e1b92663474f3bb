"""The table of all executions of the daemon."""

from __future__ import annotations

import errno
import math
import os
import signal
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Literal

from twisted.application.service import Service
from twisted.internet.defer import Deferred, DeferredList, TimeoutError
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

from sandboxd.execution.execution import Execution
from sandboxd.processes.cgroup import Cgroup, CgroupError, Cgroups
from sandboxd.processes.child import Spawner, SpawnError
from sandboxd.processes.command import Command
from sandboxd.processes.companion import Companion
from sandboxd.processes.environment import Environment
from sandboxd.processes.marks import marked_cgroup, marks_by_limit
from sandboxd.processes.reaper import Reaper
from sandboxd.processes.spawn_client import ChildListener, SpawnClient
from sandboxd.processes.trees import Trees
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.threads import ThreadPool
from sandboxd.reactor.turn_budget import TurnBudget

#: Bounds of the ended executions that are remembered, for background processes and for others each: their number, the
#: bytes of their output, and the seconds since their end.
KEEP_COUNT = 1000
KEEP_BYTES = 256 * 1024 * 1024
KEEP_SECONDS = 24 * 3600.0

#: Most commands that run at a time.
MAX_LIVE = 4096

#: On a stop: seconds from SIGTERM to SIGKILL, and from SIGKILL until giving up.
STOP_GRACE = 3.0
STOP_PATIENCE = 3.0

#: Seconds in which a trial start has to end.
TRIAL_TIMEOUT = 5.0

#: Seconds between two rounds of reaping inherited zombies and forgetting old executions.
HOUSEKEEPING = 1.0


def _new_id() -> str:
    """Return a random UUID (RFC 9562, version 4); in a quarter of the time of the standard library's."""
    digits = os.urandom(16).hex()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:]}"


class Finished:
    """
    The executions that have ended and are remembered, in the order of their end.

    :param count: most executions.
    :param size: most bytes of output, scripts and variables of all together.
    :param age: most seconds since the end of one.
    """

    def __init__(self, count: int, size: int, age: float) -> None:
        self._limits = (count, size, age)
        self._executions: deque[tuple[Execution, float, int]] = deque()
        self._size = 0

    def add(self, execution: Execution, now: float) -> None:
        """Add an execution that has ended."""
        size = execution.size
        self._executions.append((execution, now, size))
        self._size += size

    def take_excess(self, now: float) -> Iterator[tuple[Execution, float]]:
        """Remove and yield those that exceed the bounds, and when they have ended; oldest first."""
        count, size, age = self._limits
        while self._executions:
            oldest, ended, held = self._executions[0]
            if len(self._executions) <= count and self._size <= size and now - ended < age:
                return
            self._size -= held
            self._executions.popleft()
            yield oldest, ended

    def take_all(self) -> list[tuple[Execution, float]]:
        """Remove and return all, and when they have ended; oldest first."""
        found = [(execution, ended) for execution, ended, _ in self._executions]
        self._executions.clear()
        self._size = 0
        return found

    def __len__(self) -> int:
        return len(self._executions)


class ProcessTable(Service):
    """
    All executions by id. It starts them; stopping it ends every process of them.

    :param environ: the daemon's environment.
    :param threads: calls a blocking function in a thread.
    :param reap: whether all children of this process are executions' or orphans that it inherits as PID 1 or as
        subreaper, and may be reaped.
    :param cgroups: makes the cgroups of commands that have limits for their whole tree; None where there are none.
    :param open_directory: as :class:`.Spawner` has it.
    :param max_live: most commands that run at a time.
    :param keep_count: most ended executions that are remembered, background processes and others each; and as many
        more of those that have left processes behind which run, so that these can be ended by its id.
    :param keep_bytes: most bytes of their output, scripts and variables.
    :param keep_seconds: most seconds since their end.
    :param drain: seconds in which foreground commands may end by themselves when it stops.
    :ivar live: the running executions by id.
    :ivar started: number of starts, by ``background`` and ``foreground``.
    :ivar ended: number of ends, by status; ``unstarted`` for those that could not be started.
    :ivar last_ended: when the last one ended, or a survivor of one was last seen, by the reactor's
        clock; initially when the table was made.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        environ: Mapping[str, str],
        threads: ThreadPool,
        turns: TurnBudget,
        *,
        reap: bool = False,
        cgroups: Cgroups | None = None,
        open_directory: Callable[[str], int | None] = lambda path: None,
        max_live: int = MAX_LIVE,
        keep_count: int = KEEP_COUNT,
        keep_bytes: int = KEEP_BYTES,
        keep_seconds: float = KEEP_SECONDS,
        drain: float = 0,
    ) -> None:
        self._reactor = reactor
        self._environment = environment = Environment(environ)
        self._reaper = Reaper()
        reap_now = self._reaper.reap if reap else lambda: None
        self._trees = Trees(reactor, threads, lambda: self._spawn_client.pids, reap_now)
        self._spawn_client = SpawnClient(reactor, turns, self._trees.marks.base, self._adopt, self._trees.end)
        self._spawner = Spawner(reactor, turns, self._spawn_client, environment, open_directory)
        self._max_live = max_live
        self._drain = drain
        self.live: dict[str, Execution] = {}
        self.started: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.last_ended = reactor.seconds()
        self._survivors_possible = False
        self._no_executions: set[int] = set()  # the marks of trial starts and of the companion
        self._ended_bytes = 0
        self._known: dict[str, Execution] = {}
        self._background: dict[str, Execution] = {}
        self._finished = {background: Finished(keep_count, keep_bytes, keep_seconds) for background in (True, False)}
        #: Those that exceed these bounds: it is yet to be found out whether they have left processes behind; they have.
        self._unlooked = Finished(keep_count, keep_bytes, math.inf)
        self._with_survivors = Finished(keep_count, keep_bytes, math.inf)
        self._marks_left: set[int] = set()  # of the processes that the last look has found
        self._looked_at = -math.inf  # when that began
        self._looking = False
        self._reap = reap
        self._cgroups = cgroups
        self._housekeeping = LoopingCall(self._housekeep)

    def start(self, command: Command, *, background: bool, collect: bool = False) -> Execution:
        """
        Start a command.

        :param background: whether it is listed as a background process.
        :param collect: whether its output may come some milliseconds late; see :meth:`.Spawner.spawn`.
        :raise CgroupError: if the limits of its tree cannot be set.
        :raise SpawnError: if the request fails, too many commands run, or the daemon is stopping.
        """
        if not self.running:
            raise SpawnError(OSError(errno.EAGAIN, "the daemon is stopping"))
        if self.full:
            raise SpawnError(OSError(errno.EAGAIN, f"{self._max_live} commands are running, which is the limit"))
        id = _new_id()
        mark = self._trees.marks.new(command.survive)
        cgroup = self._cgroup(command, mark)
        try:
            execution = Execution(
                id, command, background, mark, self._reactor, self._trees, self._spawner, self._ended, cgroup, collect
            )
        except SpawnError:
            if cgroup is not None:
                cgroup.remove()
            raise
        self.live[id] = execution
        self._survivors_possible = True
        self.started["background" if background else "foreground"] += 1
        self._known[id] = execution
        if background:
            self._background[id] = execution
        return execution

    def _cgroup(self, command: Command, mark: int) -> Cgroup | None:
        """
        Return a cgroup for a command that has limits for its tree, or that is to be found by its cgroup.

        :raise CgroupError: if the limits cannot be set.
        """
        if self._cgroups is None:
            if command.tree_limits:
                raise CgroupError("limits: memory, pids and cpus need a cgroup that is delegated to the daemon")
            return None
        if not command.tree_limits and marks_by_limit():
            return None
        try:
            return self._cgroups.make(marked_cgroup(mark), command.tree_limits)
        except CgroupError:
            if command.tree_limits:
                raise
            return None  # it still has its mark in the environment

    @property
    def marks(self) -> Literal["rlimit", "cgroup", "environment"]:
        """How the processes of a command are found."""
        if marks_by_limit():
            return "rlimit"
        return "environment" if self._cgroups is None else "cgroup"

    async def try_start(self) -> None:
        """
        Run a command that does nothing, the way all commands are run, and wait for its end. It is neither listed nor
        counted.

        :raise SpawnError: if it could not be started, or did not end with 0 in :data:`TRIAL_TIMEOUT` seconds.
        """
        command = Command(":", timeout=TRIAL_TIMEOUT)
        execution = Execution(
            _new_id(),
            command,
            False,
            self._trees.marks.new(),
            self._reactor,
            self._trees,
            self._spawner,
            lambda execution: None,
        )
        self._no_executions.add(execution.mark)
        try:
            await execution.when_started()
            await execution.when_settled()
        finally:
            self._no_executions.discard(execution.mark)
        if execution.timed_out:
            raise SpawnError(OSError(errno.ETIMEDOUT, f"it did not end in {TRIAL_TIMEOUT:g} seconds"))
        if execution.exit_code != 0:
            raise SpawnError(OSError(errno.EIO, f"it ended with {execution.exit_code}"))

    async def has_survivors(self) -> bool:
        """Return whether an ended execution has left a process behind that still runs; True too if that is unknown."""
        if not self._survivors_possible:
            return False
        self._survivors_possible = False  # unless a command is started meanwhile
        found = True
        with suppress(OSError):
            found = bool(await self._trees.running() - self._no_executions)
        if found:
            self._survivors_possible = True
            self.last_ended = self._reactor.seconds()
        return found

    def start_companion(self, argv: Sequence[str]) -> Companion:
        """
        Start the command that runs beside the daemon.

        :raise OSError: if it cannot be started.
        """
        companion = Companion(self._reactor, self._trees, self._reaper, argv, self._environment.inherited)
        self._no_executions.add(companion.mark)
        return companion

    @property
    def full(self) -> bool:
        """Whether no command can be started until one ends."""
        return len(self.live) >= self._max_live

    @property
    def output_bytes(self) -> int:
        """Bytes that all executions have written, forgotten ones included."""
        return self._ended_bytes + sum(execution.log.total_bytes for execution in self.live.values())

    def background(self) -> Iterable[Execution]:
        """Return the background processes that run or are remembered, in the order of their start."""
        return (execution for execution in self._background.values() if execution.pid is not None)

    def get(self, id: str) -> Execution:
        """Return the execution with an id; raise KeyError if none that runs or is remembered has it."""
        return self._known[id]

    def by_mark(self) -> dict[int, Execution]:
        """Return all executions that run or are remembered, by the marks of their processes."""
        return {execution.mark: execution for execution in self._known.values()}

    def startService(self) -> None:
        """Start accepting commands."""
        super().startService()
        self._spawn_client.start()
        self._housekeeping.clock = self._reactor
        self._housekeeping.start(HOUSEKEEPING, now=False)

    def stopService(self) -> Deferred[None]:
        """End every process of all executions, also those left by ended ones; fires when they are gone."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        foreground = [execution.when_settled() for execution in self.live.values() if not execution.background]
        if self._drain:
            with suppress(TimeoutError):
                await DeferredList(foreground, consumeErrors=True).addTimeout(self._drain, self._reactor)
        for execution in list(self.live.values()):
            if execution.pid is None:
                execution.kill_without_waiting()
            with suppress(SpawnError):
                await execution.when_started()
            if execution.tty is not None and execution.ended_at is None:
                with suppress(OSError):  # the processes cannot be looked at, but are ended below
                    await execution.send_signal(signal.SIGHUP)  # interactive shells ignore SIGTERM
        survivors = await self._trees.end_all(signal.SIGTERM, STOP_GRACE)
        if survivors:
            survivors = await self._trees.end_all(signal.SIGKILL, STOP_PATIENCE)
        if survivors:
            self._log.error("processes that could not be killed: {pids}", pids=survivors)
        else:
            unmarked = [execution.end_unmarked(signal.SIGTERM, STOP_GRACE) for execution in self.live.values()]
            for ended in list(map(Deferred.fromCoroutine, unmarked)):
                if pids := (await ended).pids:
                    self._log.error("processes that could not be killed: {pids}", pids=pids)
        if self._housekeeping.running:
            self._housekeeping.stop()
            self._housekeep()
        self._spawn_client.stop()

    def _ended(self, execution: Execution) -> None:
        self.live.pop(execution.id, None)
        self.ended["unstarted" if execution.pid is None else execution.status] += 1
        self.last_ended = self._reactor.seconds()
        self._ended_bytes += execution.log.total_bytes
        if self._cgroups is not None and execution.cgroup is not None:
            self._cgroups.retire(execution.cgroup)
        if execution.pid is None:  # the command never ran
            self._known.pop(execution.id, None)
            self._background.pop(execution.id, None)
            return
        finished = self._finished[execution.background]
        finished.add(execution, self.last_ended)
        self._forget(finished, self.last_ended)

    def _adopt(self, children: dict[int, ChildListener]) -> None:
        """Take over the children of a spawn server that has died: they are now children of this process."""
        for pid, child in children.items():
            child.adopted()
            if not self._reaper.adopt(self._reactor, pid, child.exited):
                self._log.error("process {pid}: its exit status was lost", pid=pid)
                child.exited(signal.SIGKILL)

    def _forget(self, finished: Finished, now: float) -> None:
        """
        Forget the executions that exceed the bounds, but for those that have left processes behind which run.

        One look at the processes decides about all executions that have ended before it: whose processes are gone gets
        no new ones. So there is one in as many ends as executions are remembered, and none where this process, to
        which orphans are reparented, has no children of its own.
        """
        for execution, ended in finished.take_excess(now):
            if ended > self._looked_at and self._reap and self._spawn_client.only_children:
                self._looked(now, set())
            self._forget_unless_left(execution, ended)
        for kept in (self._unlooked, self._with_survivors):
            for execution, _ in kept.take_excess(now):
                self._drop(execution)
        if self._unlooked and self.running and not self._looking:
            self._looking = True
            Deferred.fromCoroutine(self._look()).addErrback(
                lambda failure: self._log.failure("what executions have left is not looked for any more", failure)
            )

    def _forget_unless_left(self, execution: Execution, ended: float) -> None:
        if ended > self._looked_at:
            self._unlooked.add(execution, ended)
        elif execution.mark in self._marks_left:
            self._with_survivors.add(execution, ended)
        else:
            self._drop(execution)

    def _drop(self, execution: Execution) -> None:
        del self._known[execution.id]
        self._background.pop(execution.id, None)

    async def _look(self) -> None:
        """Look for the processes that executions have left; in a thread, as there may be many."""
        began = self._reactor.seconds()
        try:
            marks = await self._trees.running()
        except OSError as error:  # the next housekeeping tries again
            self._log.warn("processes cannot be looked at, which is tried again: {error}", error=error)
            return
        finally:
            self._looking = False
        self._looked(began, marks)

    def _looked(self, at: float, marks: set[int]) -> None:
        """Take the marks of the processes that were found at a time, and forget the executions that have none."""
        self._looked_at, self._marks_left = at, marks
        for kept in (self._with_survivors, self._unlooked):
            for execution, ended in kept.take_all():
                self._forget_unless_left(execution, ended)

    def _housekeep(self) -> None:
        """Do what is due about once a second. What fails once is logged and due again: all else depends on it."""
        for part in (self._forget_old, self._spawn_client.check, self._reap_all, self._remove_retired):
            try:
                part()
            except Exception:
                self._log.failure("housekeeping has failed, which is tried again")

    def _forget_old(self) -> None:
        for finished in self._finished.values():
            self._forget(finished, self._reactor.seconds())

    def _reap_all(self) -> None:
        if self._reap:
            self._reaper.reap()

    def _remove_retired(self) -> None:
        if self._cgroups is not None:
            self._cgroups.remove_retired()
