"""Admission of requests by their heads: path, token, origin, size. All checks of who may call are here."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

from twisted.logger import Logger

from sandboxd.settings import Settings
from sandboxd.web.auth import OWN_AUTHORIZATION, DaemonAuth, same_origin, subprotocol_authorization
from sandboxd.web.request import Refusal, Request, too_large
from sandboxd.web.route_table import RouteTable, RouteTraits

UNAUTHORIZED = Refusal(
    401,
    "missing or wrong token; send the header 'Authorization: Bearer <SANDBOX_SECRET>'",
    ((b"WWW-Authenticate", b"Bearer"),),
)

_log = Logger()


class Admission:
    """
    The check that each request has to pass before its body is read.

    Every path needs a token, also one without a route, unless its route was declared as open.

    :param auth: checks tokens.
    :param routes: the traits of the routes.
    :param settings: the limits of a request's size.
    """

    def __init__(self, auth: DaemonAuth, routes: RouteTable, settings: Settings) -> None:
        self._auth = auth
        self._routes = routes
        self._settings = settings

    def check(self, request: Request, length: int | None) -> Refusal | None:
        """
        Return the refusal of a request, or None. Sets its ``route``, ``success``, ``authenticated``, ``max_body`` and
        ``claim``.

        :param length: bytes of its body; None if that is chunked.
        """
        route, is_open, request.success = self._routes.look_up(request.method, request.path)
        request.route = route
        if is_open:
            if length != 0:
                return Refusal(413, f"{request.path.decode('ascii', 'replace')} takes no body")
        elif (refusal := self._authenticate(request, route)) is not None:
            return refusal
        if route is not None and route.forwards:
            return None
        limit = self._settings.max_upload if route is not None and route.streams else self._settings.max_body
        if limit is not None and route is not None and route.max_body is not None:
            limit = min(limit, route.max_body)
        request.max_body = limit
        if length is not None and limit is not None and length > limit:
            return too_large(limit)
        return None if route is not None and route.rest else _bad_path(request.path)

    def _authenticate(self, request: Request, route: RouteTraits | None) -> Refusal | None:
        """
        Check a request's token: in the header :data:`OWN_AUTHORIZATION`, else in ``Authorization``, else, for a
        WebSocket, in a subprotocol.

        Only a WebSocket's may be there, as no browser lets a page set that header for anything else; then the page has
        to be our own host's.
        """
        header = request.getHeader(OWN_AUTHORIZATION) or request.getHeader(b"Authorization")
        in_subprotocol = False
        if header is None and route is not None and route.websocket:
            header = subprotocol_authorization(request.requestHeaders.getRawHeaders(b"Sec-WebSocket-Protocol", []))
            in_subprotocol = header is not None
        if self._auth.allows(header):
            request.authenticated = True
        elif route is not None and not route.observes and self._auth.may_claim(header):
            request.claim = header
        else:
            return UNAUTHORIZED
        if in_subprotocol and not _is_same_origin(request):
            return Refusal(403, "Origin: a page of another host may not open a WebSocket with this token")
        return None

    async def claim(self, authorization: bytes) -> Refusal | None:
        """Claim the daemon with an ``Authorization``; return why that has failed, or None."""
        try:
            return None if await self._auth.claim(authorization) else UNAUTHORIZED
        except Exception:
            _log.failure("the daemon could not be claimed")
            return Refusal(503, "the token could not be stored; the daemon's log has the details")


def _bad_path(path: bytes) -> Refusal | None:
    """Return the refusal of a path that no route can have, or None."""
    escaped = b"%" in path
    if not path.startswith(b"/") or b"//" in path or (escaped and b"%2f" in path.lower()):
        return Refusal(404, f"no such route: {path.decode('ascii', 'replace')}")
    if not escaped:
        return None
    try:
        unquote_to_bytes(path).decode("utf-8")
    except UnicodeDecodeError:
        return Refusal(404, "no such route: the path is not UTF-8")
    return None


def _is_same_origin(request: Request) -> bool:
    """Return whether a request has no ``Origin``, or that of its own ``Host``."""
    origins = request.requestHeaders.getRawHeaders(b"Origin")
    return not origins or all(same_origin(origin, request.getHeader(b"Host") or b"") for origin in origins)
