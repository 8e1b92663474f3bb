"""All executions of the daemon."""

from __future__ import annotations

import errno
import signal
import uuid
from collections import deque
from collections.abc import Iterable, Mapping

from twisted.application.service import Service
from twisted.internet.defer import Deferred
from twisted.internet.task import LoopingCall
from twisted.logger import Logger
from twisted.python.failure import Failure

from sandboxd.execution.command import Command
from sandboxd.execution.environment import Environment
from sandboxd.execution.execution import Execution
from sandboxd.execution.log import OutputLog
from sandboxd.execution.protocol import CaptureProtocol
from sandboxd.execution.spawn import Child, Children, Reactor, SpawnError, spawn
from sandboxd.execution.tree import Trees
from sandboxd.workers import Workers

#: Finished background processes that are remembered, by number and by bytes of output; the oldest go first.
MAX_FINISHED = 1000
MAX_FINISHED_BYTES = 256 * 1024 * 1024

#: Seconds that a stop gives processes between SIGTERM and SIGKILL, and after that to be gone.
STOP_GRACE = 3.0
STOP_PATIENCE = 3.0

#: Seconds between looks for inherited zombies.
REAP_INTERVAL = 1.0


class ProcessTable(Service):
    """
    Starts executions and knows them by id. Stopping it ends every process that any of them has left.

    :param environ: the environment that children inherit, less what is private to the daemon.
    :param in_thread: runs a blocking function off the reactor's thread.
    :param reap_orphans: whether orphans come to this process to be reaped, as to PID 1 or a subreaper.
    """

    _log = Logger()

    def __init__(
        self, reactor: Reactor, environ: Mapping[str, str], in_thread: Workers, reap_orphans: bool = False
    ) -> None:
        self._reactor = reactor
        self._environment = Environment(environ)
        self._trees = Trees(reactor, in_thread)
        self._children = Children()
        self._running: dict[str, Execution] = {}
        self._background: dict[str, Execution] = {}
        self._finished: deque[Execution] = deque()
        self._finished_bytes = 0
        self._reaper = LoopingCall(self._children.reap_orphans) if reap_orphans else None

    def start(self, command: Command, *, background: bool) -> Execution:
        """
        Run a command.

        :param background: whether it is listed, and can be got by its id, also after it has ended.
        :raise SpawnError: if it cannot be started, or the daemon is stopping.
        """
        if not self.running:
            raise SpawnError(OSError(errno.EAGAIN, "the daemon is stopping"), None)
        id = str(uuid.uuid4())
        env = self._environment.merged(command.env)

        def launch(protocol: CaptureProtocol, mark: int) -> Child:
            argv = ["sh", "-c", command.cmd]
            return spawn(self._reactor, self._children, protocol, argv, cwd=command.cwd, env=env, mark=mark)

        execution = Execution(id, command, OutputLog(), self._reactor, self._trees, launch, self._ended)
        self._running[id] = execution
        if background:
            self._background[id] = execution
        return execution

    def background(self) -> Iterable[Execution]:
        """The background processes that are remembered, in the order of their start."""
        return self._background.values()

    def get(self, id: str) -> Execution:
        """
        A background process.

        :raise KeyError: if there is none of that id.
        """
        return self._background[id]

    def startService(self) -> None:
        """Begin to reap."""
        super().startService()
        if self._reaper is not None:
            self._reaper.clock = self._reactor
            self._reaper.start(REAP_INTERVAL).addErrback(self._reaper_broke)

    def stopService(self) -> Deferred[None]:
        """End every process, also those left behind by executions that ended long ago; fires when they are gone."""
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        if await self._trees.end_all(signal.SIGTERM, STOP_GRACE):
            survivors = await self._trees.end_all(signal.SIGKILL, STOP_PATIENCE)
            if survivors:
                self._log.error("processes that could not be killed: {pids}", pids=survivors)
                return
        for execution in list(self._running.values()):
            await execution.when_ended()
        if self._reaper is not None and self._reaper.running:
            self._reaper.stop()
            self._children.reap_orphans()

    def _ended(self, execution: Execution) -> None:
        self._running.pop(execution.id, None)
        if execution.id not in self._background:
            return
        self._finished.append(execution)
        self._finished_bytes += execution.log.size
        while len(self._finished) > MAX_FINISHED or self._finished_bytes > MAX_FINISHED_BYTES:
            oldest = self._finished.popleft()
            self._finished_bytes -= oldest.log.size
            del self._background[oldest.id]

    def _reaper_broke(self, failure: Failure) -> None:
        self._log.failure("orphans are no longer reaped", failure)
