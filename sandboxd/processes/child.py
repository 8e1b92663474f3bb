"""
A child process as an :class:`IProcessTransport`, which delivers output and exit status to a :class:`ProcessProtocol`.

It is not started by ``reactor.spawnProcess``, which lists every open descriptor for each child, forks the whole daemon
when there is a working directory, and calls waitpid(2) for every child at each SIGCHLD, but by
:mod:`sandboxd.processes.spawn_client`.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import lru_cache, partial

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
from sandboxd.processes.program import arguments
from sandboxd.processes.spawn_client import SpawnClient, memfd
from sandboxd.processes.spawn_messages import AT_CWD, AT_EXEC, AT_START, StartRequest
from sandboxd.processes.terminal import open_terminal, set_size
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.turn_budget import TurnBudget

#: Once the child has exited while its own children hold its pipes open, output is still delivered until the pipes have
#: been silent for QUIET seconds, or for LINGER seconds in all.
QUIET = 0.05
LINGER = 0.5


class SpawnError(Exception):
    """
    A child could not be started. The text is that of the operating system.

    :ivar errno: the error number.
    :ivar at_cwd: whether the working directory could not be entered.
    :ivar unknown: whether it may have been started all the same, and been ended then.
    :ivar at_exec: whether the program could not be executed.
    """

    def __init__(self, error: OSError, step: int = AT_START) -> None:
        super().__init__(error.strerror or str(error))
        self.errno = error.errno
        self.at_cwd = step == AT_CWD
        self.at_exec = step == AT_EXEC
        self.unknown = error.errno == errno.EIO  # as from SpawnClient.kill_and_fail


class Spawner:
    """
    The starter of children.

    :param turns: schedules the reading of their output.
    :param client: starts their processes.
    :param open_directory: returns a descriptor of a directory that can be entered without a wait, or None.
    """

    def __init__(
        self,
        reactor: Reactor,
        turns: TurnBudget,
        client: SpawnClient,
        environment: Environment,
        open_directory: Callable[[str], int | None],
    ) -> None:
        self._open_directory = open_directory
        self._reactor = reactor
        self._turns = turns
        self._client = client
        self._environment = environment

    def spawn(
        self,
        protocol: ProcessProtocol,
        command: Command,
        mark: int,
        cgroup: Cgroup | None = None,
        collect: bool = False,
    ) -> Child:
        """
        Request the start of a command in a session of its own.

        ``protocol`` gets ``connectionMade`` when it runs, its output as it comes, then ``processExited`` once the
        output in its pipes has been delivered, and ``processEnded`` when its pipes have no writer left. If it cannot be
        started, ``protocol`` gets ``processExited`` alone, with a :exc:`SpawnError`.

        :param mark: the mark of its process tree; see :mod:`sandboxd.processes.marks`.
        :param cgroup: the cgroup that it joins before it runs.
        :param collect: whether its output may come some milliseconds late, and all at once with its exit, which costs
            this process less. Ignored for one with stdin, a terminal, one pipe for all output, or a long script.
        :raise SpawnError: if the request itself fails.
        """
        collect = collect and not (command.has_stdin or command.merge_stderr or command.tty)
        opened: list[int] = []
        try:
            program, argv, script = arguments(command)
            collect = collect and script is None
            ours, theirs = ({}, []) if collect else self._descriptors(command, opened)
            if script is not None:
                opened.append(memfd(script))
                theirs.append(opened[-1])
            directory = None if command.cwd is None else self._open_directory(command.cwd)
            if directory is not None:
                opened.append(directory)
                theirs.append(directory)
            child = Child(self._reactor, self._turns, protocol, command, ours)
            user = command.user
            request = StartRequest(
                argv,
                self._environment.merged(command),
                mark,
                stdin=command.has_stdin,
                cwd=None if command.cwd is None else os.fsencode(command.cwd),
                user=None if user is None else (user.uid, user.gid, user.groups),
                cgroup=b"" if cgroup is None else os.fsencode(cgroup.path),
                limits={LIMITS[name]: value for name, value in command.limits.items()},
                program=program,
                merge=command.merge_stderr,
                script=script is not None,
                tty=command.tty is not None,
                collect=collect,
                directory=directory is not None,
            )
            child.send_signal = self._client.launch(child, request, theirs)
        except OSError as error:
            for fd in opened:
                os.close(fd)
            raise SpawnError(error) from None
        return child

    def _descriptors(self, command: Command, opened: list[int]) -> tuple[dict[int, int], list[int]]:
        """
        Open both ends of a command's stdin, stdout and stderr.

        :param opened: gets every descriptor, as soon as it is open.
        :return: the daemon's ends, by the child's descriptor; the child's ends, in the order of the request.
        :raise OSError: if that fails.
        """
        if command.tty is not None:
            return open_terminal(command.tty, opened)
        ours, theirs = {}, []
        for number in (1, 2, 0):
            if (number == 2 and command.merge_stderr) or (number == 0 and not command.has_stdin):
                continue
            ends = os.pipe2(os.O_CLOEXEC)
            opened.extend(ends)
            ours[number], end = ends[::-1] if number == 0 else ends
            theirs.append(end)
        return ours, theirs


@implementer(IProcessTransport, IPushProducer)
class Child:
    """
    A child process, from the request for its start on.

    :ivar pid: its process id, also that of its process group and session; None until it has started.
    :ivar send_signal: sends a signal to its process group; does nothing once it has exited.
    """

    def __init__(
        self,
        reactor: Reactor,
        turns: TurnBudget,
        protocol: ProcessProtocol,
        command: Command,
        ends: Mapping[int, int],
    ) -> None:
        """
        Take over the daemon's ends of the child's pipes, or of its terminal.

        :param ends: by the child's own descriptor.
        """
        self.pid: int | None = None
        self.send_signal: Callable[[int], None] = _nothing
        self._reactor = reactor
        self._turns = turns
        self._protocol = protocol
        self._pipes: dict[int, OutputPipe] = {}
        for descriptor, fd in ends.items():
            if descriptor != 0:
                self._open(descriptor, fd)
        self._stdin = InputPipe(reactor, ends[0]) if 0 in ends else None
        self._terminal = ends[1] if command.tty is not None else -1
        self._input = command.input
        self._keep_stdin = command.stdin or command.tty is not None
        self._status: int | None = None
        self._exit_reported = False
        self._quiet: IDelayedCall | None = None
        self._linger: IDelayedCall | None = None

    def _open(self, descriptor: int, fd: int) -> None:
        self._pipes[descriptor] = OutputPipe(
            self._reactor, self._turns, fd, partial(self._received, descriptor), partial(self._closed, descriptor)
        )

    # ChildListener

    def done(self, pid: int, status: int, stdout: bytes, stderr: bytes) -> None:
        """Deliver the output of a child that has exited, and report its exit."""
        self.pid = pid
        self._status = status
        self.send_signal = _nothing
        self._exit_reported = True
        self._protocol.makeConnection(self)
        for descriptor, data in ((1, stdout), (2, stderr)):
            if data:
                self._protocol.childDataReceived(descriptor, data)
        reason = _reason(status)
        self._protocol.processExited(reason)
        self._protocol.processEnded(reason)

    def started(self, pid: int, output: list[int]) -> None:
        """Start reading the child's output, and connect the protocol."""
        self.pid = pid
        for descriptor, fd in enumerate(output, 1):
            self._open(descriptor, fd)
        self._protocol.makeConnection(self)
        self.resumeProducing()
        if self._input is not None:
            self.write(self._input)
            self._input = None
            if not self._keep_stdin:
                self.closeStdin()

    def failed(self, error: OSError, step: int) -> None:
        """Report that the child could not be started."""
        self._exit_reported = True
        self.closeStdin()
        self.loseConnection()
        self._protocol.processExited(Failure(SpawnError(error, step)))

    def exited(self, status: int) -> None:
        """Deliver what is in the child's pipes, then report its exit."""
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
            self._protocol.processEnded(_reason(self._status))

    def adopted(self) -> None:
        """Signal the child directly from now on, as it is a child of this process."""
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
        """Return an empty address: pipes have none."""
        return UNIXAddress(None)

    def getPeer(self) -> IAddress:
        """Return an empty address: pipes have none."""
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

    def resize(self, cols: int, rows: int) -> None:
        """
        Set the size of the child's terminal; its foreground processes get SIGWINCH if that has changed.

        :raise OSError: ENOTTY if it has no terminal.
        """
        if self._terminal < 0:
            raise OSError(errno.ENOTTY, "it has no terminal")
        set_size(self._terminal, cols, rows)

    # OutputPipe

    def _received(self, descriptor: int, data: bytes) -> None:
        self._protocol.childDataReceived(descriptor, data)
        if self._quiet is not None:
            self._quiet.reset(QUIET)

    def _closed(self, descriptor: int) -> None:
        del self._pipes[descriptor]
        self._terminal = -1
        self._protocol.childConnectionLost(descriptor)
        if not self._pipes and self._status is not None:
            self._report_exit()
            self._protocol.processEnded(_reason(self._status))

    def _report_exit(self) -> None:
        if self._exit_reported:
            return
        self._exit_reported = True
        for call in (self._quiet, self._linger):
            if call is not None and call.active():
                call.cancel()
        self._quiet = self._linger = None
        assert self._status is not None
        self._protocol.processExited(_reason(self._status))
        for pipe in self._pipes.values():  # what processes that the child left write: read, so that they do not block
            pipe.drop()
        self.resumeProducing()


@lru_cache(256)
def _reason(status: int) -> Failure:
    """Return what a protocol gets of a wait status; the same object each time, as making one is slow."""
    if status == 0:
        return Failure(ProcessDone(0))
    code = os.WEXITSTATUS(status) if os.WIFEXITED(status) else None
    signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
    return Failure(ProcessTerminated(code, signum, status))


def _nothing(signum: int) -> None:
    pass
