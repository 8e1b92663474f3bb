"""Has children started by spawners, processes of their own, and passes on what those tell; see :mod:`.spawner`."""

from __future__ import annotations

import array
import errno
import marshal
import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from twisted.internet.interfaces import IReadDescriptor, IWriteDescriptor
from twisted.logger import Logger
from twisted.python.failure import Failure
from zope.interface import implementer

import sandboxd
from sandboxd.execution.limits import own_nofile
from sandboxd.execution.pipes import Reactor, close_later
from sandboxd.execution.spawner import EXITED, INLINE, LONG, STARTED
from sandboxd.turns import Turns

#: How many spawners there are: two, so that one can start a child while the other one waits for an ``exec``.
SPAWNERS = 2

#: Messages that are read from a spawner before others get their turn.
BURST = 8

#: A spawner has not taken what was sent to it: messages, or descriptors on their way.
_LATER = (errno.EAGAIN, errno.ETOOMANYREFS)

#: Seconds after which a spawner that has died is replaced, if no command needs one before.
_RESPAWN = 1.0

#: What a spawner runs. Isolated, so that neither the environment nor the directory can change what it imports.
_PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(sandboxd.__file__).parents[1])!r})
from sandboxd.execution.spawner import main
main(*map(int, sys.argv[1:]))
"""


class Launched(Protocol):
    """Who hears what becomes of a child. One of the first two is called, and after ``started`` the third."""

    def started(self, pid: int) -> None:
        """It runs."""

    def failed(self, error: OSError, at_cwd: bool) -> None:
        """It could not be started."""

    def exited(self, status: int) -> None:
        """It has exited; ``status`` is as waitpid(2) tells it."""

    def adopted(self) -> None:
        """Who has started it is dead; it is this process's own child now."""


class Launcher:
    """
    The spawners, and the children that they have started.

    :param turns: lets what they tell be dealt with in turns with all other work.
    :param base: the base of the marks, by which a spawner finds what is left when this process is gone.
    :param adopted: called when a spawner has died, with those of its children that now are this process's own.
    """

    _log = Logger()

    def __init__(
        self, reactor: Reactor, turns: Turns, base: int, adopted: Callable[[dict[int, Launched]], None]
    ) -> None:
        self._reactor = reactor
        self._turns = turns
        self._base = base
        self._adopted = adopted
        self._spawners: list[_Spawner] = []
        self._running = False
        self._last = 0

    def start(self) -> None:
        """
        Start the spawners.

        :raise OSError: if that cannot be done.
        """
        self._running = True
        while len(self._spawners) < SPAWNERS:
            self._spawners.append(_Spawner(self._reactor, self._turns, self._base, self._lost))

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

    def launch(self, child: Launched, request: tuple[Any, ...], fds: list[int]) -> Callable[[int], None]:
        """
        Have a child started.

        :param child: told what becomes of it.
        :param request: what is said of it, as :class:`.spawner.Spawner` has it.
        :param fds: the descriptors that go with it. They are closed once they are sent.
        :return: sends a signal to the child's process group, if the child has not exited.
        :raise OSError: if it cannot be asked for; the descriptors stay open.
        """
        self.start()  # one may have died
        spawner = min(self._spawners, key=_load)
        self._last += 1
        message = marshal.dumps((self._last, *request))
        if len(message) > INLINE:
            fds.append(_memfd(message))
            message = LONG
        spawner.launch(self._last, child, message, fds)
        return partial(spawner.signal, self._last)

    def _lost(self, spawner: _Spawner) -> None:
        if spawner not in self._spawners:
            return
        self._log.error("process {pid}, which starts commands, has died; another takes its place", pid=spawner.pid)
        self._spawners.remove(spawner)
        self._reactor.callLater(_RESPAWN, self._replace)
        self._adopted({pid: child for child, pid in spawner.abandoned()})

    def _replace(self) -> None:
        if self._running:
            self.start()


def _load(spawner: _Spawner) -> int:
    return len(spawner.starting)


@implementer(IReadDescriptor, IWriteDescriptor)
class _Spawner:
    """
    The daemon's end of one spawner.

    :ivar pid: its process id.
    :ivar starting: the children that it was asked to start and has not answered for, by number.
    """

    def __init__(self, reactor: Reactor, turns: Turns, base: int, lost: Callable[[_Spawner], None]) -> None:
        self._reactor = reactor
        self._turns = turns
        self._lost = lost
        self.starting: dict[int, Launched] = {}
        self._running: dict[int, tuple[Launched, int]] = {}
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
        popen.returncode = 0  # it is reaped as any orphan is, not by subprocess
        reactor.addReader(self)

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return type(self).__name__

    def launch(self, number: int, child: Launched, message: bytes, fds: list[int]) -> None:
        """Ask for a child."""
        self.starting[number] = child
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
                if error.errno not in _LATER:
                    self._hung_up()
                return
            self._unsent.popleft()
            for fd in fds:
                os.close(fd)
        self._reactor.removeWriter(self)

    def doRead(self) -> None:
        for _ in range(BURST):
            try:
                message = self._socket.recv(INLINE)
            except BlockingIOError:
                return
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
            child, _ = self._running.pop(number)
            child.exited(value)
            return
        child = self.starting.pop(number)
        if what == STARTED:
            self._running[number] = (child, value)
            child.started(value)
        else:
            child.failed(OSError(value, os.strerror(value)), bool(rest[0]))

    def connectionLost(self, reason: Failure) -> None:
        self._hung_up()

    def _hung_up(self) -> None:
        if self._socket.fileno() >= 0:
            self.close()
            self._turns.take(self._died)  # behind what it has told and was not dealt with yet

    def _died(self) -> None:
        self._lost(self)

    def abandoned(self) -> list[tuple[Launched, int]]:
        """The children that run and their pids; those that were asked for have failed."""
        starting, self.starting = self.starting, {}
        for child in starting.values():
            child.failed(OSError(errno.EIO, "the process that starts commands has died"), False)
        running, self._running = self._running, {}
        return list(running.values())

    def close(self) -> None:
        """Hang up."""
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        close_later(self._reactor, self._socket.detach())
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()


def _memfd(data: bytes) -> int:
    """A file in memory."""
    fd = os.memfd_create("sandboxd")
    with open(fd, "wb", closefd=False) as file:
        file.write(data)
    return fd
