"""
Starts a child, delivers its output, tells its exit status. The only place that knows how a child is launched.

``subprocess`` is the launcher because it uses ``vfork`` (a daemon of any size starts a child in a millisecond),
closes descriptors in C, and reports a failed ``exec`` as an exception; ``reactor.spawnProcess`` would list every
open descriptor for each child and fork the whole daemon when there is a working directory. What the rest of the
code sees is Twisted's own :class:`IProcessTransport` and a :class:`ProcessProtocol`.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping

from twisted.internet.address import UNIXAddress
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IProcessTransport,
    IPushProducer,
    IReactorFDSet,
    IReactorTime,
    IReadDescriptor,
)
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.execution.tree import inherited_mark

#: Bytes asked of a pipe at a time: what a pipe holds by default.
READ_SIZE = 64 * 1024

#: When the child has exited but its own children hold its pipes open, output is still taken as its own until
#: the pipes have been silent for QUIET seconds, or for LINGER seconds in all.
QUIET = 0.05
LINGER = 0.5


class SpawnError(Exception):
    """
    The child could not be started. The text is the operating system's.

    :ivar errno: its error number.
    :ivar at_cwd: whether it was the working directory that could not be entered.
    """

    def __init__(self, error: OSError, cwd: str | None) -> None:
        super().__init__(error.strerror or str(error))
        self.errno = error.errno
        self.at_cwd = cwd is not None and error.filename == cwd


class Reactor(IReactorFDSet, IReactorTime):
    """What :func:`spawn` asks of a reactor."""


class Children:
    """The children that have been started and whose exit has not been seen, by pid."""

    def __init__(self) -> None:
        self._unreaped: dict[int, Child] = {}

    def add(self, child: Child) -> None:
        """A child was started."""
        self._unreaped[child.pid] = child

    def remove(self, child: Child) -> None:
        """Its exit status was read."""
        self._unreaped.pop(child.pid, None)

    def reap_orphans(self) -> int:
        """
        Collect the zombies that this process has inherited, as PID 1 or subreaper.

        Looks before it takes, so that the status of a child of our own is never lost: such a child is told.

        :return: how many orphans there were.
        """
        orphans = 0
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return orphans
            if info is None:
                return orphans
            child = self._unreaped.get(info.si_pid)
            if child is not None:
                child.reap()
            else:
                os.waitpid(info.si_pid, os.WNOHANG)
                orphans += 1


def spawn(
    reactor: Reactor,
    children: Children,
    protocol: ProcessProtocol,
    argv: list[str],
    *,
    cwd: str | None,
    env: Mapping[str, str],
    mark: int,
) -> Child:
    """
    Start a child in a session of its own, with stdin from ``/dev/null``.

    ``protocol`` gets its output as it comes, then ``processExited`` once the output that the child left in its
    pipes has been delivered, and ``processEnded`` when nobody holds the pipes any more.

    :param mark: what its whole process tree is found by; see :mod:`sandboxd.execution.tree`.
    :raise SpawnError: if it cannot be started.
    """
    opened: list[int] = []
    try:
        for _ in range(2):
            opened.extend(os.pipe2(os.O_CLOEXEC))
        stdout, stdout_end, stderr, stderr_end = opened
        with inherited_mark(mark):
            popen = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=stdout_end,
                stderr=stderr_end,
                cwd=cwd,
                env=env,
                start_new_session=True,
            )
        try:
            pidfd = os.pidfd_open(popen.pid)
        except OSError:
            popen.kill()
            popen.wait()
            raise
    except OSError as error:
        for fd in opened:
            os.close(fd)
        raise SpawnError(error, cwd) from None
    os.close(stdout_end)
    os.close(stderr_end)
    child = Child(reactor, children, protocol, popen, pidfd, stdout, stderr)
    children.add(child)
    protocol.makeConnection(child)
    child.start()
    return child


@implementer(IProcessTransport, IPushProducer)
class Child:
    """
    A started child.

    :ivar pid: its process id, which is also that of its process group and session.
    """

    def __init__(
        self,
        reactor: Reactor,
        children: Children,
        protocol: ProcessProtocol,
        popen: subprocess.Popen[bytes],
        pidfd: int,
        stdout: int,
        stderr: int,
    ) -> None:
        self.pid: int = popen.pid
        self._reactor = reactor
        self._children = children
        self._protocol = protocol
        self._popen = popen
        self._pipes = {1: _OutputPipe(reactor, self, 1, stdout), 2: _OutputPipe(reactor, self, 2, stderr)}
        self._exit_watch = _ExitWatch(reactor, pidfd, self.reap)
        self._status: int | None = None
        self._exit_told = False
        self._quiet: IDelayedCall | None = None
        self._linger: IDelayedCall | None = None

    def start(self) -> None:
        """Begin to read."""
        self._exit_watch.start()
        self.resumeProducing()

    # IProcessTransport

    def signalProcess(self, signalID: str | int) -> None:
        """
        Signal the child's process group.

        :raise ProcessExitedAlready: if the child has exited; what is left of its group may be another's by now.
        """
        if self._status is not None:
            raise ProcessExitedAlready()
        signum = signalID if isinstance(signalID, int) else signal.Signals[f"SIG{signalID}"]
        try:
            os.killpg(self.pid, signum)
        except ProcessLookupError:
            raise ProcessExitedAlready() from None

    def closeChildFD(self, descriptor: int) -> None:
        """Close our end of one of the child's pipes."""
        pipe = self._pipes.get(descriptor)
        if pipe is not None:
            pipe.close()

    def closeStdin(self) -> None:
        """There is none."""

    def closeStdout(self) -> None:
        """Stop reading stdout."""
        self.closeChildFD(1)

    def closeStderr(self) -> None:
        """Stop reading stderr."""
        self.closeChildFD(2)

    def writeToChild(self, childFD: int, data: bytes) -> None:
        """
        Nothing can be written to.

        :raise KeyError: always.
        """
        raise KeyError(childFD)

    def write(self, data: bytes) -> None:
        """
        Nothing can be written to.

        :raise KeyError: always.
        """
        self.writeToChild(0, data)

    def writeSequence(self, data: Iterable[bytes]) -> None:
        """
        Nothing can be written to.

        :raise KeyError: always.
        """
        self.writeToChild(0, b"")

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
        """Let the child wait in ``write`` once its pipes are full."""
        for pipe in self._pipes.values():
            self._reactor.removeReader(pipe)

    def resumeProducing(self) -> None:
        """Read on."""
        for pipe in self._pipes.values():
            self._reactor.addReader(pipe)

    def stopProducing(self) -> None:
        """Stop reading."""
        self.loseConnection()

    # What the descriptors tell

    def output(self, descriptor: int, data: bytes) -> None:
        """A pipe delivered something."""
        if self._exit_told:
            return  # Written by what the child left behind: read, so that it never waits, and dropped.
        self._protocol.childDataReceived(descriptor, data)
        if self._quiet is not None:
            self._quiet.reset(QUIET)

    def pipe_closed(self, descriptor: int) -> None:
        """A pipe has no writer any more, or we closed it."""
        if self._pipes.pop(descriptor, None) is None:
            return
        self._protocol.childConnectionLost(descriptor)
        if not self._pipes and self._status is not None:
            self._tell_exit()
            self._protocol.processEnded(self._reason())

    def reap(self) -> None:
        """Read the exit status, if there is one."""
        if self._status is not None:
            return
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            return
        self._status = status
        self._popen.returncode = status  # or subprocess would go on asking for it
        self._children.remove(self)
        self._exit_watch.stop()
        for pipe in list(self._pipes.values()):
            pipe.drain()
        if self._pipes:
            self._quiet = self._reactor.callLater(QUIET, self._tell_exit)
            self._linger = self._reactor.callLater(LINGER, self._tell_exit)
        elif not self._exit_told:
            self._tell_exit()
            self._protocol.processEnded(self._reason())

    def _tell_exit(self) -> None:
        if self._exit_told:
            return
        self._exit_told = True
        for call in (self._quiet, self._linger):
            if call is not None and call.active():
                call.cancel()
        self._quiet = self._linger = None
        self._protocol.processExited(self._reason())
        self.resumeProducing()

    def _reason(self) -> Failure:
        assert self._status is not None
        if self._status == 0:
            return Failure(ProcessDone(0))
        code = os.WEXITSTATUS(self._status) if os.WIFEXITED(self._status) else None
        signum = os.WTERMSIG(self._status) if os.WIFSIGNALED(self._status) else None
        return Failure(ProcessTerminated(code, signum, self._status))


