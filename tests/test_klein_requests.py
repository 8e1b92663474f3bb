"""What a Klein route or a Twisted resource may ask of a request, though most of it is made only then."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol, TypeVar, cast

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.web.http_headers import InvalidHeaderName
from twisted.web.iweb import IRequest
from twisted.web.resource import Resource
from zope.interface.verify import verifyObject

from sandboxd.daemon.sockets import ListeningSocket
from sandboxd.service import Sandboxd
from sandboxd.web.request import Request
from sandboxd.web.tokens import Credentials
from tests.client import Api

Function = TypeVar("Function", bound=Callable[..., Any])


class Adder(Protocol):
    """``route`` of a Klein app."""

    def __call__(self, path: str, methods: list[str] = ...) -> Callable[[Function], Function]: ...


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[Adder, Api]]:
    """What adds a route to the Klein app of a daemon in this process, and a client of it."""
    http, proxy = (ListeningSocket(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
    service = Sandboxd(cast(Any, reactor), [http], [proxy], Credentials(("secret",)), os.environ)
    service.startService()
    try:
        yield cast(Adder, service.routes.app.route), Api(f"http://127.0.0.1:{http.port}", "secret")
    finally:
        await service.stopService()


async def test_a_request_is_twisteds() -> None:
    seen: dict[str, Any] = {}
    async with serving() as (route, api):

        @route("/seen/<name>", methods=["POST"])
        def look(request: Any, name: str) -> bytes:
            seen.update(
                name=name,
                args=request.args,
                body=request.content.read(),
                header=request.getHeader("x-header"),
                all=request.requestHeaders.getRawHeaders(b"X-Header"),
                cookie=request.getCookie(b"a"),
                host=(request.getRequestHostname(), request.getHost().host, request.isSecure()),
                client=request.getClientAddress().host,
                path=(request.path, request.uri, request.method, request.clientproto),
                segments=(request.prepath, request.postpath, request.sitepath),
                url=str(request.URLPath()),
            )
            verifyObject(IRequest, request)
            request.requestHeaders.setRawHeaders(b"X-Header", [b"changed"])
            seen["changed"] = request.getHeader(b"x-header")
            request.setResponseCode(203, b"Whatever")
            request.addCookie(b"c", b"d", path=b"/")
            request.responseHeaders.addRawHeader(b"X-Twice", b"1")
            request.responseHeaders.addRawHeader(b"X-Twice", b"2")
            request.setHeader("X-Text", "text")
            request.setHeader(b"X-Folded", b"a\r\nb")
            return b"answer"

        response = await api.call("POST", "/seen/me?q=1&q=2", b"body", {"X-Header": "value", "Cookie": "a=b; e"})
    assert (response.status, response.body) == (203, b"answer")
    assert response.headers.getRawHeaders("X-Twice") == ["1", "2"]
    assert response.headers.getRawHeaders("X-Text") == ["text"]
    assert response.headers.getRawHeaders("X-Folded") == ["a b"]
    assert response.headers.getRawHeaders("Set-Cookie") == ["c=d; Path=/"]
    assert response.headers.getRawHeaders("Content-Type") == ["text/html"]
    for name in ("X-Request-Id", "Server", "Date"):
        assert len(response.headers.getRawHeaders(name)) == 1
    assert seen == {
        "name": "me",
        "args": {b"q": [b"1", b"2"]},
        "body": b"body",
        "header": "value",
        "all": [b"value"],
        "cookie": b"b",
        "host": (b"127.0.0.1", "127.0.0.1", False),
        "client": "127.0.0.1",
        "path": (b"/seen/me", b"/seen/me?q=1&q=2", b"POST", b"HTTP/1.1"),
        "segments": ([b"seen", b"me"], [], []),
        "url": seen["url"],
        "changed": b"changed",
    }


async def test_what_is_set_before_the_response_headers_are_asked_for_is_among_them() -> None:
    async with serving() as (route, api):

        @route("/x")
        def answer(request: Any) -> bytes:
            request.setHeader(b"X-Before", b"1")
            names = {name for name, _ in request.responseHeaders.getAllRawHeaders()}
            assert names == {b"X-Before", b"Server", b"Date", b"X-Request-Id"}
            request.responseHeaders.removeHeader(b"Server")
            return b""

        response = await api.get("/x")
    assert response.status == 200
    assert response.headers.getRawHeaders("X-Before") == ["1"]
    assert response.headers.getRawHeaders("Server") is None


@pytest.mark.parametrize("name", [b"bad name", b"bad\r\nname", b""])
async def test_a_header_name_that_is_none_is_refused(name: bytes) -> None:
    async with serving() as (route, api):

        @route("/x")
        def answer(request: Any) -> bytes:
            with pytest.raises(InvalidHeaderName):
                request.setHeader(name, b"x")
            return b"refused"

        assert (await api.get("/x")).body == b"refused"


@pytest.mark.filterwarnings("ignore:twisted.web.resource._Unsafe")  # twisted.web.static warns of itself
async def test_a_resource_can_be_returned(tmp_path: Any) -> None:
    from twisted.web.static import Data, File

    large = tmp_path / "large"
    large.write_bytes(os.urandom(3_000_000))

    class OnlyGet(Resource):
        isLeaf = True

        def render_GET(self, request: Any) -> bytes:
            return b"got"

    async with serving() as (route, api):

        @route("/data")
        def data(request: Any) -> Resource:
            return Data(b"some data", "text/plain")

        @route("/file")
        def file(request: Any) -> Resource:  # sent by a pull producer
            return File(str(large))

        @route("/get", methods=["GET", "HEAD", "POST"])
        def only_get(request: Any) -> Resource:
            return OnlyGet()

        assert (await api.get("/data")).body == b"some data"
        assert (await api.get("/file")).body == large.read_bytes()
        part = await api.get("/file", {"Range": "bytes=10-19"})
        assert (part.status, part.body) == (206, large.read_bytes()[10:20])
        head = await api.call("HEAD", "/get")
        assert (head.status, head.body, head.headers.getRawHeaders("Content-Length")) == (200, b"", ["3"])
        assert (await api.call("POST", "/get")).status == 405


async def test_etags_and_redirects_and_no_content() -> None:
    async with serving() as (route, api):

        @route("/etag")
        def etag(request: Any) -> bytes:
            return b"" if request.setETag(b'"x"') else b"new"

        @route("/redirect")
        def redirect(request: Any) -> bytes:
            request.redirect(b"/etag")
            return b""

        @route("/none")
        def none(request: Any) -> bytes:
            request.setResponseCode(204)
            return b"not sent"

        plain = await api.get("/etag")
        assert (plain.body, plain.headers.getRawHeaders("ETag")) == (b"new", ['"x"'])
        assert (await api.get("/etag", {"If-None-Match": '"x"'})).status == 304
        assert (await api.call("GET", "/redirect")).body == b"new"  # followed
        empty = await api.get("/none")
        assert (empty.status, empty.body, empty.headers.getRawHeaders("Content-Type")) == (204, b"", None)


async def test_a_disconnect_fires_the_deferred_of_whoever_asked() -> None:
    gone: Deferred[str] = Deferred()
    called: Deferred[None] = Deferred()
    async with serving() as (route, api):

        @route("/wait")
        def wait(request: Any) -> Deferred[bytes]:
            request.notifyFinish().addErrback(lambda failure: gone.callback(failure.type.__name__))
            called.callback(None)
            return Deferred()

        asking = api.request("GET", "/wait")
        await called
        asking.cancel()
        asking.addErrback(lambda _: None)
        assert await gone in ("ConnectionDone", "ConnectionLost")


@pytest.mark.slow
async def test_a_request_that_has_been_answered_holds_no_body() -> None:
    async with serving() as (_, api):
        gc.collect()
        gc.disable()  # Klein leaves a reference cycle, which may live for long
        try:
            for path, status in (("/no-such-route", 404), ("/processes/none/signal", 400), ("/run", 400)):
                assert (await api.call("POST", path, b"x" * 100_000)).status == status
            requests = [each for each in gc.get_objects() if isinstance(each, Request)]
            assert requests
            assert not any(request.body or request._rest for request in requests)
        finally:
            gc.enable()
