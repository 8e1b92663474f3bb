"""
Routes below ``/proxy/<port>/``: forward HTTP requests to a server in the sandbox.

A request is forwarded as it arrives, and its answer likewise: bodies of any length, both ways at once. Each has a
connection of its own to the server; the client's is kept. Of a long body, and of a connection that was upgraded, the
kernel moves the bytes between the two sockets (:mod:`sandboxd.proxy.splicing`).
"""

from __future__ import annotations

import socket
from collections.abc import Iterator

import httptools
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectError
from twisted.python.failure import Failure

from sandboxd.api.operations import RawBody
from sandboxd.api.routing import ApiError, Routes
from sandboxd.api.tunnel import port_number, unreachable
from sandboxd.proxy.both_ways import BothWays
from sandboxd.proxy.socket_stream import SIZE, SocketStream, connect
from sandboxd.proxy.splicing import PipePool, can_splice
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.oneshot import OneShot
from sandboxd.web.auth import OWN_AUTHORIZATION
from sandboxd.web.body import BodyError, BodyStream
from sandboxd.web.request import Request
from sandboxd.web.response import ResponseStream
from sandboxd.web.route_table import PREFIX

PATH = b"/proxy/"

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

#: Bytes of the longest head of an answer.
MAX_HEAD = 256 * 1024

#: Bytes of a body from which on splicing the rest of it costs less than copying that.
SPLICED = 1024 * 1024

#: Headers that concern one connection only (RFC 9110 section 7.6.1).
HOP_BY_HOP = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)

#: Headers of a request that are not forwarded as they came. ``Expect`` is answered here.
REPLACED = frozenset(
    (
        b"authorization",
        b"content-length",
        b"expect",
        b"host",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-sandbox-authorization",
        OWN_AUTHORIZATION.lower(),
    )
)


class Previews:
    """
    The requests that are forwarded.

    :ivar open: how many there are.
    :ivar total: how many there have been.
    :ivar pool: the pipes of those that are spliced, or None if the kernel cannot do that.
    """

    def __init__(self) -> None:
        self.open = 0
        self.total = 0
        self.pool = PipePool() if can_splice() else None

    def close(self) -> None:
        """Close the pipes that are free."""
        if self.pool is not None:
            self.pool.close()


def add_preview_route(routes: Routes, reactor: Reactor, previews: Previews, own_ports: frozenset[int]) -> None:
    """
    Add the routes below ``/proxy/<port>/`` to the API.

    :param own_ports: the ports that the daemon listens on, to which nothing is forwarded.
    """

    @routes.subtree(PATH.decode(), "/proxy/<port>/<rest>", METHODS, reply=RawBody("*/*"), errors=(400, 403, 502))
    async def preview(request: Request, body: BodyStream) -> None:
        """
        Forward a request to a server of the sandbox, on 127.0.0.1 or else ::1, as `/<rest>` with its query.

        Bodies are forwarded as they come, without the API's limits of size and time; `Upgrade` passes. The server sees
        `X-Forwarded-For`, `-Host`, `-Proto` and `-Prefix`, and the header `X-Sandbox-Authorization` as `Authorization`.
        """
        path, query, target = request.path, *_target(request)
        number = port_number(path.removeprefix(PREFIX).removeprefix(PATH).partition(b"/")[0].decode("latin-1"))
        if number in own_ports:
            raise ApiError(403, f"port: {number} is the daemon's own")
        if target is None:
            request.setHeader(b"Location", b"%d/%s" % (number, query))
            raise ApiError(308, f"the server's root is {path.decode('latin-1')}/")
        try:
            server = await connect(reactor, number)
        except ConnectError as error:
            raise unreachable(number, error) from None
        previews.open += 1
        previews.total += 1
        try:
            await _Exchange(reactor, previews.pool, request, body, server).forward(number, target)
        finally:
            previews.open -= 1
            server.close()


def _target(request: Request) -> tuple[bytes, bytes | None]:
    """
    Return the query with its question mark, and the path to ask the server for: None if the path ends with the port.
    """
    path, mark, query = request.uri.partition(b"?")
    _, slash, rest = path.removeprefix(PREFIX).removeprefix(PATH).partition(b"/")
    return mark + query, slash + rest + mark + query if slash else None


