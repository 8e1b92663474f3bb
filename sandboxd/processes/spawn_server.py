"""
The spawn server: a program of its own that starts commands for the daemon.

It is a process of its own, because a start blocks until the child's execve(2) is done, which takes tens of milliseconds
while all processors are busy. The daemon sends requests over a socket, with the child's ends of its pipes; the server
starts the child and sends records of its pid, and later its exit status; see :mod:`.spawn_messages`. What children
inherit but the daemon does not have (rlimits, oom_score_adj) is set here, so that the daemon never changes itself for a
child.

It is also the guardian: when the daemon is gone, for whatever reason, it kills the processes of all executions, which
it finds by :mod:`sandboxd.processes.marks`.

Commands may run as the same user, and so may send it signals and set its limits. It is not dumpable, so that they
cannot read its memory or take its descriptors (ptrace(2), pidfd_getfd(2)). It stops when its limits are not those that
it was started with, and the daemon replaces it.

Imports little of the standard library and nothing else, to start fast and to be small. A second server is forked from
the first, so that the two share most of their memory.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import resource
import select
import signal
import socket
import sys
import termios
from array import array
from collections import deque
from contextlib import suppress
from time import monotonic

from sandboxd.processes.execute import execute, standard_path, variables, with_mark
from sandboxd.processes.limits import inherited_nofile
from sandboxd.processes.marks import inherited_mark, kill_remaining, marks_by_limit, survives
from sandboxd.processes.spawn_messages import (
    AT_CWD,
    AT_EXEC,
    AT_START,
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
    pack_done,
    pack_record,
    unpack_request,
)

#: Errors of execve(2) that are the program's.
_EXEC_ERRORS = (
    errno.EACCES,
    errno.EINVAL,
    errno.EISDIR,
    errno.ELIBBAD,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOEXEC,
    errno.ENOTDIR,
    errno.EPERM,
    errno.ETXTBSY,
)


#: Seconds after which a child whose output is collected is handed over to the daemon if it has written something, and
#: seconds after which it is handed over in any case.
LOOK = 0.004
HAND_OVER = 0.02

#: Added to oom_score_adj, so that commands are killed before the daemon when memory is short; see proc(5).
OOM_SCORE_STEP = 200
OOM_SCORE_MAX = 1000

#: Signals that this process ignores: those that end the daemon, which it has to outlive, and those of failed writes.
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGXFSZ)
#: Seconds that the daemon may take to exit after it has closed its sockets.
_DAEMON_EXIT = 10.0

#: Exit codes of this process, as the daemon's log shows them.
MALFORMED, TAMPERED, LOST = 3, 4, 5

_PR_SET_DUMPABLE = 4
_PR_SET_NAME = 15
_LIMITS = [getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")]


class _Child:
    """
    A child that has not been reaped.

    :ivar number: the daemon's number for it; 0 once its end has been reported.
    :ivar errors: the read end of the pipe through which it reports that it cannot execute its program, or -1.
    :ivar output: the read ends of its stdout and stderr while they are collected, or empty.
    :ivar survives: whether it is to survive the daemon: it was started so, or is another server.
    """

    __slots__ = ("errors", "number", "output", "pid", "pidfd", "survives")

    def __init__(self, number: int, pid: int, pidfd: int, errors: int, survives: bool) -> None:
        self.number = number
        self.survives = survives
        self.pid = pid
        self.pidfd = pidfd
        self.errors = errors
        self.output: tuple[int, ...] = ()

    def close_output(self) -> None:
        """Close the pipes of its output."""
        for fd in self.output:
            os.close(fd)
        self.output = ()


class SpawnServer:
    """
    The server of one daemon, which starts children until the daemon closes its end of the socket.

    :param control: the socket to the daemon.
    :param daemon: a pidfd of the daemon.
    :param base: the base of the daemon's marks.
    :param nofile: the soft limit of open files of a child.
    :param limits: the resource limits of this process.
    """

    def __init__(
        self, control: socket.socket, daemon: int, base: int, nofile: int, limits: list[tuple[int, int]]
    ) -> None:
        self._control = control
        self._daemon = daemon
        self._base = base
        self._nofile = nofile
        self._limits = limits
        self._home = _enter_own_directory()
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._children: dict[int, _Child] = {}  # by number
        self._watched: dict[int, _Child] = {}  # by pidfd, and by the pipe for errors
        self._looks: deque[tuple[float, _Child]] = deque()
        self._hand_overs: deque[tuple[float, _Child]] = deque()
        self._env: tuple[bytes, dict[bytes, bytes]] = (b"", {})  # that of the last request: most are the same

    def serve(self) -> None:
        """Start commands until the daemon has exited, kill what its executions have left, and exit."""
        code = 1
        try:
            self._run()
            if self._daemon_exited():
                kill_remaining(self._base)
                self._kill_children()
            code = 0
        except MalformedMessage:
            code = MALFORMED
        finally:
            os._exit(code)

    def _run(self) -> None:
        """
        Serve requests until the end of file.

        :raise MalformedMessage: if one is not as it should be.
        """
        control = self._control.fileno()
        while True:
            requests = False
            for fd, _ in self._epoll.poll(self._look()):
                child = self._watched.get(fd)
                if fd == control:
                    requests = True  # last, as new children may get descriptors that have events in this list
                elif child is not None and fd == child.errors:
                    self._executed(child)
                elif child is not None:
                    self._exited(child)
            if requests and not self._receive():
                return

    def _record(self, number: int, kind: int, value: int, detail: int = AT_START, fds: tuple[int, ...] = ()) -> None:
        self._send(pack_record(number, kind, value, detail), fds)

    def _send(self, record: bytes, fds: tuple[int, ...] = ()) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the next read returns the end of file
            if fds:
                self._control.sendmsg([record], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))])
            else:
                self._control.send(record)

    def _look(self) -> float:
        """Hand over the children that take long; return the seconds until the next look, -1 for none."""
        wait = -1.0
        for queue, unconditional in ((self._looks, False), (self._hand_overs, True)):
            while queue:
                at, child = queue[0]
                if child.output:
                    left = at - monotonic()
                    if left > 0:
                        wait = left if wait < 0 else min(wait, left)
                        break
                    if unconditional or _events(child.output):
                        self._hand_over(child)
                queue.popleft()
        return wait

    def _hand_over(self, child: _Child) -> None:
        """Let the daemon read the output of a child that takes long, or that leaves processes behind."""
        self._record(child.number, STARTED, child.pid, fds=child.output)
        child.close_output()

    def _receive(self) -> bool:
        """Serve one request, as epoll reports the next one too; return False at the end of file."""
        if limits() != self._limits:  # looked at before a request is received, which then goes to another server
            for child in self._children.values():
                if child.output and child.errors < 0:
                    self._hand_over(child)
            os._exit(TAMPERED)
        try:
            message, fds = _receive(self._control)
        except BlockingIOError:
            return True
        except ConnectionResetError:
            return False
        if not message:
            return False
        try:
            self._serve(message, fds)
        finally:
            for fd in fds:
                os.close(fd)
        return True

    def _serve(self, message: bytes, fds: list[int]) -> None:
        kind, number, payload = unpack_request(message)
        try:
            if kind == START:
                self._start(number, StartRequest.unpack(payload), fds)
            elif kind == START_LONG:
                if not fds:  # it did not fit under RLIMIT_NOFILE
                    raise OSError(errno.EMFILE, "")
                long = os.pread(fds[-1], os.fstat(fds[-1]).st_size, 0)
                self._start(number, StartRequest.unpack(long), fds[:-1])
            elif kind == SIGNAL:
                self._signal(number, int.from_bytes(payload, "little"))
            elif kind == FORK:
                self._fork_server(number, fds)
            else:
                raise MalformedMessage(f"a request of kind {kind}")
        except OSError as error:
            self._record(number, FAILED, error.errno or errno.EIO)
        except ValueError:  # a limit that is above a hard one, or an argument that Python does not pass to the kernel
            self._record(number, FAILED, errno.EINVAL if limits() == self._limits else errno.EAGAIN)

    def _start(self, number: int, request: StartRequest, fds: list[int]) -> None:
        directory = -1
        if request.directory:
            if not fds:  # it did not fit under RLIMIT_NOFILE
                raise OSError(errno.EMFILE, "")
            fds, directory = fds[:-1], fds[-1]
        if not request.collect:
            child = self._start_with(number, request, fds, directory)
            if child is not None and child.errors < 0:
                self._record(number, STARTED, child.pid)
            return
        pipes: list[int] = []
        child = None
        try:
            for _ in range(2):
                pipes.extend(os.pipe2(os.O_CLOEXEC))
            child = self._start_with(number, request, pipes[1::2], directory)
        finally:
            for fd in pipes[1::2] if child is not None else pipes:
                os.close(fd)
        if child is not None:
            child.output = tuple(pipes[::2])
            if child.errors < 0:
                self._collect(child)

    def _start_with(self, number: int, request: StartRequest, fds: list[int], directory: int) -> _Child | None:
        """
        Start a child with these descriptors; return None if its program cannot be executed, which has been reported.

        :param directory: a descriptor of its working directory, or -1.
        """
        if len(fds) < len(request.targets):  # they did not fit under RLIMIT_NOFILE
            raise OSError(errno.EMFILE, "")
        if self._env[0] != request.env:
            self._env = (request.env, variables(request.env))
        stays = request.cwd is None or (directory >= 0 and self._home >= 0)
        plain = stays and request.user is None and not (request.cgroup or request.limits or request.tty)
        program = standard_path(request.program, self._env[1]) if plain else None
        if program is None:
            child = self._add(number, *self._fork(request, fds), survives(request.mark))
            self._record(number, FORKED, child.pid)
            return child
        # Nothing that it touches can block: vfork(2), which suspends this process until the program is executed.
        if directory >= 0:
            try:
                os.fchdir(directory)
            except OSError as error:
                self._record(number, FAILED, error.errno or errno.EIO, AT_CWD)
                return None
        try:
            pid = self._posix_spawn(program, request, fds)
        except OSError as error:
            if error.errno not in _EXEC_ERRORS:
                raise
            self._record(number, FAILED, error.errno, AT_EXEC)
            return None
        finally:
            if directory >= 0:
                self._return_home()
        return self._add(number, pid, -1, survives(request.mark))

    def _return_home(self) -> None:
        """Enter the own directory again, in which other children begin; exit if that is forbidden now."""
        try:
            os.fchdir(self._home)
        except OSError:
            os._exit(LOST)

    def _collect(self, child: _Child) -> None:
        """Collect the output of a child that executes its program, for a while."""
        now = monotonic()
        self._looks.append((now + LOOK, child))
        self._hand_overs.append((now + HAND_OVER, child))

    def _posix_spawn(self, program: bytes, request: StartRequest, fds: list[int]) -> int:
        ends = [
            (os.POSIX_SPAWN_DUP2, fd, target)
            for fd, targets in zip(fds, request.targets)  # noqa: B905
            for target in targets
        ]
        env = self._env[1] if marks_by_limit() else with_mark(self._env[1], request.mark)
        with inherited_mark(request.mark), inherited_nofile(self._nofile):
            return os.posix_spawn(program, request.argv, env, file_actions=ends, setsid=True)

    def _fork(self, request: StartRequest, fds: list[int]) -> tuple[int, int]:
        """
        Start a child by fork(2), as what it does before it executes the shell may block or fail.

        :return: its pid, and the read end of the pipe through which it reports that.
        """
        errors, their_errors = os.pipe2(os.O_CLOEXEC)
        try:
            with inherited_mark(request.mark):
                pid = os.fork()
                if pid == 0:
                    execute(request, fds, self._nofile, their_errors)
        except OSError:
            os.close(errors)
            raise
        finally:
            os.close(their_errors)
        return pid, errors

    def _add(self, number: int, pid: int, errors: int, survives: bool) -> _Child:
        """Watch a child."""
        watched = [errors] if errors >= 0 else []
        try:
            watched.insert(0, os.pidfd_open(pid))
            for fd in watched:
                self._epoll.register(fd, select.EPOLLIN)
        except OSError:  # no descriptor or memory, or too much is watched (epoll(7))
            os.killpg(pid, signal.SIGKILL) if errors < 0 else os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            for fd in watched:
                os.close(fd)
            raise OSError(errno.EIO, "it has run for a moment") from None
        child = self._children[number] = _Child(number, pid, watched[0], errors, survives)
        self._watched.update(dict.fromkeys(watched, child))
        return child

    def _executed(self, child: _Child) -> None:
        """Report that a forked child executes its program, or why it does not."""
        report = os.read(child.errors, 8)
        self._forget(child.errors)
        child.errors = -1
        if report:
            self._fail(child, int.from_bytes(report[1:], "little"), report[0])
        elif _name(child.pid) == NAME:  # it was killed before
            self._fail(child, errno.ECANCELED)
        elif child.output:
            self._collect(child)
        else:
            self._record(child.number, STARTED, child.pid)

    def _fail(self, child: _Child, error: int, detail: int = AT_START) -> None:
        """Report that a child does not execute its program; it still has to be reaped."""
        self._record(child.number, FAILED, error, detail)
        del self._children[child.number]
        child.number = 0
        child.close_output()

    def _signal(self, number: int, signum: int) -> None:
        """Signal a child's process group. Its pid is not reused before this process has reaped it."""
        child = self._children.get(number)
        if child is None:
            return
        try:
            if child.errors < 0:
                os.killpg(child.pid, signum)
            elif signum == signal.SIGKILL:
                os.kill(child.pid, signum)
                if _name(child.pid) == NAME:  # it will die without having executed anything, even if that takes long
                    self._forget(child.errors)
                    child.errors = -1
                    self._fail(child, errno.ETIMEDOUT)
        except (ProcessLookupError, PermissionError):
            pass

    def _kill_children(self) -> None:
        """Kill the children that have no mark any more; last, as some are found by their parents."""
        for child in self._children.values():
            if not child.survives:
                with suppress(ProcessLookupError, PermissionError):
                    (os.kill if child.errors >= 0 else os.killpg)(child.pid, signal.SIGKILL)

    def _exited(self, child: _Child) -> None:
        """Report the exit of a child; then, while the daemon is at it, close what was its own."""
        if child.errors >= 0:
            self._executed(child)
        status = os.waitpid(child.pid, 0)[1]
        if child.number:
            del self._children[child.number]
            self._report_exit(child, status)
            child.close_output()
        self._forget(child.pidfd)

    def _report_exit(self, child: _Child, status: int) -> None:
        if child.output:
            events = _events(child.output)
            # Hung up: it has no writer any more, and a read does not block.
            sizes = [_size(fd) if events.get(fd, 0) & select.POLLIN else 0 for fd in child.output]
            if all(events.get(fd, 0) & select.POLLHUP for fd in child.output) and sum(sizes) <= MAX_OUTPUT:
                texts = [os.read(fd, size) if size else b"" for fd, size in zip(child.output, sizes)]  # noqa: B905
                self._send(pack_done(child.number, child.pid, status, *texts))
                return
            self._hand_over(child)
        self._record(child.number, EXITED, status)

    def _forget(self, fd: int) -> None:
        # Not by closing alone: a forked child may have a copy, and then epoll would report its events for ever.
        self._epoll.unregister(fd)
        del self._watched[fd]
        os.close(fd)

    def _fork_server(self, number: int, fds: list[int]) -> None:
        """Fork another server; the request's descriptor is its socket to the daemon."""
        if not fds:
            raise OSError(errno.EMFILE, "")
        pid = os.fork()
        if pid:
            self._add(number, pid, -1, True)
            self._record(number, STARTED, pid)
            return
        os.setsid()
        for fd in self._watched:
            os.close(fd)
        for child in self._children.values():
            child.close_output()
        self._epoll.close()
        self._control.close()
        if self._home >= 0:
            os.close(self._home)
        SpawnServer(socket.socket(fileno=fds[0]), self._daemon, self._base, self._nofile, self._limits).serve()

    def _daemon_exited(self) -> bool:
        """Return whether the daemon has exited, waiting some seconds for it, as it closes its sockets first."""
        poll = select.poll()
        poll.register(self._daemon, select.POLLIN)
        return bool(poll.poll(_DAEMON_EXIT * 1000))


