"""
``Idempotency-Key``: a request that is sent again joins the first one, or gets its answer, and is never executed twice.

After draft-ietf-httpapi-idempotency-key-header: the same key with another request is a conflict (409 here, since
the official clients retry nothing below 500).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from twisted.internet.interfaces import IReactorTime

T = TypeVar("T")


class KeyConflict(Exception):
    """A key was used for another request, or the result of its request is no longer known."""


class KeyedResult(Generic[T]):
    """
    The result of a request with a key.

    :ivar value: the result; None once it was dropped to save memory, or is unknown.
    :ivar why_lost: what is answered to a request that comes again when there is no value any more.
    :ivar keyed: whether the request has a key that is remembered, so that it may come again.
    """

    def __init__(self, value: T, fingerprint: bytes, keyed: bool, time: float) -> None:
        self.value: T | None = value
        self.fingerprint = fingerprint
        self.keyed = keyed
        self.time = time
        self.size = 0
        self.why_lost = "the request was executed, but its answer is no longer kept"


class IdempotencyStore:
    """
    The results of requests by their keys.

    :param clock: gives the time.
    :param count: how many keys are remembered.
    :param seconds: for how long.
    :param max_bytes: how much the answers may hold together; beyond it the oldest are dropped, not their keys.
    """

    def __init__(
        self, clock: IReactorTime, count: int = 10_000, seconds: float = 24 * 3600.0, max_bytes: int = 64 * 1024 * 1024
    ) -> None:
        self._clock = clock
        self._count = count
        self._seconds = seconds
        self._max_bytes = max_bytes
        self._bytes = 0
        self._entries: OrderedDict[str, KeyedResult[object]] = OrderedDict()

    def once(self, key: str | None, fingerprint: bytes, start: Callable[[], T]) -> KeyedResult[T]:
        """
        Return the result of ``start``, called now or when the key was first used.

        :param key: the header's value, or None for a result that is not remembered.
        :param fingerprint: what distinguishes this request from others.
        :raise KeyConflict: if the key cannot be used for this request.
        """
        now = self._clock.seconds()
        if key is None:
            return KeyedResult(start(), b"", False, now)
        self._forget(now, self._count)
        known = self._entries.get(key)
        if known is None:
            entry = KeyedResult(start(), fingerprint, True, now)
            self._forget(now, self._count - 1)
            self._entries[key] = cast(KeyedResult[object], entry)
            return entry
        if known.fingerprint != fingerprint:
            raise KeyConflict("Idempotency-Key: it was used for another request; send a new key")
        if known.value is None:
            raise KeyConflict(f"Idempotency-Key: {known.why_lost}")
        return cast(KeyedResult[T], known)

    def forget(self, entry: KeyedResult[T]) -> None:
        """Forget an entry whose request has had no effect, so that its key may be used again."""
        if entry.keyed:
            entry.keyed = False
            self._bytes -= entry.size
            for key, known in self._entries.items():
                if known is entry:
                    del self._entries[key]
                    return

    def lose(self, entry: KeyedResult[T], why: str) -> None:
        """Refuse the request of an entry if it is sent again, as it may have been executed."""
        entry.why_lost = why
        self._bytes -= entry.size
        entry.value, entry.size = None, 0

    def holds(self, entry: KeyedResult[T], size: int) -> None:
        """Set the bytes of memory that an entry's value holds; drop the oldest values if all together hold too many."""
        if not entry.keyed or entry.value is None:
            return
        self._bytes += size - entry.size
        entry.size = size
        for oldest in self._entries.values():
            if self._bytes <= self._max_bytes:
                return
            self._bytes -= oldest.size
            if oldest.size:
                oldest.value, oldest.size = None, 0

    def _forget(self, now: float, count: int) -> None:
        """Forget entries that are too old, and the oldest of more than ``count``."""
        while self._entries:
            oldest = next(iter(self._entries.values()))
            if len(self._entries) <= count and now - oldest.time < self._seconds:
                return
            self._bytes -= oldest.size
            oldest.keyed = False
            self._entries.popitem(last=False)
