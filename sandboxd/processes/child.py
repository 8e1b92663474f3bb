"""
A child as an :class:`IProcessTransport`, which delivers output and exit status to a :class:`ProcessProtocol`.

It is not started by ``reactor.spawnProcess``, which lists every open descriptor for each child, forks the whole daemon
when there is a working directory, and calls waitpid(2) for every child at each SIGCHLD, but by
:mod:`sandboxd.processes.spawn_client`.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import IAddress, IDelayedCall, IProcessTransport, IPushProducer
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.processes.cgroup import Cgroup
from sandboxd.processes.command import Command
from sandboxd.processes.environment import Environment
from sandboxd.processes.limits import LIMITS
from sandboxd.processes.pipes import InputPipe, OutputPipe
from sandboxd.processes.spawn_client import SpawnClient
from sandboxd.processes.spawn_messages import StartRequest
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.turn_budget import TurnBudget

#: Once the child has exited while its own children hold its pipes open, output is still delivered until the pipes have
#: been silent for QUIET seconds, or for LINGER seconds in all.
QUIET = 0.05
LINGER = 0.5


class SpawnError(Exception):
    """
    The child could not be started. Its text is that of the operating system.

    :ivar errno: the error number.
    :ivar at_cwd: whether the working directory could not be entered.
    :ivar unknown: whether it may have been started all the same, and been ended then.
    """

    def __init__(self, error: OSError, at_cwd: bool = False) -> None:
        super().__init__(error.strerror or str(error))
        self.errno = error.errno
        self.at_cwd = at_cwd
        self.unknown = error.errno == errno.EIO  # as from SpawnClient.break_off


class Spawner:
    """
    Starts children.

    :param turns: schedules the reading of their output.
    :param client: starts their processes.
    """

    def __init__(self, reactor: Reactor, turns: TurnBudget, client: SpawnClient, environment: Environment) -> None:
        self._reactor = reactor
        self._turns = turns
        self._client = client
        self._environment = environment

    def spawn(self, protocol: ProcessProtocol, command: Command, mark: int, cgroup: Cgroup | None = None) -> Child:
        """
        Request the start of ``sh -c`` in a session of its own.

        ``protocol`` gets ``connectionMade`` when it runs, its output as it comes, then ``processExited`` once the
        output in its pipes has been delivered, and ``processEnded`` when its pipes have no writer left. If it cannot be
        started, ``protocol`` gets ``processExited`` alone, with a :exc:`SpawnError`.

        :param mark: the mark of its process tree; see :mod:`sandboxd.processes.marks`.
        :param cgroup: the cgroup that it joins before it runs.
        :raise SpawnError: if the request itself fails.
        """
        opened: list[int] = []
        try:
            for _ in range(3 if command.stdin else 2):
                opened.extend(os.pipe2(os.O_CLOEXEC))
            stdout, stdout_end, stderr, stderr_end, *stdin = opened
            theirs = [stdout_end, stderr_end, *stdin[:1]]
            child = Child(self._reactor, self._turns, protocol, command, stdout, stderr, stdin[1] if stdin else None)
            user = command.user
            request = StartRequest(
                [b"sh", b"-c", os.fsencode(command.cmd)],
                self._environment.merged(command),
                mark,
                stdin=command.stdin,
                cwd=None if command.cwd is None else os.fsencode(command.cwd),
                user=None if user is None else (user.uid, user.gid, user.groups),
                cgroup=b"" if cgroup is None else os.fsencode(cgroup.path),
                limits={LIMITS[name]: value for name, value in command.limits.items()},
            )
            child.send_signal = self._client.launch(child, request, theirs)
        except OSError as error:
            for fd in opened:
                os.close(fd)
            raise SpawnError(error) from None
        return child


@implementer(IProcessTransport, IPushProducer)
class Child:
    """
    A child, from the request for it on.

    :ivar pid: its process id, also that of its process group and session; None until it has started.
    :ivar send_signal: sends a signal to its process group; does nothing once it has exited.
    """

    def __init__(
        self,
        reactor: Reactor,
        turns: TurnBudget,
        protocol: ProcessProtocol,
        command: Command,
        stdout: int,
        stderr: int,
        stdin: int | None,
    ) -> None:
        self.pid: int | None = None
        self.send_signal: Callable[[int], None] = _nothing
        self._reactor = reactor
        self._protocol = protocol
        self._pipes = {
            descriptor: OutputPipe(
                reactor, turns, fd, partial(self._received, descriptor), partial(self._closed, descriptor)
            )
            for descriptor, fd in ((1, stdout), (2, stderr))
        }
        self._stdin = None if stdin is None else InputPipe(reactor, stdin)
        self._status: int | None = None
        self._exit_reported = False
        self._quiet: IDelayedCall | None = None
        self._linger: IDelayedCall | None = None

    # ChildListener

    def started(self, pid: int) -> None:
        """Start reading its output, and connect the protocol."""
        self.pid = pid
        self._protocol.makeConnection(self)
        self.resumeProducing()

    def failed(self, error: OSError, at_cwd: bool) -> None:
        """Report that it could not be started."""
        self._exit_reported = True
        self.closeStdin()
        self.loseConnection()
        self._protocol.processExited(Failure(SpawnError(error, at_cwd)))

    def exited(self, status: int) -> None:
        """Deliver what is in its pipes, then report its exit."""
        self._status = status
        self.send_signal = _nothing
        if self._stdin is not None:
            self._stdin.close()
        for pipe in list(self._pipes.values()):
            pipe.drain()
        if self._pipes:
            self._quiet = self._reactor.callLater(QUIET, self._report_exit)
            self._linger = self._reactor.callLater(LINGER, self._report_exit)
        elif not self._exit_reported:
            self._report_exit()
            self._protocol.processEnded(self._reason())

    def adopted(self) -> None:
        """Signal it directly from now on: it is a child of this process."""
        self.send_signal = self._signal_group

    def _signal_group(self, signum: int) -> None:
        assert self.pid is not None
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signum)

    # IProcessTransport

    def signalProcess(self, signalID: str | int) -> None:
        """
        Send a signal to the child's process group.

        :raise ProcessExitedAlready: if the child has exited, after which its process group id may be reused.
        """
        if self._status is not None:
            raise ProcessExitedAlready()
        self.send_signal(signalID if isinstance(signalID, int) else signal.Signals[f"SIG{signalID}"])

    def closeChildFD(self, descriptor: int) -> None:
        """Close the daemon's end of one of the child's pipes."""
        if descriptor == 0:
            self.closeStdin()
        pipe = self._pipes.get(descriptor)
        if pipe is not None:
            pipe.close()

    def closeStdin(self) -> None:
        """Close stdin once all that was written has been taken."""
        if self._stdin is not None:
            self._stdin.close_when_done()

    def closeStdout(self) -> None:
        """Stop reading stdout."""
        self.closeChildFD(1)

    def closeStderr(self) -> None:
        """Stop reading stderr."""
        self.closeChildFD(2)

    def feed(self, data: bytes) -> Deferred[None]:
        """
        Write to the child's stdin.

        :return: fires when the pipe has taken all of it; fails with :exc:`BrokenPipeError` if stdin is closed.
        """
        if self._stdin is None:
            return fail(BrokenPipeError(errno.EPIPE, "it was started without stdin"))
        return self._stdin.feed(data)

    def writeToChild(self, childFD: int, data: bytes) -> None:
        """
        Write to the child's stdin, without waiting.

        :raise KeyError: if ``childFD`` is not 0.
        """
        if childFD != 0:
            raise KeyError(childFD)
        self.feed(data).addErrback(lambda failure: failure.trap(BrokenPipeError) and None)

    def write(self, data: bytes) -> None:
        """Write to the child's stdin, without waiting."""
        self.writeToChild(0, data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """Write to the child's stdin, without waiting."""
        self.writeToChild(0, b"".join(data))

    def loseConnection(self) -> None:
        """Stop reading."""
        for pipe in list(self._pipes.values()):
            pipe.close()

    def getHost(self) -> IAddress:
        """Pipes have no address."""
        return UNIXAddress(None)

    def getPeer(self) -> IAddress:
        """Pipes have no address."""
        return UNIXAddress(None)

    # IPushProducer

    def pauseProducing(self) -> None:
        """Stop reading, so that the child blocks in write(2) once its pipes are full."""
        for pipe in self._pipes.values():
            pipe.pause()

    def resumeProducing(self) -> None:
        """Continue reading."""
        for pipe in self._pipes.values():
            pipe.resume()

    def stopProducing(self) -> None:
        """Stop reading."""
        self.loseConnection()

    # OutputPipe

    def _received(self, descriptor: int, data: bytes) -> None:
        self._protocol.childDataReceived(descriptor, data)
        if self._quiet is not None:
            self._quiet.reset(QUIET)

    def _closed(self, descriptor: int) -> None:
        del self._pipes[descriptor]
        self._protocol.childConnectionLost(descriptor)
        if not self._pipes and self._status is not None:
            self._report_exit()
            self._protocol.processEnded(self._reason())

    def _report_exit(self) -> None:
        if self._exit_reported:
            return
        self._exit_reported = True
        for call in (self._quiet, self._linger):
            if call is not None and call.active():
                call.cancel()
        self._quiet = self._linger = None
        self._protocol.processExited(self._reason())
        for pipe in self._pipes.values():  # what processes that the child left write: read, so that they do not block
            pipe.drop()
        self.resumeProducing()

    def _reason(self) -> Failure:
        assert self._status is not None
        if self._status == 0:
            return Failure(ProcessDone(0))
        code = os.WEXITSTATUS(self._status) if os.WIFEXITED(self._status) else None
        signum = os.WTERMSIG(self._status) if os.WIFSIGNALED(self._status) else None
        return Failure(ProcessTerminated(code, signum, self._status))


def _nothing(signum: int) -> None:
    pass
