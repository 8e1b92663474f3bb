"""The table of routes that the HTTP server consults before a route is called, by the method and path of a request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

#: All routes are served under this prefix too, which two of the official clients hard-code.
PREFIX = b"/koyeb-sandbox"


class RouteTraits(NamedTuple):
    """
    The traits of a route that decide how its requests are admitted and read.

    :ivar open: whether it needs no token. Such a route gets no body, and its requests wait for no turn.
    :ivar observes: whether it only looks at the daemon: it neither claims it nor counts as work.
    :ivar streams: whether it reads its body as it arrives.
    :ivar forwards: whether its requests are forwarded: the path as it was sent, the body as it arrives, of any size.
    :ivar websocket: whether it opens a WebSocket.
    :ivar rest: whether its last parameter is the rest of the path, with slashes, percent-encoded or not.
    :ivar success: whether its replies have a ``success`` field, which is false in errors.
    :ivar max_body: most bytes of its body, if that is less than the daemon's limit.
    """

    open: bool = False
    observes: bool = False
    streams: bool = False
    forwards: bool = False
    websocket: bool = False
    success: bool = False
    rest: bool = False
    max_body: int | None = None


class RouteLookup(NamedTuple):
    """
    The result of a lookup: the traits of a request's route, and what all routes of its path have in common.

    :ivar route: the traits of its route; None if no route has its method and path.
    :ivar open: whether a route of its path needs no token.
    :ivar success: whether the replies of a route of its path have a ``success`` field.
    """

    route: RouteTraits | None
    open: bool
    success: bool


class RouteTable:
    """The traits of all routes, by method and path."""

    def __init__(self) -> None:
        self._fixed: dict[bytes, dict[bytes, RouteTraits]] = {}
        self._subtrees: dict[bytes, RouteTraits] = {}
        self._known: dict[tuple[bytes, bytes], RouteLookup] = {}
        self._templates: dict[tuple[bytes, ...], dict[bytes, RouteTraits]] = {}
        self._rests: dict[bytes, dict[bytes, RouteTraits]] = {}

    def add(self, method: bytes, path: str, traits: RouteTraits) -> None:
        """
        Add a route.

        :param path: with parameters as ``<name>``.
        """
        self._known.clear()
        if "<" in path:
            template = path.encode("ascii")
            if traits.rest:
                self._rests.setdefault(template.partition(b"<")[0], {})[method] = traits
            else:
                self._templates.setdefault(tuple(template.split(b"/")), {})[method] = traits
        else:
            self._fixed.setdefault(path.encode("ascii"), {})[method] = traits

    def add_subtree(self, prefix: str, traits: RouteTraits) -> None:
        """Add a route for all methods and all paths that begin with ``prefix``."""
        self._known.clear()
        for start in (b"", PREFIX):
            self._subtrees[start + prefix.encode("ascii")] = traits

    def look_up(self, method: bytes, path: bytes) -> RouteLookup:
        """
        Return the traits of a request's route, and what holds for its path. The path is as :meth:`methods` takes it.
        """
        found = self._known.get((method, path))
        if found is None:
            methods = self.methods(path)
            is_open, success = (any(getattr(each, name) for each in methods.values()) for name in ("open", "success"))
            found = RouteLookup(self.find(method, path), is_open, success)
            if method in self._fixed.get(path.removeprefix(PREFIX), ()):  # no more than there are routes
                self._known[method, path] = found
        return found

    def find(self, method: bytes, path: bytes) -> RouteTraits | None:
        """Return the traits of a request's route, or None. The path is as :meth:`methods` takes it."""
        for prefix, traits in self._subtrees.items():
            if path.startswith(prefix):
                return traits
        return self.methods(path).get(b"GET" if method == b"HEAD" else method)

    def methods(self, path: bytes) -> Mapping[bytes, RouteTraits]:
        """
        Return the traits of a path's routes by method.

        :param path: the path as the client has sent it, without the query.
        """
        found = self._fixed.get(path)
        if found is None:
            path = path.removeprefix(PREFIX)
            found = self._fixed.get(path)
        if found is None:
            parts = path.split(b"/")
            found = next((methods for each, methods in self._templates.items() if _matches(each, parts)), None)
        if found is None:
            found = next((methods for prefix, methods in self._rests.items() if path.startswith(prefix)), {})
        return found


def _matches(template: tuple[bytes, ...], parts: list[bytes]) -> bool:
    """Return whether a path has the parts of a template, in which ``<name>`` stands for any but an empty one."""
    return len(template) == len(parts) and all(
        part == expected or (part and expected.startswith(b"<"))
        for expected, part in zip(template, parts)  # noqa: B905
    )
