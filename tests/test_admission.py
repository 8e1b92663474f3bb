"""What a client without a token may cost, and what is decided by a request's head."""

from __future__ import annotations

import http.client
import json
import resource
import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from sandboxd.settings import Settings
from sandboxd.web.request_head import origin_form
from sandboxd.web.route_table import RouteTable, RouteTraits
from tests.daemon import Daemon

MIB = 1024 * 1024


def connect(daemon: Daemon) -> socket.socket:
    return socket.create_connection(("127.0.0.1", daemon.port), timeout=10)


def exchange(daemon: Daemon, request: bytes) -> bytes:
    """Return all that is answered to a request, until the daemon closes the connection."""
    with connect(daemon) as sock:
        sock.sendall(request)
        answer = b""
        while data := sock.recv(65536):
            answer += data
    return answer


@pytest.fixture
def limited(start_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon with 128 descriptors, the metrics open."""
    return start_daemon("--open-metrics", via=("prlimit", "--nofile=128:128"))


@pytest.mark.parametrize("path", ["/health", "/ready", "/koyeb-sandbox/health"])
@pytest.mark.parametrize("method", ["GET", "POST", "PUT"])
@pytest.mark.parametrize("length", [b"Content-Length: 100000000", b"Transfer-Encoding: chunked"])
def test_an_open_route_takes_no_body(daemon: Daemon, method: str, path: str, length: bytes) -> None:
    answer = exchange(daemon, f"{method} {path} HTTP/1.1\r\nHost: x\r\n".encode() + length + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"takes no body" in answer


def test_bodies_of_open_routes_cost_no_memory(limited: Daemon) -> None:
    before = limited.memory()
    head = b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(6):
            sock = stack.enter_context(connect(limited))
            try:
                sock.sendall(head + b"x" * 16 * MIB)
            except ConnectionError:  # it was answered and closed meanwhile
                continue
        assert limited.memory() - before < 32 * MIB


def test_a_wrong_method_of_an_open_route_is_405(daemon: Daemon) -> None:
    answer = exchange(daemon, b"POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 405 ")


def test_idle_connections_without_a_token_leave_descriptors_for_work(limited: Daemon) -> None:
    kept = http.client.HTTPConnection("127.0.0.1", limited.port, timeout=10)
    headers = {"Authorization": f"Bearer {limited.secret}"}
    kept.request("GET", "/status", headers=headers)
    assert kept.getresponse().read()
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(limited)) for _ in range(200)]
        kept.request("POST", "/run", b'{"cmd": "echo hi"}', headers)
        response = kept.getresponse()
        assert (response.status, b"hi" in response.read()) == (200, True)
        with pytest.raises(ConnectionResetError):
            idle[0].recv(1)  # the oldest was closed
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert idle[-1].recv(12) == b"HTTP/1.1 200"
    kept.close()


def test_an_idle_connection_is_closed_after_the_keep_alive_time(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--keep-alive=1")
    with connect(daemon) as sock:
        for _ in range(2):
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert sock.recv(65536).startswith(b"HTTP/1.1 200 ")
        while sock.recv(65536):
            pass
    assert b"Timing out" not in daemon.log.read_bytes()


def test_an_idle_connection_outlives_those_of_load_balancers() -> None:
    assert Settings().keep_alive > 600


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/health", b"/health"),
        (b"http://x/health?a=b", b"/health?a=b"),
        (b"HTTPS://x:1/run", b"/run"),
        (b"http://x", b"/"),
        (b"http://x?a=/health", b"/?a=/health"),
        (b"http://x#/health", b"/#/health"),
        (b"http:///health", b"/health"),
        (b"ftp://x/health", b"ftp://x/health"),
    ],
)
def test_the_origin_form_of_a_target(target: bytes, expected: bytes) -> None:
    assert origin_form(target) == expected


def test_a_query_behind_an_authority_is_no_path(daemon: Daemon) -> None:
    answer = exchange(daemon, b"GET http://x?a=/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 401 ")


def test_without_a_descriptor_left_every_answer_is_json(start_daemon: Callable[..., Daemon]) -> None:
    starved = start_daemon()
    client = http.client.HTTPConnection("127.0.0.1", starved.port, timeout=10)
    authorization = {"Authorization": f"Bearer {starved.secret}"}
    client.request("GET", "/health")
    assert client.getresponse().read()
    restore = resource.prlimit(starved.pid, resource.RLIMIT_NOFILE)
    # What routes with parameters need is imported at the first of them, or behind the first request with a token.
    resource.prlimit(starved.pid, resource.RLIMIT_NOFILE, (3, restore[1]))
    client.request("POST", "/processes/x/signal", b"{}", headers=authorization)
    response = client.getresponse()
    assert (response.status, response.headers["Content-Type"]) == (503, "application/json")
    assert "too many open files" in json.loads(response.read())["error"].lower()
    resource.prlimit(starved.pid, resource.RLIMIT_NOFILE, restore)
    client.request("GET", "/processes/x", headers=authorization)
    assert json.loads(client.getresponse().read())
    resource.prlimit(starved.pid, resource.RLIMIT_NOFILE, (3, 3))
    expected = {"/processes/x": 404, "/nope": 404, "/status": 200, "/metrics": 503, "/ports": 503, "/openapi.json": 200}
    for path, status in expected.items():
        client.request("GET", path, headers=authorization)
        response = client.getresponse()
        assert (response.status, response.headers["Content-Type"]) == (status, "application/json"), path
        assert json.loads(response.read())
    client.close()


def test_routes_are_found_by_path_with_and_without_the_prefix() -> None:
    table = RouteTable()
    table.add(b"GET", "/a.b", RouteTraits(open=True))
    table.add(b"PUT", "/a.b", RouteTraits())
    table.add(b"GET", "/ports/<port>/connect", RouteTraits(websocket=True))
    assert table.methods(b"/a.b") == {b"GET": RouteTraits(open=True), b"PUT": RouteTraits()}
    assert table.methods(b"/koyeb-sandbox/a.b") == table.methods(b"/a.b")
    assert table.methods(b"/koyeb-sandbox/ports/1/connect") == {b"GET": RouteTraits(websocket=True)}
    assert table.methods(b"/ports/1/2/connect") == {}
    assert table.methods(b"/aXb") == {}


def test_what_is_known_of_a_path_is_forgotten_when_a_route_is_added() -> None:
    table = RouteTable()
    table.add(b"GET", "/a", RouteTraits())
    assert table.look_up(b"GET", b"/a") == (RouteTraits(), False, False)
    assert table.look_up(b"PUT", b"/koyeb-sandbox/a") == (None, False, False)
    table.add(b"PUT", "/a", RouteTraits(open=True, success=True))
    assert table.look_up(b"GET", b"/a") == (RouteTraits(), True, True)
    assert table.look_up(b"PUT", b"/koyeb-sandbox/a") == (RouteTraits(open=True, success=True), True, True)
    assert table.look_up(b"GET", b"/b") == (None, False, False)
