"""Forwarding between two connected sockets, both ways: by copying and, once many bytes come, by splicing."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import cast

from sandboxd.proxy.copying import CopiedSocket, copy
from sandboxd.proxy.splicing import PipePool, SplicedSocket, splice
from sandboxd.reactor.interfaces import Reactor


class BothWays:
    """
    A pair of sockets whose bytes are forwarded to each other, half-close included, until both have ended or one breaks.
    """

    def __init__(
        self,
        reactor: Reactor,
        pool: PipePool | None,
        one: socket.socket,
        other: socket.socket,
        count_copied: Callable[[int], None],
        done: Callable[[BaseException | None], None],
    ) -> None:
        """
        Start to forward. The caller keeps the sockets, and must call :meth:`stop` before closing them.

        :param pool: pipes for splicing; None to copy only.
        :param one: a non-blocking socket.
        :param other: the other one, non-blocking too.
        :param count_copied: called with the number of bytes that were copied; the pool counts those that are spliced.
        :param done: called once: with None when both have ended and all bytes have arrived, or with the error of one.
        """
        self._reactor = reactor
        self._pool = pool
        self._one, self._other = one, other
        self._done = done
        self._passed = 0  #: bytes from the other to the one, before they were spliced
        much = None if pool is None else self._splice
        self._ends: tuple[CopiedSocket, CopiedSocket] | tuple[SplicedSocket, SplicedSocket]
        self._ends = copy(reactor, one, other, count_copied, much, done)

    @property
    def passed_to_one(self) -> int:
        """Bytes that the first socket has been sent."""
        return self._passed + self._ends[1].passed

    def stop(self) -> None:
        """Stop watching the sockets."""
        for end in self._ends:
            end.stop()

    def _splice(self) -> None:
        """Continue by splicing, as far as the two sides have not ended."""
        assert self._pool is not None
        self.stop()
        self._passed = self._ends[1].passed
        ended = cast("tuple[bool, bool]", tuple(end.ended for end in self._ends))
        self._ends = splice(self._reactor, self._pool, self._one, self._other, self._done, ended)
