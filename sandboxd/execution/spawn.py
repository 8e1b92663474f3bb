"""
Starts a child, delivers its output, tells its exit status. The only place that knows how a child is launched.

``subprocess`` is the launcher because it uses ``vfork`` (a daemon of any size starts a child in a millisecond),
closes descriptors in C, and reports a failed ``exec`` as an exception; ``reactor.spawnProcess`` would list every
open descriptor for each child and fork the whole daemon when there is a working directory. What the rest of the
code sees is Twisted's own :class:`IProcessTransport` and a :class:`ProcessProtocol`.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Protocol

from twisted.internet.address import UNIXAddress
from twisted.internet.defer import Deferred, fail
from twisted.internet.error import ProcessDone, ProcessExitedAlready, ProcessTerminated
from twisted.internet.interfaces import (
    IAddress,
    IDelayedCall,
    IProcessTransport,
    IPushProducer,
)
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure
from zope.interface import implementer

from sandboxd.execution import marks as marks_module
from sandboxd.execution.cgroup import Cgroup
from sandboxd.execution.command import Command
from sandboxd.execution.limits import inherited_nofile, inherited_oom_score, ulimits
from sandboxd.execution.marks import Marks, inherited_mark
from sandboxd.execution.pipes import ExitWatch, InputPipe, OutputPipe, Reactor
from sandboxd.turns import Turns

#: When the child has exited but its own children hold its pipes open, output is still taken as its own until
#: the pipes have been silent for QUIET seconds, or for LINGER seconds in all.
QUIET = 0.05
LINGER = 0.5

#: The shell, by its full name: the PATH of a command's environment is the command's business.
SH = "/bin/sh"


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


class Started(Protocol):
    """
    A child that reads its own exit status.

    :ivar pid: its process id.
    """

    pid: int

    def reap(self) -> None:
        """Read it, if there is one."""


class Children:
    """The children that have been started and whose exit has not been seen, by pid."""

    def __init__(self) -> None:
        self._unreaped: dict[int, Started] = {}

    def add(self, child: Started) -> None:
        """A child was started."""
        self._unreaped[child.pid] = child

    def remove(self, child: Started) -> None:
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
    turns: Turns,
    children: Children,
    protocol: ProcessProtocol,
    command: Command,
    env: Mapping[str, str],
    mark: int,
    cgroup: Cgroup | None,
) -> Child:
    """
    Start ``sh -c`` in a session of its own.

    ``protocol`` gets its output as it comes, then ``processExited`` once the output that the child left in its
    pipes has been delivered, and ``processEnded`` when nobody holds the pipes any more.

    :param turns: lets it be served in turns with all others.
    :param mark: what its whole process tree is found by; see :mod:`sandboxd.execution.marks`.
    :param cgroup: what it is put into before it runs.
    :raise SpawnError: if it cannot be started.
    """
    opened: list[int] = []
    popen: subprocess.Popen[bytes] | None = None
    try:
        for _ in range(3 if command.stdin or cgroup is not None else 2):
            opened.extend(os.pipe2(os.O_CLOEXEC))
        stdout, stdout_end, stderr, stderr_end, *stdin = opened
        with inherited_mark(mark), inherited_oom_score(), inherited_nofile(opened) as before:
            popen = subprocess.Popen(
                _argv(command, before, gated=cgroup is not None),
                executable=SH,
                stdin=stdin[0] if stdin else subprocess.DEVNULL,
                stdout=stdout_end,
                stderr=stderr_end,
                cwd=command.cwd,
                env=env,
                start_new_session=True,
                **_identity(command),
            )
        pidfd = os.pidfd_open(popen.pid)
        opened.append(pidfd)
        if cgroup is not None:
            cgroup.join(popen.pid)
            os.write(stdin[1], b"\n")
    except OSError as error:
        for fd in opened:
            os.close(fd)
        if popen is not None:
            popen.kill()
            popen.wait()
        raise SpawnError(error, command.cwd) from None
    for fd in (stdout_end, stderr_end, *stdin[:1]):
        os.close(fd)
    child = Child(reactor, turns, children, protocol, popen, pidfd, stdout, stderr, stdin[1] if stdin else None)
    children.add(child)
    protocol.makeConnection(child)
    child.start()
    if stdin and not command.stdin:
        child.closeStdin()
    return child


def _argv(command: Command, before: list[str], gated: bool) -> list[str]:
    """
    What is executed: the command, after what a shell is to do first.

    A gated one waits for a line on its stdin. ``read`` takes it byte by byte, and leaves the rest of a pipe alone.

    Limits are set by that shell, so that they hold before the command can have children; from outside it could be
    too late, and for another user's process it takes a capability that containers do not have.
    """
    gate = ["read -r _"] if gated else []
    steps = [*gate, *before, *ulimits(command.limits)]
    if not steps:
        return ["sh", "-c", command.cmd]
    stdin = " </dev/null" if gated and not command.stdin else ""
    return ["sh", "-c", " && ".join([*steps, f'exec {SH} -c "$1" sh{stdin}']), "sh", command.cmd]


def _identity(command: Command) -> dict[str, Any]:
    """Whom it runs as, in ``subprocess``'s words. Given only if it is asked for: it makes ``vfork`` impossible."""
    if command.user is None:
        return {}
    return {"user": command.user.uid, "group": command.user.gid, "extra_groups": command.user.groups}


