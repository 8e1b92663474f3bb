"""Transfers of file contents: their common base, made step by step in threads, and closed at any time."""

from __future__ import annotations

import errno
import os
import select
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from time import monotonic

from twisted.logger import Logger

from sandboxd.reactor.threads import ThreadPool

_log = Logger()


class BriefWait:
    """
    Waits in a thread for a client that reads or writes about as fast as the daemon; others are for the reactor.

    :param socket: a socket's descriptor.
    :param events: ``POLLIN`` or ``POLLOUT``.
    """

    #: Seconds of all waits together.
    PATIENCE = 0.02

    def __init__(self, socket: int, events: int) -> None:
        self._poll = select.poll()
        self._poll.register(socket, events)
        self._left = self.PATIENCE

    def ready(self) -> bool:
        """Return whether the socket is ready, or has become so in the time that was left."""
        if self._poll.poll(0):
            return True
        began = monotonic()
        found = self._poll.poll(max(self._left, 0) * 1000)
        self._left -= monotonic() - began
        return bool(found)


class Transfer(ABC):
    """
    A transfer in steps, one at a time. All of its methods block: call them in a thread.

    The steps exclude each other, and :meth:`close` may come at any time, from another thread too: a route that waits
    for a step can be cancelled, and the step itself cannot.

    :ivar over: whether it was closed; a step that runs for long looks at it.
    """

    def __init__(self) -> None:
        self.over = False
        self._lock = Lock()

    @contextmanager
    def _step(self) -> Iterator[None]:
        """
        Run one step, unless the transfer is closed.

        :raise OSError: ``ECANCELED`` if it was closed.
        """
        with self._lock:
            self._check_over()
            yield

    def _check_over(self) -> None:
        if self.over:
            raise OSError(errno.ECANCELED, os.strerror(errno.ECANCELED))

    def close(self) -> None:
        """End the transfer, complete or not, once the step that runs has ended. Can be called again."""
        self.over = True
        with self._lock:
            self._close()

    @abstractmethod
    def _close(self) -> None:
        """Release all resources, and remove what is incomplete."""


def close_in_thread(pool: ThreadPool, transfer: Transfer) -> None:
    """Close a transfer in a thread, without waiting: a step of it may still run in another."""
    pool(transfer.close).addErrback(lambda failure: _log.failure("not ended", failure))