def _tokens(request: Request, name: bytes) -> list[bytes]:
    """Return the members of a header that is a list, in lower case."""
    values = request.requestHeaders.getRawHeaders(name) or []
    return [token.strip().lower() for value in values for token in value.split(b",")]


def _request_head(request: Request, body: BodyStream, port: int, target: bytes, upgrade: bytes | None) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method, target), b"Host: 127.0.0.1:%d" % port]
    dropped = HOP_BY_HOP | REPLACED | set(_tokens(request, b"Connection"))
    for name, values in request.requestHeaders.getAllRawHeaders():
        if name.lower() not in dropped:
            lines += [b"%s: %s" % (name, value) for value in values]
    lines += [b"%s: %s" % header for header in _forwarded(request, port)]
    for value in request.requestHeaders.getRawHeaders(b"X-Sandbox-Authorization") or []:
        lines.append(b"Authorization: " + value)
    if body.length is None:
        lines.append(b"Transfer-Encoding: chunked")
    elif body.length or request.getHeader(b"Content-Length") is not None:
        lines.append(b"Content-Length: %d" % body.length)
    lines += [b"Connection: close"] if upgrade is None else [b"Connection: Upgrade", b"Upgrade: " + upgrade]
    return b"\r\n".join(lines) + b"\r\n\r\n"


def _forwarded(request: Request, port: int) -> Iterator[tuple[bytes, bytes]]:
    """Yield the ``X-Forwarded-*`` headers; those that a proxy before this one has set are kept or extended."""
    clients = request.requestHeaders.getRawHeaders(b"X-Forwarded-For") or []
    host = getattr(request.getClientAddress(), "host", None)
    if host is not None:
        clients = [*clients, host.removeprefix("::ffff:").encode("ascii")]  # an IPv4 client of an IPv6 socket
    if clients:
        yield b"X-Forwarded-For", b", ".join(clients)
    for name, default in ((b"X-Forwarded-Host", request.getHeader(b"Host")), (b"X-Forwarded-Proto", b"http")):
        value = request.getHeader(name) or default
        if value is not None:
            yield name, value
    prefix = PREFIX if request.path.startswith(PREFIX + b"/") else b""
    yield (
        b"X-Forwarded-Prefix",
        b"%s%s%s%d" % (request.getHeader(b"X-Forwarded-Prefix") or b"", prefix, PATH, port),
    )


def _ignore(count: int) -> None:
    """Count no bytes."""


