"""All executions of the daemon."""

from __future__ import annotations

import errno
import signal
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from sandboxd.execution.execution import Execution
from sandboxd.execution.log import OutputLog
from sandboxd.execution.protocol import CaptureProtocol
from sandboxd.processes.cgroup import CgroupError, Cgroups
from sandboxd.processes.child import Child, SpawnError, spawn
from sandboxd.processes.command import Command
from sandboxd.processes.companion import Companion
from sandboxd.processes.environment import Environment
from sandboxd.processes.reaper import Reaper
from sandboxd.processes.spawn_client import ChildListener, SpawnClient
from sandboxd.processes.trees import Trees
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.threads import ThreadPool
from sandboxd.reactor.turn_budget import TurnBudget

#: What is remembered of executions that have ended, for background processes and for others alike.
KEEP_COUNT = 1000
KEEP_BYTES = 256 * 1024 * 1024
KEEP_SECONDS = 24 * 3600.0

#: Commands that run at a time.
MAX_LIVE = 4096

#: Seconds that a stop gives processes between SIGTERM and SIGKILL, and after that to be gone.
STOP_GRACE = 3.0
STOP_PATIENCE = 3.0

#: Seconds between looks for inherited zombies, and for finished executions that have grown old.
HOUSEKEEPING = 1.0


class Finished:
    """
    Executions that have ended and are remembered, in the order of their end.

    :param count: how many, at most.
    :param size: bytes of output, at most, that they hold together.
    :param age: seconds after its end at which one is forgotten.
    """

    def __init__(self, count: int, size: int, age: float) -> None:
        self._limits = (count, size, age)
        self._executions: deque[tuple[Execution, float]] = deque()
        self._size = 0

    def add(self, execution: Execution, now: float) -> None:
        """One has ended."""
        self._executions.append((execution, now))
        self._size += execution.log.size

    def take_excess(self, now: float) -> Iterator[Execution]:
        """Those that are to be forgotten, oldest first, forgetting them."""
        count, size, age = self._limits
        while self._executions:
            oldest, ended = self._executions[0]
            if len(self._executions) <= count and self._size <= size and now - ended < age:
                return
            self._size -= oldest.log.size
            yield self._executions.popleft()[0]


