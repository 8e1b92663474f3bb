"""The client of the spawn servers: sends them requests, and passes their records on; see :mod:`.spawn_server`."""

from __future__ import annotations

import array
import errno
import marshal
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReadDescriptor, IWriteDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

import sandboxd
from sandboxd.processes.limits import own_nofile
from sandboxd.processes.pipes import ExitWatch, close_later
from sandboxd.processes.spawn_server import EXITED, INLINE, LONG, STARTED
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.turn_budget import TurnBudget

#: Number of spawn servers: two, so that one can start a child while the other one waits for an execve(2).
SPAWNERS = 2

#: Most messages read from a spawn server in one turn.
BURST = 8

#: sendmsg(2) fails for now: the socket is full, too many descriptors are in flight, or the kernel lacks memory.
_LATER = (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)

#: Seconds after which a dead spawn server is replaced, unless a command needs one earlier.
_RESPAWN = 1.0

#: The program of a spawn server. Run with -I, so that neither environment nor directory change what it imports.
_PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(sandboxd.__file__).parents[1])!r})
from sandboxd.processes.spawn_server import main
main(*map(int, sys.argv[1:]))
"""


class ChildListener(Protocol):
    """The receiver of a child's records: ``started`` or ``failed``, and ``exited`` after ``started``."""

    def started(self, pid: int) -> None:
        """Called when it runs."""

    def failed(self, error: OSError, at_cwd: bool) -> None:
        """Called when it could not be started."""

    def exited(self, status: int) -> None:
        """Called when it has exited, with its wait status, as of waitpid(2)."""

    def adopted(self) -> None:
        """Called when its spawn server has died: it was reparented to this process, the subreaper."""