@implementer(IReadDescriptor)
class _Descriptor:
    """A descriptor that the reactor watches for reading."""

    def __init__(self, reactor: Reactor, fd: int) -> None:
        self._reactor = reactor
        self._fd = fd

    def fileno(self) -> int:
        return self._fd

    def logPrefix(self) -> str:
        return type(self).__name__

    def doRead(self) -> Failure | None:
        raise AssertionError("a subclass reads")

    def connectionLost(self, reason: Failure) -> None:
        self._close_fd()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            self._reactor.removeReader(self)
            os.close(self._fd)
            self._fd = -1


class _OutputPipe(_Descriptor):
    """The reading end of a child's stdout or stderr."""

    def __init__(self, reactor: Reactor, child: Child, descriptor: int, fd: int) -> None:
        super().__init__(reactor, fd)
        self._child = child
        self._descriptor = descriptor
        os.set_blocking(fd, False)

    def doRead(self) -> None:
        try:
            data = os.read(self._fd, READ_SIZE)
        except BlockingIOError:
            return
        if data:
            self._child.output(self._descriptor, data)
        else:
            self.close()

    def connectionLost(self, reason: Failure) -> None:
        self.close()

    def drain(self) -> None:
        """Deliver what is in the pipe now: at most what a pipe can hold, lest a fast writer keep us here."""
        left = fcntl.fcntl(self._fd, _F_GETPIPE_SZ)
        while left > 0 and self._fd >= 0:
            try:
                data = os.read(self._fd, READ_SIZE)
            except OSError:
                return
            if not data:
                self.close()
                return
            left -= len(data)
            self._child.output(self._descriptor, data)

    def close(self) -> None:
        self._close_fd()
        self._child.pipe_closed(self._descriptor)


class _ExitWatch(_Descriptor):
    """A pidfd, which becomes readable when its process exits: no SIGCHLD, and no search among all children."""

    def __init__(self, reactor: Reactor, pidfd: int, exited: Callable[[], None]) -> None:
        super().__init__(reactor, pidfd)
        self._exited = exited

    def start(self) -> None:
        self._reactor.addReader(self)

    def stop(self) -> None:
        self._close_fd()

    def doRead(self) -> None:
        self._exited()


#: Not in :mod:`fcntl` before Python 3.10.
_F_GETPIPE_SZ: int = getattr(fcntl, "F_GETPIPE_SZ", 1032)
