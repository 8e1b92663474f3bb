"""Dispatch of requests: find the endpoint of a path, and run its coroutine."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping
from typing import Any, cast

from twisted.internet.defer import CancelledError, Deferred
from twisted.logger import Logger
from twisted.python.failure import Failure
from twisted.web.iweb import IRequest
from twisted.web.resource import IResource, Resource
from twisted.web.server import NOT_DONE_YET

from sandboxd.reactor.oneshot import OneShot
from sandboxd.web.request import Request
from sandboxd.web.route_table import PREFIX

_log = Logger()

Endpoint = Callable[..., Coroutine[Any, Any, "bytes | None"]]


class Dispatch(Resource):
    """
    A resource that calls the endpoint of a path without parameters itself, and has Klein find all others.

    Klein matches a path with Werkzeug, which costs as much as all the rest that is done for a small request. It is
    imported in a thread, when a path with parameters comes, or behind the answer to the first request that has a token:
    an idle daemon does without.

    :param load: returns Klein's resource, later.
    :param refuse: the endpoint of a request for which Klein could not be imported; takes the request and the error.
    """

    isLeaf = True

    def __init__(
        self,
        load: Callable[[], Deferred[IResource]],
        refuse: Endpoint,
        fixed: Mapping[tuple[bytes, bytes], Endpoint],
        subtrees: Mapping[bytes, Endpoint],
    ) -> None:
        super().__init__()
        self._load = load
        self._refuse = refuse
        self._loading: OneShot[None] | None = None
        self._klein: IResource | None = None
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
            return self._render_with_klein(request)
        if self._klein is None and request.active:
            request.notifyFinish().addBoth(lambda _: self._load_early())
        _Call(request, endpoint(request)).resume(None)
        return NOT_DONE_YET

    def _render_with_klein(self, request: Request) -> Any:
        if self._klein is None:
            self._when_loaded().addCallbacks(
                lambda _: request.call_route(),
                lambda failure: _Call(request, self._refuse(request, failure.value)).resume(None),
            )
            return NOT_DONE_YET
        path = request.postpath or []
        if path[:1] == [PREFIX[1:]]:
            request.prepath, request.postpath = path[:1], path[1:]
        return self._klein.render(request)

    def _when_loaded(self) -> Deferred[None]:
        """Return a Deferred that fires when Klein has been imported; it fails if that does, and may be tried again."""
        loading = self._loading
        if loading is None:
            loading = self._loading = OneShot()
            self._load().addCallbacks(self._loaded, self._not_loaded)
        return loading.when_fired()

    def _loaded(self, klein: IResource) -> None:
        self._klein = klein
        if self._loading is not None:
            self._loading.fire(None)

    def _not_loaded(self, failure: Failure) -> None:
        loading, self._loading = self._loading, None
        if loading is not None:
            loading.fire(failure)

    def _load_early(self) -> None:
        self._when_loaded().addErrback(
            lambda failure: _log.failure("Klein could not be imported; the next request tries again", failure)
        )


class _Call:
    """
    The coroutine of an endpoint while it runs. What it returns is sent; a disconnect cancels what it awaits.

    It does for one coroutine that only awaits Deferreds what ``Deferred.fromCoroutine`` does, without a Deferred, a
    context and a state of its own: most endpoints return without having waited for anything.
    """

    def __init__(self, request: Request, coroutine: Coroutine[Deferred[Any], Any, bytes | None]) -> None:
        self._request = request
        self._coroutine = coroutine
        self._awaited: Deferred[Any] | None = None

    def resume(self, result: object) -> None:
        """Run the coroutine until it awaits a Deferred that has not fired, or returns."""
        first = self._awaited is None
        try:
            if isinstance(result, Failure):
                self._awaited = self._coroutine.throw(cast(BaseException, result.value))
            else:
                self._awaited = self._coroutine.send(result)
        except StopIteration as end:
            self._finish(end.value)
        except CancelledError:
            pass  # the client has gone away
        except Exception:
            self._fail(Failure())
        else:
            if first:
                self._request.notifyFinish().addErrback(self._cancel)
            self._awaited.addBoth(self.resume)

    def _finish(self, body: bytes | None) -> None:
        try:
            self._request.send_rest(body)
        except Exception:
            self._fail(Failure())

    def _fail(self, failure: Failure) -> None:
        if self._request.connected:
            self._request.processingFailed(failure)
        else:
            _log.failure("a request failed whose client has gone away", failure)

    def _cancel(self, _: Failure) -> None:
        if self._awaited is not None:
            self._awaited.cancel()
