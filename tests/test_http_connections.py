"""What becomes of a connection: half-closed, slow, idle, refused, or read by nobody."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.internet import reactor
from twisted.internet.task import Clock, deferLater
from twisted.internet.threads import deferToThread

from sandboxd.api.operations import RawBody
from sandboxd.api.routing import Reply
from sandboxd.daemon.sockets import ListeningSocket
from sandboxd.reactor.deadline import Deadline
from sandboxd.service import Sandboxd
from sandboxd.web.body import HIGH_WATER, BodyStream
from sandboxd.web.request import Request
from sandboxd.web.tokens import Credentials
from tests.daemon import Daemon, alive
from tests.http_cases import AUTH, BODY
from tests.http_client import Responses
from tests.waiting import until

HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
MIB = 1024 * 1024


@pytest.fixture
def sock(daemon: Daemon) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as sock:
        yield sock


def run(cmd: str, *fields: bytes) -> bytes:
    """A request for ``/run``."""
    body = json.dumps({"cmd": cmd}).encode()
    return b"\r\n".join(
        (b"POST /run HTTP/1.1", b"Host: x", AUTH, b"Content-Length: %d" % len(body), *fields, b"", body)
    )


def next_json(responses: Responses) -> Any:
    answer = responses.next()
    assert answer is not None
    return json.loads(answer.body)


def test_a_client_that_shuts_down_its_side_gets_the_answer_to_what_is_ready(sock: socket.socket) -> None:
    sock.sendall(HEALTH)
    sock.shutdown(socket.SHUT_WR)
    assert next_json(Responses(sock))["status"] == "ok"
    assert sock.recv(1) == b""


def test_a_client_that_shuts_down_its_side_has_hung_up_on_its_command(sock: socket.socket, tmp_path: Any) -> None:
    pid = tmp_path / "pid"
    sock.sendall(run(f"echo $$ > {pid}.tmp; mv {pid}.tmp {pid}; exec sleep 1000"))
    deadline = time.monotonic() + 10
    while not pid.exists():
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)
    sock.shutdown(socket.SHUT_WR)
    assert sock.recv(1) == b""
    while alive(int(pid.read_text())):
        assert time.monotonic() < deadline
        select.select([], [], [], 0.02)


def test_a_refused_client_can_send_on_and_read_the_answer(sock: socket.socket) -> None:
    sock.sendall(b"POST /run HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n")
    for _ in range(40):
        sock.sendall(b"x" * MIB)  # would fail if the daemon had closed its side for reading
    answer = Responses(sock).next()
    assert answer is not None
    assert (answer.status, answer.headers["connection"]) == (401, "close")
    assert sock.recv(1) == b""


def test_requests_behind_one_that_takes_time_are_not_read_without_bound(sock: socket.socket, daemon: Daemon) -> None:
    before = daemon.memory()
    sock.sendall(run("sleep 1"))
    sock.setblocking(False)
    sent = 0
    try:
        while sent < 200 * MIB:
            sent += sock.send(HEALTH * 1000)
    except BlockingIOError:
        pass
    assert sent < 64 * MIB
    assert daemon.memory() - before < 8 * MIB


@pytest.mark.slow
def test_answers_that_nobody_reads_stop_the_reading_of_requests(sock: socket.socket, daemon: Daemon) -> None:
    before = daemon.memory()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    sent, data, quiet = 0, HEALTH * 1000, 0
    while quiet < 3:  # seconds in which the daemon has taken nothing
        _, writable, _ = select.select([], [sock], [], 1.0)
        if writable:
            sent, quiet = sent + sock.send(data), 0
        else:
            quiet += 1
        assert sent < 100 * MIB
    assert daemon.memory() - before < 8 * MIB
    sock.setblocking(True)
    sock.settimeout(10)
    responses = Responses(sock)
    for _ in range(1000):
        assert next_json(responses)["status"] == "ok"  # it goes on


def test_many_requests_in_one_piece_are_all_answered(sock: socket.socket) -> None:
    sock.sendall(HEALTH * 3000)
    responses = Responses(sock)
    assert all(next_json(responses)["status"] == "ok" for _ in range(3000))


def test_a_head_may_come_octet_by_octet(sock: socket.socket) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    request = b"POST /read_file HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    for octet in request + b"%x\r\n%s\r\n0\r\nX: y\r\n\r\n" % (len(BODY), BODY) + HEALTH:
        sock.sendall(bytes([octet]))
    responses = Responses(sock)
    assert "/no/such" in next_json(responses)["error"]
    assert next_json(responses)["status"] == "ok"


@pytest.mark.parametrize("size", [16 * 1024, 16 * 1024 + 1])
def test_a_head_is_as_large_as_the_limit_says(sock: socket.socket, size: int) -> None:
    head = b"GET /health HTTP/1.1\r\nHost: x\r\nX: "
    sock.sendall(head + b"x" * (size - len(head) - 4) + b"\r\n\r\n")
    answer = Responses(sock).next()
    assert answer is not None
    assert answer.status == (200 if size == 16 * 1024 else 400)


@pytest.mark.parametrize(
    "beginning",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"\n",
        b" GET",
        b"GET /health HTTP/1.1\n",
        b"GET /health HTTP/1.1\r\nHost: x\n",
        b"\0",
    ],
)
def test_what_can_be_no_head_is_refused_before_its_end(sock: socket.socket, beginning: bytes) -> None:
    sock.sendall(beginning)
    answer = Responses(sock).next()
    assert answer is not None
    assert answer.status == 400


def test_an_expectation_is_answered_when_the_body_is_wanted(sock: socket.socket) -> None:
    head = b"POST /read_file HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\nExpect: 100-continue\r\nContent-Length: 20\r\n\r\n"
    for _ in range(2):
        sock.sendall(head)
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(BODY)
        assert "/no/such" in next_json(Responses(sock))["error"]


def test_slow_requests_and_idle_connections_end(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--request-timeout=1", "--keep-alive=1")
    for beginning, status in (
        (b"GET /health HTTP/1.1\r\nHo", 408),
        (b"POST /read_file HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\nContent-Length: 20\r\n\r\n{", 408),
        (b"POST /read_file HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n", 408),
        (HEALTH, 200),
        (HEALTH + b"\r\n", 200),
    ):
        with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as sock:
            sock.sendall(beginning)
            responses = Responses(sock)
            answer = responses.next()
            assert answer is not None
            assert answer.status == status
            assert responses.next() is None


def test_a_chunked_body_over_the_limit_is_refused_in_the_middle_of_a_piece(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--max-body=1000")
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as sock:
        head = b"POST /read_file HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
        sock.sendall(head + b"64\r\n%s\r\n" % (b" " * 100) * 200 + b"0\r\n\r\n")
        responses = Responses(sock)
        answer = responses.next()
        assert answer is not None
        assert (answer.status, answer.headers["connection"]) == (413, "close")
        assert responses.next() is None
    assert "Traceback" not in daemon.log.read_text()


async def test_a_connection_goes_on_behind_a_body_that_its_route_has_not_read() -> None:
    http, proxy = (ListeningSocket(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
    service = Sandboxd(cast(Any, reactor), [http], [proxy], Credentials(("secret",)), os.environ)

    @service.routes.route("PUT", "/unread", RawBody())
    async def unread(request: Request, body: BodyStream) -> Reply:
        while not body.complete:
            await deferLater(reactor, 0.01)
        assert body.held
        return Reply({}, 400)

    def exchange() -> list[int]:
        head = b"PUT /unread HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: %d\r\n\r\n"
        with socket.create_connection(("127.0.0.1", cast(int, http.port)), timeout=10) as sock:
            sock.sendall(head % HIGH_WATER + bytes(HIGH_WATER))
            responses = Responses(sock)
            first = responses.next()
            sock.sendall(HEALTH)
            second = responses.next()
        assert first is not None
        assert second is not None
        return [first.status, second.status]

    service.startService()
    try:
        assert await deferToThread(exchange) == [400, 200]
    finally:
        await service.stopService()


def test_a_deadline_expires_once_and_at_the_time_that_was_set_last() -> None:
    clock, expired = Clock(), []
    deadline = Deadline(clock, lambda: expired.append(clock.seconds()))
    deadline.set(10)
    clock.advance(8)
    deadline.set(10)
    clock.pump([1.0] * 9)
    assert expired == []
    clock.advance(1)
    assert expired == [18.0]
    deadline.set(10)
    deadline.clear()
    clock.advance(30)
    assert expired == [18.0]
    deadline.set(100)
    deadline.set(1)
    clock.advance(1)
    assert expired == [18.0, 49.0]
    deadline.set(1)
    deadline.stop()
    assert clock.getDelayedCalls() == []


#: Starts its arguments in a network of their own, with less patience for vanished clients.
APART = """
import runpy, sys
import sandboxd.reactor.liveness
sandboxd.reactor.liveness.RETRANSMISSIONS, sandboxd.reactor.liveness.INTERVAL = 3, 0.2
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

