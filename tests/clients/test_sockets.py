"""Tunnels and forwarded ports, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import http.server
import select
import socket
import struct
import threading
import urllib.request
from collections.abc import Iterator

import pytest

from sandboxd.client import AsyncSandbox, Sandbox, SandboxError
from sandboxd.client.flow import ConnectionLost
from sandboxd.client.websocket import FAILURES, failure
from tests.daemon import Daemon

MIB = 1024 * 1024


@pytest.fixture
def sandbox(daemon: Daemon) -> Iterator[Sandbox]:
    with Sandbox(daemon.url, daemon.secret, patience=5.0) as sandbox:
        yield sandbox


@pytest.fixture
def echo() -> Iterator[int]:
    """A port that sends back what it gets, and ends its side when its client does."""

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(65536):
                connection.sendall(data)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threads.append(threading.Thread(target=serve, args=(server.accept()[0],)))
                threads[-1].start()

    threads: list[threading.Thread] = []
    server = socket.create_server(("127.0.0.1", 0))
    accepting = threading.Thread(target=accept)
    accepting.start()
    yield server.getsockname()[1]
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    for thread in [accepting, *threads]:
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def web() -> Iterator[int]:
    """A web server, which ends each connection itself."""

    class Hello(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"hello " * 500_000)

        def log_message(self, format: str, *arguments: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hello) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join(5)


def test_a_tunnel(sandbox: Sandbox, echo: int) -> None:
    data = bytes(range(256)) * 4096 * 3
    with sandbox.tunnel(echo) as tunnel:
        sender = threading.Thread(target=tunnel.send, args=(data,))
        sender.start()
        got = b""
        while len(got) < len(data):
            got += tunnel.receive()
        sender.join()
    assert got == data


@pytest.mark.slow
def test_the_end_of_a_tunnel(sandbox: Sandbox, web: int) -> None:
    with sandbox.tunnel(web) as tunnel:
        tunnel.send(b"GET / HTTP/1.0\r\n\r\n")
        got = b"".join(iter(tunnel.receive, b""))
        assert tunnel.receive() == b""
    assert got.endswith(b"hello " * 500_000)


def test_a_port_that_nobody_listens_on(sandbox: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SandboxError, match="not reachable") as caught, sandbox.tunnel(port):
        pass
    assert caught.value.status == 502


@pytest.mark.slow
def test_a_forwarded_port(sandbox: Sandbox, web: int) -> None:
    with sandbox.forward_port(web) as forward:
        for _ in range(3):
            with urllib.request.urlopen(f"http://127.0.0.1:{forward.port}/", timeout=20) as response:
                assert response.read() == b"hello " * 500_000
        with pytest.raises(OSError, match="in use"), sandbox.forward_port(web, forward.port):
            pass


async def forward_many(url: str, secret: str, port: int) -> None:
    async with AsyncSandbox(url, secret) as sandbox, sandbox.forward_port(port) as forward:

        async def one(number: int) -> None:
            reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
            writer.write(b"%d" % number * 1000)
            assert await reader.readexactly(len(b"%d" % number * 1000)) == b"%d" % number * 1000
            writer.close()
            await writer.wait_closed()

        await asyncio.wait_for(asyncio.gather(*map(one, range(20))), 20)


def test_many_connections_over_asyncio(daemon: Daemon, echo: int) -> None:
    asyncio.run(forward_many(daemon.url, daemon.secret, echo))


async def tunnel_over_asyncio(url: str, secret: str, port: int) -> None:
    async with AsyncSandbox(url, secret) as sandbox, sandbox.tunnel(port) as tunnel:
        await tunnel.send(b"x" * MIB)
        got = 0
        while got < MIB:
            got += len(await tunnel.receive())


def test_a_tunnel_over_asyncio(daemon: Daemon, echo: int) -> None:
    asyncio.run(tunnel_over_asyncio(daemon.url, daemon.secret, echo))


def test_a_forward_ends_with_its_connections_open(sandbox: Sandbox, echo: int) -> None:
    with sandbox.forward_port(echo) as forward:
        connection = socket.create_connection(("127.0.0.1", forward.port), 10)
        connection.sendall(b"x")
        assert connection.recv(1) == b"x"
    with connection:
        assert connection.recv(1) == b""


@pytest.fixture
def flood() -> Iterator[tuple[int, threading.Event]]:
    """A port that sends to one client until no more is taken, and an event for that."""
    full = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            connection, _ = server.accept()
            with connection:
                while select.select([], [connection], [], 0.5)[1]:
                    connection.send(bytes(65536), socket.MSG_DONTWAIT)
                full.set()
                connection.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=serve)
        thread.start()
        yield server.getsockname()[1], full
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.slow
def test_a_forward_ends_while_its_client_reads_nothing(sandbox: Sandbox, flood: tuple[int, threading.Event]) -> None:
    with socket.socket() as connection:
        connection.settimeout(10)
        forward = sandbox.forward_port(flood[0]).__enter__()
        connection.connect(("127.0.0.1", forward.port))
        assert flood[1].wait(20)
        thread = threading.Thread(target=forward.__exit__)
        thread.start()
        thread.join(20)
        assert not thread.is_alive()


def test_an_error_in_the_body_of_a_with_statement_is_not_changed(daemon: Daemon, sandbox: Sandbox, echo: int) -> None:
    with pytest.raises(FileNotFoundError), sandbox.tunnel(echo):
        raise FileNotFoundError

    async def raise_in_tunnel() -> None:
        async with AsyncSandbox(daemon.url, daemon.secret) as sandbox, sandbox.tunnel(echo):
            raise FileNotFoundError

    with pytest.raises(FileNotFoundError):
        asyncio.run(raise_in_tunnel())


def test_a_local_client_that_resets_its_connection_is_no_error(daemon: Daemon, echo: int) -> None:
    errors: list[SandboxError] = []

    async def reset() -> None:
        async with AsyncSandbox(daemon.url, daemon.secret) as sandbox:
            forward = sandbox.forward_port(echo)
            forward.on_error = errors.append
            async with forward:
                reader, writer = await asyncio.open_connection("127.0.0.1", forward.port)
                writer.write(b"x")
                assert await reader.readexactly(1) == b"x"
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()
                while forward._connections:
                    await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(reset(), 30))
    assert errors == []


def test_a_local_port_that_is_none_is_an_error_of_the_with_statement(sandbox: Sandbox) -> None:
    with pytest.raises(OverflowError), sandbox.forward_port(8080, local=70000):
        pass


def test_a_websocket_that_does_not_open_in_time_cannot_be_reached() -> None:
    error = asyncio.TimeoutError()  # in Python 3.10 neither the builtin one nor an OSError
    assert isinstance(error, FAILURES)
    found = failure(error, "http://127.0.0.1")
    assert isinstance(found, ConnectionLost)
    assert not found.sent
