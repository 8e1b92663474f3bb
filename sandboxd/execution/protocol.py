"""Captures what a child writes."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.interfaces import IReactorTime
from twisted.internet.protocol import ProcessProtocol
from twisted.python.failure import Failure

from sandboxd.execution.log import OutputLog


class CaptureProtocol(ProcessProtocol):
    """
    Puts a child's stdout and stderr into one log, in the order in which they arrive.

    :param log: where the output goes.
    :param clock: tells the time of each batch.
    :param started: called when the child runs.
    :param exited: called with the reason, once the child has exited and its output is in the log.
    """

    def __init__(
        self, log: OutputLog, clock: IReactorTime, started: Callable[[], None], exited: Callable[[Failure], None]
    ) -> None:
        self._log = log
        self._clock = clock
        self._started = started
        self._exited = exited

    def connectionMade(self) -> None:
        """The child runs."""
        self._started()

    def outReceived(self, data: bytes) -> None:
        """The child wrote to stdout."""
        self._log.append("stdout", data, self._clock.seconds())

    def errReceived(self, data: bytes) -> None:
        """The child wrote to stderr."""
        self._log.append("stderr", data, self._clock.seconds())

    def processExited(self, reason: Failure) -> None:
        """The child has exited, and all that it left in its pipes has been received; or it could not be started."""
        log, exited = self._log, self._exited
        # What the command left behind may hold its pipes, and so this, for days: not the output and the execution.
        self._log, self._started, self._exited, self.transport = _NOWHERE, _nothing, _nothing, None
        log.close(self._clock.seconds())
        exited(reason)


def _nothing(reason: Failure | None = None) -> None:
    pass


#: The log of a protocol that receives nothing any more.
_NOWHERE = OutputLog()
