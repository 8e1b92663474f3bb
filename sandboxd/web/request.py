"""A request of the API: its head, its body, its response."""

from __future__ import annotations

import hashlib
import re
import secrets
import socket
from collections.abc import Callable, Iterable
from email.utils import formatdate
from functools import cached_property, lru_cache
from io import BytesIO
from itertools import count
from time import perf_counter, time
from typing import Any, AnyStr, NamedTuple, Protocol, cast
from urllib.parse import unquote_to_bytes

from twisted.internet.interfaces import IAddress, ITransport
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.http import NO_BODY_CODES, datetimeToString, parse_qs
from twisted.web.http_headers import Headers
from twisted.web.server import Request as TwistedRequest
from twisted.web.server import version as VERSION

from sandboxd.web.ascii_json import dumps
from sandboxd.web.body import BodyStream, whole
from sandboxd.web.request_head import Head
from sandboxd.web.request_stats import HUNG_UP
from sandboxd.web.route_table import PREFIX, RouteTraits

#: Bytes of the body that are sent together with the head; more are not worth the copy.
JOINED = 32 * 1024

_log = Logger()


class Refusal(NamedTuple):
    """A response to a request whose route is not called."""

    status: int
    error: str
    headers: tuple[tuple[bytes, bytes], ...] = ()


