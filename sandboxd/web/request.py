"""A request of the API: its body, its answer, and what is known of it before a route is called."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from io import BytesIO
from itertools import count
from time import perf_counter
from typing import NamedTuple, Protocol, cast

from twisted.internet.defer import Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web import server

from sandboxd.reactor.turn_budget import TurnBudget
from sandboxd.settings import Settings
from sandboxd.web.ascii_json import dumps
from sandboxd.web.auth import Gate
from sandboxd.web.body import BodyStream, whole
from sandboxd.web.request_stats import HUNG_UP

#: Under which all routes are found too.
PREFIX = b"/koyeb-sandbox"


def _both(*paths: bytes) -> frozenset[bytes]:
    return frozenset(prefix + path for prefix in (b"", PREFIX) for path in paths)


#: The routes that need no token.
OPEN_PATHS = _both(b"/health", b"/ready")

#: Those that only look at the daemon: whoever asks them first must not come to own it.
METRICS_PATHS = _both(b"/metrics", b"/metrics.json")
WATCHING_PATHS = METRICS_PATHS | _both(b"/status", b"/openapi.json")

_log = Logger()


class Refusal(NamedTuple):
    """An answer that needs no route."""

    status: int
    error: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class RouteMap(Protocol):
    """What the server must know of the routes."""

    def on_error(self, path: str) -> dict[str, object]:
        """What an error on a path has beside its text."""

    def knows(self, path: str) -> bool:
        """Whether there is a route for a path, whatever the method."""

    def streams(self, method: bytes, path: bytes) -> bool:
        """Whether the route of a method and a path reads its body as it arrives."""

    def forwards(self, path: bytes) -> bool:
        """Whether a path is forwarded as it is, with a body to which no limit applies."""

    def is_websocket(self, path: str) -> bool:
        """Whether the route of a path is a WebSocket."""


class Server(Protocol):
    """
    What a request must know of the server; it is :class:`sandboxd.web.site.Site`.

    :ivar gate: who may call.
    :ivar settings: how much of a request is taken.
    :ivar routes: what is known of the routes.
    :ivar turns: shares out the time of the reactor.
    """

    gate: Gate
    settings: Settings
    routes: RouteMap
    turns: TurnBudget

    def ended(self, request: Request, status: int) -> None:
        """A request was answered, or its client is gone."""


class Connection(Protocol):
    """
    What a request must know of its client's connection; it is :class:`sandboxd.web.site.Channel`.

    :ivar refused: whether what still arrives is dropped.
    """

    refused: bool

    @property
    def site(self) -> Server:
        """The server."""

    def progress(self) -> None:
        """Some more has arrived of a body that may take its time."""

    def refuse(self, request: Request, refusal: Refusal) -> None:
        """Answer now, and close."""

    def cut_off(self, request: Request) -> None:
        """Take no notice of the rest of a request, which is about to be answered."""

    def flush(self) -> None:
        """Give the kernel what was written now."""

    def abort(self) -> None:
        """Close at once."""

    def hold(self, held: bool) -> None:
        """Let the client wait, or go on."""

    def upgrade(self, received: Callable[[bytes], None]) -> bytes:
        """Give what the client sends to ``received``; return what has arrived behind the request."""

    def close_upgraded(self) -> None:
        """Close when all is written."""


UNAUTHORIZED = Refusal(
    401,
    "missing or wrong token; send the header 'Authorization: Bearer <SANDBOX_SECRET>'",
    ((b"WWW-Authenticate", b"Bearer"),),
)


class Request(server.Request):
    """
    A request whose body is held in memory, up to the site's limit, or given to its route as it arrives.

    :ivar stream: the body, if the route wants it as it arrives.
    """

    stream: BodyStream | None = None
    duplex = False  #: whether its body goes on to arrive while it is answered
    upgraded = False  #: whether the connection no longer speaks HTTP
    _called = False
    refusal: Refusal | None = None
    claim: bytes | None = None  #: an ``Authorization`` that would claim the daemon, which is to be tried first
    template: str | None = None  #: the path of the route that answers, with its parameters as ``<name>``
    body = b""
    id = b""  #: what its caller or we have named it; empty until its headers are complete
    active = False  #: whether it keeps the daemon from being idle
    began = 0.0  #: when its headers were complete, in seconds of :func:`time.perf_counter`
    _answered = 0.0

    @property
    def connection(self) -> Connection:
        """The client's connection, by its full type."""
        return cast(Connection, self.channel)

    def begin(self, method: bytes, uri: bytes) -> None:
        """Its headers are complete."""
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
            self.connection.site.ended(self, self.code if self.upgraded else HUNG_UP)
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
        limit = self.connection.site.settings.max_body
        if self.content.tell() + len(data) > limit:
            self.connection.refuse(self, too_large(limit))
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
        """All has arrived: hand it to the routes, unless it was refused before."""
        if self.claim is not None:
            Deferred.fromCoroutine(self._claim(self.claim))
        elif self.path in OPEN_PATHS:
            self._process()  # whoever asks after our health gets the truth, not a place in a queue
        else:
            self.connection.site.turns.take(self._process)

    async def _claim(self, authorization: bytes) -> None:
        """Claim the daemon, and go on if that has succeeded."""
        self.claim = None
        try:
            if not await self.connection.site.gate.claim(authorization):
                self.refusal = UNAUTHORIZED
        except Exception:
            _log.failure("the daemon could not be claimed")
            self.refusal = Refusal(503, "the token could not be stored; the daemon's log has the details")
        self.process()

    def _process(self) -> None:
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

    def answer(self, refusal: Refusal) -> None:
        """Send a refusal as the whole response."""
        path = self.path.removeprefix(PREFIX).decode("ascii", "replace")
        body = dumps({**self.connection.site.routes.on_error(path), "error": refusal.error})
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