class _Exchange:
    """A forwarded request, and the server's response to it."""

    def __init__(
        self, reactor: Reactor, pool: PipePool | None, request: Request, body: BodyStream, server: SocketStream
    ) -> None:
        self._reactor = reactor
        self._pool = pool
        self._request = request
        self._body = body
        self._server = server

    async def forward(self, port: int, target: bytes) -> None:
        """
        Forward the request and the response.

        :param port: the server's.
        :param target: what the server is asked for.
        :raise ApiError: if the answer is malformed, or breaks off.
        :raise BodyError: if the request's body is malformed.
        """
        request, server = self._request, self._server
        upgrade = request.getHeader(b"Upgrade") if b"upgrade" in _tokens(request, b"Connection") else None
        await server.write(_request_head(request, self._body, port, target, upgrade))
        sending = Deferred.fromCoroutine(self._send_body())
        refused: list[BodyError] = []

        def failed(failure: Failure) -> None:
            error = failure.value
            if isinstance(error, BodyError):
                refused.append(error)
            server.stop()

        sending.addErrback(failed)
        answer = _ForwardedResponse(request)
        try:
            while not answer.complete and (data := await server.read()):
                behind = answer.feed(data)
                if behind is not None:
                    if upgrade is None:
                        raise ApiError(502, "the server has switched protocols without having been asked to")
                    await self._switch(answer, behind)
                    return
                await answer.send()
                if self._pool is not None and answer.much_follows(data):
                    await self._splice_answer(answer, self._pool)
            answer.end(server.error)
            await answer.send()
        except Exception:
            if refused:
                raise refused[0] from None
            raise
        finally:
            sending.cancel()
            answer.close()
        server.finish()

    async def _send_body(self) -> None:
        """Forward the body of the request at the pace at which the server takes it."""
        body, server = self._body, self._server
        if body.length == 0:
            return
        while data := await body.read():
            lent = None if self._pool is None else body.socket()
            if lent is not None:
                await self._splice_body(data, *lent)
            else:
                await server.write(data if body.length is not None else b"%x\r\n%s\r\n" % (len(data), data))
        if body.length is None:
            await server.write(b"0\r\n\r\n")

    async def _splice_body(self, data: bytes, descriptor: int, size: int) -> None:
        """
        Splice the rest of the request's body.

        :param data: what comes before it.
        :param descriptor: the client's socket, which is closed here.
        :param size: bytes of the body that are to come.
        """
        assert self._pool is not None
        taken = 0

        def count(size: int) -> None:
            nonlocal taken
            taken += size

        client = SocketStream(self._reactor, socket.socket(fileno=descriptor))
        try:
            await self._server.write(data)
            await client.splice_to(self._server, self._pool, size, count)
        finally:
            client.finish()
            self._body.received(taken)

    async def _splice_answer(self, answer: _ForwardedResponse, pool: PipePool) -> None:
        """
        Splice the rest of the response, or of the part that has arrived, if the client has taken all that was sent
        before.
        """
        client = await answer.socket(self._reactor)
        if client is None:
            return
        try:
            await self._server.splice_to(client, pool, answer.left, answer.spliced, bool(self._request.chunked))
            if client.broken:
                raise ApiError(502, "the client has gone")
        finally:
            client.finish()

    async def _switch(self, answer: _ForwardedResponse, behind: bytes) -> None:
        """Forward bytes of the protocol that the server has switched to, both ways, until both sides have ended."""
        request, server = self._request, self._server
        early: list[bytes] = []
        early.append(request.switch_protocols(answer.head(), early.append))
        if behind:  # to send nothing would take a pending error from the socket
            request.send_raw(behind)
        stream = ResponseStream(request)
        try:
            while request.unsent:
                await stream.when_drained()
            connection = request.connection
            done: OneShot[BaseException | None] = OneShot()
            client = connection.hand_over_socket(lambda: done.fire(None))
        finally:
            stream.finish()
        forwarding = None
        try:
            await server.write(b"".join(early))
            server.stop()
            if not done.fired:
                forwarding = BothWays(self._reactor, self._pool, client, server.socket, _ignore, done.fire)
            error = await done.when_fired()
        finally:
            if forwarding is not None:
                forwarding.stop()
                request.sentLength += forwarding.passed_to_one
            connection.take_back_socket()
        if error is None:
            server.finish()
        else:
            connection.abort()


