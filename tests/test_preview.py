"""``/proxy/<port>/<rest>``: real servers seen through the daemon, by clients on bare sockets and by libraries."""

from __future__ import annotations

import hashlib
import http.client
import http.server
import json
import os
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import pytest
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve
from websockets.typing import Subprotocol

from sandboxd.proxy.splicing import can_splice
from tests.daemon import Daemon
from tests.test_tunnel import bearer, serving
from tests.waiting import until

MIB = 1024 * 1024

#: A metric.
SPLICED_BYTES = "sandboxd_previews_spliced_bytes_total "

#: The SO_LINGER with which a socket is closed with a RST.
RESET = struct.pack("ii", 1, 0)

#: The subprotocol of Vite's hot module replacement.
HMR = Subprotocol("vite-hmr")


class Handler(http.server.BaseHTTPRequestHandler):
    """Tells what it was asked, or does as the path says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers["Content-Length"] or 0))

    def answer(self) -> None:
        body = self.read_body()
        told = {
            "method": self.command,
            "target": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "sha256": hashlib.sha256(body).hexdigest(),
            "size": len(body),
        }
        reply = json.dumps(told).encode()
        self.send_response(299, "As Asked")
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        self.send_header("Content-Length", str(len(reply)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply)

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = do_PATCH = do_OPTIONS = do_PURGE = answer


@contextmanager
def http_server(handler: type[http.server.BaseHTTPRequestHandler] = Handler) -> Iterator[int]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def headers(daemon: Daemon, **more: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {daemon.secret}", **{name.replace("_", "-"): v for name, v in more.items()}}


class Answer(NamedTuple):
    """A response with its whole body."""

    status: int
    reason: str
    headers: http.client.HTTPMessage
    body: bytes

    def read(self) -> bytes:
        return self.body


def call(daemon: Daemon, method: str, path: str, body: Any = None, **more: str) -> Answer:
    """The response to a request on a connection of its own."""
    with closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=20)) as client:
        client.request(method, path, body, headers(daemon, **more))
        response = client.getresponse()
        return Answer(response.status, response.reason, response.headers, response.read())


def bare(daemon: Daemon, request: bytes) -> socket.socket:
    """A connection on which a request was sent; ``AUTH`` in it stands for the token."""
    client = socket.create_connection(("127.0.0.1", daemon.port), 20)
    client.sendall(request.replace(b"AUTH", b"Authorization: Bearer " + daemon.secret.encode()))
    return client


# Requests


@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PURGE"])
def test_a_request_arrives_as_it_was_sent(daemon: Daemon, method: str, prefix: str) -> None:
    with http_server() as port:
        target = "/a//b/../%2F%ff/c;d?x=1;y&z=%00"
        response = call(daemon, method, f"{prefix}/proxy/{port}{target}", b"some body", X_Mine="yes")
        told = json.loads(response.read())
        assert (told["method"], told["target"]) == (method, target)
        assert told["sha256"] == hashlib.sha256(b"some body").hexdigest()
        found = told["headers"]
        assert found["x-mine"] == "yes"
        assert found["host"] == f"127.0.0.1:{port}"
        assert "authorization" not in found
        assert found["x-forwarded-for"] == "127.0.0.1"
        assert found["x-forwarded-host"] == f"127.0.0.1:{daemon.port}"
        assert found["x-forwarded-proto"] == "http"
        assert found["x-forwarded-prefix"] == f"{prefix}/proxy/{port}"


def test_what_proxies_before_have_said_is_kept(daemon: Daemon) -> None:
    with http_server() as port:
        given = {
            "X_Forwarded_For": "192.0.2.1",
            "X_Forwarded_Host": "example.org",
            "X_Forwarded_Proto": "https",
            "X_Forwarded_Prefix": "/sandboxes/7",
            "X_Sandbox_Authorization": "Basic abc",
            "X_Sandboxd_Authorization": f"Bearer {daemon.secret}",
        }
        found = json.loads(call(daemon, "GET", f"/proxy/{port}/", **given).read())["headers"]
    assert found["x-forwarded-for"] == "192.0.2.1, 127.0.0.1"
    assert found["x-forwarded-host"] == "example.org"
    assert found["x-forwarded-proto"] == "https"
    assert found["x-forwarded-prefix"] == f"/sandboxes/7/proxy/{port}"
    assert found["authorization"] == "Basic abc"
    assert not {"x-sandbox-authorization", "x-sandboxd-authorization"} & set(found)


def test_headers_of_one_hop_are_not_forwarded(daemon: Daemon) -> None:
    with http_server() as port:
        given = {"Connection": "X-Hop, keep-alive", "X_Hop": "1", "Keep_Alive": "timeout=5", "TE": "trailers"}
        found = json.loads(call(daemon, "GET", f"/proxy/{port}/", **given).read())["headers"]
    assert not {"x-hop", "keep-alive", "te"} & set(found)
    assert found["connection"] == "close"


def test_a_body_in_chunks_arrives(daemon: Daemon) -> None:
    with http_server() as port:
        told = json.loads(call(daemon, "POST", f"/proxy/{port}/", iter([b"one", b"two" * 100_000])).read())
    assert told["size"] == 300_003
    assert told["sha256"] == hashlib.sha256(b"one" + b"two" * 100_000).hexdigest()


def test_a_body_may_be_longer_and_slower_than_the_apis_limits(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(SANDBOX_MAX_BODY="1000", SANDBOX_MAX_UPLOAD="1000", SANDBOX_REQUEST_TIMEOUT="1")
    blob = os.urandom(2 * MIB)

    def slowly() -> Iterator[bytes]:
        yield blob[:MIB]
        time.sleep(1.5)
        yield blob[MIB:]

    with http_server() as port:
        for body in (blob, slowly()):
            told = json.loads(call(daemon, "POST", f"/proxy/{port}/", body).read())
            assert told["sha256"] == hashlib.sha256(blob).hexdigest()


def test_a_malformed_body_is_refused(daemon: Daemon) -> None:
    with http_server() as port:
        request = b"POST /proxy/%d/ HTTP/1.1\r\nHost: x\r\nAUTH\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n" % port
        with bare(daemon, request) as client:
            assert client.makefile("rb").readline().startswith(b"HTTP/1.1 400 ")


def test_100_continue_is_answered(daemon: Daemon) -> None:
    with http_server() as port:
        head = (
            b"POST /proxy/%d/ HTTP/1.1\r\nHost: x\r\nAUTH\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n" % port
        )
        with bare(daemon, head) as client:
            reply = client.makefile("rb")
            assert reply.readline() == b"HTTP/1.1 100 Continue\r\n"
            assert reply.readline() == b"\r\n"
            client.sendall(b"abc")
            assert reply.readline() == b"HTTP/1.1 299 As Asked\r\n"


# Answers


def test_an_answer_comes_back_unchanged(daemon: Daemon) -> None:
    with http_server() as port:
        response = call(daemon, "GET", f"/proxy/{port}/")
        assert (response.status, response.reason) == (299, "As Asked")
        assert response.headers.get_all("Set-Cookie") == ["a=1", "b=2"]
        assert str(response.headers["Server"]).startswith("BaseHTTP")
        assert response.headers.get_all("Server") == [response.headers["Server"]]
        assert "X-Request-Id" not in response.headers
        assert "Content-Type" not in response.headers
        response.read()


def test_the_clients_connection_is_kept(daemon: Daemon) -> None:
    client = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=20)
    with http_server() as port, closing(client):
        sock = None
        for method, body in (("GET", None), ("POST", b"x"), ("HEAD", None), ("GET", None)):
            client.request(method, f"/proxy/{port}/", body, headers(daemon))
            assert client.getresponse().read() or method == "HEAD"
            assert sock in (None, client.sock)
            sock = client.sock
        client.request("GET", "/health")
        assert json.loads(client.getresponse().read())["status"] == "ok"
        assert sock is client.sock


@pytest.mark.parametrize(
    ("answer", "status", "body"),
    [
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\nETag: x\r\n\r\n", 304, b""),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b""),
        (b"HTTP/1.0 200 OK\r\n\r\nuntil the end", 200, b"until the end"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nTrailer: x\r\n\r\n", 200, b"abc"),
        (b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\na", 200, b"a"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\naHTTP/1.1 404 No\r\n\r\n", 200, b"a"),
        (b"SSH-2.0-OpenSSH\r\n", 502, None),
        (b"HTTP/1.1 200 OK\r\nContent-Le", 502, None),
        (b"HTTP/1.1 200 OK\r\nX: " + bytes(1) + b"\r\n\r\n", 502, None),
        (b"HTTP/1.1 200 OK\r\n" + b"X: y%d\r\n" % 10**9 * 30_000 + b"\r\n", 502, None),
        (b"HTTP/1.1 101 Switching\r\nConnection: Upgrade\r\nUpgrade: x\r\n\r\n", 502, None),
        (b"", 502, None),
    ],
)
def test_answers_of_every_shape(daemon: Daemon, answer: bytes, status: int, body: bytes | None) -> None:
    def reply(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(answer)

    with serving(reply) as port:
        response = call(daemon, "GET", f"/proxy/{port}/")
        assert response.status == status
        found = response.read()
        assert found == body if body is not None else "error" in json.loads(found)


def test_an_answer_that_breaks_off_does_not_look_complete(daemon: Daemon) -> None:
    for head in (b"Content-Length: 100", b"Transfer-Encoding: chunked"):

        def reply(connection: socket.socket, head: bytes = head) -> None:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\n%s\r\n\r\n5\r\nabcde\r\n" % head)

        with serving(reply) as port, pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            call(daemon, "GET", f"/proxy/{port}/")


def test_an_answer_may_come_before_the_request_is_complete(daemon: Daemon) -> None:
    def reply(connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        while stream.readline() != b"\r\n":
            pass
        connection.sendall(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(3):
            size = int(stream.readline(), 16)
            connection.sendall(b"%x\r\n%s\r\n" % (size, stream.read(size)))
            stream.readline()
        connection.sendall(b"0\r\n\r\n")

    with serving(reply) as port:
        head = b"POST /proxy/%d/ HTTP/1.1\r\nHost: x\r\nAUTH\r\nTransfer-Encoding: chunked\r\n\r\n" % port
        with bare(daemon, head) as client:
            answer = client.makefile("rb")
            assert answer.readline() == b"HTTP/1.1 200 OK\r\n"
            while answer.readline() != b"\r\n":
                pass
            for piece in (b"one", b"three", b"seven"):
                client.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                assert int(answer.readline(), 16) == len(piece)
                assert answer.read(len(piece) + 2) == piece + b"\r\n"
            client.sendall(b"0\r\n\r\n")
            assert answer.readline() == b"0\r\n"


# Size and pace


def test_a_download_of_256_mb_is_byte_complete_and_costs_no_memory(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    block = os.urandom(MIB)

    class Download(Handler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(256 * MIB))
            self.end_headers()
            for _ in range(256):
                self.wfile.write(block)

    expected = hashlib.sha256()
    for _ in range(256):
        expected.update(block)
    with http_server(Download) as port:
        before = daemon.memory()
        daemon.reset_peak()
        found = hashlib.sha256()
        with closing(http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=20)) as client:
            client.request("GET", f"/proxy/{port}/", headers=headers(daemon))
            response = client.getresponse()
            while data := response.read(MIB):
                found.update(data)
        assert found.hexdigest() == expected.hexdigest()
        assert daemon.peak_memory() - before < 24 * MIB


def test_a_client_that_does_not_read_stops_the_server(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    sent = [0]
    release = threading.Event()

    def flood(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        connection.settimeout(1)
        try:
            while True:
                sent[0] += connection.send(bytes(65536))
        except OSError:
            release.wait(20)

    with serving(flood) as port:
        before = daemon.memory()
        with bare(daemon, b"GET /proxy/%d/ HTTP/1.1\r\nHost: x\r\nAUTH\r\n\r\n" % port):
            deadline, last = time.monotonic() + 15, -1
            while sent[0] != last and time.monotonic() < deadline:
                last = sent[0]
                release.wait(1.5)
            assert 0 < sent[0] < 64 * MIB
            assert daemon.memory() - before < 24 * MIB
        release.set()


def test_a_client_that_hangs_up_ends_the_servers_connection(daemon: Daemon) -> None:
    ended = threading.Event()

    def wait(connection: socket.socket) -> None:
        connection.recv(65536)
        try:
            connection.recv(1)
        finally:
            ended.set()

    with serving(wait) as port:
        bare(daemon, b"GET /proxy/%d/ HTTP/1.1\r\nHost: x\r\nAUTH\r\n\r\n" % port).close()
        assert ended.wait(10)


# Upgrade


@pytest.mark.slow
def test_a_websocket_passes_both_ways(daemon: Daemon) -> None:
    def echo(connection: ServerConnection) -> None:
        assert connection.request is not None
        connection.send(connection.request.path)
        for message in connection:
            connection.send(message)
        connection.close(4001)

    with serve(echo, "127.0.0.1", 0, subprotocols=[HMR], max_size=None) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.socket.getsockname()[1]
        url = f"ws://127.0.0.1:{daemon.port}/proxy/{port}/hmr?token=1"
        with connect(
            url,
            additional_headers=headers(daemon),
            subprotocols=[HMR],
            proxy=None,
            max_size=None,
        ) as client:
            assert client.subprotocol == HMR
            assert client.recv(timeout=10) == "/hmr?token=1"
            for message in ("text", b"\0\xff", os.urandom(4 * MIB)):
                client.send(message)
                assert client.recv(timeout=20) == message
        with connect(
            url,
            additional_headers=headers(daemon),
            subprotocols=[HMR],
            proxy=None,
        ) as client:
            assert client.recv(timeout=10)
            client.close(4002, "bye")
            assert client.close_code == 4002
        server.shutdown()


def test_an_upgrade_that_the_server_declines_is_an_answer(daemon: Daemon) -> None:
    with http_server() as port:
        told = json.loads(call(daemon, "GET", f"/proxy/{port}/", Connection="Upgrade", Upgrade="websocket").read())
    assert (told["headers"]["connection"].lower(), told["headers"]["upgrade"]) == ("upgrade", "websocket")


@contextmanager
def upgraded(daemon: Daemon, port: int, behind: bytes = b"") -> Iterator[tuple[socket.socket, Any]]:
    """A connection that has been upgraded, and its stream behind the head; ``behind`` was sent with the request."""
    head = b"GET /proxy/%d/ HTTP/1.1\r\nHost: x\r\nAUTH\r\nConnection: Upgrade\r\nUpgrade: bytes\r\n\r\n" % port
    with bare(daemon, head + behind) as client, client.makefile("rb") as stream:
        assert stream.readline() == b"HTTP/1.1 101 Yes\r\n"
        while stream.readline() != b"\r\n":
            pass
        yield client, stream


def switch(connection: socket.socket, behind: bytes = b"") -> Any:
    """Answer a request with 101, and return the stream of what comes behind its head."""
    stream = connection.makefile("rb")
    while stream.readline() != b"\r\n":
        pass
    connection.sendall(b"HTTP/1.1 101 Yes\r\nConnection: Upgrade\r\nUpgrade: bytes\r\n\r\n" + behind)
    return stream


@pytest.mark.parametrize("size", [10, 8 * MIB], ids=["little", "much"])
def test_a_half_close_passes_through_an_upgraded_connection(daemon: Daemon, size: int) -> None:
    blob = os.urandom(size)
    found: list[bytes] = []

    def until_the_end(connection: socket.socket) -> None:
        """Answer what has come until the client's end of stream."""
        found.append(switch(connection, b"early").read())
        connection.sendall(found[0])

    with serving(until_the_end) as port, upgraded(daemon, port, b"at once") as (client, stream):
        client.sendall(blob)
        client.shutdown(socket.SHUT_WR)
        assert stream.read() == b"early" + b"at once" + blob

    ended = threading.Event()

    def end_first(connection: socket.socket) -> None:
        stream = switch(connection)
        connection.sendall(blob)
        connection.shutdown(socket.SHUT_WR)
        found.append(stream.read())
        ended.set()

    with serving(end_first) as port, upgraded(daemon, port) as (client, stream):
        assert stream.read() == blob
        client.sendall(blob)
        client.shutdown(socket.SHUT_WR)
        assert ended.wait(10)
        assert found[1] == blob


