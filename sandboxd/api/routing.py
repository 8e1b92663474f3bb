"""
The registration of routes: decode bodies, encode replies, and turn every kind of error into a response.

A route is an ``async`` function of the request (and of its decoded body) that returns a reply's
:class:`~sandboxd.messages.decoding.Struct`, sent with the status that the route declares; a :class:`Reply` where the
status is another; or None if it has written the response itself.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast
from urllib.parse import unquote_to_bytes

import msgspec
from twisted.internet.defer import CancelledError
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.resource import IResource

from sandboxd.api.dispatch import Dispatch, Endpoint
from sandboxd.api.operations import Operation, RawBody
from sandboxd.files.errors import EXHAUSTED, FileError
from sandboxd.messages.decoding import BadRequest, decode, decode_query
from sandboxd.messages.long_text import LONG, cut_out
from sandboxd.messages.strict import check_fields, check_parameters
from sandboxd.processes.cgroup import CgroupError
from sandboxd.reactor.threads import NoThread, ThreadPool
from sandboxd.web.ascii_json import dumps
from sandboxd.web.body import BodyError
from sandboxd.web.idempotency import KeyConflict
from sandboxd.web.preferences import prefers_strict
from sandboxd.web.request import Request, printable
from sandboxd.web.response import ResponseStream
from sandboxd.web.route_table import PREFIX, RouteTable, RouteTraits
from sandboxd.web.websocket import HandshakeError

if TYPE_CHECKING:  # see Routes.app
    from klein import Klein

#: The result of a route; None if it has written the response itself.
RouteResult: TypeAlias = "msgspec.Struct | Reply | None"

Route: TypeAlias = "Callable[..., Awaitable[RouteResult]]"

#: Adds a route, as a decorator of the function.
Adder: TypeAlias = Callable[[Route], None]

#: Bytes from which on a body is decoded in pieces, in threads. It takes twice as long as to decode it in one go, which
#: holds the reactor for less than 30 ms up to here.
LARGE = 16 * 1024 * 1024

#: Most bytes of the body of a route whose messages are small.
SMALL_BODY = 1024 * 1024

_log = Logger()


class Reply(NamedTuple):
    """A JSON reply with a status of its own."""

    body: msgspec.Struct | Mapping[str, object]
    status: int = 200


class LongFields(NamedTuple):
    """
    The fields of a body that may hold a long text.

    :ivar in_thread: calls a function in a thread of the right pool.
    :ivar names: their names.
    :ivar in_pieces: whether the route takes the text in pieces, as its parameter ``text``.
    """

    in_thread: Callable[..., Awaitable[Any]]
    names: tuple[str, ...]
    in_pieces: bool = False


class ApiError(Exception):
    """An error that a route answers a request with: a status and the fields of the JSON body."""

    def __init__(self, status: int, error: str, **fields: object) -> None:
        super().__init__(error)
        self.status = status
        self.fields = {"error": error, **fields}


class Routes:
    """
    The routes of the API, on one Klein app.

    :ivar operations: the description of each, for the OpenAPI document.
    :ivar table: the traits of each, for the HTTP server.
    """

    def __init__(self) -> None:
        self._endpoints: list[tuple[str, str, Endpoint]] = []
        self.operations: list[Operation] = []
        self._fixed: dict[tuple[bytes, bytes], Endpoint] = {}
        self._subtrees: dict[bytes, Endpoint] = {}
        self.table = RouteTable()

    @cached_property
    def app(self) -> Klein:
        """
        The Klein app of all routes; ask for it when every family has added its own.

        It is made when it is first asked for: importing Klein and Werkzeug is a fifth of a start, and an eighth of the
        memory of a daemon that nobody uses.
        """
        import encodings.idna  # noqa: F401 -- Werkzeug needs it at the first path with parameters

        from klein import Klein
        from werkzeug.exceptions import HTTPException

        app = Klein()
        app.url_map.merge_slashes = False
        app.handle_errors(HTTPException)(cast(Any, _http_exception))
        for method, path, endpoint in self._endpoints:
            app.route(path, methods=[method])(endpoint)
        return app

    def get(self, path: str, **options: Any) -> Adder:
        """Return a decorator that adds a route without a body; see :meth:`route`."""
        return self.route("GET", path, **options)

    def post(self, path: str, body_type: Any, **options: Any) -> Adder:
        """Return a decorator that adds a route with a body; see :meth:`route`."""
        return self.route("POST", path, body_type, **options)

    def route(
        self,
        method: str,
        path: str,
        body_type: Any = None,
        *,
        query: Any = None,
        reply: Any = None,
        status: int = 200,
        errors: tuple[int, ...] = (),
        headers: tuple[str, ...] = (),
        long: LongFields | None = None,
        max_body: int | None = None,
        success: bool = False,
        websocket: bool = False,
        open: bool = False,
        observes: bool = False,
        rest: bool = False,
        documented: bool = True,
    ) -> Adder:
        """
        Return a decorator that adds a route. The route is called with the request, the body if it takes one, the path's
        parameters by name, and ``query`` by that name if it has a type for it.

        :param body_type: what the body is decoded to from JSON; ``bytes`` for the body itself; a
            :class:`~sandboxd.api.operations.RawBody` for a :class:`~sandboxd.web.body.BodyStream` of it, as it
            arrives (for paths without parameters); None if there is none.
        :param query: a :class:`msgspec.Struct` that the query is decoded to.
        :param reply: for the OpenAPI document; see :class:`~sandboxd.api.operations.Operation`.
        :param status: of the reply.
        :param errors: statuses of errors, for the OpenAPI document.
        :param headers: headers that the route evaluates, for the OpenAPI document.
        :param long: the fields that may be long.
        :param max_body: most bytes of the body; :data:`SMALL_BODY` for JSON without fields that may be long.
        :param success: whether replies have ``success``; see :class:`~sandboxd.web.route_table.RouteTraits`.
        :param websocket: whether it opens a WebSocket; see there.
        :param open: whether it needs no token; see there.
        :param observes: whether it only looks at the daemon; see there.
        :param rest: whether its last parameter is the rest of the path; see there. Only for GET and one parameter.
        :param documented: whether it is in the OpenAPI document.
        """
        takes = RawBody() if body_type is bytes else body_type
        streams = isinstance(body_type, RawBody)
        if max_body is None and long is None and not streams and body_type not in (None, bytes):
            max_body = SMALL_BODY
        self.table.add(
            method.encode("ascii"),
            path,
            RouteTraits(open, observes, streams, websocket=websocket, success=success, rest=rest, max_body=max_body),
        )

        def add(route: Route) -> None:
            async def endpoint(request: Request, **parameters: Any) -> bytes | None:
                request.template = path
                body = None if body_type is None or streams else request.take_body()
                strict = prefers_strict(request.joined_header("Prefer"))

                def call() -> Awaitable[RouteResult]:
                    if strict:
                        request.setHeader(b"Preference-Applied", b"handling=strict")
                        check_parameters(os.fsdecode(request.query), query)
                    if query is not None:
                        parameters["query"] = decode_query(request.query, query)
                    if streams:
                        return route(request, request.body_stream(), **parameters)
                    if body is None:
                        return route(request, **parameters)
                    if body_type is bytes:
                        return route(request, body, **parameters)
                    if long is not None and len(body) >= LARGE:
                        return in_pieces(long, body)
                    return route(request, decoded(body), **parameters)

                def decoded(body: bytes) -> Any:
                    value = decode(body, body_type)
                    if strict:
                        check_fields(body, body_type)
                    return value

                async def in_pieces(long: LongFields, body: bytes) -> RouteResult:
                    await long.in_thread(request.make_fingerprint)
                    small, text = await long.in_thread(cut_out, body)
                    if len(small) >= LARGE:
                        raise ApiError(
                            413, f"the body has {len(small)} bytes beside its longest text; {LARGE} are too many"
                        )
                    value = decoded(small)
                    if text is None:
                        return await route(request, value, **parameters)
                    field = next((name for name in long.names if getattr(value, name) == text.mark), None)
                    if field is None:
                        raise BadRequest(f"a text of more than {LONG} bytes is not in {' or '.join(long.names)}")
                    if long.in_pieces:
                        return await route(request, value, text=text, **parameters)
                    setattr(value, field, await long.in_thread(text.whole))
                    return await route(request, value, **parameters)

                try:
                    return await _answered(request, call, status)
                finally:
                    # A cancelled call leaves an exception whose traceback keeps this frame until a garbage collection.
                    body = None

            endpoint.__name__ = f"{method} {path}"
            if rest:
                self._add_rest(path, endpoint)
            else:
                self._endpoints.append((method, path, endpoint))
            if "<" not in path:
                for prefix in (b"", PREFIX):
                    self._fixed[method.encode("ascii"), prefix + path.encode("ascii")] = endpoint
            if documented:
                self.operations.append(
                    Operation(method, path, route, takes, query, reply, status, errors, headers, success, open)
                )

        return add

    def subtree(self, prefix: str, path: str, methods: Sequence[str], *, reply: Any, errors: tuple[int, ...]) -> Adder:
        """
        Return a decorator that adds a route for all paths that begin with ``prefix``, whatever the method. The route is
        called with the request and its body as it arrives, to which no limit applies; the path is the one that the
        client has sent.

        :param path: the path in the OpenAPI document.
        :param methods: the methods in the OpenAPI document.
        :param reply: the type of the reply in the OpenAPI document.
        :param errors: statuses of errors, for the OpenAPI document.
        """

        self.table.add_subtree(prefix, RouteTraits(forwards=True))

        def add(route: Route) -> None:
            async def endpoint(request: Request) -> bytes | None:
                request.template = path
                return await _answered(request, lambda: route(request, request.body_stream()), 200)

            for start in (b"", PREFIX):
                self._subtrees[start + prefix.encode("ascii")] = endpoint
            for method in methods:
                takes = RawBody("*/*") if method in ("POST", "PUT", "PATCH") else None
                self.operations.append(
                    Operation(method, path, route, takes, None, reply, 200, errors, (), False, is_open=False)
                )

        return add

    def _add_rest(self, path: str, endpoint: Endpoint) -> None:
        """Have an endpoint called with the rest of the path, which is any bytes, as Klein would not."""
        prefix, _, name = path.removesuffix(">").partition("<")

        async def with_rest(request: Request) -> bytes | None:
            if request.method not in (b"GET", b"HEAD"):
                request.template = path
                request.setHeader(b"Allow", b"GET")
                return _json(request, Reply({"error": f"{path} takes GET only"}, 405))
            encoded = request.path.removeprefix(PREFIX).removeprefix(prefix.encode("ascii"))
            return await endpoint(request, **{name: os.fsdecode(unquote_to_bytes(encoded))})

        for start in (b"", PREFIX):
            self._subtrees[start + prefix.encode("ascii")] = with_rest

    def resource(self, threads: ThreadPool) -> IResource:
        """
        Return the resource that serves all routes, at ``/`` and below :data:`PREFIX`, which two of the official clients
        hard-code.

        :param threads: imports Klein, once requests come.
        """
        return Dispatch(lambda: threads(lambda: self.app.resource()), _refuse, self._fixed, self._subtrees)


async def _refuse(request: Request, error: Exception) -> bytes | None:
    """Answer a request for which Klein could not be imported: 503 if that can be tried again."""

    async def fail() -> RouteResult:
        with changing_nothing():
            raise error

    return await _answered(request, fail, 200)


def _http_exception(request: Request, failure: Failure) -> bytes:
    """Answer 404 or 405."""
    from werkzeug.exceptions import HTTPException, MethodNotAllowed
    from werkzeug.routing import RequestRedirect

    error = failure.value
    path = request.path.decode("utf-8", "replace")
    if isinstance(error, MethodNotAllowed):
        allowed = ", ".join(sorted(set(error.valid_methods or ()) - {"HEAD"}))
        request.setHeader(b"Allow", allowed.encode("ascii"))
        return _json(request, Reply({**request.on_error, "error": f"{path} takes {allowed} only"}, 405))
    assert isinstance(error, HTTPException)
    status = 404 if isinstance(error, RequestRedirect) else error.code or 404
    return _json(request, Reply({"error": f"no such route: {path}"}, status))


#: Statuses of errors that have none themselves.
_STATUSES: Mapping[type[Exception], int] = {BadRequest: 400, CgroupError: 400, KeyConflict: 409}


@contextmanager
def changing_nothing() -> Iterator[None]:
    """Raise 503 if this process runs out of resources inside, where nothing is changed, so that the request fails."""
    try:
        yield
    except OSError as error:
        if error.errno in EXHAUSTED:
            raise exhausted(error) from None
        raise


def exhausted(error: OSError) -> ApiError:
    """Return the error of a request that has had no effect, for lack of resources."""
    return ApiError(503, f"the daemon has run out of resources: {error.strerror}")


def _error_reply(request: Request, error: Exception) -> Reply:
    """
    Return the reply to a request whose route has raised an error; an unexpected one is logged, and answered with 500.
    """
    if isinstance(error, ApiError):
        return Reply({**request.on_error, **error.fields}, error.status)
    if isinstance(error, (BodyError, HandshakeError, FileError)):
        return Reply({**request.on_error, "error": str(error)}, error.status)
    for type, status in _STATUSES.items():
        if isinstance(error, type):
            return Reply({**request.on_error, "error": str(error)}, status)
    # Where a request may have changed something, an error that no operation has expected is a fault.
    unchanged = isinstance(error, NoThread) or request.method in (b"GET", b"HEAD")
    if isinstance(error, OSError) and error.errno in EXHAUSTED and unchanged:
        return Reply({**request.on_error, "error": str(exhausted(error))}, 503)
    _log.failure(
        "{method} {path} failed [{request_id}]",
        method=printable(request.method),
        path=printable(request.path),
        request_id=request.id.decode("ascii"),
    )
    return Reply({**request.on_error, "error": "internal error; the daemon's log has the details"}, 500)


async def _answered(request: Request, call: Callable[[], Awaitable[RouteResult]], status: int) -> bytes | None:
    """
    Call a route, and make the response from what it returns or raises.

    :param status: the status of a reply that is a Struct.
    """
    try:
        answer = await call()
        reply = Reply(answer, status) if isinstance(answer, msgspec.Struct) else answer
    except CancelledError as error:
        # The client is gone; Klein ignores it. Its traceback would keep the frames of the route, and a large body.
        raise error.with_traceback(None) from None
    except Exception as error:
        reply = _error_reply(request, error)
    if reply is None:
        return None
    if request.startedWriting:
        # Half a response cannot be taken back, but it must not look like a whole one.
        request.connection.abort()
        return None
    return _json(request, reply)


def _json(request: Request, reply: Reply) -> bytes:
    body = dumps(reply.body)
    request.setResponseCode(reply.status)
    request.setHeader(b"Content-Type", b"application/json")
    request.setHeader(b"Content-Length", b"%d" % len(body))
    if reply.status == 503:
        request.setHeader(b"Retry-After", b"1")
    return body


async def send_json_parts(request: Request, parts: Iterable[bytes]) -> None:
    """
    Send a large JSON reply in parts, each made when the client is ready for it.

    :param parts: the text; joined, they are the document.
    """
    request.setHeader(b"Content-Type", b"application/json")
    stream = ResponseStream(request)
    try:
        for part in parts:
            await stream.when_ready()
            stream.write(part)
    finally:
        stream.finish()