class ProcessTable(Service):
    """
    Starts executions and knows them by id. Stopping it ends every process that any of them has left.

    :param environ: the environment that children inherit, less what is private to the daemon.
    :param in_thread: runs a blocking function off the reactor's thread.
    :param turns: shares out the time of the reactor.
    :param guarded: whether this process owns all its children: as PID 1 or a subreaper it reaps the orphans that
        come to it.
    :param cgroups: makes the cgroups of commands with limits for their whole tree, if the daemon has one of its own.
    :param max_live: how many commands may run at a time.
    :param keep_count: how many that have ended are remembered; background processes and others each.
    :param keep_bytes: how many bytes of their output.
    :param keep_seconds: for how long.
    :ivar live: the executions that run, by id.
    :ivar started: how many were started, of ``background`` and of ``foreground``.
    :ivar ended: how many have ended, by status; ``unstarted`` are those that could not be started.
    :ivar last_ended: when the last one has, by the clock; when the table was made, if none has.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        environ: Mapping[str, str],
        in_thread: ThreadPool,
        turns: TurnBudget,
        *,
        guarded: bool = False,
        cgroups: Cgroups | None = None,
        max_live: int = MAX_LIVE,
        keep_count: int = KEEP_COUNT,
        keep_bytes: int = KEEP_BYTES,
        keep_seconds: float = KEEP_SECONDS,
    ) -> None:
        self._reactor = reactor
        self._environment = Environment(environ)
        self._trees = Trees(reactor, in_thread, lambda: self._launcher.pids)
        self._orphans = Reaper()
        self._launcher = SpawnClient(reactor, turns, self._trees.marks.base, self._adopt, self._trees.end)
        self._turns = turns
        self._max_live = max_live
        self.live: dict[str, Execution] = {}
        self.started: Counter[str] = Counter()
        self.ended: Counter[str] = Counter()
        self.last_ended = reactor.seconds()
        self._ended_bytes = 0
        self._known: dict[str, Execution] = {}
        self._background: dict[str, Execution] = {}
        self._finished = {background: Finished(keep_count, keep_bytes, keep_seconds) for background in (True, False)}
        self._guarded = guarded
        self._cgroups = cgroups
        self._housekeeping = LoopingCall(self._housekeep)

    def start(self, command: Command, *, background: bool) -> Execution:
        """
        Run a command.

        :param background: whether it is listed.
        :raise CgroupError: if its tree cannot be limited as it asks.
        :raise SpawnError: if it cannot be started, there are too many, or the daemon is stopping.
        """
        if not self.running:
            raise SpawnError(OSError(errno.EAGAIN, "the daemon is stopping"))
        if self.full:
            raise SpawnError(OSError(errno.EAGAIN, f"{self._max_live} commands are running, which is the limit"))
        id = str(uuid.uuid4())
        env = self._environment.merged(command)

        cgroup = None
        if command.tree_limits:
            if self._cgroups is None:
                raise CgroupError("limits: memory, pids and cpus need a cgroup that is delegated to the daemon")
            cgroup = self._cgroups.make(id, command.tree_limits)

        def launch(protocol: CaptureProtocol, mark: int) -> Child:
            return spawn(self._reactor, self._turns, self._launcher, protocol, command, env, mark, cgroup)

        try:
            execution = Execution(
                id, command, background, OutputLog(), self._reactor, self._trees, launch, self._ended, cgroup
            )
        except SpawnError:
            if cgroup is not None:
                cgroup.remove()
            raise
        self.live[id] = execution
        self.started["background" if background else "foreground"] += 1
        self._known[id] = execution
        if background:
            self._background[id] = execution
        return execution

    def start_companion(self, argv: Sequence[str]) -> Companion:
        """
        Start the command that the daemon was started with.

        :raise OSError: if it cannot be started.
        """
        return Companion(self._reactor, self._trees, self._orphans, argv, self._environment.inherited)

    @property
    def full(self) -> bool:
        """Whether no more commands may be started until one ends."""
        return len(self.live) >= self._max_live

    @property
    def output_bytes(self) -> int:
        """Bytes that all executions have written."""
        return self._ended_bytes + sum(execution.log.total_bytes for execution in self.live.values())

    def background(self) -> Iterable[Execution]:
        """The background processes that are remembered, in the order of their start."""
        return (execution for execution in self._background.values() if execution.pid is not None)

    def get(self, id: str) -> Execution:
        """
        An execution that runs or is remembered.

        :raise KeyError: if there is none of that id.
        """
        return self._known[id]

    def startService(self) -> None:
        """Begin to accept commands."""
        super().startService()
        self._launcher.start()
        self._housekeeping.clock = self._reactor
        self._housekeeping.start(HOUSEKEEPING, now=False).addErrback(self._housekeeping_broke)

    def stopService(self) -> Deferred[None]:
        """End every process, also those left behind by executions that ended long ago; fires when they are gone."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        for execution in list(self.live.values()):
            with suppress(SpawnError):
                await execution.when_started()
        if await self._trees.end_all(signal.SIGTERM, STOP_GRACE):
            survivors = await self._trees.end_all(signal.SIGKILL, STOP_PATIENCE)
            if survivors:
                self._log.error("processes that could not be killed: {pids}", pids=survivors)
                return
        for execution in list(self.live.values()):
            await execution.when_ended()
        if self._housekeeping.running:
            self._housekeeping.stop()
            self._housekeep()
        self._launcher.stop()

    def _ended(self, execution: Execution) -> None:
        self.live.pop(execution.id, None)
        self.ended["unstarted" if execution.pid is None else execution.status] += 1
        self.last_ended = self._reactor.seconds()
        self._ended_bytes += execution.log.total_bytes
        if self._cgroups is not None and execution.cgroup is not None:
            self._cgroups.retire(execution.cgroup)
        if execution.pid is None:  # it never was
            self._known.pop(execution.id, None)
            self._background.pop(execution.id, None)
            return
        self._finished[execution.background].add(execution, self.last_ended)
        self._forget()

    def _adopt(self, children: dict[int, ChildListener]) -> None:
        """The process that has started these is dead: they are our own now."""
        for pid, child in children.items():
            child.adopted()
            if not self._orphans.adopt(self._reactor, pid, child.exited):
                self._log.error("process {pid}: its exit status was lost", pid=pid)
                child.exited(signal.SIGKILL)

    def _forget(self) -> None:
        now = self._reactor.seconds()
        for finished in self._finished.values():
            for execution in finished.take_excess(now):
                del self._known[execution.id]
                self._background.pop(execution.id, None)

    def _housekeep(self) -> None:
        self._forget()
        if self._guarded:
            self._orphans.reap()
        if self._cgroups is not None:
            self._cgroups.remove_retired()

    def _housekeeping_broke(self, failure: Failure) -> None:
        self._log.failure("orphans are no longer reaped, and finished executions no longer forgotten", failure)
