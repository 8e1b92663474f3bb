"""The proxy: what it is bound to, and what it does with connections. The sockets are real, and all are on loopback."""

from __future__ import annotations

import ctypes
import hashlib
import http.client
import json
import os
import re
import resource
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from threading import Thread
from typing import Any, cast

import pytest
from twisted.internet import reactor
from twisted.internet.defer import maybeDeferred
from twisted.internet.main import CONNECTION_LOST
from twisted.internet.threads import deferToThread
from twisted.python.failure import Failure

from sandboxd.daemon.sockets import listen_at
from sandboxd.proxy.copying import copy
from sandboxd.proxy.portforward import PortForward, bare_socket
from tests.client import Api
from tests.daemon import SECRET, Daemon
from tests.waiting import settled, until

MIB = 1024 * 1024

#: Seconds after which a socket of these tests gives up.
PATIENCE = 10


def listening(host: str = "127.0.0.1") -> socket.socket:
    """A target."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    target = socket.create_server((host, 0), family=family)
    target.settimeout(PATIENCE)
    return target


def accepted(target: socket.socket) -> socket.socket:
    """The next connection to a target."""
    sock = target.accept()[0]
    sock.settimeout(PATIENCE)
    return sock


def connected(daemon: Daemon) -> socket.socket:
    """A new connection to the proxy."""
    return socket.create_connection(("127.0.0.1", daemon.proxy_port), timeout=PATIENCE)


def all_from(sock: socket.socket) -> bytes:
    """Everything until the end."""
    return b"".join(iter(lambda: sock.recv(65536), b""))


def exactly(sock: socket.socket, size: int) -> bytes:
    """So many bytes."""
    data = b""
    while len(data) < size:
        chunk = sock.recv(size - len(data))
        assert chunk, f"ended after {data!r}"
        data += chunk
    return data


def is_over(sock: socket.socket) -> bool:
    """Waits for the end of a connection; whether it came without a byte."""
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True


def vanish(sock: socket.socket) -> None:
    """Have the kernel drop every segment that comes for a socket, so that nothing is acknowledged: see socket(7)."""
    program = ctypes.create_string_buffer(struct.pack("=HBBI", 0x06, 0, 0, 0))  # BPF_RET | BPF_K: accept 0 bytes
    so_attach_filter = 26
    sock.setsockopt(socket.SOL_SOCKET, so_attach_filter, struct.pack("@HP", 1, ctypes.addressof(program)))


async def bind(api: Api, target: socket.socket | int) -> int:
    """Bind the proxy to a target, whatever it was bound to before."""
    port: int = target if isinstance(target, int) else target.getsockname()[1]
    await unbind(api)
    response = await api.post("/bind_port", {"port": str(port)})
    assert response.status == 200, response
    return port


async def unbind(api: Api) -> None:
    response = await api.post("/unbind_port", {})
    assert response.json() == {"success": True, "message": "Port binding removed"}


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with listening() as target:
        yield target


# The routes


@pytest.mark.parametrize("port", ["8080", 8080])
async def test_binding_answers_and_shows_in_the_status(api: Api, daemon: Daemon, port: str | int) -> None:
    await unbind(api)
    response = await api.post("/bind_port", {"port": port})
    assert (response.status, response.json()) == (
        200,
        {"success": True, "message": "Port binding configured", "port": "8080"},
    )
    status = {"success": True, "port": "8080", "proxy_port": str(daemon.proxy_port)}
    assert (await api.get("/port_status")).json() == status
    await unbind(api)
    assert (await api.get("/port_status")).json() == {**status, "port": ""}


@pytest.mark.parametrize("port", ["1", "65535", 1, 65535])
async def test_the_first_and_the_last_port_can_be_bound(api: Api, port: str | int) -> None:
    await unbind(api)
    assert (await api.post("/bind_port", {"port": port})).status == 200


NOT_PORTS = [
    "abc",
    "",
    " ",
    "0",
    "65536",
    "-1",
    "8080abc",
    "80.5",
    "0x50",
    "1e3",
    "\u0663\u0663",
    "99999999999",
    "0000010000000",
    0,
    65536,
    -1,
    1 << 70,
    80.5,
    True,
    None,
    ["8080"],
]


@pytest.mark.parametrize("port", NOT_PORTS, ids=ascii)
async def test_what_is_no_port_is_refused_and_binds_nothing(api: Api, port: object) -> None:
    await unbind(api)
    response = await api.post("/bind_port", {"port": port})
    assert response.status == 400
    assert response.json()["success"] is False
    assert "port" in response.json()["error"]
    assert (await api.get("/port_status")).json()["port"] == ""


async def test_binding_needs_a_port(api: Api) -> None:
    response = await api.post("/bind_port", {})
    assert response.status == 400
    assert "port" in response.json()["error"]


async def test_the_proxy_cannot_be_bound_to_itself(api: Api, daemon: Daemon) -> None:
    await unbind(api)
    assert (await api.post("/bind_port", {"port": daemon.proxy_port})).status == 400


def test_the_proxy_cannot_be_bound_to_another_port_of_its_own(start_daemon: Callable[..., Daemon]) -> None:
    code = (
        "import os, socket, sys\n"
        "socks = [socket.create_server(('127.0.0.1', 0)) for _ in range(3)]\n"
        "[os.dup2(sock.fileno(), 20 + number) for number, sock in enumerate(socks)]\n"
        "[os.dup2(20 + number, 3 + number) for number in range(3)]\n"
        "os.environ.update(LISTEN_FDS='3', LISTEN_FDNAMES='http:proxy:proxy', LISTEN_PID=str(os.getpid()))\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    daemon = start_daemon(via=(sys.executable, "-c", code))
    ports = re.search(r"proxy on port (\d+), port (\d+)", daemon.log.read_text())
    assert ports is not None
    for port in ports.groups():
        client = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=10)
        client.request("POST", "/bind_port", json.dumps({"port": port}), {"Authorization": f"Bearer {daemon.secret}"})
        assert client.getresponse().status == 400
        client.close()


async def test_a_proxied_connection_logs_nothing(api: Api, daemon: Daemon, target: socket.socket) -> None:
    await bind(api, target)
    before = daemon.log.read_bytes()
    with connected(daemon) as client, accepted(target) as server:
        client.sendall(b"x")
        assert exactly(server, 1) == b"x"
    assert daemon.log.read_bytes() == before


@pytest.mark.parametrize("again", ["8080", "9090"])
async def test_binding_twice_is_a_conflict_that_names_the_bound_port(api: Api, again: str) -> None:
    await bind(api, 8080)
    response = await api.post("/bind_port", {"port": again})
    assert (response.status, response.json()) == (
        409,
        {"success": False, "error": "Port already bound", "current_port": "8080"},
    )
    assert (await api.get("/port_status")).json()["port"] == "8080"


@pytest.mark.parametrize("port", ["9090", 9090])
async def test_unbinding_another_port_is_a_conflict_and_changes_nothing(api: Api, port: str | int) -> None:
    await bind(api, 8080)
    response = await api.post("/unbind_port", {"port": port})
    assert response.status == 409
    assert response.json()["success"] is False
    assert (await api.get("/port_status")).json()["port"] == "8080"


@pytest.mark.parametrize("body", [b"", b"{}", b'{"port": "8080"}', b'{"port": 8080}', b'{"port": null}'])
async def test_unbinding_with_the_right_port_or_without_any(api: Api, body: bytes) -> None:
    await bind(api, 8080)
    for _ in "bound", "unbound":
        response = await api.post("/unbind_port", body)
        assert (response.status, response.json()) == (200, {"success": True, "message": "Port binding removed"})
        assert (await api.get("/port_status")).json()["port"] == ""


async def test_unbinding_what_is_no_port_is_refused(api: Api) -> None:
    await bind(api, 8080)
    response = await api.post("/unbind_port", {"port": "abc"})
    assert response.status == 400
    assert "port" in response.json()["error"]
    assert (await api.get("/port_status")).json()["port"] == "8080"


# Connections


async def test_unbound_the_proxy_accepts_and_closes_within_100_ms(api: Api, daemon: Daemon) -> None:
    await unbind(api)
    times = []
    for _ in range(20):
        started = time.monotonic()
        with connected(daemon) as client:
            assert client.recv(1) == b""
        times.append(time.monotonic() - started)
    assert sorted(times)[len(times) // 2] < 0.1


async def test_bytes_are_forwarded_both_ways(api: Api, daemon: Daemon, target: socket.socket) -> None:
    await bind(api, target)
    with connected(daemon) as client, accepted(target) as server:
        for turn in range(3):
            client.sendall(b"question %d" % turn)
            assert exactly(server, 10) == b"question %d" % turn
            server.sendall(b"answer %d" % turn)
            assert exactly(client, 8) == b"answer %d" % turn


async def test_a_target_that_speaks_first_is_heard(api: Api, daemon: Daemon, target: socket.socket) -> None:
    await bind(api, target)
    with connected(daemon) as client, accepted(target) as server:
        server.sendall(b"hello")
        assert exactly(client, 5) == b"hello"


async def test_an_answer_after_the_half_close_of_the_client_arrives(
    api: Api, daemon: Daemon, target: socket.socket
) -> None:
    await bind(api, target)
    with connected(daemon) as client:
        client.sendall(b"question")
        client.shutdown(socket.SHUT_WR)
        with accepted(target) as server:
            assert all_from(server) == b"question"
            server.sendall(b"answer")
        assert all_from(client) == b"answer"


async def test_what_follows_the_half_close_of_the_target_arrives(
    api: Api, daemon: Daemon, target: socket.socket
) -> None:
    await bind(api, target)
    with connected(daemon) as client, accepted(target) as server:
        server.sendall(b"greeting")
        server.shutdown(socket.SHUT_WR)
        assert all_from(client) == b"greeting"
        client.sendall(b"late")
        client.shutdown(socket.SHUT_WR)
        assert all_from(server) == b"late"


@pytest.mark.parametrize("from_client", [True, False], ids=["client", "target"])
async def test_a_half_close_behind_much_data_cuts_nothing_off(
    api: Api, daemon: Daemon, target: socket.socket, from_client: bool
) -> None:
    await bind(api, target)
    data = os.urandom(20 * MIB)
    with connected(daemon) as client, accepted(target) as server, ThreadPoolExecutor() as pool:
        one, other = (client, server) if from_client else (server, client)
        other.shutdown(socket.SHUT_WR)  # so that both ways are closed as soon as the data is through

        def send() -> None:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)

        sending = pool.submit(send)
        assert all_from(one) == b""
        assert all_from(other) == data
        sending.result(PATIENCE)


@pytest.mark.parametrize("from_client", [True, False], ids=["client", "target"])
async def test_a_reset_ends_the_other_side(api: Api, daemon: Daemon, target: socket.socket, from_client: bool) -> None:
    await bind(api, target)
    with connected(daemon) as client, accepted(target) as server:
        client.sendall(b"x")
        assert exactly(server, 1) == b"x"
        one, other = (client, server) if from_client else (server, client)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        one.close()
        assert is_over(other)


async def test_a_target_on_ipv6_only_is_found(api: Api, daemon: Daemon) -> None:
    with listening("::1") as target:
        await bind(api, target)
        with connected(daemon) as client, accepted(target) as server:
            client.sendall(b"over six")
            assert exactly(server, 8) == b"over six"


async def test_a_target_that_refuses_closes_the_connection(api: Api, daemon: Daemon) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # and does not listen
        await bind(api, deaf)
        for _ in range(5):
            with connected(daemon) as client:
                assert is_over(client)


async def test_a_new_binding_serves_new_connections_while_an_old_one_lives(
    api: Api, daemon: Daemon, target: socket.socket
) -> None:
    with listening() as new_target:
        await bind(api, target)
        with connected(daemon) as old_client, accepted(target) as old_server:
            await bind(api, new_target)
            with connected(daemon) as client, accepted(new_target) as server:
                client.sendall(b"new")
                assert exactly(server, 3) == b"new"
                old_client.sendall(b"old")
                assert exactly(old_server, 3) == b"old"
            await unbind(api)
            old_server.sendall(b"still")
            assert exactly(old_client, 5) == b"still"


def send_until_stuck(sock: socket.socket, most: int) -> int:
    """Send until nothing is taken for a second; how many bytes were taken."""
    sent, block = 0, b"x" * MIB
    sock.settimeout(1)
    try:
        while sent < most:
            sent += sock.send(block)
    except TimeoutError:
        pass
    sock.settimeout(PATIENCE)
    return sent


@pytest.mark.slow
@pytest.mark.parametrize("from_client", [True, False], ids=["client", "target"])
async def test_a_side_that_does_not_read_stops_the_other_and_costs_no_memory(
    api: Api, daemon: Daemon, target: socket.socket, from_client: bool
) -> None:
    await bind(api, target)
    with connected(daemon) as client, accepted(target) as server, ThreadPoolExecutor() as pool:
        one, other = (client, server) if from_client else (server, client)
        before, most = daemon.memory(), 300 * MIB
        sent = send_until_stuck(one, most)
        assert 0 < sent < most
        assert daemon.memory() - before < 10 * MIB
        # The way back is free meanwhile, and once the other side reads, all of it arrives.
        other.sendall(b"busy")
        assert exactly(one, 4) == b"busy"
        received = pool.submit(lambda: sum(map(len, iter(lambda: other.recv(MIB), b""))))
        one.sendall(b"the end")
        one.shutdown(socket.SHUT_WR)
        assert received.result(PATIENCE) == sent + 7


async def test_50_mb_both_ways_at_once_are_byte_complete(api: Api, daemon: Daemon, target: socket.socket) -> None:
    await bind(api, target)

    def send(sock: socket.socket) -> str:
        block, digest = os.urandom(5 * MIB), hashlib.sha256()
        for turn in range(10):
            data = block[turn:] + block[:turn]
            sock.sendall(data)
            digest.update(data)
        sock.shutdown(socket.SHUT_WR)
        return digest.hexdigest()

    def receive(sock: socket.socket) -> str:
        digest = hashlib.sha256()
        while data := sock.recv(MIB):
            digest.update(data)
        return digest.hexdigest()

    with connected(daemon) as client, accepted(target) as server, ThreadPoolExecutor() as pool:
        sent = [pool.submit(send, sock) for sock in (client, server)]
        received = [pool.submit(receive, sock) for sock in (server, client)]
        assert [one.result(30) for one in sent] == [one.result(30) for one in received]


async def test_a_hundred_connections_at_once_are_kept_apart(api: Api, daemon: Daemon, target: socket.socket) -> None:
    await bind(api, target)
    clients = [connected(daemon) for _ in range(100)]
    servers = []
    for number, client in enumerate(clients):
        client.sendall(b"%3d" % number)
        servers.append(accepted(target))
    for server in servers:
        server.sendall(exactly(server, 3))
    for number, client in enumerate(clients):
        assert exactly(client, 3) == b"%3d" % number
    for sock in clients + servers:
        sock.close()


@pytest.mark.slow
async def test_connections_that_have_ended_keep_no_descriptor(api: Api, daemon: Daemon, target: socket.socket) -> None:
    await bind(api, target)
    before = await settled(daemon.descriptors)
    for turn in range(20):
        client, server = connected(daemon), accepted(target)
        for sock in (client, server) if turn % 2 else (server, client):
            sock.close()
    await until(lambda: daemon.descriptors() <= before)


async def test_much_that_follows_the_half_close_of_the_client_arrives(
    api: Api, daemon: Daemon, target: socket.socket
) -> None:
    await bind(api, target)
    data = os.urandom(20 * MIB)
    with connected(daemon) as client, accepted(target) as server, ThreadPoolExecutor() as pool:
        client.sendall(b"all of it, please")
        client.shutdown(socket.SHUT_WR)
        assert all_from(server) == b"all of it, please"

        def send() -> None:
            server.sendall(data)
            server.shutdown(socket.SHUT_WR)

        sending = pool.submit(send)
        assert all_from(client) == data
        sending.result(PATIENCE)
    assert (await api.get("/status")).json()["proxy_connections"] == 0


@pytest.mark.slow
async def test_a_target_that_accepts_late_gets_the_connection(api: Api, daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as busy:
        busy.settimeout(PATIENCE)
        await bind(api, busy)
        # Once the queue is full, the kernel drops what would complete another connection; it is tried again after 1 s.
        clients = [connected(daemon) for _ in range(4)]
        for number, client in enumerate(clients):
            client.sendall(b"%d" % number)
        servers = [await deferToThread(accepted, busy) for _ in clients]
        assert {exactly(server, 1) for server in servers} == {b"0", b"1", b"2", b"3"}
        for sock in (*clients, *servers):
            sock.close()


async def test_a_target_that_never_accepts_costs_a_connection_no_longer_than_the_patience(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sandboxd.proxy.portforward.CONNECT_TIMEOUT", 0.1)
    forward = PortForward(cast(Any, reactor))
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, ExitStack() as stack:
        port = deaf.getsockname()[1]
        for _ in range(2):  # fill its queue
            filling = stack.enter_context(socket.socket())
            filling.setblocking(False)
            filling.connect_ex(("127.0.0.1", port))
        forward.bind(port)
        client, accepted_end = map(stack.enter_context, socket.socketpair())
        connection = forward.buildProtocol(None)
        assert connection is not None
        connection.makeConnection(cast(Any, accepted_end))
        assert forward.connections == {connection}
        await until(lambda: not forward.connections)
        client.settimeout(PATIENCE)
        assert is_over(client)
    forward.close_all()


async def test_a_connection_for_which_there_is_no_descriptor_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = PortForward(cast(Any, reactor))
    forward.bind(1)
    client, accepted_end = socket.socketpair()
    connection = forward.buildProtocol(None)
    assert connection is not None
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, before[1]))
    try:
        connection.makeConnection(cast(Any, accepted_end))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    with client:
        assert client.recv(1) == b""
    assert not forward.connections
    forward.close_all()


async def test_connections_leave_descriptors_for_requests(
    start_daemon: Callable[..., Daemon], target: socket.socket
) -> None:
    daemon = start_daemon(via=["prlimit", "--nofile=160:160"])
    api = Api(daemon.url, SECRET)
    await bind(api, target)
    clients = [connected(daemon) for _ in range(160 // 8)]
    servers = [accepted(target) for _ in clients]
    with connected(daemon) as client:
        assert is_over(client)
    assert (await api.run("echo on"))["stdout"] == "on\n"
    for sock in (clients.pop(), servers.pop()):
        sock.close()
    while (await api.get("/status")).json()["proxy_connections"] >= 160 // 8:
        pass
    clients.append(connected(daemon))
    servers.append(accepted(target))
    for sock in (*clients, *servers):
        sock.close()


async def test_an_event_of_an_earlier_owner_of_the_descriptor_ends_no_connection() -> None:
    loop = cast(Any, reactor)
    counted: list[int] = []
    done: list[BaseException | None] = []
    with ExitStack() as stack:
        client, one = map(stack.enter_context, socket.socketpair())
        other, server = map(stack.enter_context, socket.socketpair())
        for sock in (one, other):
            sock.setblocking(False)
        ends = copy(loop, one, other, counted.append, None, done.append)
        client.sendall(b"before")
        await until(lambda: sum(counted) == 6)
        for end in ends:  # as the reactor does it
            loop.removeReader(end)
            end.connectionLost(Failure(CONNECTION_LOST))
        assert not done
        client.sendall(b"behind")
        await until(lambda: sum(counted) == 12)
        assert exactly(server, 12) == b"beforebehind"
        for sock in (client, server):
            sock.close()
        await until(lambda: bool(done))
    assert done == [None]


async def test_clients_of_a_unix_socket_are_forwarded(tmp_path: Path) -> None:
    forward = PortForward(cast(Any, reactor))
    listener = listen_at(tmp_path / "proxy")
    port = listener.serve(cast(Any, reactor), forward, bare_socket)

    def talk(target: socket.socket) -> bytes:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(tmp_path / "proxy"))
            client.sendall(b"question")
            with accepted(target) as server:
                assert exactly(server, 8) == b"question"
                server.sendall(b"answer" * 100_000)
            return all_from(client)

    with listening() as target:
        forward.bind(target.getsockname()[1])
        assert await deferToThread(talk, target) == b"answer" * 100_000
    await maybeDeferred(port.stopListening)
    await until(lambda: not forward.connections)
    forward.close_all()


@pytest.mark.slow
async def test_peers_whose_machines_have_vanished_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandboxd.reactor.liveness.INTERVAL", 0.1)
    monkeypatch.setattr("sandboxd.reactor.liveness.RETRANSMISSIONS", 3)
    short = ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 2))
    monkeypatch.setattr("sandboxd.reactor.liveness.KEEP_ALIVE", short)
    forward = PortForward(cast(Any, reactor))
    port = cast(Any, reactor).listenTCP(0, forward, interface="127.0.0.1")
    port.transport = bare_socket
    with listening() as target, ExitStack() as stack:
        forward.bind(target.getsockname()[1])

        async def connection() -> tuple[socket.socket, socket.socket]:
            address = ("127.0.0.1", port.getHost().port)
            client = stack.enter_context(await deferToThread(socket.create_connection, address, PATIENCE))
            return client, stack.enter_context(await deferToThread(accepted, target))

        silent, _ = await connection()
        client, server = await connection()
        _, other_server = await connection()
        stays, stays_server = await connection()
        for vanishing in (silent, client, other_server):
            vanish(vanishing)
        server.sendall(b"never acknowledged")
        await until(lambda: len(forward.connections) == 1, 20)
        stays_server.sendall(b"on")
        assert await deferToThread(exactly, stays, 2) == b"on"
    await port.stopListening()
    await until(lambda: not forward.connections)
    forward.close_all()


@pytest.mark.parametrize("splicing", [True, False], ids=["spliced", "copied"])
async def test_with_the_kernels_help_and_without_it_the_same_arrives(splicing: bool) -> None:
    forward = PortForward(cast(Any, reactor), splicing=splicing)
    assert (forward.pool is not None) == splicing
    port = cast(Any, reactor).listenTCP(0, forward, interface="127.0.0.1")
    port.transport = bare_socket
    sent = os.urandom(3_000_000)

    def talk(target: socket.socket) -> tuple[bytes, bytes]:
        with socket.create_connection(("127.0.0.1", port.getHost().port), timeout=10) as client:
            with accepted(target) as there:
                writer = Thread(target=lambda: (client.sendall(sent), client.shutdown(socket.SHUT_WR)))
                writer.start()
                received = all_from(there)
                there.sendall(received[::-1])
            answer = all_from(client)
            writer.join()
            return received, answer

    with listening() as target:
        forward.bind(target.getsockname()[1])
        received, answer = await deferToThread(talk, target)
    assert received == sent
    assert answer == sent[::-1]
    assert (forward.accepted, forward.forwarded) == (1, 2 * len(sent))
    await port.stopListening()
    await until(lambda: not forward.connections)
    forward.close_all()
