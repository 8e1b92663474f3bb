"""A request of the API: its body, its answer, and what is known of it before a route is called."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from io import BytesIO
from itertools import count
from time import perf_counter
from typing import NamedTuple, Protocol, cast

from twisted.python.failure import Failure
from twisted.web import server

from sandboxd.web.ascii_json import dumps
from sandboxd.web.body import BodyStream, whole
from sandboxd.web.request_stats import HUNG_UP
from sandboxd.web.route_table import PREFIX, RouteTraits


class Refusal(NamedTuple):
    """An answer that needs no route."""

    status: int
    error: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Connection(Protocol):
    """
    What a request uses of its client's connection; it is :class:`sandboxd.web.site.Channel`.

    :ivar refused: whether what still arrives is dropped.
    """

    refused: bool

    def process(self, request: Request) -> None:
        """Answer a request that has arrived, in its turn."""

    def ended(self, request: Request, status: int) -> None:
        """Count a request that was answered, or whose client is gone."""

    def progress(self) -> None:
        """Restart the time in which more of a streamed body has to arrive."""

    def refuse(self, request: Request, refusal: Refusal) -> None:
        """Answer at once, drop the rest of the request, and close."""

    def cut_off(self, request: Request) -> None:
        """Drop the rest of a request that is about to be answered, and close after that."""

    def flush(self) -> None:
        """Give the kernel now what was written."""

    def abort(self) -> None:
        """Close at once."""

    def hold(self, held: bool) -> None:
        """Stop or resume reading from the client."""

    def upgrade(self, received: Callable[[bytes], None]) -> bytes:
        """Give what the client sends to ``received``; return what has arrived behind the request."""

    def close_upgraded(self) -> None:
        """Close when all is written."""


class Request(server.Request):
    """
    A request whose body is held in memory, up to the site's limit, or given to its route as it arrives.

    :ivar route: the traits of its route; None if there is none for its method and path.
    :ivar success: whether the replies on its path have a ``success`` field.
    :ivar authenticated: whether it has a valid token.
    :ivar claim: an ``Authorization`` that would claim the daemon, which is to be tried first; or None.
    :ivar refusal: what it is answered with in place of calling its route, or None.
    :ivar max_body: most bytes of its body; None for any number.
    :ivar stream: the body, if the route reads it as it arrives.
    :ivar duplex: whether its body goes on to arrive while it is answered.
    :ivar body: the whole body, once :meth:`take_body` was called.
    :ivar template: the path of its route, with parameters as ``<name>``; None until that is called.
    :ivar id: its ``X-Request-Id``, the client's or a new one; empty until its headers are complete.
    :ivar began: when its headers were complete, in seconds of :func:`time.perf_counter`.
    :ivar upgraded: whether the connection no longer speaks HTTP.
    """

    route: RouteTraits | None = None
    success = False
    authenticated = False
    claim: bytes | None = None
    refusal: Refusal | None = None
    max_body: int | None = None
    stream: BodyStream | None = None
    duplex = False
    body = b""
    template: str | None = None
    id = b""
    began = 0.0
    upgraded = False
    _called = False
    _answered = 0.0

    @property
    def connection(self) -> Connection:
        """The client's connection, by its full type."""
        return cast(Connection, self.channel)

    @property
    def active(self) -> bool:
        """Whether it keeps the daemon from being idle: it has a token, and does not only look at the daemon."""
        route = self.route
        return (self.authenticated or self.claim is not None) and route is not None and not route.observes

    @property
    def query(self) -> bytes:
        """The part of its target behind the question mark."""
        return self.uri.partition(b"?")[2]

    def begin(self, method: bytes, uri: bytes) -> None:
        """Set what is known of it once its headers are complete."""
        self.began = perf_counter()
        self.method, self.path = method, uri.partition(b"?")[0]
        given = self.requestHeaders.getRawHeaders(b"X-Request-Id")
        self.id = request_id(given[0] if given else None)
        self.responseHeaders.setRawHeaders(b"X-Request-Id", [self.id])

    @property
    def latency(self) -> float:
        """Seconds until the first byte of the answer was written; so far, if none was."""
        return (self._answered or perf_counter()) - self.began

    def connectionLost(self, reason: Failure) -> None:
        """The client is gone."""
        if self.began and not self.finished:
            self.connection.ended(self, self.code if self.upgraded else HUNG_UP)
        super().connectionLost(reason)

    def gotLength(self, length: int | None) -> None:
        """The headers are complete."""
        self.content = BytesIO()

    def handleContentChunk(self, data: bytes) -> None:
        """Some of the body has arrived."""
        if self.stream is not None:
            self.connection.progress()
            self.stream.feed(data)
            return
        assert self.content is not None
        if self.max_body is not None and self.content.tell() + len(data) > self.max_body:
            self.connection.refuse(self, too_large(self.max_body))
        elif not self.connection.refused:
            self.content.write(data)

    def requestReceived(self, command: bytes, path: bytes, version: bytes) -> None:
        """The headers have arrived if the route reads its body by itself, and later, or else, all has."""
        if not self._called:
            self._called = True
            super().requestReceived(command, path, version)

    def write(self, data: bytes) -> None:
        """Send some of the response. If the body is still arriving, the rest of it is not waited for."""
        if not self.startedWriting:
            self._answered = perf_counter()
            if self._incomplete and not self.duplex:
                self.connection.cut_off(self)
        super().write(data)

    def switch_protocols(self, head: bytes, received: Callable[[bytes], None]) -> bytes:
        """
        Answer 101 and speak HTTP no more on this connection; it ends with the request.

        :param head: the whole head of the response.
        :param received: called with what the client sends from now on.
        :return: what it has sent behind the request.
        """
        self.upgraded, self.startedWriting, self.code = True, 1, 101
        self._answered = perf_counter()
        behind = self.connection.upgrade(received)
        self.send_raw(head)
        return behind

    def send_raw(self, data: bytes) -> None:
        """Send bytes of the protocol that was switched to."""
        self.sentLength += len(data)
        self.channel.write(data)

    def finish(self) -> None:
        """End the response, and with it the connection if that was upgraded."""
        if not self.upgraded:
            if self.duplex and self._incomplete:
                self.connection.cut_off(self)
            super().finish()
        elif not self._disconnected:
            self.connection.close_upgraded()

    @property
    def _incomplete(self) -> bool:
        """Whether its body is still arriving."""
        return self.stream is not None and not self.stream.complete and not self._disconnected

    def body_stream(self) -> BodyStream:
        """The body as a stream, even if it came as a whole."""
        return self.stream or whole(self.take_body())

    def take_body(self) -> bytes:
        """The whole body, which is kept as :attr:`body` from now on."""
        assert isinstance(self.content, BytesIO)
        self.body = self.content.getvalue()  # shares the memory, where read() would copy it
        self.content.close()
        return self.body

    @property
    def idempotency_key(self) -> str | None:
        """The header ``Idempotency-Key``, or None."""
        return self.text_header(b"Idempotency-Key") or None

    def text_header(self, name: bytes) -> str | None:
        """A header's value; what is not UTF-8 in it is escaped."""
        value = self.getHeader(name)
        return None if value is None else value.decode("utf-8", "backslashreplace")

    def joined_header(self, name: str) -> str | None:
        """All values of a header that may be a list; what is not UTF-8 in them is escaped."""
        values = self.requestHeaders.getRawHeaders(name.encode("ascii"))
        return None if values is None else b", ".join(values).decode("utf-8", "backslashreplace")

    @property
    def fingerprint(self) -> bytes:
        """What makes this request different from another: its path, without the prefix, and its body."""
        return self.path.removeprefix(PREFIX) + b"\0" + self.body

    def process(self) -> None:
        """Have it answered: all of it has arrived, or its route reads the body as it arrives."""
        self.connection.process(self)

    def call_route(self) -> None:
        """Call its route, or answer with its refusal."""
        if self._disconnected:
            return
        if self.refusal is None:
            super().process()
        else:
            self.answer(self.refusal)

    def send_rest(self, body: bytes | None) -> None:
        """Send what a route has returned, if it has not sent all by itself, and end the response."""
        if self._disconnected:
            return
        connection = self.connection
        if body is not None:
            self.write(body)
        self.finish()
        connection.flush()

    @property
    def on_error(self) -> dict[str, object]:
        """What an error has beside its text."""
        return {"success": False} if self.success else {}

    def answer(self, refusal: Refusal) -> None:
        """Send a refusal as the whole response."""
        body = dumps({**self.on_error, "error": refusal.error})
        self.setResponseCode(refusal.status)
        self.setHeader(b"Content-Type", b"application/json")
        self.setHeader(b"Content-Length", b"%d" % len(body))
        for name, value in refusal.headers:
            self.setHeader(name, value)
        self.write(body)
        self.finish()


def too_large(limit: int) -> Refusal:
    """The answer to a body over ``limit`` bytes."""
    return Refusal(413, f"the request body is over the limit of {limit} bytes")


def printable(text: bytes) -> str:
    """Part of a request's first line, as it can be shown on a terminal."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:1000].decode("ascii", "replace"))


_ACCEPTED = re.compile(rb"[A-Za-z0-9._~+/=:@-]{1,128}")


_prefix = secrets.token_hex(4).encode("ascii")


_numbers = count(1)


def request_id(given: bytes | None) -> bytes:
    """
    The id that a request came with, or a new one if that is none: up to 128 letters, digits and ``._~+/=:@-``.

    :param given: the header ``X-Request-Id``, or None.
    """
    if given is not None and _ACCEPTED.fullmatch(given):
        return given
    return b"%s-%x" % (_prefix, next(_numbers))