def _enter_own_directory() -> int:
    """Return a descriptor of the working directory; -1 if this process could not return there from another."""
    fd = os.open(b".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fchdir(fd)
    except OSError:
        os.close(fd)
        return -1
    return fd


def _events(fds: tuple[int, ...]) -> dict[int, int]:
    """Return the pipes that have data or no writer, and which of both."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return dict(poll.poll(0))


def _size(fd: int) -> int:
    """Return the number of bytes in a pipe."""
    return int.from_bytes(fcntl.ioctl(fd, termios.FIONREAD, bytes(4)), sys.byteorder)


def _name(pid: int) -> bytes:
    """Return the command name of a process that has not been reaped."""
    try:
        with open(f"/proc/{pid}/comm", "rb", buffering=0) as file:
            return file.read().rstrip(b"\n")
    except OSError:
        return b""


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a request and its descriptors; an empty request at the end of file."""
    message, ancillary, _, _ = control.recvmsg(INLINE, 256, RECEIVE_FLAGS)
    if not ancillary:
        return message, []
    fds = array("i")
    for _, _, data in ancillary:
        fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return message, list(fds)


def limits() -> list[tuple[int, int]]:
    """Return all resource limits of this process."""
    return list(map(resource.getrlimit, _LIMITS))


def _ignore(signum: int, frame: object) -> None:
    """Do nothing. A handler in place of SIG_IGN, which children would inherit."""


def main(fd: int, base: int, nofile: int, daemon_pid: int) -> None:
    """
    Run a server for the daemon, which is the parent of this process.

    :param fd: the socket to the daemon.
    :param base: the base of the daemon's marks.
    :param nofile: the soft limit of open files of a child.
    """
    _raise_oom_score()  # a process that is not dumpable may not write to its own files in /proc, unless it is root
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    libc.prctl(_PR_SET_NAME, NAME, 0, 0, 0)
    _reset_signals()
    marks_by_limit()  # before a command can change this process's limits
    try:
        daemon = os.pidfd_open(daemon_pid)
    except ProcessLookupError:
        daemon = -1
    if daemon < 0 or os.getppid() != daemon_pid:  # it has died since it started this process
        kill_remaining(base)
        return
    # Each child needs a descriptor here; the daemon may not have raised its own limit yet.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    control = socket.socket(fileno=fd)
    control.set_inheritable(False)
    gc.freeze()
    SpawnServer(control, daemon, base, nofile, limits()).serve()


def _reset_signals() -> None:
    """
    Give every signal its default disposition and unblock it, as children inherit both from here.

    This process ignores signals by a handler that does nothing, which execve(2) resets.
    """
    for signum in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        signal.signal(signum, _ignore if signum in _IGNORED else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _raise_oom_score() -> None:
    """Make the kernel kill this process and its children before the daemon when memory is short; see proc(5)."""
    try:
        with open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:
            own = int(os.pread(file.fileno(), 16, 0))
            os.pwrite(file.fileno(), b"%d" % min(own + OOM_SCORE_STEP, OOM_SCORE_MAX), 0)
    except OSError:
        pass
