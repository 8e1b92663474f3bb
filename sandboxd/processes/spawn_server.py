"""
The spawn server: a program that starts commands for the daemon, and the messages that the two exchange.

It is a process of its own, because a start blocks until the child's execve(2) is done, which takes tens of milliseconds
while all processors are busy. The daemon sends a request over a socket, with the child's ends of its pipes; the server
starts the child and sends its pid, and later its exit status. What children inherit but the daemon does not have
(rlimits, oom_score_adj) is set here, so that the daemon never changes itself for a child.

It is also the guardian: when the daemon is gone, for whatever reason, it kills the processes of all executions, which
it finds by :mod:`sandboxd.processes.marks`.

Both ends are of one version of this code, so messages are :mod:`marshal` data. This module imports little of the
standard library and nothing else, to start fast and to be small.
"""

from __future__ import annotations

import errno
import marshal
import os
import resource
import select
import signal
import socket
from contextlib import suppress
from functools import partial
from typing import Any

from sandboxd.processes.limits import inherited_nofile
from sandboxd.processes.marks import guard, inherited_mark

#: The shell, by its full path: a command's PATH must not change it.
SH = "/bin/sh"

#: Kinds of records, their second item.
STARTED, FAILED, EXITED = range(3)

#: Most bytes of a request that is sent as one message; a longer one is sent as a memfd.
INLINE = 64 * 1024

#: Most requests that are served before records are sent.
BURST = 8

#: Signals that Python ignores and a child must not, and signals that this process ignores.
_RESTORED = (signal.SIGPIPE, signal.SIGXFSZ)
_IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

#: Added to oom_score_adj, so that commands are killed before the daemon when memory is short; see proc(5).
OOM_SCORE_STEP = 200
OOM_SCORE_MAX = 1000


class SpawnServer:
    """
    Start the children that the daemon requests, until it closes its end of the socket.

    :param control: the socket to the daemon.
    :param nofile: the soft limit of open files of a child.
    """

    def __init__(self, control: socket.socket, nofile: int) -> None:
        self._control = control
        self._epoll = select.epoll()
        self._epoll.register(control.fileno(), select.EPOLLIN)
        self._children: dict[int, tuple[int, int]] = {}  # number and pid of each child, by pidfd
        self._pidfds: dict[int, int] = {}  # and back, by number
        self._records: list[tuple[int, ...]] = []
        self._home = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._nofile = nofile

    def run(self) -> None:
        """Serve requests."""
        control = self._control.fileno()
        while True:
            for fd, _ in self._epoll.poll():
                if fd != control:
                    self._exited(fd)
                elif not self._listen():
                    return
            self._send()

    def _send(self) -> None:
        """Send the pending records."""
        while self._records:
            some, self._records = self._records[:256], self._records[256:]
            with suppress(BrokenPipeError, ConnectionResetError):  # the next read returns the end of file
                self._control.send(marshal.dumps(some))

    def _listen(self) -> bool:
        """Serve some requests; return False at the end of file."""
        for _ in range(BURST):
            try:
                message, fds = _receive(self._control)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                return False
            if not message:
                return False
            try:
                if message.startswith(LONG_PREFIX):
                    self._serve_long(int(message[len(LONG_PREFIX) :]), fds)
                else:
                    self._serve(marshal.loads(message), fds)
            finally:
                for fd in fds:
                    os.close(fd)
        return True

    def _serve_long(self, number: int, fds: list[int]) -> None:
        """Serve a request that is in its last descriptor."""
        try:
            size = os.fstat(fds[-1]).st_size
            request = marshal.loads(os.pread(fds[-1], size, 0))
        except (IndexError, OSError):  # the descriptors did not fit under RLIMIT_NOFILE
            self._records.append((number, FAILED, errno.EMFILE, 0))
            return
        self._serve(request, fds[:-1])

    def _serve(self, request: tuple[Any, ...], fds: list[int]) -> None:
        if len(request) == 2:
            self._signal(*request)
            return
        number = request[0]
        try:
            pid = self._start(fds, *request[1:])
            try:
                pidfd = os.pidfd_open(pid)
            except OSError:
                _undo(pid)
                raise
        except OSError as error:
            self._records.append((number, FAILED, error.errno or 0, int(isinstance(error, _CannotEnter))))
            return
        except ValueError:  # an argument that Python does not pass to the kernel
            self._records.append((number, FAILED, errno.EINVAL, 0))
            return
        self._epoll.register(pidfd, select.EPOLLIN)
        self._children[pidfd] = (number, pid)
        self._pidfds[number] = pidfd
        self._records.append((number, STARTED, pid))

    def _signal(self, number: int, signum: int) -> None:
        """Signal a child's process group; its pid is not reused, for this process has not reaped it."""
        pidfd = self._pidfds.get(number)
        if pidfd is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._children[pidfd][1], signum)

    def _exited(self, pidfd: int) -> None:
        number, pid = self._children.pop(pidfd)
        del self._pidfds[number]
        self._epoll.unregister(pidfd)
        os.close(pidfd)
        self._records.append((number, EXITED, os.waitpid(pid, 0)[1]))

    def _start(
        self,
        fds: list[int],
        argv: list[bytes],
        env: dict[bytes, bytes],
        mark: int,
        has_stdin: bool,
        cwd: bytes | None,
        identity: tuple[int, int, tuple[int, ...]] | None,
        cgroup: bytes | None,
    ) -> int:
        """
        Start a child.

        :param fds: its stdout, its stderr, its stdin if it has one, and the other end of that if it has to wait until
            it is in its cgroup.
        :return: its pid.
        """
        if len(fds) < 2 + has_stdin + (cgroup is not None):  # they did not fit under RLIMIT_NOFILE
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        stdout, stderr, *rest = fds
        stdin = rest.pop(0) if has_stdin else 0
        if cwd is not None:
            try:
                os.chdir(cwd)
            except OSError as error:
                raise _CannotEnter(error.errno, error.strerror) from None
        try:
            with inherited_mark(mark):
                if identity is None:
                    with inherited_nofile(self._nofile):
                        pid = _posix_spawn(argv, env, stdin, stdout, stderr)
                else:
                    pid = _fork(argv, env, stdin, stdout, stderr, identity, self._nofile)
        finally:
            if cwd is not None:
                os.fchdir(self._home)
        if cgroup is not None:
            try:
                with open(os.path.join(cgroup, b"cgroup.procs"), "wb", buffering=0) as procs:
                    procs.write(b"%d" % pid)
                os.write(rest[0], b"\n")
            except OSError:
                _undo(pid)
                raise
        return pid