#: Follows the log of a process, in the network of a daemon, and has another request whose answer is far away.
FOLLOW = """
import json, socket, sys, time
port, token = int(sys.argv[1]), sys.argv[2]
def request(method, path, body=None):
    client = socket.create_connection(("127.0.0.1", port), 10)
    data = json.dumps(body or {}).encode()
    fields = ["Host: x", f"Authorization: Bearer {token}", f"Content-Length: {len(data)}", "", ""]
    client.sendall("\\r\\n".join([f"{method} {path} HTTP/1.1", *fields]).encode() + data)
    return client
started = request("POST", "/start_process", {"cmd": "sleep 300"}).recv(65536)
id = json.loads(started.partition(b"\\r\\n\\r\\n")[2])["id"]
silent = request("POST", "/run", {"cmd": "sleep 300"})
stream = request("GET", f"/process_logs_streaming?id={id}")
assert stream.recv(65536)
print("open", flush=True)
time.sleep(60)
"""


def can_unshare() -> bool:
    """Whether networks can be made, and entered."""
    if not all(map(shutil.which, ("unshare", "nsenter", "ip"))):
        return False
    return subprocess.run(["unshare", "-n", "true"], stderr=subprocess.DEVNULL).returncode == 0


@pytest.mark.skipif(not can_unshare(), reason="NOT TESTED: needs root, and the right to make networks")
async def test_a_client_whose_machine_has_vanished_is_given_up(start_daemon: Callable[..., Daemon]) -> None:
    up = ["unshare", "-n", "sh", "-c", 'ip link set lo up; exec "$@"', "sh"]
    daemon = start_daemon(via=[*up, sys.executable, "-c", APART], SANDBOX_HEARTBEAT="1")
    inside = ["nsenter", f"--net=/proc/{daemon.pid}/ns/net"]

    def connections() -> int:
        """Those of the daemon's port that are established."""
        lines = [line.split() for line in Path(f"/proc/{daemon.pid}/net/tcp6").read_text().splitlines()]
        return sum(fields[1].endswith(f":{daemon.port:04X}") and fields[3] == "01" for fields in lines)

    command = [*inside, sys.executable, "-c", FOLLOW, str(daemon.port), daemon.secret]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        try:
            assert client.stdout.readline() == b"open\n"
            assert connections() == 2
            subprocess.run([*inside, "ip", "link", "set", "lo", "down"], check=True)
            await until(lambda: connections() == 1, 20)
            assert client.poll() is None
        finally:
            client.kill()
