"""The body of a request, read by a route as it arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from twisted.internet.defer import Deferred

#: Bytes that may wait for the reader; with more, the client has to.
HIGH_WATER = 1024 * 1024

#: Bytes that are missing from which on a reader may take them from the client's socket itself.
DIRECT = 256 * 1024


class BodyError(Exception):
    """
    A body cannot be read; has the status to answer.

    :ivar status: the status to answer.
    """

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status


class Source(Protocol):
    """What a body uses of its client's connection; it is :class:`sandboxd.web.channel.Channel`."""

    def lend_socket(self) -> int | None:
        """Return a duplicate of the socket's descriptor, and read nothing more of the body; None if that cannot be."""

    def return_socket(self, count: int) -> None:
        """Go on to read: ``count`` bytes of the body were read by another."""


class BodyStream:
    """
    A body that is still arriving. One reader awaits :meth:`read` until that returns nothing.

    The reader being cancelled is how it ends when the client hangs up: a disconnect cancels the route's Deferred, and
    so what the route awaits. A route that answers without having read all closes the connection.

    :param length: bytes of the body, or None if that is not known.
    :param limit: bytes that may come, or None for any number.
    :param hold: called with whether the client has to wait.
    :ivar patient: whether it may come as slowly as it likes.
    :ivar source: the connection that it comes from, whose socket a reader may use; None if there is none.
    :ivar begin: called when the reader first wants something: the time to send ``100 Continue``.
    :ivar complete: whether all has arrived.
    :ivar held: whether the client waits for the reader.
    """

    def __init__(
        self,
        length: int | None,
        limit: int | None = None,
        hold: Callable[[bool], None] = lambda held: None,
        patient: bool = False,
    ) -> None:
        self.patient = patient
        self.length = length
        self.begin: Callable[[], None] | None = None
        self.source: Source | None = None
        self.complete = False
        self.held = False
        self._limit = limit
        self._hold = hold
        self._received = 0
        self._waiting: list[bytes] = []
        self._size = 0
        self._error: BodyError | None = None
        self._reader: Deferred[None] | None = None

    async def read(self) -> bytes:
        """
        Return what has arrived since the last call, at least one byte; nothing at the end.

        :raise BodyError: if it is too long, malformed, or came too slowly.
        """
        begin, self.begin = self.begin, None
        if begin is not None:
            begin()
        while not (self._waiting or self.complete or self._error):
            self._reader = Deferred()
            await self._reader
        if self._error is not None:
            raise self._error
        data = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
        self._waiting.clear()
        self._size = 0
        self._set_held(False)
        return data

    def socket(self) -> tuple[int, int] | None:
        """
        Return a descriptor of the client's socket, to be closed by the caller, and how many bytes of the body may be
        read from it; None if less than :data:`DIRECT` is missing, or if it comes in chunks, or something else is in the
        way.

        Nothing may be done with this object until what was read there is reported to :meth:`received`.
        """
        if self.source is None or self._waiting or self.complete or self._error or self.length is None:
            return None
        left = self.length - self._received
        socket = self.source.lend_socket() if left >= DIRECT else None
        return None if socket is None else (socket, left)

    def received(self, count: int) -> None:
        """Count bytes that were read from :meth:`socket`, and go on."""
        self._received += count
        if self.source is not None:
            self.source.return_socket(count)

    def feed(self, data: bytes) -> None:
        """Add bytes that have arrived."""
        self._received += len(data)
        if self._limit is not None and self._received > self._limit:
            self.fail(BodyError(413, f"the request body is over the limit of {self._limit} bytes"))
        if self._error is not None or not data:
            return
        self._waiting.append(data)
        self._size += len(data)
        self._set_held(self._size >= HIGH_WATER)
        self._wake()

    def end(self) -> None:
        """Mark the body as complete."""
        self.complete = True
        self._wake()

    def fail(self, error: BodyError) -> None:
        """Fail the reader with an error, and drop what it has not read."""
        self._error = self._error or error
        self._waiting.clear()
        self._set_held(False)
        self._wake()

    def _set_held(self, held: bool) -> None:
        if held != self.held:
            self.held = held
            self._hold(held)

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.called:
            reader.callback(None)


def whole(data: bytes) -> BodyStream:
    """Return a stream of a body that has arrived completely."""
    body = BodyStream(len(data))
    body.feed(data)
    body.end()
    return body
