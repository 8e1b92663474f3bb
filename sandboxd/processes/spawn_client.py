"""The client of the spawn servers, which sends them requests and passes their records on; see :mod:`.spawn_server`."""

from __future__ import annotations

import array
import errno
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
from sandboxd.processes.reaper import children
from sandboxd.processes.spawn_messages import (
    AT_START,
    DONE,
    EXITED,
    FAILED,
    FORK,
    FORKED,
    INLINE,
    MAX_OUTPUT,
    NAME,
    RECEIVE_FLAGS,
    SIGNAL,
    START,
    START_LONG,
    STARTED,
    MalformedMessage,
    StartRequest,
    pack_request,
    unpack_done,
    unpack_record,
    unpack_request,
)
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.turn_budget import TurnBudget

#: Number of spawn servers: two, so that one can start a child while the other one waits for an execve(2).
SPAWN_SERVERS = 2

#: Most records read from a spawn server in one turn.
BURST = 32

#: Seconds after which a spawn server that has answered nothing is replaced.
ANSWER_TIMEOUT = 2.0

#: Seconds that a child may take to execute its program, once it was forked: entering a directory may block.
START_TIMEOUT = 10.0

#: Most bytes of a record.
_RECORD_SIZE = MAX_OUTPUT + 1024

#: sendmsg(2) fails for now: the socket is full, too many descriptors are in flight, or the kernel lacks memory.
_LATER = (errno.EAGAIN, errno.ETOOMANYREFS, errno.ENOBUFS, errno.ENOMEM)

#: The program of a spawn server. Run with -I, so that neither environment nor directory change what it imports.
_PROGRAM = f"""
import sys
sys.path.insert(0, {str(Path(sandboxd.__file__).parents[1])!r})
from sandboxd.processes.spawn_server import main
main(*map(int, sys.argv[1:]))
"""


class ChildListener(Protocol):
    """The receiver of a child's records: ``started``, ``failed`` or ``done``, and ``exited`` after ``started``."""

    def started(self, pid: int, output: list[int]) -> None:
        """Take the pid of the running child, and the read ends of its stdout and stderr if the server made them."""

    def done(self, pid: int, status: int, stdout: bytes, stderr: bytes) -> None:
        """Take the exit status and all output of a child that has run and exited."""

    def failed(self, error: OSError, step: int) -> None:
        """
        Take the error of a child that could not be started; after ``EIO`` it may have run.

        :param step: what failed: ``AT_CWD`` or another of :mod:`.spawn_messages`.
        """

    def exited(self, status: int) -> None:
        """Take the wait status of a child that has exited, as of waitpid(2)."""

    def adopted(self) -> None:
        """Take over a child whose spawn server has exited: it was reparented to this process, the subreaper."""


class _Launch:
    """
    A child whose start was requested.

    :ivar pid: None until it was forked.
    :ivar server: the spawn server that the request was sent to; None once it has failed or exited.
    :ivar collect: whether the server makes the pipes for its output.
    :ivar forked_at: when it was forked, by the reactor's clock, if it has not executed its program yet.
    """

    __slots__ = ("child", "collect", "forked_at", "mark", "number", "pid", "server")

    def __init__(self, number: int, child: ChildListener, mark: int, collect: bool = False) -> None:
        self.number = number
        self.child = child
        self.mark = mark
        self.collect = collect
        self.pid: int | None = None
        self.server: _Server | None = None
        self.forked_at: float | None = None

    def signal(self, signum: int) -> None:
        """Signal the child's process group, if it has not exited; SIGKILL also ends one that is being started."""
        if self.server is not None:
            self.server.send(pack_request(SIGNAL, self.number, bytes([signum])), [])


