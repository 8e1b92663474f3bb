"""
Fairness: a bound on the work of one turn of the reactor, so that no kind of work fills it.

Two hundred commands that start at once, or a hundred that write, are some milliseconds of work each. Done as they
come, they would delay ``/health`` by their sum.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime

#: Seconds of work in one turn, at most; work that has begun is not interrupted.
BUDGET = 0.008


class TurnBudget:
    """
    A budget of time for each turn of the reactor: work is done at once while time is left; the rest is queued for later
    turns, in order.

    The time is renewed in the turn after the one that has used it up. A turn with less work asks the reactor for
    nothing, so the work of several such turns counts together.

    :param timer: returns seconds, from an arbitrary beginning.
    """

    def __init__(self, clock: IReactorTime, timer: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._timer = timer
        self._spent = 0.0
        self._working = False
        self._scheduled = False
        self._waiting: deque[Callable[[], None]] = deque()

    @property
    def working(self) -> bool:
        """Whether the caller's time is counted: it was called by :meth:`take`, or after :meth:`turn` has fired."""
        return self._working

    def take(self, work: Callable[[], None]) -> bool:
        """
        Call ``work`` now or in a later turn.

        :return: whether it was called now.
        """
        if self._working:
            work()  # nested: its time is counted by the outer call
            return True
        if self._waiting or self._spent >= BUDGET:
            self._waiting.append(work)
            return False
        try:
            self._do(work)
        finally:
            if self._spent >= BUDGET and not self._scheduled:
                self._schedule()
        return True

    def turn(self) -> Deferred[None]:
        """Return a Deferred that fires when there is time left in a turn. Can be cancelled."""
        ready: Deferred[None] = Deferred()
        self.take(lambda: None if ready.called else ready.callback(None))
        return ready

    def _schedule(self) -> None:
        self._scheduled = True
        self._clock.callLater(0, self._next_turn)

    def _do(self, work: Callable[[], None]) -> None:
        self._working = True
        started = self._timer()
        try:
            work()
        finally:
            self._spent += self._timer() - started
            self._working = False

    def _next_turn(self) -> None:
        self._spent = 0.0
        self._scheduled = False
        if self._waiting:
            self._schedule()
        while self._waiting and self._spent < BUDGET:
            self._do(self._waiting.popleft())
