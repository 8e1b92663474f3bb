"""Has children started by spawners, processes of their own, and passes on what those tell; see :mod:`.spawner`."""

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

#: How many spawners there are: two, so that one can start a child while the other one waits for an ``exec``.
SPAWNERS = 2

#: Messages that are read from a spawner before others get their turn.
BURST = 8

#: A spawner has not taken what was sent to it (messages, or descriptors on their way), or the kernel has no room.
_LATER = (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)

#: Seconds after which a spawner that has died is replaced, if no command needs one before.
_RESPAWN = 1.0

#: What a spawner runs. Isolated, so that neither the environment nor the directory can change what it imports.
_PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(sandboxd.__file__).parents[1])!r})
from sandboxd.processes.spawn_server import main
main(*map(int, sys.argv[1:]))
"""


class ChildListener(Protocol):
    """Who hears what becomes of a child. One of the first two is called, and after ``started`` the third."""

    def started(self, pid: int) -> None:
        """It runs."""

    def failed(self, error: OSError, at_cwd: bool) -> None:
        """It could not be started."""

    def exited(self, status: int) -> None:
        """It has exited; ``status`` is as waitpid(2) tells it."""

    def adopted(self) -> None:
        """Who has started it is dead; it is this process's own child now."""


class SpawnClient:
    """
    The spawners, and the children that they have started.

    :param turns: lets what they tell be dealt with in turns with all other work.
    :param base: the base of the marks, by which a spawner finds what is left when this process is gone.
    :param adopted: called when a spawner has died, with those of its children that now are this process's own.
    :param end_tree: kills what has a mark; fires when it is gone.
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
        Start the spawners.

        :raise OSError: if that cannot be done.
        """
        self._running = True
        while len(self._spawners) < SPAWNERS:
            self._spawners.append(_SpawnServer(self._reactor, self._turns, self._base, self._lost, self._break_off))

    def stop(self) -> None:
        """Let the spawners end, once they have killed what is left."""
        self._running = False
        spawners, self._spawners = self._spawners, []
        for spawner in spawners:
            spawner.close()

    @property
    def pids(self) -> frozenset[int]:
        """The spawners' own pids."""
        return frozenset(spawner.pid for spawner in self._spawners)

    def launch(
        self, child: ChildListener, mark: int, request: tuple[Any, ...], fds: list[int]
    ) -> Callable[[int], None]:
        """
        Have a child started.

        :param child: told what becomes of it, later.
        :param mark: what its process tree is found by.
        :param request: what is said of it, as :class:`.spawner.Spawner` has it.
        :param fds: the descriptors that go with it. They are closed once they are sent.
        :return: sends a signal to the child's process group, if the child has not exited.
        :raise OSError: if it cannot be asked for; the descriptors stay open.
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
            self._break_off(child, mark)  # it may run, and nobody would know

    def _break_off(self, child: ChildListener, mark: int) -> None:
        """Nothing can be said of a child any more: end it, and then say so."""
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
    The daemon's end of one spawner.

    :ivar pid: its process id.
    :ivar starting: the children that it was asked to start and has not answered for, and their marks, by number.
    :ivar running: those that it has started, their marks and pids, by number.
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
        popen.returncode = 0  # it is reaped as any orphan is, not by subprocess
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return type(self).__name__

    def launch(self, number: int, child: ChildListener, mark: int, message: bytes, fds: list[int]) -> None:
        """Ask for a child."""
        self.starting[number] = (child, mark)
        self._send(message, fds)

    def signal(self, number: int, signum: int) -> None:
        """Signal a child's process group."""
        self._send(marshal.dumps((number, int(signum))), [])

    def _send(self, message: bytes, fds: list[int]) -> None:
        if self._socket.fileno() < 0:  # it has died, and who was to be started will be told
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
                # It has died. The reader will meet what it has still told, and then its end; not now, for whoever
                # asks for a child must have returned before the child is told anything.
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
                continue  # it has died with requests unread; what it has told comes behind that
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
        except Exception:  # of one child, which must not be the others' fault
            self._log.failure("a command is broken off, as what became of it could not be dealt with")
            self.running.pop(number, None)
            self._break_off(child, mark)

    def connectionLost(self, reason: Failure) -> None:
        self._hung_up()

    def _hung_up(self) -> None:
        if self._socket.fileno() >= 0:
            with suppress(ProcessLookupError):  # if it lives, it must not take us for dead, and kill what we run
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self._close_socket()
            # A process that dies closes its files first. Its children are ours only when it has exited.
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
    """A file in memory."""
    fd = os.memfd_create("sandboxd")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
    except OSError:
        os.close(fd)
        raise
    return fd