@pytest.mark.parametrize("breaks", ["client", "server"])
def test_a_break_passes_through_an_upgraded_connection(daemon: Daemon, breaks: str) -> None:
    ended = threading.Event()

    def serve_one(connection: socket.socket) -> None:
        stream = switch(connection)
        if breaks == "server":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.close()
            stream.close()
            return
        with pytest.raises(ConnectionResetError):
            stream.read()
        ended.set()

    with serving(serve_one) as port:
        with upgraded(daemon, port) as (client, stream):
            if breaks == "server":
                with pytest.raises(ConnectionResetError):
                    stream.read()
                return
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        assert ended.wait(10)


def test_a_stop_ends_upgraded_connections(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    ended = threading.Event()

    def serve_one(connection: socket.socket) -> None:
        switch(connection).read()
        ended.set()

    with serving(serve_one) as port, upgraded(daemon, port) as (_, stream):
        daemon.stop()
        assert stream.read() == b""
        assert ended.wait(10)


def test_the_access_log_counts_the_bytes_of_an_upgraded_connection(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--access-log")

    def serve_one(connection: socket.socket) -> None:
        switch(connection)
        connection.sendall(bytes(4 * MIB))

    with serving(serve_one) as port:
        with upgraded(daemon, port) as (client, stream):
            assert len(stream.read()) == 4 * MIB
            client.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + 10
        while (found := re.search(rf"GET /proxy/{port}/ 101 .* (\d+) B to", daemon.log.read_text())) is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    assert 0 < int(found[1]) - 4 * MIB < 200


# Splicing


def spliced(daemon: Daemon) -> int:
    """Bytes of previews that the daemon has spliced."""
    text = call(daemon, "GET", "/metrics").body.decode()
    return int(float(next(line.split()[1] for line in text.splitlines() if line.startswith(SPLICED_BYTES))))


@pytest.mark.parametrize(
    ("head", "behind"),
    [
        (b"Content-Length: %d\r\n" % (8 * MIB), b""),
        (b"Content-Length: %d\r\n" % (8 * MIB), b"HTTP/1.1 200 OK\r\n\r\n more than was said"),
        (b"", b""),
        (b"Transfer-Encoding: chunked\r\n", b""),
    ],
    ids=["length", "too-much", "until-closed", "chunked"],
)
def test_long_bodies_are_spliced_and_the_clients_connection_goes_on(daemon: Daemon, head: bytes, behind: bytes) -> None:
    blob = os.urandom(8 * MIB)

    def serve_one(connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        while stream.readline() != b"\r\n":
            pass
        body = stream.read(len(blob))
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n")
        if b"chunked" in head:
            connection.sendall(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        else:
            connection.sendall(body + behind)

    before = spliced(daemon)
    client = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=20)
    with serving(serve_one) as port, closing(client):
        client.connect()
        kept = client.sock
        for _ in range(2):
            client.request("POST", f"/proxy/{port}/", blob, headers(daemon))
            assert client.getresponse().read() == blob
            client.request("GET", "/health")
            assert json.loads(client.getresponse().read())["status"] == "ok"
            assert client.sock is kept
    assert not can_splice() or spliced(daemon) - before > (2 if b"chunked" in head else 4) * 6 * MIB


def test_a_request_behind_a_long_body_is_answered_next(daemon: Daemon) -> None:
    blob = os.urandom(8 * MIB)
    with http_server() as port:
        head = b"POST /proxy/%d/ HTTP/1.1\r\nHost: x\r\nAUTH\r\nContent-Length: %d\r\n\r\n" % (port, len(blob))
        next_one = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        with bare(daemon, head + blob + next_one) as client:
            answers = client.makefile("rb").read()
    assert hashlib.sha256(blob).hexdigest().encode() in answers
    assert answers.count(b"HTTP/1.1 ") == 2
    assert b'"status":"ok"' in answers.replace(b" ", b"")


def test_a_long_answer_to_a_client_of_http_1_0_ends_with_the_connection(daemon: Daemon) -> None:
    blob = os.urandom(8 * MIB)

    def serve_one(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n" + blob)

    with serving(serve_one) as port, bare(daemon, b"GET /proxy/%d/ HTTP/1.0\r\nAUTH\r\n\r\n" % port) as client:
        assert client.makefile("rb").read().partition(b"\r\n\r\n")[2] == blob


@pytest.mark.parametrize("head", [b"Content-Length: %d\r\n" % (64 * MIB), b""], ids=["length", "until-closed"])
def test_a_long_answer_that_breaks_off_does_not_look_complete(daemon: Daemon, head: bytes) -> None:
    def serve_one(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n" + bytes(8 * MIB))
        if not head:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)

    with serving(serve_one) as port, pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
        call(daemon, "GET", f"/proxy/{port}/")


def test_a_server_that_answers_in_the_middle_of_a_long_body_is_heard(daemon: Daemon) -> None:
    def serve_one(connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        while stream.readline() != b"\r\n":
            pass
        stream.read(2 * MIB)
        connection.sendall(b"HTTP/1.1 413 No\r\nContent-Length: 3\r\n\r\nbig")

    with serving(serve_one) as port:
        head = b"POST /proxy/%d/ HTTP/1.1\r\nHost: x\r\nAUTH\r\nContent-Length: %d\r\n\r\n" % (port, 64 * MIB)
        with bare(daemon, head + bytes(4 * MIB)) as client:
            answer = client.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 413 No\r\n")
    assert answer.endswith(b"\r\n\r\nbig")


@pytest.mark.parametrize("way", ["up", "down"])
async def test_a_client_that_breaks_off_a_long_body_ends_the_servers_connection(daemon: Daemon, way: str) -> None:
    ended, begun = threading.Event(), threading.Event()
    descriptors = daemon.descriptors()

    def serve_one(connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        while stream.readline() != b"\r\n":
            pass
        try:
            if way == "up":
                stream.read(4 * MIB)
                begun.set()
                stream.read()
            else:
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 * MIB))
                connection.sendall(bytes(2 * MIB))
                begun.set()
                connection.sendall(bytes(62 * MIB))
        except OSError:
            ended.set()

    with serving(serve_one) as port:
        length = b"Content-Length: %d\r\n" % (64 * MIB) if way == "up" else b""
        head = b"POST /proxy/%d/ HTTP/1.1\r\nHost: x\r\nAUTH\r\n%s\r\n" % (port, length)
        with bare(daemon, head + (bytes(6 * MIB) if way == "up" else b"")) as client:
            if way == "down":
                with client.makefile("rb") as stream:
                    stream.read(4 * MIB)
            assert begun.wait(10)
        assert ended.wait(10)
    pipes = 4  # descriptors of those that are kept for the next bodies
    await until(lambda: daemon.descriptors() <= descriptors + pipes)


# Refusals


def refused(daemon: Daemon, path: str) -> tuple[int, str]:
    response = call(daemon, "GET", path)
    return response.status, json.loads(response.read())["error"]


@pytest.mark.parametrize("port", ["0", "65536", "http", "", "-1", "%38080"])
def test_what_is_no_port_is_refused(daemon: Daemon, port: str) -> None:
    assert refused(daemon, f"/proxy/{port}/")[0] == 400


def test_the_daemons_own_ports_are_refused(daemon: Daemon) -> None:
    for port in (daemon.port, daemon.proxy_port):
        assert refused(daemon, f"/proxy/{port}/health") == (403, f"port: {port} is the daemon's own")


def test_a_port_that_nobody_listens_on_is_answered_502(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    status, error = refused(daemon, f"/proxy/{port}/")
    assert status == 502
    assert str(port) in error


def test_a_server_on_ipv6_only_is_found(daemon: Daemon) -> None:
    def reply(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nsix")

    with serving(reply, socket.AF_INET6) as port:
        assert call(daemon, "GET", f"/proxy/{port}/").read() == b"six"


def test_without_a_token_nothing_is_forwarded(daemon: Daemon) -> None:
    secret = daemon.secret.encode()
    with http_server() as port:
        for query, header in (
            (b"", b""),
            (b"?token=" + secret, b""),
            (b"", b"Cookie: token=%s; Authorization=Bearer %s\r\n" % (secret, secret)),
            (b"", b"Sec-WebSocket-Protocol: %s\r\n" % bearer(daemon.secret).encode()),
        ):
            upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
            request = b"GET /proxy/%d/%s HTTP/1.1\r\nHost: x\r\n%s%s\r\n" % (port, query, upgrade, header)
            with bare(daemon, request) as client:
                assert client.makefile("rb").readline().startswith(b"HTTP/1.1 401 ")


def test_a_port_without_a_slash_is_redirected(daemon: Daemon) -> None:
    response = call(daemon, "GET", "/proxy/8080?x=1")
    assert (response.status, response.headers["Location"]) == (308, "8080/?x=1")


def test_python_s_own_server_in_the_sandbox(daemon: Daemon, tmp_path: Any) -> None:
    (tmp_path / "page.html").write_text("<h1>hello</h1>")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = f"exec {sys.executable} -m http.server --bind 127.0.0.1 {port}"
    start = json.dumps({"cmd": command, "cwd": str(tmp_path)})
    id = json.loads(call(daemon, "POST", "/start_process", start).read())["id"]
    waited = json.dumps({"port": port, "http": "/page.html", "timeout": 20})
    assert json.loads(call(daemon, "POST", f"/processes/{id}/wait", waited).read())["reason"] == "http"
    response = call(daemon, "GET", f"/proxy/{port}/page.html")
    assert (response.status, response.read()) == (200, b"<h1>hello</h1>")
    assert response.headers["Content-Type"] == "text/html"
    call(daemon, "POST", "/kill_process", json.dumps({"id": id})).read()
