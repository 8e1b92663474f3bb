"""A timeout that is set again far more often than it expires."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime


class Deadline:
    """
    A function to be called once the time that was set last has come. To set it again or to clear it costs no timer: the
    one that runs looks at the time when it expires, and is started again.

    :param expired: the function.
    """

    def __init__(self, clock: IReactorTime, expired: Callable[[], None]) -> None:
        self._clock = clock
        self._expired = expired
        self._at: float | None = None
        self._timer: IDelayedCall | None = None
        self._fires = 0.0

    def set(self, seconds: float) -> None:
        """Set the time to so many seconds from now."""
        self._at = self._clock.seconds() + seconds
        if self._timer is None:
            self._start(seconds)
        elif self._at < self._fires:
            self._timer.cancel()
            self._start(seconds)

    def clear(self) -> None:
        """Set no time."""
        self._at = None

    def stop(self) -> None:
        """Clear it for good: stop the timer, and drop the reference to the function."""
        self._at = None
        del self._expired
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, seconds: float) -> None:
        self._timer = self._clock.callLater(seconds, self._fire)
        self._fires = self._timer.getTime()

    def _fire(self) -> None:
        self._timer = None
        if self._at is None:
            return
        left = self._at - self._clock.seconds()
        if left > 0:
            self._start(left)
        else:
            self._at = None
            self._expired()