class Connection(Protocol):
    """
    The interface that a request needs of its connection, :class:`sandboxd.web.channel.Channel`.

    :ivar persistent: whether another request may follow.
    """

    persistent: bool

    @property
    def site(self) -> Any:
        """The server, a :class:`sandboxd.web.site.Site`."""

    @property
    def transport(self) -> ITransport:
        """The transport of the connection."""

    def getPeer(self) -> IAddress:
        """Return the client's address."""

    def getHost(self) -> IAddress:
        """Return the address that it has connected to."""

    def request_done(self) -> None:
        """Go on with the next request, as this one has been answered."""

    def refuse(self, request: Request, refusal: Refusal) -> None:
        """Answer at once, drop the rest of the request, and close."""

    def cut_off(self) -> None:
        """Drop the rest of a request that is about to be answered, and close after that."""

    def write(self, data: bytes) -> None:
        """Send bytes."""

    def drain(self) -> None:
        """Pause the producer until the kernel has all that was written, and takes more."""

    @property
    def unsent(self) -> bool:
        """Whether the kernel has yet to take bytes that were written."""

    def duplicate_socket(self) -> int | None:
        """Return a duplicate of the socket's descriptor, or None unless the kernel has all that was written."""

    def hand_over_socket(self, closing: Callable[[], None]) -> socket.socket:
        """Return the socket, which is not read or written here until it is taken back."""

    def take_back_socket(self) -> None:
        """Read and write the socket here again, if it was handed over."""

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Register a producer, to be paused while the client has to catch up."""

    def unregisterProducer(self) -> None:
        """Unregister the producer."""

    def loseConnection(self) -> None:
        """Close when all is written."""

    def abort(self) -> None:
        """Close at once."""

    def hold(self, held: bool) -> None:
        """Stop or resume reading from the client."""

    def upgrade(self, received: Callable[[bytes], None]) -> bytes:
        """Pass all further bytes of the client on to ``received``; return those that have arrived after the request."""

    def close_upgraded(self) -> None:
        """Close when all is written."""


@lru_cache(128)
def _field_name(name: bytes) -> bytes:
    """
    Return a header's name as it is sent.

    :raise InvalidHeaderName: if it is malformed.
    """
    return next(Headers({name: [b""]}).getAllRawHeaders())[0]


@lru_cache(1)
def _date(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode("ascii")


class Request(TwistedRequest):
    """
    A request whose body is held in memory, up to the site's limit, or read by its route as it arrives.

    It is Twisted's, with all that a resource or a Klein route can ask of it; what most of them never ask for is made
    when it is first asked for. Until ``responseHeaders`` is asked for, headers of the response are in a dictionary.

    :ivar head: what the client has sent before the body.
    :ivar route: the traits of its route; None if no route has its method and path.
    :ivar success: whether the replies on its path have a ``success`` field.
    :ivar authenticated: whether it has a valid token.
    :ivar claim: an ``Authorization`` that would claim the daemon, which is to be tried first; or None.
    :ivar refusal: the response to send in place of calling the route, or None.
    :ivar max_body: most bytes of its body; None for any number.
    :ivar stream: the body, if the route reads it as it arrives.
    :ivar duplex: whether its body goes on to arrive while it is answered.
    :ivar body: the whole body once :meth:`take_body` was called, before that its first piece.
    :ivar template: the path of its route, with parameters as ``<name>``; None until that is called.
    :ivar id: its ``X-Request-Id``, the client's or a new one.
    :ivar began: when its head was complete, in seconds of :func:`time.perf_counter`.
    :ivar upgraded: whether the connection no longer speaks HTTP.
    """

    channel: Connection  # type: ignore[assignment]
    route: RouteTraits | None = None
    success = False
    authenticated = False
    claim: bytes | None = None
    refusal: Refusal | None = None
    max_body: int | None = None
    _fingerprint: bytes | None = None
    stream: BodyStream | None = None
    duplex = False
    body = b""
    template: str | None = None
    upgraded = False
    queued = False
    _answered = 0.0
    _rest: BytesIO | None = None
    _bodiless = False  #: whether its response has no body
    _in_headers = False  #: whether requestHeaders were asked for, and may have been changed
    _parsePOSTFormSubmission = False

    def __init__(self, channel: Connection, head: Head) -> None:  # that of Twisted's makes what is made later here
        self.began = perf_counter()
        self.channel = channel
        self.head = head
        self.method = head.method
        self.uri = head.target
        self.path = head.target.partition(b"?")[0]
        self.clientproto = head.version
        self.id = request_id(head.last.get(b"x-request-id"))
        self.notifications = []
        self.cookies = []
        self._out: dict[bytes, bytes] | None = {}  #: headers of the response, until responseHeaders are asked for

    def __getattr__(self, name: str) -> Any:
        """Make an attribute that Twisted's ``__init__`` sets, when it is first used."""
        make = _MADE_LATER.get(name)
        if make is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        value = make(self)
        setattr(self, name, value)
        return value

    @property
    def connection(self) -> Connection:
        """The client's connection, with its full type."""
        return self.channel

    @property
    def connected(self) -> bool:
        """Whether the client is still connected, and the response not complete."""
        return not (self._disconnected or self.finished)

    @property
    def active(self) -> bool:
        """
        Whether the request keeps the daemon from being idle: it has a token, and its route does not merely observe.
        """
        route = self.route
        return (self.authenticated or self.claim is not None) and route is not None and not route.observes

    @property
    def query(self) -> bytes:
        """The part of the target after the question mark."""
        return self.uri.partition(b"?")[2]

    @property
    def latency(self) -> float:
        """Seconds until the first byte of the response was written; until now, if none was."""
        return (self._answered or perf_counter()) - self.began

    def connectionLost(self, reason: Failure) -> None:
        """Fail what waits for the end of the request, as the client is gone."""
        if not self.finished:
            self.channel.site.ended(self, self.code if self.upgraded else HUNG_UP)
        self._disconnected = True
        self._drop_body()
        del self.channel
        waiting, self.notifications = self.notifications, []
        for each in waiting:
            each.errback(reason)

    def body_received(self, data: bytes) -> None:
        """Take some of the body."""
        if self.stream is not None:
            self.stream.feed(data)
            return
        if not self.body:
            self.body = data
        else:
            if self._rest is None:
                self._rest = BytesIO()
                self._rest.write(self.body)
            self._rest.write(data)
        received = len(self.body) if self._rest is None else self._rest.tell()
        if self.max_body is not None and received > self.max_body:
            self.channel.refuse(self, too_large(self.max_body))

    def _drop_body(self) -> None:
        """Release the body: Klein and Werkzeug make reference cycles with a request, which may live for long."""
        self.body, self._rest = b"", None

    def write(self, data: bytes) -> None:
        """Send some of the response. If the body is still arriving, the rest of it is not waited for."""
        if self.finished:
            raise RuntimeError("write() was called after finish()")
        if self._disconnected or self._inFakeHead:
            return
        head = b""
        if not self.startedWriting:
            self.startedWriting = 1
            self._answered = perf_counter()
            if self.stream is not None and self._incomplete and not self.duplex:
                self.channel.cut_off()
            head = self._response_head()
        if self._bodiless or not data:
            if head:
                self.channel.write(head)
            return
        self.sentLength += len(data)
        if self.chunked:
            data = b"%s%x\r\n%s\r\n" % (head, len(data), data)
        elif len(data) <= JOINED:
            data = head + data
        elif head:
            self.channel.write(head)
        self.channel.write(data)

    def _response_head(self) -> bytes:
        """Return the status line and the headers, having decided how the body is framed."""
        if self.lastModified is not None:
            self.setHeader(b"Last-Modified", datetimeToString(self.lastModified))
        if self.etag is not None:
            self.setHeader(b"ETag", self.etag)
        if self.cookies:
            self.responseHeaders.setRawHeaders(b"Set-Cookie", self.cookies)
        length = self._sent_header(b"Content-Length")
        without_content = self.code in NO_BODY_CODES
        self._bodiless = without_content or self.method == b"HEAD"
        default_type = self.defaultContentType
        if not (default_type is None or without_content or length == b"0" or self._sent_header(b"Content-Type")):
            self.setHeader(b"Content-Type", default_type)
        if length is None and not self._bodiless and self.clientproto == b"HTTP/1.1":
            self.chunked = 1
            self.setHeader(b"Transfer-Encoding", b"chunked")
        if not self.channel.persistent:
            self.setHeader(b"Connection", b"close")
        if self._out is not None:
            return b"%s %d %s\r\nServer: %s\r\nDate: %s\r\nX-Request-Id: %s\r\n%s\r\n" % (
                self.clientproto,
                self.code,
                self.code_message,
                VERSION,
                _date(int(time())),
                self.id,
                b"".join([b"%s: %s\r\n" % field for field in self._out.items()]),
            )
        headers = self.responseHeaders.getAllRawHeaders()
        fields = b"".join([b"%s: %s\r\n" % (name, each) for name, values in headers for each in values])
        return b"%s %d %s\r\n%s\r\n" % (self.clientproto, self.code, self.code_message, fields)

    def setHeader(self, name: AnyStr, value: AnyStr) -> None:
        """Set a header of the response."""
        if self._out is not None and isinstance(name, bytes) and isinstance(value, bytes):
            folded = b"\n" in value or b"\r" in value
            self._out[_field_name(name)] = b" ".join(value.splitlines()) if folded else value
        else:
            self.responseHeaders.setRawHeaders(name, [value])

    def _sent_header(self, name: bytes) -> bytes | None:
        """Return the present value of a header of the response, or None."""
        if self._out is not None:
            return self._out.get(name)
        values = self.responseHeaders.getRawHeaders(name)
        return values[0] if values else None

    def _make_request_headers(self) -> Headers:
        self._in_headers = True
        return _headers(self.head.fields)

    def _make_response_headers(self) -> Headers:
        out, self._out = self._out or {}, None
        own = {b"Server": VERSION, b"Date": _date(int(time())), b"X-Request-Id": self.id}
        return _headers([*own.items(), *out.items()])

    def getHeader(self, key: AnyStr) -> AnyStr | None:
        """Return the last value of a header of the request, or None."""
        if isinstance(key, bytes) and not self._in_headers:
            return self.head.last.get(key.lower())
        return super().getHeader(key)

    def registerProducer(self, producer: Any, streaming: bool) -> None:
        """Register the producer of the response, to be paused while the client has to catch up."""
        if self._disconnected:
            producer.stopProducing()
        else:
            super().registerProducer(producer, streaming)

    def unregisterProducer(self) -> None:
        """Unregister the producer; the rest of the response is written without pauses."""
        self.producer = None
        if not self._disconnected:
            self.channel.unregisterProducer()

    def switch_protocols(self, head: bytes, received: Callable[[bytes], None]) -> bytes:
        """
        Answer 101, and pass all further bytes of the client on; the connection ends with the request.

        :param head: the whole head of the response.
        :param received: called with what the client sends from now on.
        :return: the bytes that the client has sent after the request.
        """
        self.upgraded, self.startedWriting, self.code = True, 1, 101
        self._answered = perf_counter()
        behind = self.channel.upgrade(received)
        self.send_raw(head)
        return behind

    def drain(self) -> None:
        """Pause the producer until the kernel has all that was written, and takes more."""
        if not self._disconnected:
            self.channel.drain()

    def duplicate_socket(self, framed: bool = False) -> int | None:
        """
        Return a duplicate of the socket's descriptor if the next bytes of the body can be written there, or None.

        :param framed: whether who writes there makes chunks if :attr:`chunked` is true.
        """
        if self._disconnected or self._bodiless or not self.startedWriting or (self.chunked and not framed):
            return None
        return self.channel.duplicate_socket()

    @property
    def unsent(self) -> bool:
        """Whether the kernel has yet to take bytes that were written."""
        return not self._disconnected and self.channel.unsent

    def send_raw(self, data: bytes) -> None:
        """Send bytes of the protocol that the connection was switched to."""
        self.sentLength += len(data)
        self.channel.write(data)

    def finish(self) -> None:
        """End the response, and the connection too if it was upgraded."""
        if self._disconnected:
            if not self.upgraded:
                raise RuntimeError("finish() was called after the connection was lost")
            return
        if self.upgraded:
            self.channel.close_upgraded()
            return
        if self.finished:
            raise RuntimeError("finish() was called twice")
        if self.duplex and self._incomplete:
            self.channel.cut_off()
        if not self.startedWriting:
            self.write(b"")
        if self.chunked and not self._bodiless:
            self.channel.write(b"0\r\n\r\n")
        if self.producer is not None:
            _log.error("the producer of {path} was not unregistered", path=printable(self.path))
            self.unregisterProducer()
        self.finished = 1
        self._drop_body()
        channel = self.channel
        channel.site.ended(self, self.code)
        del self.channel
        channel.request_done()
        waiting, self.notifications = self.notifications, []
        for each in waiting:
            each.callback(None)

    @property
    def _incomplete(self) -> bool:
        """Whether the body is still arriving."""
        return self.stream is not None and not self.stream.complete and not self._disconnected

    def body_stream(self) -> BodyStream:
        """Return the body as a stream, also if it has arrived completely."""
        return self.stream or whole(self.take_body())

    def take_body(self) -> bytes:
        """Return the whole body, which is kept as :attr:`body`."""
        if self._rest is not None:
            self.body = self._rest.getvalue()  # shares the memory, where read() would copy it
            self._rest = None
        return self.body

    @property
    def idempotency_key(self) -> str | None:
        """The header ``Idempotency-Key``, or None."""
        return self.text_header(b"Idempotency-Key") or None

    def text_header(self, name: bytes) -> str | None:
        """Return a header's value, or None; bytes that are not UTF-8 are escaped."""
        value = self.getHeader(name)
        return None if value is None else value.decode("utf-8", "backslashreplace")

    def joined_header(self, name: str) -> str | None:
        """Return all values of a header joined by commas, or None; bytes that are not UTF-8 are escaped."""
        key = name.encode("ascii")
        if not self._in_headers and key.lower() not in self.head.last:
            return None
        values = self.requestHeaders.getRawHeaders(key)
        return None if values is None else b", ".join(values).decode("utf-8", "backslashreplace")

    def make_fingerprint(self) -> bytes:
        """
        Return the digest that identifies a request with an idempotency key: of the path without the prefix, and of the
        body.

        Empty without a key. The first call takes long for a large body: it may be made in a thread.
        """
        if self._fingerprint is None:
            if self.idempotency_key is None:
                self._fingerprint = b""
            else:
                digest = hashlib.sha256(self.path.removeprefix(PREFIX) + b"\0")
                digest.update(self.body)
                self._fingerprint = digest.digest()
        return self._fingerprint

    @cached_property
    def site(self) -> Any:  # type: ignore[override]
        """The server."""
        return self.channel.site

    @cached_property
    def prepath(self) -> list[bytes]:  # type: ignore[override]
        """The segments of the path that have been routed."""
        return []

    @cached_property
    def postpath(self) -> list[bytes]:  # type: ignore[override]
        """The segments of the path that have yet to be routed."""
        return [unquote_to_bytes(each) for each in self.path[1:].split(b"/")]

    @cached_property
    def args(self) -> dict[bytes, list[bytes]]:  # type: ignore[override]
        """The parameters of the query."""
        return cast("dict[bytes, list[bytes]]", parse_qs(self.query, 1))

    @cached_property
    def content(self) -> BytesIO:  # type: ignore[override]
        """The body as a file."""
        return BytesIO(self.take_body())

    def call_route(self) -> None:
        """Call the route of the request, or answer with its refusal."""
        if self._disconnected:
            return
        if self.refusal is not None:
            self.answer(self.refusal)
            return
        try:
            self.render(self.channel.site.resource)
        except Exception:
            self.processingFailed(Failure())

    def processingFailed(self, reason: Failure) -> Failure:
        """Answer 500 in JSON to a fault outside a route, such as in finding it."""
        _log.failure(
            "{path} failed [{request_id}]", reason, path=printable(self.path), request_id=self.id.decode("ascii")
        )
        if not (self._disconnected or self.finished):
            if self.startedWriting:
                self.connection.abort()
            else:
                self.answer(Refusal(500, "internal error; the daemon's log has the details"))
        return reason

    def send_rest(self, body: bytes | None) -> None:
        """Send the body that a route has returned, None if it has written the response itself, and end the response."""
        if self._disconnected:
            return
        if body is not None:
            self.write(body)
        self.finish()

    @property
    def on_error(self) -> dict[str, object]:
        """The fields of an error's body beside its text."""
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


