"""An event that happens once, and whoever waits for it."""

from __future__ import annotations

from typing import Generic, TypeVar

from twisted.internet.defer import Deferred
from twisted.python.failure import Failure

T = TypeVar("T")


class OneShot(Generic[T]):
    """Gives each caller a Deferred of its own, before the event and after it."""

    def __init__(self) -> None:
        self._result: T | Failure | None = None
        self._fired = False
        self._waiting: list[Deferred[T]] = []

    @property
    def fired(self) -> bool:
        """Whether it has happened."""
        return self._fired

    def fire(self, result: T | Failure) -> None:
        """It has happened. A Failure fails those who wait."""
        self._fired = True
        self._result = result
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            if not deferred.called:  # one that was told may have cancelled another
                deferred.callback(result)

    def when_fired(self) -> Deferred[T]:
        """Fires with the result. Can be cancelled, which concerns this caller only."""
        deferred: Deferred[T] = Deferred(self._cancelled)
        if self._fired:
            deferred.callback(self._result)  # type: ignore[arg-type]
        else:
            self._waiting.append(deferred)
        return deferred

    def _cancelled(self, deferred: Deferred[T]) -> None:
        if deferred in self._waiting:
            self._waiting.remove(deferred)
