"""What holds for every route: who is let in, what is refused and when, and the shape of the replies."""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import cast

import pytest
from twisted.internet import reactor
from twisted.internet.threads import deferToThread
from twisted.logger import capturedLogs
from twisted.web.server import Request

from sandboxd import __version__
from sandboxd.api.routing import LARGE, SMALL_BODY, Reply
from sandboxd.daemon.sockets import ListeningSocket
from sandboxd.reactor.interfaces import Reactor
from sandboxd.service import Sandboxd
from sandboxd.settings import Settings
from sandboxd.web.tokens import Credentials
from tests.client import Api
from tests.connection import Connection
from tests.daemon import Daemon

MIB = 1024 * 1024

GET_ROUTES = ("/list_processes", "/process_logs_streaming", "/port_status")
POST_ROUTES = (
    "/run",
    "/run_streaming",
    "/start_process",
    "/kill_process",
    "/write_file",
    "/read_file",
    "/delete_file",
    "/delete_dir",
    "/make_dir",
    "/list_dir",
    "/stat_file",
    "/bind_port",
    "/unbind_port",
)
ROUTES = [*(("GET", path) for path in GET_ROUTES), *(("POST", path) for path in POST_ROUTES)]


@pytest.fixture
def stranger(daemon: Daemon) -> Api:
    """A client without a token."""
    return Api(daemon.url, None)


# Routes and bodies


@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_every_route_is_there_with_and_without_the_prefix(api: Api, method: str, path: str) -> None:
    data: dict[str, str] | None = {} if method == "POST" else None
    plain, prefixed = await api.call(method, path, data), await api.call(method, f"/koyeb-sandbox{path}", data)
    assert plain.status not in (404, 405)
    assert (prefixed.status, prefixed.body) == (plain.status, plain.body)


@pytest.mark.parametrize(
    "content_type",
    [
        "application/json",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "multipart/form-data",
        "text/plain; charset=utf-16",
        "nonsense",
    ],
)
async def test_a_body_is_json_whatever_its_content_type(api: Api, content_type: str) -> None:
    response = await api.post("/run", {"cmd": "echo a=b"}, {"Content-Type": content_type})
    assert response.json()["stdout"] == "a=b\n"


def test_a_body_needs_no_content_type_and_may_be_chunked(connection: Connection) -> None:
    body = b'2\r\n{"\r\n5\r\ncmd":\r\na;x=y\r\n "echo hi"\r\n1\r\n}\r\n0\r\n\r\n'
    connection.send("POST /run", connection.auth + b"Transfer-Encoding: chunked\r\n", body)
    assert connection.response()[2]["stdout"] == "hi\n"


async def test_an_empty_body_is_an_empty_object(api: Api) -> None:
    assert (await api.post("/unbind_port", b"")).status == 200
    response = await api.post("/run", b"")
    assert (response.status, "cmd" in response.json()["error"]) == (400, True)


@pytest.mark.parametrize("body", [b"{", b"[]", b"1", b'"cmd"', b"null", b"cmd=true", b'{"cmd": "\xff"}', b"{}{}"])
async def test_a_body_that_is_no_json_object_is_a_bad_request(api: Api, body: bytes) -> None:
    for path in ("/run", "/run_streaming", "/start_process"):
        response = await api.post(path, body)
        assert response.status == 400
        assert response.json()["error"]


async def test_replies_are_ascii(api: Api) -> None:
    response = await api.post("/run", {"cmd": "printf 'nel\u0085 ls\u2028 euro\u20ac emoji\U0001f600 bad\\377'"})
    assert response.body.isascii()
    assert response.json()["stdout"] == "nel\x85 ls\u2028 euro\u20ac emoji\U0001f600 bad\ufffd"


async def test_a_query_does_not_matter_where_none_is_asked_for(api: Api) -> None:
    assert (await api.get("/port_status?x=%ff&=&&port=1")).status == 200


# What there is not


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/nope",
        "/run/",
        "/run/nope",
        "/./run",
        "/run%00",
        "/%ff",
        "/koyeb-sandbox",
        "/koyeb-sandbox/",
        "/koyeb-sandbox/nope",
        "/koyeb-sandbox/%ff",
        "/koyeb-sandbox/koyeb-sandbox/run",
        "/koyeb-sandboxrun",
        "/RUN",
        "/%E2%82%AC",
        "/" + "n" * 5000,
    ],
    ids=lambda path: ascii(path[:40]),
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_route_is_404(connection: Connection, method: str, path: str) -> None:
    connection.send(f"{method} {path}", connection.auth)
    status, _, body = connection.response()
    assert status == 404
    assert body["error"]


