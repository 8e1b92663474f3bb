"""
The log of a watch: numbered changes, bounded; repeated modifications of a file within a short interval are one.

A reader holds a position, not a queue, as with the log of a command: a slow one costs no memory, and gets the number of
changes it has missed.
"""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Literal, NamedTuple

from twisted.internet.defer import Deferred, succeed

Kind = Literal["created", "modified", "moved", "deleted", "overflow"]

#: Changes that are kept for readers to come back to.
KEPT = 16_384

#: Bytes of paths that they may hold together.
KEPT_BYTES = 8 * 1024 * 1024


class Change(NamedTuple):
    """
    One change in a directory.

    :ivar path: where, relative to what is watched; empty for that itself.
    :ivar is_dir: whether it is a directory.
    :ivar origin: for ``moved``, where it was before.
    :ivar reason: for ``overflow``, why changes may have been lost.
    """

    kind: Kind
    path: bytes
    is_dir: bool = False
    origin: bytes | None = None
    reason: str | None = None

    @property
    def cost(self) -> int:
        """Bytes of the change's paths."""
        return len(self.path) + len(self.origin or b"")


class DroppedChanges(NamedTuple):
    """The number of changes that a reader has missed, because the log has dropped them; None if it is unknown."""

    number: int | None


class ChangeBatch:
    """The changes of a short interval, with repeated changes of one path merged."""

    def __init__(self) -> None:
        self._changes: list[Change] = []
        self._last: dict[bytes, Kind] = {}

    def __len__(self) -> int:
        return len(self._changes)

    def add(self, change: Change) -> None:
        """Add a change, unless it modifies what this batch has as created or modified already."""
        if change.kind == "modified" and self._last.get(change.path) in ("created", "modified"):
            return
        if change.kind == "moved":
            self._last.clear()  # what was below a directory is elsewhere now
        elif change.kind == "overflow":
            if self._changes and self._changes[-1] == change:
                return
        else:
            self._last[change.path] = change.kind
        self._changes.append(change)

    def take(self) -> list[Change]:
        """Return all changes in order, and start a new batch."""
        changes, self._changes = self._changes, []
        self._last.clear()
        return changes


class ChangeLog:
    """
    The newest changes of a watch.

    :param first: number of the first change to come. Of two logs of the same directory the later one must begin with
        a higher number than the earlier one ended with, so that a position in the earlier is known to be lost.
    :ivar next: number of the change that comes next.
    :ivar end: why no more will come, or None while more may.
    """

    def __init__(self, first: int, max_changes: int = KEPT, max_bytes: int = KEPT_BYTES) -> None:
        self.next = first
        self.end: str | None = None
        self._first = first
        self._max_changes = max_changes
        self._max_bytes = max_bytes
        self._bytes = 0
        self._changes: deque[Change] = deque()
        self._waiting: list[Deferred[None]] = []

    def append(self, changes: list[Change]) -> None:
        """Append changes, drop the oldest beyond the bounds, and wake the readers."""
        self._changes.extend(changes)
        self._bytes += sum(change.cost for change in changes)
        self.next += len(changes)
        while self._changes and (len(self._changes) > self._max_changes or self._bytes > self._max_bytes):
            self._bytes -= self._changes.popleft().cost
        self._wake()

    def close(self, reason: str) -> None:
        """End the log, and wake the readers."""
        if self.end is None:
            self.end = reason
            self._wake()

    def read(self, position: int, limit: int) -> tuple[int, list[Change] | DroppedChanges]:
        """
        Return the changes from a position on.

        :param position: number of the change that it wants next.
        :param limit: how many at most.
        :return: the position behind, and the changes.
        """
        oldest = self.next - len(self._changes)
        if position < self._first or position > self.next:
            return oldest, DroppedChanges(None)
        if position < oldest:
            return oldest, DroppedChanges(oldest - position)
        found = list(islice(self._changes, position - oldest, position - oldest + limit))
        return position + len(found), found

    def when_more(self, position: int) -> Deferred[None]:
        """Return a Deferred that fires when there is a change at a position, or the log has ended. Can be cancelled."""
        if self.end is not None or position != self.next:
            return succeed(None)
        deferred: Deferred[None] = Deferred(self._waiting_cancelled)
        self._waiting.append(deferred)
        return deferred

    def _waiting_cancelled(self, deferred: Deferred[None]) -> None:
        if deferred in self._waiting:
            self._waiting.remove(deferred)

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            if not deferred.called:  # one that was woken may have cancelled another
                deferred.callback(None)