def start_guardian(marks: Marks) -> subprocess.Popen[bytes]:
    """
    Start the process that kills what executions have left if this one dies; see :mod:`sandboxd.execution.marks`.

    :raise OSError: if it cannot be started.
    """
    guardian = subprocess.Popen(
        [sys.executable, "-I", "-S", marks_module.__file__, str(marks.base)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd="/",
        env={},
        start_new_session=True,
    )
    guardian.returncode = 0  # it is reaped as any orphan is, not by subprocess
    return guardian


@implementer(IProcessTransport, IPushProducer)
class Child:
    """
    A started child.

    :ivar pid: its process id, which is also that of its process group and session.
    """

    def __init__(
        self,
        reactor: Reactor,
        turns: Turns,
        children: Children,
        protocol: ProcessProtocol,
        popen: subprocess.Popen[bytes],
        pidfd: int,
        stdout: int,
        stderr: int,
        stdin: int | None,
    ) -> None:
        self.pid: int = popen.pid
        self._reactor = reactor
        self._children = children
        self._protocol = protocol
        self._popen = popen
        self._pipes = {
            descriptor: OutputPipe(
                reactor, turns, fd, partial(self._received, descriptor), partial(self._closed, descriptor)
            )
            for descriptor, fd in ((1, stdout), (2, stderr))
        }
        self._stdin = None if stdin is None else InputPipe(reactor, stdin)
        self._exit_watch = ExitWatch(reactor, turns, pidfd, self.reap)
        self._status: int | None = None
        self._exit_told = False
        self._quiet: IDelayedCall | None = None
        self._linger: IDelayedCall | None = None

    def start(self) -> None:
        """Begin to read."""
        self._exit_watch.resume()
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
        if descriptor == 0:
            self.closeStdin()
        pipe = self._pipes.get(descriptor)
        if pipe is not None:
            pipe.close()

    def closeStdin(self) -> None:
        """Let the child read the end of its stdin, once it has taken what was written."""
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

        :return: fires when the pipe has taken all of it; fails with :exc:`BrokenPipeError` if nobody will read it.
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
        """Let the child wait in ``write`` once its pipes are full."""
        for pipe in self._pipes.values():
            pipe.pause()

    def resumeProducing(self) -> None:
        """Read on."""
        for pipe in self._pipes.values():
            pipe.resume()

    def stopProducing(self) -> None:
        """Stop reading."""
        self.loseConnection()

    # What the descriptors tell

    def _received(self, descriptor: int, data: bytes) -> None:
        if self._exit_told:
            return  # Written by what the child left behind: read, so that it never waits, and dropped.
        self._protocol.childDataReceived(descriptor, data)
        if self._quiet is not None:
            self._quiet.reset(QUIET)

    def _closed(self, descriptor: int) -> None:
        del self._pipes[descriptor]
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
        self._exit_watch.close()
        if self._stdin is not None:
            self._stdin.close()
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