class SpawnClient:
    """
    The spawn servers, and the children that they have started.

    :param turns: schedules the handling of their records.
    :param base: the base of the marks, by which a spawn server finds the processes of a daemon that is gone.
    :param adopted: called when a spawn server has died, with its children, by pid; they are this process's own now.
    :param end_tree: kills the processes of a mark; fires when they are gone.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        turns: TurnBudget,
        base: int,
        adopted: Callable[[dict[int, ChildListener]], None],
        end_tree: Callable[[int], Deferred[list[int]]],
    ) -> None:
        self._reactor = reactor
        self._turns = turns
        self._base = base
        self._adopted = adopted
        self._end_tree = end_tree
        self._spawners: list[_SpawnServer] = []
        self._running = False
        self._last = 0

    def start(self) -> None:
        """
        Start the spawn servers that are missing.

        :raise OSError: if one cannot be started.
        """
        self._running = True
        while len(self._spawners) < SPAWNERS:
            self._spawners.append(_SpawnServer(self._reactor, self._turns, self._base, self._lost, self._break_off))

    def stop(self) -> None:
        """Let the spawn servers end, once they have killed what is left."""
        self._running = False
        spawners, self._spawners = self._spawners, []
        for spawner in spawners:
            spawner.close()

    @property
    def pids(self) -> frozenset[int]:
        """The pids of the spawn servers."""
        return frozenset(spawner.pid for spawner in self._spawners)

    def launch(
        self, child: ChildListener, mark: int, request: tuple[Any, ...], fds: list[int]
    ) -> Callable[[int], None]:
        """
        Request the start of a child.

        :param child: gets its records, later.
        :param mark: the mark of its process tree.
        :param request: the arguments of :meth:`.SpawnServer._start`, less the descriptors.
        :param fds: the descriptors of the request, closed once they are sent.
        :return: sends a signal to the child's process group, if the child has not exited.
        :raise OSError: if there is no spawn server; the descriptors stay open.
        """
        try:
            self.start()  # one may have died
        except OSError:
            if not self._spawners:
                raise
        spawner = min(self._spawners, key=_load)
        self._last += 1
        message = marshal.dumps((self._last, *request))
        if len(message) > INLINE:
            fds.append(_memfd(message))
            message = LONG % self._last
        spawner.launch(self._last, child, mark, message, fds)
        return partial(spawner.signal, self._last)

    def _lost(self, spawner: _SpawnServer) -> None:
        if spawner not in self._spawners:
            return
        self._log.error("process {pid}, which starts commands, has died; another takes its place", pid=spawner.pid)
        self._spawners.remove(spawner)
        self._reactor.callLater(_RESPAWN, self._replace)
        self._adopted({pid: child for child, _, pid in spawner.running.values()})
        for child, mark in spawner.starting.values():
            self._break_off(child, mark)  # it may run

    def _break_off(self, child: ChildListener, mark: int) -> None:
        """End a child whose state is unknown, and then report it as failed."""
        error = OSError(errno.EIO, "the process that starts commands has died")
        self._end_tree(mark).addBoth(lambda _: child.failed(error, False))

    def _replace(self) -> None:
        if not self._running:
            return
        try:
            self.start()
        except OSError as error:
            self._log.error("no process that starts commands can be had: {error}", error=error)
            self._reactor.callLater(_RESPAWN, self._replace)


def _load(spawner: _SpawnServer) -> tuple[int, int]:
    return len(spawner.starting), len(spawner.running)


@implementer(IReadDescriptor, IWriteDescriptor)
class _SpawnServer:
    """
    The daemon's end of one spawn server.

    :ivar starting: requested children without an answer, and their marks, by number.
    :ivar running: started children, their marks and pids, by number.
    """

    _log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        turns: TurnBudget,
        base: int,
        lost: Callable[[_SpawnServer], None],
        break_off: Callable[[ChildListener, int], None],
    ) -> None:
        self._reactor = reactor
        self._turns = turns
        self._lost = lost
        self._break_off = break_off
        self.starting: dict[int, tuple[ChildListener, int]] = {}
        self.running: dict[int, tuple[ChildListener, int, int]] = {}
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._socket.setblocking(False)
            program = [sys.executable, "-I", "-S", "-c", _PROGRAM]
            popen = subprocess.Popen(
                [*program, str(theirs.fileno()), str(base), str(own_nofile())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={},
                start_new_session=True,
            )
        self.pid = popen.pid
        self._pidfd = os.pidfd_open(self.pid)
        popen.returncode = 0  # reaped by the Reaper, not by subprocess
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return type(self).__name__

    def launch(self, number: int, child: ChildListener, mark: int, message: bytes, fds: list[int]) -> None:
        """Send a request."""
        self.starting[number] = (child, mark)
        self._send(message, fds)

    def signal(self, number: int, signum: int) -> None:
        """Signal a child's process group."""
        self._send(marshal.dumps((number, int(signum))), [])

    def _send(self, message: bytes, fds: list[int]) -> None:
        if self._socket.fileno() < 0:  # it has died; :meth:`SpawnClient._lost` deals with the requests
            for fd in fds:
                os.close(fd)
            return
        self._unsent.append((message, fds))
        if len(self._unsent) == 1:
            self.doWrite()
            if self._unsent:
                self._reactor.addWriter(self)

    def doWrite(self) -> None:
        while self._unsent:
            message, fds = self._unsent[0]
            try:
                self._socket.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            except OSError as error:
                if error.errno in _LATER:
                    return
                # It has died. The reader gets the records that it has still sent, and then the end of file; not now,
                # for :meth:`SpawnClient.launch` has to return before its child gets any record.
                self._drop_unsent()
                break
            self._unsent.popleft()
            for fd in fds:
                os.close(fd)
        self._reactor.removeWriter(self)

    def _drop_unsent(self) -> None:
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()

    def doRead(self) -> None:
        for _ in range(BURST):
            try:
                message = self._socket.recv(INLINE)
            except BlockingIOError:
                return
            except ConnectionResetError:
                continue  # it has died with requests unread; its records follow
            except OSError:
                message = b""
            if not message:
                self._hung_up()
                return
            for record in marshal.loads(message):
                self._turns.take(partial(self._record, record))

    def _record(self, record: tuple[int, ...]) -> None:
        number, what, value, *rest = record
        if what == EXITED:
            child, mark, _ = self.running.pop(number)
        else:
            child, mark = self.starting.pop(number)
        try:
            if what == EXITED:
                child.exited(value)
            elif what == STARTED:
                self.running[number] = (child, mark, value)
                child.started(value)
            else:
                child.failed(OSError(value, os.strerror(value)), bool(rest[0]))
        except Exception:  # an error of one child must not affect the others
            self._log.failure("a command is killed, as an error occurred in the daemon while handling it")
            self.running.pop(number, None)
            self._break_off(child, mark)

    def connectionLost(self, reason: Failure) -> None:
        self._hung_up()

    def _hung_up(self) -> None:
        if self._socket.fileno() >= 0:
            with suppress(ProcessLookupError):  # it would take the daemon for dead, and kill all commands
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._close_socket()
            # A dying process closes its files before its children are reparented: wait until it has exited.
            ExitWatch(self._reactor, self._pidfd, partial(self._turns.take, self._died))

    def _died(self) -> None:
        self._lost(self)

    def close(self) -> None:
        """Hang up."""
        if self._socket.fileno() >= 0:
            self._close_socket()
            os.close(self._pidfd)

    def _close_socket(self) -> None:
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        close_later(self._reactor, self._socket.detach())
        self._drop_unsent()


def _memfd(data: bytes) -> int:
    """Return a file in memory."""
    fd = os.memfd_create("sandboxd")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
    except OSError:
        os.close(fd)
        raise
    return fd
