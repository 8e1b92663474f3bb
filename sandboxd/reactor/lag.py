"""The reactor's lag: by how much timed calls are late, and so how long a client waits for its turn."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Sequence

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime

#: Seconds between measurements.
INTERVAL = 0.05

#: Upper bounds of the histogram, in seconds of lag.
DELAYS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class LagMeter(Service):
    """
    A meter of the reactor's lag: a call at a fixed interval, whose delay is measured.

    :ivar longest: longest delay since the start, in seconds.
    :ivar delays: histogram of all delays.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self.longest = 0.0
        self.delays = Histogram(DELAYS)
        self._clock = clock
        self._due = 0.0
        self._call: IDelayedCall | None = None

    def startService(self) -> None:
        """Start measuring."""
        super().startService()
        self._schedule()

    def stopService(self) -> None:
        """Stop measuring."""
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
    Counts of values by bucket, as a Prometheus histogram has them.

    :param bounds: upper bounds of the buckets, ascending; one bucket more holds what is above the last.
    :ivar counts: number of values in each bucket.
    :ivar sum: sum of all values.
    """

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def copy(self) -> Histogram:
        """Return an independent copy."""
        copy = Histogram(self.bounds)
        copy.counts, copy.sum = self.counts.copy(), self.sum
        return copy
