"""How long the reactor has been kept from its work: the longest that any client had to wait for its turn."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime

#: Seconds between looks.
INTERVAL = 0.05

#: Seconds by which a look may be late.
DELAYS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class LagMeter(Service):
    """
    Asks to be called at a fixed interval, and measures by how much it is late.

    :ivar longest: the longest delay since the start, in seconds.
    :ivar delays: all of them.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self.longest = 0.0
        self.delays = Histogram(DELAYS)
        self._clock = clock
        self._due = 0.0
        self._call: IDelayedCall | None = None

    def startService(self) -> None:
        """Begin to measure."""
        super().startService()
        self._schedule()

    def stopService(self) -> None:
        """Measure no more."""
        super().stopService()
        if self._call is not None and self._call.active():
            self._call.cancel()

    def _schedule(self) -> None:
        self._due = time.monotonic() + INTERVAL
        self._call = self._clock.callLater(INTERVAL, self._look)

    def _look(self) -> None:
        delay = time.monotonic() - self._due  # not by the reactor's clock: a pause of the process is a delay, too
        self.longest = max(self.longest, delay)
        self.delays.observe(delay)
        self._schedule()


class Histogram:
    """
    How often a value fell between which bounds.

    :param bounds: the upper bounds, ascending; what is above the last is counted too.
    :ivar counts: how often, by bound.
    :ivar sum: of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """One more."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """As it is now."""
        copy = Histogram(self.bounds)
        copy.counts, copy.sum = self.counts.copy(), self.sum
        return copy
