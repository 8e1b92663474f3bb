"""Clients of attach, tunnels and previews that break off anywhere, in any way: nothing of them is left."""

from __future__ import annotations

import random
import re
import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.daemon import Daemon
from tests.test_attach import call, described, kill, start
from tests.test_tunnel import serving
from tests.waiting import until

MIB = 1024 * 1024

#: The SO_LINGER with which a socket is closed with a RST.
RESET = struct.pack("ii", 1, 0)

#: Descriptors of the pipes that the daemon keeps for the next bodies.
PIPES = 8

WEBSOCKET = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


class Server:
    """A server of the sandbox, for HTTP and for tunnels. It does as its first line says."""

    def __init__(self) -> None:
        self.open = 0
        self._lock = threading.Lock()

    def serve(self, connection: socket.socket) -> None:
        with self._lock:
            self.open += 1
        try:
            with connection.makefile("rb") as stream:
                asked = stream.readline()
                while asked.startswith((b"GET", b"POST")) and stream.readline() not in (b"\r\n", b""):
                    pass
                self._answer(asked, connection, stream.read1)
        finally:
            with self._lock:
                self.open -= 1

    def _answer(self, asked: bytes, connection: socket.socket, read: Callable[[int], bytes]) -> None:
        if b"/length" in asked:
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (1 << 40))
        elif b"/closed" in asked:
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        elif b"/chunked" in asked:
            connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        elif b"/switch" in asked:
            connection.sendall(b"HTTP/1.1 101 Yes\r\nConnection: Upgrade\r\nUpgrade: bytes\r\n\r\n")
        if b"/upload" in asked or b"/switch" in asked or b"echo" in asked:
            while data := read(65536):
                if b"/upload" not in asked:
                    connection.sendall(data)
            return
        block = b"10000\r\n" + bytes(65536) + b"\r\n" if b"/chunked" in asked else bytes(65536)
        while True:
            connection.sendall(block)


def frame(data: bytes) -> bytes:
    """A binary WebSocket frame of a client, whose mask is zero."""
    size = struct.pack("!BQ", 0xFF, len(data)) if len(data) > 65535 else struct.pack("!BH", 0xFE, len(data))
    return b"\x82" + size + bytes(4) + data


def requests(daemon: Daemon, port: int, terminal: str, pipe: str) -> list[bytes]:
    """The beginnings of what clients send."""
    auth = b"Host: x\r\nAuthorization: Bearer %s\r\n" % daemon.secret.encode()
    upload = b"POST /proxy/%d/upload HTTP/1.1\r\n%s" % (port, auth)
    tunnel = b"GET /ports/%d/connect HTTP/1.1\r\n%s%s\r\n" % (port, auth, WEBSOCKET)
    return [
        *(b"GET /proxy/%d/%s HTTP/1.1\r\n%s\r\n" % (port, each, auth) for each in (b"length", b"closed", b"chunked")),
        upload + b"Content-Length: %d\r\n\r\n" % (1 << 40) + bytes(MIB),
        upload + b"Transfer-Encoding: chunked\r\n\r\n" + b"10000\r\n%s\r\n" % bytes(65536) * 8,
        b"GET /proxy/%d/switch HTTP/1.1\r\n%sConnection: Upgrade\r\nUpgrade: bytes\r\n\r\n" % (port, auth) + bytes(MIB),
        tunnel + frame(b"echo\n") + frame(bytes(100_000)) * 5,
        tunnel + frame(b"source\n"),
        b"GET /processes/%s/attach?events=true HTTP/1.1\r\n%s%s\r\n" % (terminal.encode(), auth, WEBSOCKET)
        + frame(b"\0some keys\r") * 20,
        b"GET /processes/%s/attach HTTP/1.1\r\n%s%s\r\n" % (pipe.encode(), auth, WEBSOCKET)
        + frame(b"\0" + bytes(50_000)) * 10,
    ]


def cut(daemon: Daemon, chance: random.Random, request: bytes) -> None:
    """Send some of a request, read some of what comes, and break off."""
    whole = chance.random() < 0.7
    with socket.create_connection(("127.0.0.1", daemon.port), 10) as client, suppress(OSError):
        client.settimeout(0.2)
        client.sendall(request if whole else request[: chance.randrange(len(request))])
        wanted = chance.choice([0, 0, 1, 200, 100_000, 4 * MIB])
        while wanted > 0 and (data := client.recv(min(wanted, 65536))):
            wanted -= len(data)
        way = chance.choice(["fin", "rst", "half", "stall"])
        if way == "half":
            client.shutdown(socket.SHUT_WR)
            client.recv(65536)
        elif way == "stall":
            threading.Event().wait(chance.random() / 10)
        if way in ("rst", "stall"):
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def reached(daemon: Daemon) -> float:
    """How many WebSockets and previews are open."""
    families = {each["name"]: each for each in call(daemon, "GET", "/metrics.json")["metrics"]}
    names = ("sandboxd_websockets", "sandboxd_previews")
    return sum(float(sample["value"]) for name in names for sample in families[name]["samples"])


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
async def test_nothing_is_left_of_clients_that_break_off(start_daemon: Callable[..., Daemon], seed: int) -> None:
    daemon = start_daemon(SANDBOX_HEARTBEAT="1")
    server = Server()
    terminal = start(daemon, argv=["cat"], tty=True)
    pipe = start(daemon, "cat; sleep 1000", stdin=True)
    with serving(server.serve) as port:
        kinds = requests(daemon, port, terminal, pipe)
        chance = random.Random(seed)

        def many(seed: int, count: int) -> None:
            chance = random.Random(seed)
            for _ in range(count):
                cut(daemon, chance, chance.choice(kinds))

        for request in kinds:  # what is imported and pooled with the first of each kind stays
            cut(daemon, chance, request)
        await until(lambda: not reached(daemon) and not server.open, 15)
        descriptors, memory = daemon.descriptors(), daemon.memory()
        threads = [threading.Thread(target=many, args=(chance.random(), 12)) for _ in range(6)]
        for thread in threads:
            thread.start()
        await until(lambda: not any(thread.is_alive() for thread in threads), 40)
        await until(lambda: not reached(daemon) and not server.open, 15)
        await until(lambda: daemon.descriptors() <= descriptors + PIPES)
        assert daemon.memory() - memory < 32 * MIB
    for id in (terminal, pipe):
        found = described(daemon, id)
        assert (found["status"], found["output"]["followers"]) == ("running", 0)
        kill(daemon, id)
    assert daemon.stop() == 0
    log = daemon.log.read_text()
    assert not re.search("Traceback|Unhandled|failed", log), log
