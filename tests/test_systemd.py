"""What a service manager gives and is told, with real sockets in its place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from twisted.internet import reactor
from twisted.internet.task import Clock

from sandboxd.daemon.systemd import ActivationError, ServiceManager, inherited_sockets
from tests.client import Api
from tests.daemon import SECRET, TWISTD, Daemon
from tests.test_daemon import IN_FOREGROUND, assert_refused

#: Gives its program the descriptors that it was itself given in FDS as 3, 4 and so on, as systemd does.
ACTIVATE = """
import fcntl, os, sys
kept = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in os.environ["FDS"].split()]
for place, fd in enumerate(kept, 3):
    os.dup2(fd, place)
    os.close(fd)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[1], sys.argv[1:])
"""
VIA = [sys.executable, "-c", ACTIVATE]


class Manager:
    """Where a service manager listens."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(address.replace("@", "\0", 1))
        self._sock.settimeout(15)

    def next(self) -> dict[str, str]:
        """The next message."""
        return dict(line.split("=", 1) for line in self._sock.recv(4096).decode().splitlines())

    def next_but_watchdog(self) -> dict[str, str]:
        """The next that does more than feed the watchdog."""
        while (message := self.next()) == {"WATCHDOG": "1"}:
            pass
        return message

    def pending(self) -> list[dict[str, str]]:
        """Those that wait."""
        messages = []
        self._sock.setblocking(False)
        try:
            while True:
                messages.append(self.next())
        except BlockingIOError:
            self._sock.settimeout(15)
            return messages

    def close(self) -> None:
        self._sock.close()


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(f"@sandboxd-test-{os.getpid()}" if request.param == "abstract" else str(tmp_path / "notify"))
    yield manager
    manager.close()


def test_from_ready_to_stopping_the_manager_is_told(start_daemon: Callable[..., Daemon], manager: Manager) -> None:
    daemon = start_daemon(NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="200000")
    ready = manager.next()
    assert ready["READY"] == "1"
    assert f"port {daemon.port}" in ready["STATUS"]
    for _ in range(3):
        assert manager.next() == {"WATCHDOG": "1"}
    os.kill(daemon.pid, signal.SIGHUP)
    reloading = manager.next_but_watchdog()
    assert reloading["RELOADING"] == "1"
    assert int(reloading["MONOTONIC_USEC"]) > 0
    assert manager.next_but_watchdog()["READY"] == "1"
    assert daemon.stop() == 0
    assert manager.next_but_watchdog()["STOPPING"] == "1"


def test_a_reactor_that_is_stuck_does_not_feed_the_watchdog(manager: Manager) -> None:
    clock = Clock()
    told = ServiceManager({"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "10000000"}, clock)
    told.ready("")
    manager.pending()
    clock.advance(4.9)
    assert manager.pending() == []
    clock.advance(0.1)
    assert manager.pending() == [{"WATCHDOG": "1"}]


@pytest.mark.parametrize(
    "environ",
    [{}, {"WATCHDOG_USEC": "x"}, {"WATCHDOG_USEC": "0"}, {"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"}],
    ids=str,
)
def test_a_watchdog_that_is_not_ours_is_not_fed(manager: Manager, environ: Mapping[str, str]) -> None:
    clock = Clock()
    ServiceManager({"NOTIFY_SOCKET": manager.address, **environ}, clock).ready("")
    assert clock.getDelayedCalls() == []
    assert manager.pending() == [{"READY": "1", "STATUS": ""}]


@pytest.mark.parametrize("address", ["", "/nope/nobody/here"])
def test_a_manager_that_is_not_there_is_no_fault(address: str) -> None:
    ServiceManager({"NOTIFY_SOCKET": address}, reactor).ready("")


async def test_commands_know_nothing_of_the_manager(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    manager = Manager(str(tmp_path / "notify"))
    daemon = start_daemon(NOTIFY_SOCKET=manager.address, WATCHDOG_USEC="60000000", LISTEN_FDS="0", LISTEN_PID="1")
    ran = await Api(daemon.url, SECRET).run("env | grep -E 'NOTIFY|WATCHDOG|LISTEN'; ls /proc/self/fd | wc -l")
    assert ran["stdout"].split() == ["4"]
    manager.close()


# Sockets that were opened for it


@pytest.mark.parametrize("names", ["proxy:http", ""])
async def test_it_serves_the_sockets_that_it_is_given(start_daemon: Callable[..., Daemon], names: str) -> None:
    given = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    proxy, http = given if names else given[::-1]
    ports = [sock.getsockname()[1] for sock in (http, proxy)]
    early = socket.create_connection(("127.0.0.1", ports[0]))
    early.sendall(b"GET /health HTTP/1.0\r\n\r\n")  # sent before there is a daemon, and answered
    daemon = start_daemon(
        via=VIA, pass_fds=[sock.fileno() for sock in given], FDS=" ".join(str(sock.fileno()) for sock in given),
        LISTEN_FDS="2", SANDBOX_SOCKET="/nope/none/either", **({"LISTEN_FDNAMES": names} if names else {}),
    )  # fmt: skip
    assert [daemon.port, daemon.proxy_port] == ports
    early.settimeout(10)
    assert early.recv(15) == b"HTTP/1.0 200 OK"
    early.close()
    ran = await Api(daemon.url, SECRET).run("ls -l /proc/self/fd | grep -c socket; env | grep LISTEN")
    assert ran["stdout"] == "0\n"
    assert daemon.stop() == 0
    for sock in given:  # they go on to listen, for the next one
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        sock.close()


def activated(count: str, **environ: str) -> dict[str, str]:
    return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": count, **environ}


def test_sockets_for_another_process_are_left_alone() -> None:
    assert inherited_sockets({**activated("2"), "LISTEN_PID": "1"}, ["http"]) == {"http": []}


@pytest.mark.parametrize("count", ["", "x", "-1", "99999"])
def test_a_bad_number_of_sockets_is_refused(count: str) -> None:
    with pytest.raises(ActivationError, match="LISTEN_FDS"):
        inherited_sockets(activated(count), ["http"])


def unusable() -> Iterator[int]:
    """Descriptors that nobody can accept from."""
    yield os.open("/dev/null", os.O_RDONLY)
    yield socket.socket(socket.AF_INET, socket.SOCK_STREAM).detach()
    yield socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach()


def test_what_is_no_listening_socket_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for fd in unusable():
        monkeypatch.setattr("sandboxd.daemon.systemd.FIRST_FD", fd)
        with pytest.raises(ActivationError, match=f"descriptor {fd} of LISTEN_FDS"):
            inherited_sockets(activated("1"), ["http"])


def test_a_socket_of_another_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        monkeypatch.setattr("sandboxd.daemon.systemd.FIRST_FD", sock.detach())
        with pytest.raises(ActivationError, match="'web'; FileDescriptorName= must be one of http, proxy"):
            inherited_sockets(activated("3", LISTEN_FDNAMES="web:http"), ["http", "proxy"])


@pytest.mark.slow
def test_a_bad_activation_is_told_in_one_line(tmp_path: Path) -> None:
    ended = subprocess.run(
        [*VIA, sys.executable, TWISTD, *IN_FOREGROUND, "sandboxd"],
        cwd=tmp_path, env={**os.environ, "SANDBOX_SECRET": SECRET, "FDS": "0", "LISTEN_FDS": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert_refused(ended, "descriptor 3 of LISTEN_FDS")
