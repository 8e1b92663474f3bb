"""The process protocol that writes a child's output to its log."""

from __future__ import annotations

import time
from collections.abc import Callable

from twisted.internet.interfaces import IDelayedCall, IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from sandboxd.execution.log import OutputLog, Stream


class CaptureProtocol(ProcessProtocol):
    """
    A protocol that appends a child's stdout and stderr to one log, in the order of their arrival.

    :param clock: the clock of :attr:`last_output`; the log's times are those of the wall clock.
    :param started: called when the child runs.
    :param flush_after: seconds that the beginning of an unfinished line waits for its end before it becomes a record.
    :param exited: called with the reason, once the child has exited and its output is in the log.
    :ivar last_output: when the child last wrote, by ``clock``; None if it never did.
    """

    def __init__(
        self,
        log: OutputLog,
        clock: IReactorTime,
        started: Callable[[], None],
        exited: Callable[[Failure], None],
        flush_after: float | None = None,
    ) -> None:
        self._flush_after = flush_after
        self._flushes: dict[Stream, IDelayedCall] = {}
        self._log = log
        self._clock = clock
        self._started = started
        self._exited = exited
        self.last_output: float | None = None

    def connectionMade(self) -> None:
        """Report that the child runs."""
        self._started()

    def outReceived(self, data: bytes) -> None:
        """Append output that the child has written to stdout."""
        self._received("stdout", data)

    def errReceived(self, data: bytes) -> None:
        """Append output that the child has written to stderr."""
        self._received("stderr", data)

    def _received(self, stream: Stream, data: bytes) -> None:
        self.last_output = self._clock.seconds()
        begins = self._log.append(stream, data, time.time())
        if begins and self._flush_after is not None:
            flush = self._flushes.get(stream)
            if flush is not None and flush.active():
                flush.reset(self._flush_after)
            else:
                self._flushes[stream] = self._clock.callLater(self._flush_after, self._flush, stream)

    def _flush(self, stream: Stream) -> None:
        self._log.flush(stream, time.time())

    def processExited(self, reason: Failure) -> None:
        """Close the log: the child has exited and its pipes are drained, or it could not be started."""
        for flush in self._flushes.values():
            if flush.active():
                flush.cancel()
        log, exited = self._log, self._exited
        # Processes that it left may hold its pipes, and so this object, for days: release the log and the execution.
        self._log, self._started, self._exited, self.transport = _NOWHERE, _nothing, _nothing, None
        log.close(time.time())
        exited(reason)


def _nothing(reason: Failure | None = None) -> None:
    pass


#: The log of a protocol whose child has exited.
_NOWHERE = OutputLog()