class SpawnClient:
    """
    The daemon's spawn servers, and the children that they have started.

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
        end_tree: Callable[[int], Deferred[Any]],
    ) -> None:
        self.reactor = reactor
        self.turns = turns
        self._base = base
        self._adopted = adopted
        self._end_tree = end_tree
        self._servers: list[_Server] = []
        self._killed: list[_Server] = []
        self._running = False
        self._last = 0
        self._strays_possible = False

    def start(self) -> None:
        """
        Start the spawn servers that are missing: the first as a new program, others as its forks.

        :raise OSError: if there is none, and none can be started.
        """
        self._running = True
        while len(self._servers) < SPAWN_SERVERS:
            parent = next((server for server in self._servers if server.pid is not None), None)
            try:
                self._servers.append(_Server(self) if parent is None else _Server(self, parent))
            except OSError:
                if parent is None:
                    raise
                return

    def stop(self) -> None:
        """Let the spawn servers end."""
        self._running = False
        servers, self._servers = self._servers, []
        for server in servers:
            server.close()

    def check(self) -> None:
        """Replace spawn servers that do not answer, and end starts that take too long. Called about once a second."""
        now = self.reactor.seconds()
        for server in list(self._servers):
            server.check(now)
        if self._strays_possible:
            self._strays_possible = False
            self._kill_strays()
        if self._running:
            try:
                self.start()
            except OSError as error:
                self._log.error("no spawn server can be started: {error}", error=error)

    def _kill_strays(self) -> None:
        """
        Kill children of this process that are spawn servers, or forks of one, but that it does not use.

        One exits by itself when its socket is closed, unless a command has stopped it. If its parent has died before it
        had reported the fork, nothing else is known of it. If they cannot be looked at, that is done at the next check.
        """
        try:
            for pid in children():
                if pid not in self.pids and Path(f"/proc/{pid}/comm").read_bytes().rstrip() == NAME:
                    os.kill(pid, signal.SIGKILL)  # it is not reaped meanwhile, so the pid is its own
        except OSError as error:
            self._strays_possible = error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

    @property
    def only_children(self) -> bool:
        """Whether this process has no children but spawn servers; False too if that is unknown."""
        try:
            return self.pids.issuperset(children())
        except OSError:
            return False

    @property
    def pids(self) -> frozenset[int]:
        """The pids of the spawn servers."""
        return frozenset(server.pid for server in (*self._servers, *self._killed) if server.pid is not None)

    def launch(self, child: ChildListener, request: StartRequest, fds: list[int]) -> Callable[[int], None]:
        """
        Request the start of a child.

        :param child: gets its records, later.
        :param fds: the child's stdout, stderr and, if it has one, stdin; none if its output is collected. They are
            closed once they are sent.
        :return: sends a signal to the child's process group, if the child has not exited.
        :raise OSError: if there is no spawn server; the descriptors stay open.
        """
        self.start()  # one may have died
        launch = _Launch(self.next_number(), child, request.mark, request.collect)
        payload = request.pack()
        message = pack_request(START, launch.number, payload)
        if len(message) > INLINE:
            fds.append(memfd(payload))
            message = pack_request(START_LONG, launch.number)
        self._send(launch, message, fds)
        return launch.signal

    def next_number(self) -> int:
        """Return an unused number for a child."""
        self._last += 1
        return self._last

    @property
    def base(self) -> int:
        """The base of the marks."""
        return self._base

    def _send(self, launch: _Launch, message: bytes, fds: list[int]) -> None:
        # Not to one whose fork is not reported yet: it could not be killed for certain, should its parent die.
        server = min((each for each in self._servers if each.pid is not None), key=_load)
        launch.server = server
        server.launch(launch, message, fds)

    def replace(self, server: _Server, reason: str) -> None:
        """Kill a spawn server, and send the requests that it has not received to others."""
        if server not in self._servers:
            return
        self._log.error("spawn server {pid} is replaced: {reason}", pid=server.pid, reason=reason)
        self._servers.remove(server)
        self._killed.append(server)
        server.kill()
        self._resend(server)
        if server.pid is None:
            self.server_exited(server, reason)

    def _resend(self, server: _Server) -> None:
        """Send the requests that a spawn server has not received to others. Nothing of them was executed."""
        for message, fds in server.unreceived():
            kind, number, _ = unpack_request(message)
            launch = server.find(number) if kind == SIGNAL else server.starting.pop(number, None)
            try:
                if kind == FORK or launch is None or not self._running:
                    raise OSError(errno.ECANCELED, "")
                if kind == SIGNAL:
                    if launch.server is not None:
                        launch.server.send(message, fds)
                    continue
                self.start()
                self._send(launch, message, fds)
            except OSError as error:
                for fd in fds:
                    os.close(fd)
                if launch is not None:
                    launch.server = None
                    launch.child.failed(OSError(error.errno, error.strerror), AT_START)

    def server_exited(self, server: _Server, reason: str) -> None:
        """Handle the exit of a spawn server: adopt its children, and end those whose state is unknown."""
        self.replace(server, reason)
        if server in self._killed:
            self._killed.remove(server)
        running = {}
        for launch in server.running.values():
            launch.server = None
            if launch.pid is not None:
                running[launch.pid] = launch.child
        self._adopted(running)
        for launch in server.starting.values():
            self.kill_and_fail(launch)
        server.running, server.starting = {}, {}

    def kill_and_fail(self, launch: _Launch, reason: str = "the process that starts commands has died") -> None:
        """Kill the processes of a child that may or may not run, then report its start as failed."""
        launch.server = None
        child, launch.child = launch.child, _Nobody()
        error = OSError(errno.EIO, reason)
        if isinstance(child, _ForkListener):
            self._strays_possible = True
            child.failed(error, AT_START)
        else:
            self._end_tree(launch.mark).addBoth(lambda _: child.failed(error, AT_START))


def _load(server: _Server) -> tuple[int, int]:
    return len(server.starting), len(server.running)


class _Nobody:
    """The receiver of the records of a child whose start was reported as failed though it ran: none is of interest."""

    def started(self, pid: int, output: list[int]) -> None:
        """Do nothing."""

    def done(self, pid: int, status: int, stdout: bytes, stderr: bytes) -> None:
        """Do nothing."""

    def failed(self, error: OSError, step: int) -> None:
        """Do nothing."""

    def exited(self, status: int) -> None:
        """Do nothing."""

    def adopted(self) -> None:
        """Do nothing."""


class _ForkListener:
    """The receiver of the records of a spawn server that was forked from another."""

    def __init__(self, client: SpawnClient, server: _Server) -> None:
        self._client = client
        self._server = server
        self.launch: _Launch | None = None

    def started(self, pid: int, output: list[int]) -> None:
        """Use the new spawn server, or kill it if it has been replaced meanwhile or cannot be watched."""
        if not self._server.forked(pid):
            self._client.server_exited(self._server, "it cannot be watched")
            if self.launch is not None:
                self.launch.signal(signal.SIGKILL)

    def done(self, pid: int, status: int, stdout: bytes, stderr: bytes) -> None:
        """Do nothing: its output is not collected."""

    def failed(self, error: OSError, step: int) -> None:
        """Have the new spawn server replaced."""
        self._client.replace(self._server, f"it cannot be forked: {error.strerror}")

    def exited(self, status: int) -> None:
        """Do nothing: its pidfd has been readable."""

    def adopted(self) -> None:
        """Do nothing."""


@implementer(IReadDescriptor, IWriteDescriptor)
class _Server:
    """
    The daemon's end of one spawn server.

    The daemon keeps a copy of the server's end of the socket, from which it takes back what a server has not received.

    :ivar pid: its process id; None until a fork has been reported.
    :ivar starting: children without STARTED or FAILED, by number.
    :ivar running: started children, by number.
    """

    _log = Logger()

    def __init__(self, client: SpawnClient, parent: _Server | None = None) -> None:
        """
        Start the spawn server.

        :param parent: the server that it is forked from; None to start the program.
        :raise OSError: if it cannot be started.
        """
        self._client = client
        self._reactor = client.reactor
        self.pid: int | None = None
        self.starting: dict[int, _Launch] = {}
        self.running: dict[int, _Launch] = {}
        self._unsent: deque[tuple[bytes, list[int]]] = deque()
        self._pidfd = -1
        self._asked_at = 0.0  # when it was asked last while it owed no answer, or has answered last
        self._unanswered = 0
        self._socket, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        try:
            if parent is None:
                self._execute(self._theirs.fileno())
            else:
                number = client.next_number()
                fd = os.dup(self._theirs.fileno())
                listener = _ForkListener(client, self)
                parent.starting[number] = listener.launch = launch = _Launch(number, listener, 0)
                launch.server = parent
                parent.send(pack_request(FORK, number), [fd], answer=True)
        except OSError:
            self._socket.close()
            self._theirs.close()
            raise
        self._reactor.addReader(self)

    def _execute(self, fd: int) -> None:
        program = [sys.executable, "-I", "-S", "-c", _PROGRAM]
        popen = subprocess.Popen(
            [*program, str(fd), str(self._client.base), str(own_nofile()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(fd,),
            env={},
            start_new_session=True,
        )
        popen.returncode = 0  # reaped by the Reaper, not by subprocess
        if not self.forked(popen.pid):
            os.kill(popen.pid, signal.SIGKILL)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def forked(self, pid: int) -> bool:
        """Watch the process that serves this socket; return False if it cannot be watched, or has been replaced."""
        if self._socket.fileno() < 0:
            return False
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:  # it has exited, or there is no descriptor
            return False
        try:
            watched = os.dup(pidfd)
        except OSError:
            os.close(pidfd)
            return False
        self.pid, self._pidfd = pid, pidfd
        ExitWatch(self._reactor, watched, self._exited)
        return True

    def fileno(self) -> int:
        return self._socket.fileno()

    def logPrefix(self) -> str:
        return type(self).__name__

    def launch(self, launch: _Launch, message: bytes, fds: list[int]) -> None:
        """Send the request for a child."""
        self.starting[launch.number] = launch
        self.send(message, fds, answer=True)

    def find(self, number: int) -> _Launch | None:
        """Return a child that has not exited."""
        return self.starting.get(number) or self.running.get(number)

    def send(self, message: bytes, fds: list[int], answer: bool = False) -> None:
        """
        Send a message.

        :param fds: the descriptors that go with it, closed once they are sent.
        :param answer: whether it will be answered.
        """
        if self._socket.fileno() < 0:  # it has died; :meth:`SpawnClient.server_exited` deals with the requests
            for fd in fds:
                os.close(fd)
            return
        if answer:
            if self._unanswered == 0:
                self._asked_at = self._reactor.seconds()
            self._unanswered += 1
        self._unsent.append((message, fds))
        if len(self._unsent) == 1:
            self._send()
            if self._unsent:
                self._reactor.addWriter(self)

    def doWrite(self) -> None:
        self._send()
        if not self._unsent:
            self._reactor.removeWriter(self)

    def _send(self) -> None:
        """Send what the socket takes now."""
        while self._unsent:
            message, fds = self._unsent[0]
            try:
                if fds:
                    self._socket.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
                else:
                    self._socket.send(message)
            except OSError as error:
                if error.errno in _LATER:
                    return
                self._log.failure("a request cannot be sent to spawn server {pid}", pid=self.pid)
                self._reactor.removeWriter(self)
                self._reactor.callLater(0, self._client.replace, self, "it cannot be reached")
                return
            self._unsent.popleft()
            for fd in fds:
                os.close(fd)

    def unreceived(self) -> list[tuple[bytes, list[int]]]:
        """Take back the messages that the server has not received, in order."""
        found = []
        with suppress(OSError):  # EAGAIN: there are no more
            while True:
                found.append(_receive(self._theirs, INLINE))
        found.extend(self._unsent)
        self._unsent.clear()
        return found

    def doRead(self) -> None:
        # Most records come alone; that no other has come, epoll finds as fast as another attempt to receive.
        self._receive(BURST if len(self.starting) > 1 else 1)

    def _receive(self, most: int) -> None:
        for _ in range(most):
            try:
                message, fds = _receive(self._socket, _RECORD_SIZE)
            except OSError:  # EAGAIN
                return
            self._client.turns.take(partial(self._record, message, fds))

    def _record(self, message: bytes, fds: list[int]) -> None:
        try:
            number, kind, value, detail = unpack_record(message)
            launch = self.running.get(number) if kind == EXITED else self.starting.get(number)
            if launch is None or (launch.pid not in (None, value) and kind in (FORKED, STARTED, DONE)):
                raise MalformedMessage(f"a record of kind {kind} of a child that is in another state")
            if (kind == DONE and not launch.collect) or len(fds) > 2 * (launch.collect and kind == STARTED):
                raise MalformedMessage(f"a record of kind {kind} with {len(fds)} descriptors")
            done = unpack_done(message) if kind == DONE else (0, b"", b"")
        except MalformedMessage as error:
            for fd in fds:
                os.close(fd)
            self._client.replace(self, str(error))
            return
        self._asked_at = self._reactor.seconds()
        if kind != EXITED and launch.forked_at is None:
            self._unanswered -= 1
        if kind == FORKED:
            launch.pid = value
            launch.forked_at = self._asked_at
            return
        (self.running if kind == EXITED else self.starting).pop(number)
        launch.forked_at = None
        if kind != STARTED:
            launch.server = None
        try:
            if kind == DONE:
                launch.child.done(value, *done)
            elif kind == EXITED:
                launch.child.exited(value)
            elif kind == FAILED:
                launch.child.failed(OSError(value, os.strerror(value)), detail)
            else:
                launch.pid = value
                self.running[number] = launch  # until its exit is reported, whatever becomes of it here
                if launch.collect and len(fds) < 2:  # this process has no descriptor left
                    for fd in fds:
                        os.close(fd)
                    self._client.kill_and_fail(launch, "too many open files to read its output")
                else:
                    launch.child.started(value, fds)
        except Exception:  # an error of one child must not affect the others
            self._log.failure("a command is killed, as an error occurred in the daemon while handling it")
            self._client.kill_and_fail(launch)

    def check(self, now: float) -> None:
        """Have this server replaced if it does not answer; end children that take too long to start."""
        if self._pidfd >= 0:
            with suppress(OSError):  # a command that runs as the same user may have stopped it
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
        if self._unanswered > 0 and now - self._asked_at > ANSWER_TIMEOUT:
            self._client.replace(self, f"it has not answered for {ANSWER_TIMEOUT} seconds")
            return
        for launch in list(self.starting.values()):
            if launch.forked_at is not None and now - launch.forked_at > START_TIMEOUT:
                launch.forked_at = now
                launch.signal(signal.SIGKILL)

    def _exited(self) -> None:
        """Handle the records that the server has sent before its exit, and then the exit."""
        if self._socket.fileno() >= 0:
            self._receive(sys.maxsize)
            self._reactor.removeReader(self)
        self._client.turns.take(self._records_handled)

    def _records_handled(self) -> None:
        self._client.server_exited(self, "it has died")
        self.close()

    def connectionLost(self, reason: Failure) -> None:
        """Do nothing. Never called, as this process has a copy of the other end."""

    def kill(self) -> None:
        """Kill the server, without waiting."""
        if self._pidfd < 0:
            self.close()
            return
        with suppress(OSError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def close(self) -> None:
        """Close the socket, upon which the server exits if it runs."""
        if self._socket.fileno() < 0:
            return
        self._reactor.removeReader(self)
        self._reactor.removeWriter(self)
        close_later(self._reactor, self._socket.detach())
        self._theirs.close()
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()
        if self._pidfd >= 0:
            with suppress(OSError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)
            os.close(self._pidfd)
            self._pidfd = -1


def _receive(sock: socket.socket, size: int) -> tuple[bytes, list[int]]:
    """
    Receive a message of at most ``size`` bytes and its descriptors, without waiting.

    :raise BlockingIOError: if there is none.
    """
    message, ancillary, _, _ = sock.recvmsg(size, 256, RECEIVE_FLAGS)
    if not ancillary:
        return message, []
    fds = array.array("i")
    for _, _, data in ancillary:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds)


def memfd(data: bytes) -> int:
    """Return the descriptor of a file in memory with these contents."""
    fd = os.memfd_create("sandboxd")
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
    except OSError:
        os.close(fd)
        raise
    return fd