@pytest.mark.parametrize("path", ["//", "//run", "//health", "/koyeb-sandbox//run", "/%2Frun", "/koyeb-sandbox%2Frun"])
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_doubled_or_escaped_slash_is_no_slash(connection: Connection, method: str, path: str) -> None:
    connection.send(f"{method} {path}", connection.auth)
    status, _, body = connection.response()
    assert status == 404
    assert body["error"]


@pytest.mark.parametrize(("method", "path"), [("GET", "/health"), *ROUTES])
async def test_the_wrong_method_is_405_with_allow(api: Api, method: str, path: str) -> None:
    for wrong in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - {method}:
        response = await api.call(wrong, path)
        assert response.status == 405, wrong
        assert response.json()["error"]
        assert response.headers.getRawHeaders("Allow") == [method]


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "CONNECT", "BREW", "get", "PROPFIND"])
def test_other_methods_are_405(connection: Connection, method: str) -> None:
    connection.send(f"{method} /run", connection.auth)
    status, headers, _ = connection.response()
    assert (status, headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("path", ["/health", "/port_status", "/run", "/nope", "/%ff"])
def test_head_has_no_body_and_the_connection_stays_usable(connection: Connection, path: str) -> None:
    connection.send(f"HEAD {path}", connection.auth)
    assert connection.response("HEAD")[2] is None
    connection.send("GET /health")
    assert connection.response()[2]["status"] == "ok"


def test_head_without_a_token_has_no_body(connection: Connection) -> None:
    connection.send("HEAD /port_status")
    assert connection.response("HEAD")[0] == 401
    connection.send("GET /health")
    assert connection.response()[2]["status"] == "ok"


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_asterisk_is_no_route(connection: Connection, method: str) -> None:
    connection.send(f"{method} *", connection.auth)
    status, _, body = connection.response()
    assert status in (404, 405)
    assert body["error"]


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"GET /health HTTP/1.1 x\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
        b"GET /health HTTP/1.1\r\nbad name: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\n: x\r\n\r\n",
        b"GET /health HTTP/1.1\r\nlong: " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n" + b"many: x\r\n" * 5000 + b"\r\n",
        b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /run HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /run HTTP/1.1\r\nContent-Length: +5\r\n\r\n",
        b"POST /run HTTP/1.1\r\nContent-Length: five\r\n\r\n",
        b"POST /run HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /run HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /run HTTP/1.1\r\nTransfer-Encoding: zip\r\n\r\n",
    ],
    ids=lambda data: ascii(data[:45].partition(b"HTTP/1.1\r\n")[2] or data[:25]),
)
def test_what_is_not_http_is_refused_in_json_and_the_connection_ends(
    connection: Connection, request_bytes: bytes
) -> None:
    connection.sock.sendall(request_bytes)
    status, headers, body = connection.response()
    assert (status, headers["connection"]) == (400, "close")
    assert body["error"]
    assert connection.is_over()


def test_a_bad_chunk_is_refused_in_json_and_the_connection_ends(connection: Connection) -> None:
    connection.send("POST /run", connection.auth + b"Transfer-Encoding: chunked\r\n", b"what\r\n")
    assert connection.response()[0] == 400
    assert connection.is_over()


# Who is let in


@pytest.mark.parametrize(("method", "path"), [*ROUTES, ("GET", "/nope"), ("DELETE", "/run"), ("POST", "/health/x")])
@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
async def test_every_other_route_wants_the_token_first(stranger: Api, prefix: str, method: str, path: str) -> None:
    response = await stranger.call(method, prefix + path, b"{" if method == "POST" else None)
    assert response.status == 401
    assert "SANDBOX_SECRET" in response.json()["error"]
    assert response.headers.getRawHeaders("WWW-Authenticate") == ["Bearer"]


@pytest.mark.parametrize("path", ["/%ff", "//health", "/health/", "/%68ealth", "/", "/x/../health", "*", "/;/health"])
def test_no_spelling_of_another_path_gets_in(connection: Connection, path: str) -> None:
    connection.send(f"GET {path}")
    assert connection.response()[0] == 401


@pytest.mark.parametrize("uri", ["http://x/port_status", "http:/health", "http://x", "ftp://x/health"])
def test_an_absolute_uri_is_no_way_around_the_token(connection: Connection, uri: str) -> None:
    connection.send(f"GET {uri}")
    assert connection.response()[2].keys() == {"error"}


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "{}", "Basic {}", "Bearer {}x", "Bearer x{}", "Bearer {} x", "Bearer\u20ac {}"],
    ids=ascii,
)
def test_a_wrong_token_is_401(connection: Connection, daemon: Daemon, value: str) -> None:
    connection.send("GET /port_status", f"Authorization: {value.format(daemon.secret)}\r\n".encode())
    assert connection.response()[0] == 401


@pytest.mark.parametrize("value", ["Bearer {}", "bearer {}", "BEARER  {} "])
def test_the_scheme_is_not_case_sensitive(connection: Connection, daemon: Daemon, value: str) -> None:
    connection.send("GET /port_status", f"Authorization: {value.format(daemon.secret)}\r\n".encode())
    assert connection.response()[0] == 200


