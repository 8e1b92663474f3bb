"""``/ports/<port>/connect`` and the WebSocket under it: real sockets at both ends."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from tests.daemon import Daemon
from tests.waiting import wait_for

BYTES = "sandboxd.bytes"


@contextmanager
def serving(serve: Callable[[socket.socket], object], family: int = socket.AF_INET) -> Iterator[int]:
    """A server that gives each connection to ``serve`` in a thread of its own; yields its port."""
    listener = socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family)

    def one(connection: socket.socket) -> None:
        with closing(connection):
            connection.settimeout(20)
            with suppress(OSError):  # what a client breaks off
                serve(connection)

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=one, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def echo(connection: socket.socket) -> None:
    while data := connection.recv(65536):
        connection.sendall(data)


def open_tunnel(daemon: Daemon, port: int | str, **options: Any) -> ClientConnection:
    """An open tunnel, with the token as ``Authorization`` unless ``additional_headers`` are given."""
    options.setdefault("additional_headers", {"Authorization": f"Bearer {daemon.secret}"})
    url = f"ws://127.0.0.1:{daemon.port}/ports/{port}/connect"
    return connect(url, open_timeout=10, close_timeout=10, proxy=None, compression=None, **options)


def received(tunnel: ClientConnection, size: int) -> bytes:
    """The next ``size`` bytes."""
    data = b""
    while len(data) < size:
        message = tunnel.recv(timeout=10)
        assert isinstance(message, bytes)
        data += message
    return data


def refused(daemon: Daemon, port: int | str, **options: Any) -> tuple[int, str]:
    """The status and the error with which a tunnel is refused."""
    with pytest.raises(InvalidStatus) as caught:
        open_tunnel(daemon, port, **options)
    response = caught.value.response
    assert response.headers["Content-Type"] == "application/json"
    return response.status_code, json.loads(response.body)["error"]


def bearer(token: str) -> str:
    return "base64url.bearer.authorization.k8s.io." + base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
def test_bytes_go_both_ways(daemon: Daemon, family: int, prefix: str) -> None:
    with serving(echo, family) as port:
        headers = {"Authorization": f"Bearer {daemon.secret}"}
        url = f"ws://127.0.0.1:{daemon.port}{prefix}/ports/{port}/connect"
        with connect(url, additional_headers=headers, subprotocols=[Subprotocol(BYTES)], proxy=None) as tunnel:
            assert tunnel.subprotocol == BYTES
            for data in (b"hello", b"\0\xff" * 1000, os.urandom(1024 * 1024)):
                tunnel.send(data)
                assert received(tunnel, len(data)) == data


def test_text_is_taken_as_bytes_and_fragments_as_one_message(daemon: Daemon) -> None:
    with serving(echo) as port, open_tunnel(daemon, port) as tunnel:
        assert tunnel.subprotocol is None
        tunnel.send("né")
        tunnel.send([b"a", b"b", b"c"])
        assert received(tunnel, 6) == "né".encode() + b"abc"


def test_the_end_of_the_target_closes_with_1000_behind_all_it_has_sent(daemon: Daemon) -> None:
    blob = os.urandom(4 * 1024 * 1024)
    with serving(lambda connection: connection.sendall(blob)) as port, open_tunnel(daemon, port) as tunnel:
        assert received(tunnel, len(blob)) == blob
        with pytest.raises(ConnectionClosed) as caught:
            tunnel.recv(timeout=10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1000


def test_a_target_that_breaks_the_connection_closes_with_1011(daemon: Daemon) -> None:
    def break_off(connection: socket.socket) -> None:
        connection.recv(1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with serving(break_off) as port, open_tunnel(daemon, port) as tunnel:
        tunnel.send(b"x")
        with pytest.raises(ConnectionClosed) as caught:
            tunnel.recv(timeout=10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1011


def test_closing_lets_the_target_have_all_that_was_sent(daemon: Daemon) -> None:
    blob = os.urandom(8 * 1024 * 1024)
    digests: list[str] = []
    done = threading.Event()

    def digest(connection: socket.socket) -> None:
        found = hashlib.sha256()
        while data := connection.recv(65536):
            found.update(data)
        digests.append(found.hexdigest())
        done.set()

    with serving(digest) as port:
        with open_tunnel(daemon, port) as tunnel:
            for start in range(0, len(blob), 1024 * 1024):
                tunnel.send(blob[start : start + 1024 * 1024])
        assert done.wait(20)
    assert digests == [hashlib.sha256(blob).hexdigest()]


def test_closing_lets_a_target_that_answers_have_all_that_was_sent(daemon: Daemon) -> None:
    size, taken = 20 * 65536, [0]
    closing_sent, done = threading.Event(), threading.Event()

    def acknowledge(connection: socket.socket) -> None:
        try:
            closing_sent.wait(20)
            while data := connection.recv(65536):
                taken[0] += len(data)
                connection.sendall(b"ack")
        finally:
            done.set()

    with serving(acknowledge) as port, open_tunnel(daemon, port) as tunnel:
        for _ in range(size // 65536):
            tunnel.send(bytes(65536))
        closing = threading.Thread(target=tunnel.close)
        closing.start()
        wait_for(lambda: tunnel.protocol.close_rcvd)  # the daemon has all
        closing_sent.set()
        assert done.wait(20)
        closing.join(20)
    assert taken[0] == size


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "99999999999", "٣"])
def test_what_is_no_port_is_refused(daemon: Daemon, port: str) -> None:
    status, error = refused(daemon, port)
    assert status == 400
    assert error.startswith("port: ")


def test_the_daemons_own_ports_are_refused(daemon: Daemon) -> None:
    for port in (daemon.port, daemon.proxy_port):
        assert refused(daemon, port) == (403, f"port: {port} is the daemon's own")


def test_a_port_that_nobody_listens_on_is_refused(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    status, error = refused(daemon, port)
    assert status == 502
    assert str(port) in error


def test_a_request_that_asks_for_no_websocket_is_answered_426(daemon: Daemon) -> None:
    with socket.create_connection(("127.0.0.1", daemon.port), 10) as client:
        client.sendall(
            b"GET /ports/1/connect HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer %s\r\n\r\n"
            % daemon.secret.encode()
        )
        reply = client.makefile("rb").read()
    assert reply.startswith(b"HTTP/1.1 426 ")
    assert b"\r\nUpgrade: websocket\r\n" in reply


@pytest.mark.parametrize("line", ["HEAD /ports/1/connect HTTP/1.1", "GET /ports/1/connect HTTP/1.0"])
def test_an_upgrade_by_another_method_or_version_is_refused(daemon: Daemon, line: str) -> None:
    with socket.create_connection(("127.0.0.1", daemon.port), 10) as client:
        client.sendall(
            b"%s\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nAuthorization: Bearer %s\r\n\r\n"
            % (line.encode(), daemon.secret.encode())
        )
        assert client.makefile("rb").readline().split()[1] == b"426"


def test_an_unknown_subprotocol_is_refused(daemon: Daemon) -> None:
    with serving(echo) as port:
        status, error = refused(daemon, port, subprotocols=["chat"])
    assert status == 400
    assert BYTES in error


# The token


def test_without_a_token_there_is_no_tunnel(daemon: Daemon) -> None:
    with serving(echo) as port:
        assert refused(daemon, port, additional_headers={})[0] == 401
        assert refused(daemon, port, additional_headers={}, subprotocols=[BYTES, bearer("wrong")])[0] == 401
        assert refused(daemon, port, additional_headers={}, subprotocols=[BYTES, bearer("")])[0] == 401


def test_the_token_may_come_as_a_subprotocol_that_is_not_echoed(daemon: Daemon) -> None:
    own = f"http://127.0.0.1:{daemon.port}"
    for origin in (None, own):
        with serving(echo) as port:
            offered = [bearer(daemon.secret), BYTES]
            with open_tunnel(daemon, port, additional_headers={}, subprotocols=offered, origin=origin) as tunnel:
                assert tunnel.subprotocol == BYTES
                tunnel.send(b"x")
                assert received(tunnel, 1) == b"x"


def test_the_bearer_alone_is_refused(daemon: Daemon) -> None:
    with serving(echo) as port:
        status, error = refused(daemon, port, additional_headers={}, subprotocols=[bearer(daemon.secret)])
    assert status == 400
    assert BYTES in error


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null", "https://127.0.0.1.evil"])
def test_a_page_of_another_origin_is_refused(daemon: Daemon, origin: str) -> None:
    with serving(echo) as port:
        offered = [bearer(daemon.secret), BYTES]
        assert refused(daemon, port, additional_headers={}, subprotocols=offered, origin=origin)[0] == 403


def test_a_subprotocol_is_no_token_for_other_routes(daemon: Daemon) -> None:
    with socket.create_connection(("127.0.0.1", daemon.port), 10) as client:
        offered = bearer(daemon.secret).encode()
        client.sendall(
            b"GET /list_processes HTTP/1.1\r\nHost: x\r\nConnection: close\r\nSec-WebSocket-Protocol: %s\r\n\r\n"
            % offered
        )
        assert client.makefile("rb").read().startswith(b"HTTP/1.1 401 ")


# Limits


def test_a_message_over_1_mib_closes_with_1009(daemon: Daemon) -> None:
    with serving(echo) as port, open_tunnel(daemon, port) as tunnel:
        tunnel.send(bytes(1024 * 1024))
        assert received(tunnel, 1024 * 1024) == bytes(1024 * 1024)
        with pytest.raises(ConnectionClosed) as caught:  # noqa: PT012
            tunnel.send(bytes(1024 * 1024 + 1))
            tunnel.recv(timeout=10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1009


def test_an_unmasked_frame_closes_with_1002(daemon: Daemon) -> None:
    with serving(echo) as port, open_tunnel(daemon, port) as tunnel:
        tunnel.socket.sendall(b"\x82\x01x")
        with pytest.raises(ConnectionClosed) as caught:
            tunnel.recv(timeout=10)
        assert caught.value.rcvd is not None
        assert caught.value.rcvd.code == 1002


def test_bytes_that_follow_the_handshake_at_once_are_not_lost(daemon: Daemon) -> None:
    with serving(echo) as port, socket.create_connection(("127.0.0.1", daemon.port), 10) as client:
        client.sendall(
            b"GET /ports/%d/connect HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            b"\x82\x83\0\0\0\0a\nb" % (port, daemon.secret.encode())
        )
        reply = client.makefile("rb")
        assert reply.readline() == b"HTTP/1.1 101 Switching Protocols\r\n"
        while (line := reply.readline()) != b"\r\n":
            if line.lower().startswith(b"sec-websocket-accept"):
                assert line.split()[1] == b"s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
        assert reply.read(5) == b"\x82\x03a\nb"


@pytest.mark.parametrize("stalled", ["target", "client"])
def test_a_side_that_does_not_read_stops_the_other_and_costs_no_memory(
    start_daemon: Callable[..., Daemon], stalled: str
) -> None:
    daemon = start_daemon()
    sent = [0]
    release = threading.Event()

    def wait(connection: socket.socket) -> None:
        release.wait(20)

    def flood(connection: socket.socket) -> None:
        connection.settimeout(1)
        try:
            while True:
                sent[0] += connection.send(bytes(65536))
        except OSError:
            release.wait(20)

    with serving(wait if stalled == "target" else flood) as port, open_tunnel(daemon, port, max_queue=1) as tunnel:
        before = daemon.memory()
        if stalled == "target":
            tunnel.socket.settimeout(1)
            frame = b"\x82\xff" + (65536).to_bytes(8, "big") + b"\0\0\0\0" + bytes(65536)
            with pytest.raises(TimeoutError):  # noqa: PT012
                for _ in range(4096):
                    sent[0] += tunnel.socket.send(frame)
        else:
            deadline, last = time.monotonic() + 15, -1
            while sent[0] != last and time.monotonic() < deadline:
                last = sent[0]
                release.wait(1.5)
        assert sent[0] < 64 * 1024 * 1024
        assert daemon.memory() - before < 24 * 1024 * 1024
        release.set()
        tunnel.socket.shutdown(socket.SHUT_RDWR)
        tunnel.socket.close()


@pytest.mark.slow
def test_a_client_that_does_not_read_its_pongs_is_not_read_from(daemon: Daemon) -> None:
    size = 40 * 1024 * 1024
    ping, message = b"\x89\xfd\0\0\0\0" + bytes(125), b"\x82\x83\0\0\0\0abc"
    pings = memoryview(ping * (size // len(ping)))
    with serving(echo) as port, socket.create_connection(("127.0.0.1", daemon.port), 10) as client:
        client.sendall(
            b"GET /ports/%d/connect HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            % (port, daemon.secret.encode())
        )
        sent = 0
        client.settimeout(1)
        with pytest.raises(TimeoutError):  # noqa: PT012
            while sent < len(pings):
                sent += client.send(pings[sent : sent + 65536])
        client.settimeout(10)
        rest = bytes(pings[sent : sent + -sent % len(ping)]) + message
        threading.Thread(target=client.sendall, args=(rest,)).start()
        last = b""
        while not last.endswith(b"\x82\x03abc"):
            data = client.recv(65536)
            assert data
            last = (last + data)[-5:]


def test_stopping_closes_with_1001(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    with serving(echo) as port, open_tunnel(daemon, port) as tunnel:
        tunnel.send(b"x")
        assert received(tunnel, 1) == b"x"
        codes: list[int] = []

        def wait() -> None:
            try:
                tunnel.recv(timeout=10)
            except ConnectionClosed as closed:
                codes.append(closed.rcvd.code if closed.rcvd else 0)

        waiting = threading.Thread(target=wait)
        waiting.start()
        assert daemon.stop() == 0
        waiting.join(10)
        assert codes == [1001]
    assert "Traceback" not in daemon.log.read_text()


def test_a_ping_comes_every_heartbeat(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(SANDBOX_HEARTBEAT="1")
    with serving(echo) as port, open_tunnel(daemon, port) as tunnel:
        pings = 0
        received_frame = tunnel.protocol.recv_frame

        def count(frame: Any) -> None:
            nonlocal pings
            pings += frame.opcode == 9
            received_frame(frame)

        tunnel.protocol.recv_frame = count  # type: ignore[method-assign]
        deadline = time.monotonic() + 10
        while pings < 2:
            assert time.monotonic() < deadline
            with pytest.raises(TimeoutError):
                tunnel.recv(timeout=0.1)


def test_the_access_log_has_the_tunnel_when_it_ends_without_the_token(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--access-log")
    with serving(echo) as port:
        offered = [bearer(daemon.secret), BYTES]
        with open_tunnel(daemon, port, additional_headers={}, subprotocols=offered) as tunnel:
            tunnel.send(b"x")
            assert received(tunnel, 1) == b"x"
            assert " 101 " not in daemon.log.read_text()
        deadline = time.monotonic() + 10
        while f"GET /ports/{port}/connect 101 " not in (log := daemon.log.read_text()):
            assert time.monotonic() < deadline, log
            time.sleep(0.02)
    assert daemon.secret not in log
    assert offered[0] not in log
