"""The Unix socket: who may come in, what is replaced, what is left behind."""

from __future__ import annotations

import http.client
import json
import os
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet import reactor
from twisted.internet.protocol import Factory
from twisted.logger import ILogObserver, LogEvent, globalLogPublisher
from twisted.protocols.wire import Echo

from sandboxd.daemon.sockets import ListeningSocket, listen_at, listen_on_port
from tests.daemon import SECRET, Daemon
from tests.test_daemon import IN_FOREGROUND, assert_refused, twistd
from tests.waiting import until


class Client(http.client.HTTPConnection):
    """An HTTP client of a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=15)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(15)
        self.sock.connect(str(self._path))

    def call(self, method: str, path: str, data: Any = None, secret: str | None = SECRET) -> tuple[int, bytes]:
        headers = {} if secret is None else {"Authorization": f"Bearer {secret}"}
        self.request(method, path, None if data is None else json.dumps(data), headers)
        response = self.getresponse()
        return response.status, response.read()


Connect = Callable[[Path], Client]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Makes clients that are closed after the test."""
    with ExitStack() as stack:
        yield lambda path: stack.enter_context(closing(Client(path)))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def test_the_whole_api_is_there_and_asks_for_the_token(
    start_daemon: Callable[..., Daemon], path: Path, connect: Connect
) -> None:
    daemon = start_daemon(f"--socket={path}", PORT="")
    assert daemon.port == 0, "there is no port beside it unless one is asked for"
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    client = connect(path)
    assert client.call("GET", "/health", secret=None)[0] == 200
    assert client.call("POST", "/run", {"cmd": "true"}, secret=None)[0] == 401
    assert json.loads(client.call("POST", "/run", {"cmd": "seq 100000 | tail -n 1"})[1])["stdout"] == "100000\n"
    streamed = client.call("POST", "/run_streaming", {"cmd": "seq 100000"})[1]
    assert streamed.count(b"event: output\n") == 100_000
    assert daemon.stop() == 0
    assert not path.exists()
    assert "Traceback" not in daemon.log.read_text()


def test_a_port_can_be_had_beside_it(start_daemon: Callable[..., Daemon], path: Path, connect: Connect) -> None:
    daemon = start_daemon(SANDBOX_SOCKET=str(path), PORT="0")
    assert daemon.port != 0
    assert connect(path).call("GET", "/health")[0] == 200


def test_what_a_killed_daemon_left_behind_is_replaced(
    start_daemon: Callable[..., Daemon], path: Path, connect: Connect
) -> None:
    killed = start_daemon(SANDBOX_SOCKET=str(path), PORT="")
    assert killed.stop(signal.SIGKILL) == -signal.SIGKILL
    assert path.exists()
    start_daemon(SANDBOX_SOCKET=str(path), PORT="")
    assert connect(path).call("GET", "/health")[0] == 200


def test_a_socket_in_use_is_left_alone(tmp_path: Path, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        inode = path.stat().st_ino
        ended = twistd(tmp_path, *IN_FOREGROUND, "sandboxd", SANDBOX_SECRET=SECRET, SANDBOX_SOCKET=str(path))
        assert_refused(ended, f"SANDBOX_SOCKET {path}", "Address already in use")
        assert path.stat().st_ino == inode


@pytest.mark.parametrize("kind", ["file", "directory", "dangling link", "link to a stale socket"])
def test_what_is_no_socket_is_left_alone(tmp_path: Path, path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to(tmp_path / "nothing")
    else:
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(str(tmp_path / "stale"))
        path.symlink_to(tmp_path / "stale")
    before = path.lstat()
    with pytest.raises(OSError, match="Address already in use"):
        listen_at(path)
    assert path.lstat() == before
    assert sorted(os.listdir(tmp_path)) in (["socket"], ["socket", "stale"])


@pytest.mark.parametrize("path", ["/nope/socket", "x" * 200], ids=["no folder", "too long"])
def test_a_path_that_cannot_be_is_told_in_one_line(tmp_path: Path, path: str) -> None:
    ended = twistd(tmp_path, *IN_FOREGROUND, "sandboxd", SANDBOX_SECRET=SECRET, SANDBOX_SOCKET=path)
    assert_refused(ended, "SANDBOX_SOCKET")


def test_one_that_another_daemon_has_replaced_is_not_removed(path: Path) -> None:
    ours = listen_at(path)
    path.rename(path.with_name("ours"))  # it keeps its inode, so that theirs has another
    theirs = listen_at(path)
    ours.remove()
    assert path.exists()
    theirs.remove()
    assert not path.exists()
    ours.close()
    theirs.close()


def connected_to(listening: ListeningSocket, path: Path) -> socket.socket:
    """A client that the kernel has connected, whether or not it was accepted."""
    if listening.port is not None:
        return socket.create_connection(("127.0.0.1", listening.port))
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(path))
    return client


async def echoes(client: socket.socket) -> None:
    """Returns once what is sent comes back."""
    client.setblocking(False)
    client.sendall(b"x")

    def received() -> bytes:
        try:
            return client.recv(1)
        except BlockingIOError:
            return b""

    await until(received)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
async def test_a_port_survives_a_lack_of_descriptors(path: Path, kind: str) -> None:
    listening = listen_on_port(0) if kind == "tcp" else listen_at(path)
    port: Any = listening.serve(reactor, Factory.forProtocol(Echo))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    events: list[LogEvent] = []
    observer = cast(ILogObserver, events.append)
    globalLogPublisher.addObserver(observer)
    with ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, before)
        clients = [stack.enter_context(connected_to(listening, path)) for _ in range(3)]
        # None is to be had, not even that which is kept for this, as if a thread took it each time.
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
        for _ in range(3):
            port.doRead()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for client in clients:
            await echoes(client)
        # Only that one is to be had: who waits is closed.
        late = stack.enter_context(connected_to(listening, path))
        taken = [os.open("/", os.O_PATH)]
        stack.callback(lambda: [os.close(fd) for fd in taken])
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))) + 1, before[1]))
        try:
            while True:
                taken.append(os.dup(taken[0]))
        except OSError:
            pass
        for _ in range(2):
            port.doRead()
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        late.settimeout(10)
        assert late.recv(1) == b""
        await echoes(stack.enter_context(connected_to(listening, path)))
    globalLogPublisher.removeObserver(observer)
    await port.stopListening()
    assert not [event for event in events if "log_failure" in event], events
    assert len([event for event in events if "connections are not accepted" in str(event.get("log_format"))]) == 1
