"""The daemon's clock: monotonic, and it does not advance while the process is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable

#: Seconds between two readings that are counted in full. The daemon reads its clock at least every
#: :data:`sandboxd.reactor.lag.INTERVAL` seconds while it runs, so a longer gap means that it was stopped: by SIGSTOP,
#: by a cgroup's freezer, or with the whole virtual machine.
LONGEST_GAP = 1.0


class RunningTime:
    """
    A monotonic clock that stands still while the process is stopped or frozen.

    Twisted's own ``reactor.seconds`` is the wall clock: setting that forward would fire every timer at once, setting it
    back would fire none for as long. Call an instance for the time in seconds, from an arbitrary beginning.

    :param monotonic: the clock that it is based on, in seconds.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._last = monotonic()
        self._stopped = 0.0

    def __call__(self) -> float:
        """Return the seconds for which the process has been running."""
        now = self._monotonic()
        gap = now - self._last
        if gap > LONGEST_GAP:
            self._stopped += gap - LONGEST_GAP
        self._last = now
        return now - self._stopped
