"""Counts of requests by route and status, for the metrics."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from twisted.internet.interfaces import IReactorTime

from sandboxd.reactor.lag import Histogram

#: Seconds, of a request.
LATENCIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)

#: The status of a request whose client has hung up before all was answered, as nginx has it.
HUNG_UP = 499


class AnswerKind(NamedTuple):
    """
    The labels by which answers are counted.

    :ivar method: the request's; empty if there is no such route or method, for the client may have invented it.
    :ivar route: the route's path with parameters as ``<name>``; empty if no route was called.
    :ivar code: the status.
    """

    method: str
    route: str
    code: int


class RequestStats:
    """
    The counts of requests. Each request costs constant time.

    :ivar answers: how many of each kind.
    :ivar latencies: seconds until the first byte of the answer, by route.
    :ivar sent: bytes of bodies that were sent.
    :ivar open: requests that are being served and keep the daemon from being idle.
    :ivar last: when the last of these ended, by the clock.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self._clock = clock
        self.answers: Counter[AnswerKind] = Counter()
        self.latencies: dict[str, Histogram] = {}
        self.sent = 0
        self.open = 0
        self.last = clock.seconds()

    def answered(self, answer: AnswerKind, seconds: float, sent: int) -> None:
        """
        Count a request that was answered.

        :param seconds: until the first byte of it.
        :param sent: bytes of its body.
        """
        self.answers[answer] += 1
        self.sent += sent
        latency = self.latencies.get(answer.route)
        if latency is None:
            latency = self.latencies[answer.route] = Histogram(LATENCIES)
        latency.observe(seconds)

    def closed(self) -> None:
        """Count the end of one of the :attr:`open` requests."""
        self.open -= 1
        self.last = self._clock.seconds()