class _CannotEnter(OSError):
    """The working directory cannot be entered."""


def _undo(pid: int) -> None:
    """Kill a child that was just started."""
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def _posix_spawn(argv: list[bytes], env: dict[bytes, bytes], stdin: int, stdout: int, stderr: int) -> int:
    """Start a child as this process's own user. posix_spawn(3) uses vfork(2), which copies no page tables."""
    ends = [(os.POSIX_SPAWN_DUP2, stdout, 1), (os.POSIX_SPAWN_DUP2, stderr, 2)]
    if stdin:
        ends.append((os.POSIX_SPAWN_DUP2, stdin, 0))
    return os.posix_spawn(SH, argv, env, file_actions=ends, setsid=True, setsigdef=_RESTORED)


def _fork(
    argv: list[bytes],
    env: dict[bytes, bytes],
    stdin: int,
    stdout: int,
    stderr: int,
    identity: tuple[int, int, tuple[int, ...]],
    nofile: int,
) -> int:
    """Start a child as another user, by fork(2). It lowers its own limit, for Popen needs descriptors."""
    import subprocess

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]

    popen = subprocess.Popen(
        argv,
        executable=SH,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        env=env,
        start_new_session=True,
        user=identity[0],
        group=identity[1],
        extra_groups=identity[2],
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (nofile, hard)),
    )
    popen.returncode = 0  # reaped as all others are, not by subprocess
    return popen.pid


def _receive(control: socket.socket) -> tuple[bytes, list[int]]:
    """Receive a request and its descriptors; an empty request at the end of file."""
    message, ancillary, _, _ = control.recvmsg(INLINE + 1024, 256, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)
    fds: list[int] = []
    for _, _, data in ancillary:
        fds.extend(memoryview(data).cast("i"))
    return message, fds


#: A message whose data is in its last descriptor, with the child's number. No marshal data begins so.
LONG_PREFIX = b"long "
LONG = LONG_PREFIX + b"%d"


def _ignore(signum: int, frame: object) -> None:
    """Do nothing. Not SIG_IGN, which children would inherit."""


def main(fd: int, base: int, nofile: int) -> None:
    """
    Start commands until the daemon is gone, then kill the processes of its executions.

    :param fd: the socket to the daemon.
    :param base: the base of the daemon's marks.
    :param nofile: the soft limit of open files of a child.
    """
    # The daemon's signals may be sent to all processes around it; this process must outlive the daemon.
    for signum in _IGNORED:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, _ignore)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would leave no exit statuses
    # Each child needs a descriptor here; the daemon may not have raised its own limit yet.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _raise_oom_score()
    control = socket.socket(fileno=fd)
    control.set_inheritable(False)
    SpawnServer(control, nofile).run()
    guard(base)


def _raise_oom_score() -> None:
    """Have this process and its children killed before the daemon when memory is short; see proc(5)."""
    with suppress(OSError), open("/proc/self/oom_score_adj", "r+b", buffering=0) as file:
        own = int(os.pread(file.fileno(), 16, 0))
        os.pwrite(file.fileno(), b"%d" % min(own + OOM_SCORE_STEP, OOM_SCORE_MAX), 0)
