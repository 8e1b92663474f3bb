"""How long the reactor has been kept from its work: the longest that any client had to wait for its turn."""

from __future__ import annotations

from twisted.application.service import Service
from twisted.internet.interfaces import IDelayedCall, IReactorTime

#: Seconds between looks.
INTERVAL = 0.05


class StallMeter(Service):
    """
    Asks to be called at a fixed interval, and measures by how much it is late.

    :ivar longest: the longest delay since the start, in seconds.
    """

    def __init__(self, clock: IReactorTime) -> None:
        self.longest = 0.0
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
        self._due = self._clock.seconds() + INTERVAL
        self._call = self._clock.callLater(INTERVAL, self._look)

    def _look(self) -> None:
        self.longest = max(self.longest, self._clock.seconds() - self._due)
        self._schedule()
