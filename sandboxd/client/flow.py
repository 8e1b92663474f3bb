"""
The core of the client, without I/O: an operation is a generator of steps, which either client carries out.

The blocking and the asyncio client differ only in how they carry out a step.

A flow yields a step and is sent its result. The steps are an :class:`HttpRequest`, whose result is an
:class:`HttpResponse`; a :class:`BlockingCall`, a function that blocks; and a :class:`Retry`, whose result comes when it
is time to try again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import quote

from sandboxd.client.errors import SandboxError, SandboxGone, Unavailable, error_of
from sandboxd.client.replies import decode

T = TypeVar("T")

#: Receives a body in pieces. It may block.
Writer = Callable[[bytes], object]


@dataclass(frozen=True)
class HttpResponse:
    """
    The response to an HTTP request.

    :ivar headers: by lower-case name.
    :ivar body: empty if it went to the request's sink.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes = b""


@dataclass(frozen=True)
class HttpRequest:
    """
    An HTTP request to send: one kind of step.

    :ivar path: below the URL of the sandbox, percent-encoded.
    :ivar body: bytes, or a function that returns an iterator of the pieces of a body of any length; it may block.
    :ivar sink: called with the head of a successful reply, returns what receives its body; without one the body is
        kept.
    :ivar timeout: seconds to wait for the reply to begin, and between its pieces; None for ever.
    :ivar repeatable: whether sending it twice does no harm.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | Callable[[], Iterable[bytes]] | None = None
    sink: Callable[[HttpResponse], Writer] | None = None
    timeout: float | None = 60.0
    repeatable: bool = True


@dataclass(frozen=True)
class BlockingCall:
    """A function that blocks on something other than the network, such as a local file: one kind of step."""

    function: Callable[[], Any]


@dataclass(frozen=True)
class Retry:
    """
    A wait before another try, after a failure that may pass: one kind of step.

    :ivar progress: whether anything was achieved since the last one, so that patience begins anew.
    """

    error: SandboxError
    progress: bool = False


Step = HttpRequest | BlockingCall | Retry

Flow = Generator[Step, Any, T]


class ConnectionLost(SandboxGone):
    """
    The connection broke, or could not be made.

    :ivar sent: whether the daemon may have received the request.
    """

    def __init__(self, message: str, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class Backoff:
    """
    The times of further tries after failures: exponential, with jitter.

    :param patience: seconds without any success after which to give up.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.reset()

    def reset(self) -> None:
        """Forget earlier failures, as a try has succeeded."""
        self._since: float | None = None
        self._delay = 0.05

    def after(self, failure: Retry) -> float:
        """
        Return the seconds to wait before the next try.

        :raise SandboxError: the error, if there is to be none.
        """
        if failure.progress:
            self.reset()
        return self.next(failure.error)

    def next(self, error: SandboxError) -> float:
        """
        Return the seconds to wait before the next try.

        :raise SandboxError: ``error``, if there is to be none.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
        left = self._since + self._patience - now
        if left <= 0:
            raise error
        self._delay = min(self._delay * 2, 2.0)
        return min(self._delay * random.uniform(0.5, 1.0), left)


def work(function: Callable[[], T]) -> Flow[T]:
    """Call a function that blocks, and return its result."""
    result: T = yield BlockingCall(function)
    return result


def exchange(request: HttpRequest) -> Flow[HttpResponse]:
    """
    Send a request, and return the successful reply; send it again if it was not executed, or may be executed twice.

    :raise SandboxError: the error that was answered.
    """
    while True:
        try:
            response: HttpResponse = yield request
        except ConnectionLost as error:
            if error.sent and not request.repeatable:
                raise
            yield Retry(error)
            continue
        if response.status < 400:
            return response
        refused = error_of(response.status, response.body)
        if not isinstance(refused, Unavailable):
            raise refused
        yield Retry(refused)


def call(request: HttpRequest, type: type[T]) -> Flow[T]:
    """Send a request, and return its JSON reply as a value."""
    response = yield from exchange(request)
    return decode(response.body, type)


def target(path: str, /, **query: object) -> str:
    """
    Return a path with a query.

    :param query: None and False are left out; a list gives the parameter several times. Text that stands for bytes
        that are not UTF-8 (PEP 383) is sent as those bytes.
    """
    pairs = []
    for name, value in query.items():
        for each in value if isinstance(value, (list, tuple)) else [value]:
            if each is not None and each is not False:
                text = "true" if each is True else str(each)
                pairs.append(f"{name}={quote(text, safe='/', errors='surrogateescape')}")
    return f"{path}?{'&'.join(pairs)}" if pairs else path