class _ForwardedResponse:
    """
    The response of the server, parsed for its framing and forwarded to the client.

    :ivar complete: whether all of it has come.
    :ivar left: bytes of its body that are to come; None if its end is that of the connection.
    """

    def __init__(self, request: Request) -> None:
        self._request = request
        self._parser = httptools.HttpResponseParser(self)
        self._reason = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_size = 0
        self._status = 0
        self._body: list[bytes] = []
        self._stream: ResponseStream | None = None
        self._begun = False
        self._whole = False  #: whether the body comes as it is, neither in chunks nor missing
        self.complete = False
        self.left: int | None = None

    def feed(self, data: bytes) -> bytes | None:
        """
        Parse bytes from the server.

        :return: what follows the head if the server has switched protocols, else None.
        :raise ApiError: if it is no HTTP.
        """
        if self._whole:
            self.on_body(data if self.left is None else data[: self.left])
            return None
        if not self._begun:
            self._head_size += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            return data[upgrade.args[0] :]
        except httptools.HttpParserError as error:
            if not self.complete:  # else it is what follows an answer to HEAD, or an answer too many
                raise ApiError(502, f"the server's answer is not valid HTTP: {error}") from None
        size = sum(len(name) + len(value) for name, value in self._headers) if self._begun else self._head_size
        if size > MAX_HEAD:
            raise ApiError(502, f"the head of the server's answer is longer than {MAX_HEAD} bytes")
        return None

    def end(self, error: BaseException | None) -> None:
        """
        Handle the end of the server's connection.

        :param error: if it has broken it.
        :raise ApiError: if the answer is not complete.
        """
        if not (self.complete or (self._whole and self.left is None and error is None)):
            raise ApiError(502, "the server has closed the connection before its answer was complete")

    async def send(self) -> None:
        """Forward what was parsed, once the client has taken what was sent before."""
        if not self._begun:
            return
        if self._stream is None:
            self._send_head()
            self._stream = ResponseStream(self._request)
        await self._stream.when_ready()
        body, self._body = b"".join(self._body), []
        self._stream.write(body)

    def much_follows(self, data: bytes) -> bool:
        """
        Return whether so many bytes are expected to follow that splicing them costs less than copying.

        :param data: what has come last.
        """
        return self._whole and not self.complete and (len(data) == SIZE if self.left is None else self.left >= SPLICED)

    async def socket(self, reactor: Reactor) -> SocketStream | None:
        """
        Return the client's socket for the rest of the body, once everything before it is written.

        Who writes there makes chunks if the request's response is ``chunked``, and reports it to :meth:`spliced`.
        """
        assert self._stream is not None
        while self._request.unsent:
            await self._stream.when_drained()
        descriptor = self._stream.socket(framed=True)
        return None if descriptor is None else SocketStream(reactor, socket.socket(fileno=descriptor))

    def spliced(self, size: int) -> None:
        """Count bytes of the body that were forwarded by splicing."""
        assert self._stream is not None
        self._stream.sent(size)
        self._count(size)

    def close(self) -> None:
        """Stop forwarding."""
        if self._stream is not None:
            self._stream.finish()

    def head(self) -> bytes:
        """Return the head of a response that switches protocols."""
        lines = [b"HTTP/1.1 %d %s" % (self._status, self._reason)]
        return b"\r\n".join([*lines, *(b"%s: %s" % header for header in self._headers)]) + b"\r\n\r\n"

    def _send_head(self) -> None:
        request = self._request
        request.duplex = True
        for name, _ in list(request.responseHeaders.getAllRawHeaders()):
            request.responseHeaders.removeHeader(name)
        request.defaultContentType = None
        request.setResponseCode(self._status, self._reason)
        listed = {
            token.strip().lower()
            for name, value in self._headers
            if name.lower() == b"connection"
            for token in value.split(b",")
        }
        for name, value in self._headers:
            if name.lower() not in HOP_BY_HOP | listed:
                request.responseHeaders.addRawHeader(name, value)

    # The names are httptools'. What follows a complete answer is ignored: no other was asked for.

    def on_message_begin(self) -> None:
        """Prepare for the head of a response, perhaps one after an interim response."""
        if not self.complete:
            self._headers.clear()
            self._reason = b""

    def on_status(self, reason: bytes) -> None:
        """Add to the reason phrase."""
        if not self.complete:
            self._reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """Add a header, unless it is a trailer."""
        if not self._begun:
            self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Take the status, and decide whether this is the final response."""
        if not self.complete:
            self._status = self._parser.get_status_code()
            self._begun = self._status >= 200
            self.complete = self._begun and self._request.method == b"HEAD"
            fields = {name.lower(): value for name, value in self._headers}
            self._whole = self._begun and not self.complete and b"transfer-encoding" not in fields
            length = fields.get(b"content-length")
            self.left = None if length is None else int(length)

    def on_body(self, data: bytes) -> None:
        """Add to the body that waits to be sent."""
        if not self.complete:
            self._body.append(data)
            self._count(len(data))

    def _count(self, size: int) -> None:
        if self._whole and self.left is not None:
            self.left -= size
            self.complete = not self.left

    def on_message_complete(self) -> None:
        """Mark the response as complete, unless it was an interim one."""
        self.complete = self._begun
