"""Finds the endpoint of a request."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.python.failure import Failure
from twisted.web.iweb import IRequest
from twisted.web.resource import IResource, Resource
from twisted.web.server import NOT_DONE_YET

from sandboxd.web.request import Request
from sandboxd.web.route_table import PREFIX

Endpoint = Callable[..., Coroutine[Any, Any, "bytes | None"]]


class Dispatch(Resource):
    """
    Calls the endpoint of a request's path if that has no parameters, as those in a hurry have not; else asks Klein.

    Klein matches a path with Werkzeug, which costs as much as all the rest that is done for a small request.
    """

    isLeaf = True

    def __init__(
        self, klein: IResource, fixed: Mapping[tuple[bytes, bytes], Endpoint], subtrees: Mapping[bytes, Endpoint]
    ) -> None:
        super().__init__()
        self._klein = klein
        self._fixed = fixed
        self._subtrees = subtrees

    def render(self, request: IRequest) -> Any:
        """Serve a request."""
        assert isinstance(request, Request)
        endpoint = self._fixed.get((request.method, request.path))
        for prefix, forward in self._subtrees.items() if endpoint is None else ():
            if request.path.startswith(prefix):
                endpoint = forward
        if endpoint is None:
            path = request.postpath or []
            if path[:1] == [PREFIX[1:]]:
                request.prepath, request.postpath = path[:1], path[1:]
            return self._klein.render(request)
        serving = Deferred.fromCoroutine(endpoint(request))
        if not serving.called:
            request.notifyFinish().addErrback(lambda _: serving.cancel())
        serving.addCallbacks(request.send_rest, _unless_cancelled).addErrback(request.processingFailed)
        return NOT_DONE_YET


def _unless_cancelled(failure: Failure) -> None:
    """A client that has gone away is not told anything."""
    failure.trap(CancelledError)