@pytest.mark.parametrize("announced", [b"Content-Length: 1000000000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_401_does_not_wait_for_the_body(connection: Connection, announced: bytes) -> None:
    connection.send("POST /run", announced)
    status, headers, _ = connection.response()
    assert (status, headers["connection"]) == (401, "close")
    assert connection.is_over()


@pytest.mark.parametrize("announced", [b"Content-Length: 1000000000\r\n", b"Transfer-Encoding: chunked\r\n"])
def test_401_reaches_a_client_that_keeps_sending(connection: Connection, daemon: Daemon, announced: bytes) -> None:
    before = daemon.memory()
    connection.send("POST /write_file", announced)
    for _ in range(20):
        connection.sock.sendall(b"100000\r\n" + b"x" * MIB + b"\r\n")
    assert connection.response()[0] == 401
    assert daemon.memory() - before < 10 * MIB


def test_401_is_the_only_answer_to_what_a_client_sent(connection: Connection) -> None:
    connection.send("POST /run", b"Content-Length: 3\r\n", b"{}\nGET /health HTTP/1.1\r\n\r\n")
    assert connection.response()[0] == 401
    assert connection.is_over()


def test_401_without_a_body_keeps_the_connection(connection: Connection) -> None:
    for _ in range(3):
        connection.send("GET /port_status")
        assert connection.response()[0] == 401
        connection.send("POST /unbind_port", b"Content-Length: 0\r\n")
        assert connection.response()[0] == 401
        connection.send("GET /port_status", connection.auth)
        assert connection.response()[0] == 200


# Sizes, and the protocol


def test_413_does_not_wait_for_the_body(connection: Connection) -> None:
    connection.send("POST /write_file", connection.auth + b"Content-Length: %d\r\n" % (Settings.max_body + 1))
    status, headers, body = connection.response()
    assert (status, headers["connection"]) == (413, "close")
    assert str(Settings.max_body) in body["error"]
    assert connection.is_over()


def test_413_for_a_chunked_body_comes_as_soon_as_it_is_over_the_limit(connection: Connection) -> None:
    connection.send("POST /write_file", connection.auth + b"Transfer-Encoding: chunked\r\n")
    chunk = b"100000\r\n" + b" " * MIB + b"\r\n"
    for _ in range(Settings.max_body // MIB + 5):
        connection.sock.sendall(chunk)
    assert connection.response()[0] == 413
    assert connection.is_over()


@pytest.mark.parametrize(
    ("route", "limit"), [("write_file", Settings.max_body), ("unbind_port", SMALL_BODY), ("files/edit", LARGE)]
)
@pytest.mark.slow
def test_a_body_at_the_limit_is_read(connection: Connection, route: str, limit: int) -> None:
    # In turn: content for /dev/null, an unknown field, an edit of what is no file.
    start, end = b'{"path":"/dev/null","edits":[{"old":"x","new":"y"}],"content":"', b'"}'
    connection.send(f"POST /{route}", connection.auth + b"Content-Length: %d\r\n" % limit, start)
    block = b"x" * MIB
    for _ in range(limit // MIB - 1):
        connection.sock.sendall(block)
    connection.sock.sendall(block[len(start) + len(end) :] + end)
    assert connection.response()[0] == (409 if route == "files/edit" else 200)
    connection.send(f"POST /{route}", connection.auth + b"Content-Length: %d\r\n" % (limit + 1))
    status, _, body = connection.response()
    assert (status, str(limit) in body["error"]) == (413, True)


def test_pipelined_requests_are_answered_in_order(connection: Connection) -> None:
    body = b'{"cmd": "sleep 0.1; echo one"}'
    connection.send("POST /run", connection.auth + b"Content-Length: %d\r\n" % len(body), body)
    connection.send("GET /nope", connection.auth)
    connection.send("GET /port_status")
    connection.send("GET /health")
    answers = [connection.response() for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 404, 401, 200]
    assert answers[0][2]["stdout"] == "one\n"


def test_expect_100_continue_is_answered_before_the_body(connection: Connection) -> None:
    connection.send("POST /run", connection.auth + b"Expect: 100-continue\r\nContent-Length: 17\r\n")
    assert connection.sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
    connection.sock.sendall(b'{"cmd":"echo hi"}')
    assert connection.response()[2]["stdout"] == "hi\n"


@pytest.mark.parametrize("size", [17, Settings.max_body + 1])
def test_expect_100_continue_is_not_answered_when_the_body_is_not_wanted(connection: Connection, size: int) -> None:
    auth, status = (b"", 401) if size == 17 else (connection.auth, 413)
    connection.send("POST /run", auth + b"Expect: 100-continue\r\nContent-Length: %d\r\n" % size)
    assert connection.sock.recv(12, socket.MSG_PEEK) == b"HTTP/1.1 %d" % status
    assert connection.response()[0] == status


def test_http_1_0_is_answered_and_closed(connection: Connection) -> None:
    connection.sock.sendall(b"GET /health HTTP/1.0\r\n\r\n")
    assert connection.response()[0] == 200
    assert connection.is_over()


# Our own faults


@asynccontextmanager
async def in_process() -> AsyncIterator[tuple[Sandboxd, Api]]:
    """A daemon in this process with two routes that fail, and a client of it."""
    http, proxy = (ListeningSocket(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
    service = Sandboxd(cast(Reactor, reactor), [http], [proxy], Credentials(("secret",)), os.environ)

    @service.routes.get("/broken")
    async def broken(request: Request) -> Reply:
        raise RuntimeError("private detail")

    @service.routes.get("/half")
    async def half(request: Request) -> Reply:
        request.setHeader(b"Content-Length", b"1000")
        request.write(b"the first half")
        raise RuntimeError("private detail")

    service.startService()
    try:
        yield service, Api(f"http://127.0.0.1:{http.port}", "secret")
    finally:
        await service.stopService()


async def test_a_route_that_raises_is_500_with_the_traceback_in_the_log_only() -> None:
    async with in_process() as (_, api):
        with capturedLogs() as logs:
            response = await api.get("/broken")
        assert response.status == 500
        assert response.json()["error"]
        assert b"private detail" not in response.body
        assert b"Traceback" not in response.body
        (failure,) = [event["log_failure"] for event in logs if "log_failure" in event]
        assert failure.getErrorMessage() == "private detail"
        assert (await api.get("/health")).status == 200


async def test_a_route_that_raises_after_it_has_begun_to_answer_breaks_the_connection() -> None:
    async with in_process() as (_, api):
        with capturedLogs() as logs, pytest.raises(Exception, match=r"(?i)response|connection"):
            await api.get("/half")
        assert len([event for event in logs if "log_failure" in event]) == 1
        assert (await api.get("/health")).status == 200


# Health


@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
async def test_health_needs_no_token(stranger: Api, daemon: Daemon, prefix: str) -> None:
    response = await stranger.get(f"{prefix}/health?x=1")
    body = response.json()
    assert (response.status, body["status"], body["version"]) == (200, "ok", __version__)
    assert (type(body["uptime"]), body["proxy_port"]) == (int, str(daemon.proxy_port))


async def test_health_ignores_a_wrong_token(daemon: Daemon) -> None:
    assert (await Api(daemon.url, "wrong").get("/health")).status == 200


@pytest.mark.slow
async def test_health_answers_within_50_ms_while_the_daemon_streams(daemon: Daemon, connection: Connection) -> None:
    drain = (
        "import socket, sys\n"
        "sock = socket.create_connection(('127.0.0.1', int(sys.argv[1])))\n"
        "sock.sendall(sys.argv[2].encode())\n"
        "total = 0\n"
        "while data := sock.recv(1 << 20):\n"
        "    if total < 1 << 20 <= (total := total + len(data)): print('busy', flush=True)\n"
    )
    body = '{"cmd":"yes"}'
    headers = f"Host: test\r\n{connection.auth.decode()}Content-Length: {len(body)}"
    request = f"POST /run_streaming HTTP/1.1\r\n{headers}\r\n\r\n{body}"
    clients = [
        subprocess.Popen([sys.executable, "-c", drain, str(daemon.port), request], stdout=subprocess.PIPE)
        for _ in range(4)
    ]
    try:
        for client in clients:
            assert client.stdout is not None
            assert await deferToThread(client.stdout.readline).addTimeout(20, reactor) == b"busy\n"
        times = []
        for _ in range(40):
            started = time.monotonic()
            connection.send("GET /health")
            assert connection.response()[2]["status"] == "ok"
            times.append(time.monotonic() - started)
    finally:
        for client in clients:
            client.send_signal(signal.SIGKILL)
            client.wait(5)
            assert client.stdout is not None
            client.stdout.close()
    assert statistics.median(times) < 0.05, times


@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
@pytest.mark.parametrize("path", ["/kill_process", "/write_file", "/processes/x/signal"])
async def test_errors_of_routes_with_success_have_it_whatever_the_error(daemon: Daemon, prefix: str, path: str) -> None:
    api = Api(daemon.url, daemon.secret)
    wrong_method = await api.get(prefix + path)
    malformed = await api.post(prefix + path, b"[]")
    stranger = await Api(daemon.url, "wrong").post(prefix + path)
    assert [reply.status for reply in (wrong_method, malformed, stranger)] == [405, 400, 401]
    assert all(reply.json()["success"] is False for reply in (wrong_method, malformed, stranger))