#: The attributes that Twisted's ``__init__`` sets and most requests never need: how each is made.
_MADE_LATER: dict[str, Callable[[Request], Any]] = {
    "requestHeaders": lambda self: self._make_request_headers(),
    "responseHeaders": lambda self: self._make_response_headers(),
    "client": lambda self: self.channel.getPeer(),
    "host": lambda self: self.channel.getHost(),
    "transport": lambda self: self.channel.transport,
    "received_cookies": lambda self: _cookies(self.requestHeaders.getRawHeaders(b"Cookie", [])),
    "sitepath": lambda self: [],
    "_adapterCache": lambda self: {},
}


def _headers(fields: Iterable[tuple[bytes, bytes]]) -> Headers:
    headers = Headers()
    for name, value in fields:
        headers.addRawHeader(name, value)
    return headers


def _cookies(values: Iterable[bytes]) -> dict[bytes, bytes]:
    pairs = (each.lstrip().partition(b"=") for value in values for each in value.split(b";"))
    return {name: value for name, mark, value in pairs if mark}


def too_large(limit: int) -> Refusal:
    """Return the refusal of a body over ``limit`` bytes."""
    return Refusal(413, f"the request body is over the limit of {limit} bytes")


def printable(text: bytes) -> str:
    """Return part of a request's first line in printable characters, for the log."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:1000].decode("ascii", "replace"))


_ACCEPTED = re.compile(rb"[A-Za-z0-9._~+/=:@-]{1,128}")


_prefix = secrets.token_hex(4).encode("ascii")


_numbers = count(1)


def request_id(given: bytes | None) -> bytes:
    """
    Return the ``X-Request-Id`` of a request, or a new one if that is not 1 to 128 letters, digits and ``._~+/=:@-``.

    :param given: the header ``X-Request-Id``, or None.
    """
    if given is not None and _ACCEPTED.fullmatch(given):
        return given
    return b"%s-%x" % (_prefix, next(_numbers))
