"""Events that happen once, and the Deferreds that wait for them."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any, Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

T = TypeVar("T")


class OneShot(Generic[T]):
    """A one-shot event that gives each caller a Deferred of its own, before and after it has happened."""

    def __init__(self) -> None:
        self._result: T | Failure | None = None
        self._fired = False
        self._waiting: list[Deferred[T]] = []

    @property
    def fired(self) -> bool:
        """Whether the event has happened."""
        return self._fired

    def fire(self, result: T | Failure) -> None:
        """Fire all waiting Deferreds with ``result``; a Failure fails them."""
        self._fired = True
        self._result = result
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            if not deferred.called:  # an earlier callback may have cancelled it
                deferred.callback(result)

    def when_fired(self) -> Deferred[T]:
        """Return a Deferred that fires with the result. Cancelling it affects no other caller."""
        deferred: Deferred[T] = Deferred(self._cancelled)
        if self._fired:
            deferred.callback(self._result)  # type: ignore[arg-type]
        else:
            self._waiting.append(deferred)
        return deferred

    def _cancelled(self, deferred: Deferred[T]) -> None:
        if deferred in self._waiting:
            self._waiting.remove(deferred)


def shielded(work: Coroutine[Any, Any, T]) -> Deferred[T]:
    """Run a coroutine; return a Deferred of its result whose cancellation does not cancel the coroutine."""
    done: OneShot[T] = OneShot()
    Deferred.fromCoroutine(work).addBoth(done.fire)
    return done.when_fired()
