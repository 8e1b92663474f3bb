"""Routes ``/health`` and ``/ready``: whether the daemon answers, and whether it would run a command."""

from __future__ import annotations

from collections.abc import Callable

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.logger import Logger

from sandboxd import __version__
from sandboxd.api.routing import Reply, Routes
from sandboxd.execution.table import ProcessTable
from sandboxd.messages.daemon import Health, Readiness
from sandboxd.processes.child import SpawnError
from sandboxd.reactor.oneshot import OneShot
from sandboxd.web.request import Request

#: Seconds for which the result of a trial start holds.
INTERVAL = 5.0


class ReadyCheck:
    """
    The readiness check: runs a command that does nothing.

    :param accepting: returns whether requests are accepted.
    """

    _log = Logger()

    def __init__(self, clock: IReactorTime, table: ProcessTable, accepting: Callable[[], bool]) -> None:
        self._clock = clock
        self._table = table
        self._accepting = accepting
        self._tried: float | None = None
        self._failure: str | None = None
        self._trial: OneShot[None] | None = None

    def why_not(self) -> str | None:
        """Return why no command would be run, without running one; None if nothing is known to prevent it."""
        if not self._accepting():
            return "the daemon does not accept requests: it is about to start or to stop"
        if self._table.full:
            return "as many commands run as may; try again later"
        return self._failure

    async def check(self) -> str | None:
        """Run a command that does nothing, unless one was run in the last seconds; then return :meth:`why_not`."""
        if self._accepting() and not self._table.full:
            if self._trial is not None:
                await self._trial.when_fired()
            elif self._tried is None or self._clock.seconds() - self._tried >= INTERVAL:
                trial: OneShot[None] = OneShot()
                self._trial = trial
                Deferred.fromCoroutine(self._try(trial))  # not awaited, as it serves other requests than this one too
                await trial.when_fired()
        return self.why_not()

    async def _try(self, trial: OneShot[None]) -> None:
        try:
            await self._table.try_start()
            self._failure = None
        except SpawnError as error:
            self._failure = f"no command can be started: {error}"
        except Exception:
            self._log.failure("a trial start has failed")
            self._failure = "no command can be started; the daemon's log has the details"
        self._tried = self._clock.seconds()
        self._trial = None
        trial.fire(None)


def add_health_routes(routes: Routes, clock: IReactorTime, proxy_port: int, ready: ReadyCheck) -> None:
    """
    Add ``GET /health`` and ``GET /ready`` to the API.

    :param proxy_port: where the proxy listens.
    """
    started = clock.seconds()

    @routes.get("/health", reply=Health, open=True, observes=True)
    async def health(request: Request) -> Health:
        """Report that the daemon answers. Needs no token."""
        return Health("ok", __version__, int(clock.seconds() - started), str(proxy_port))

    @routes.get("/ready", reply=Readiness, errors=(503,), open=True, observes=True)
    async def readiness(request: Request) -> Readiness | Reply:
        """
        Report whether the daemon would run a command now. Needs no token.

        It runs one that does nothing, at most once in 5 seconds. Answers 503 with the reason while that fails, while
        the daemon is stopping, and while as many commands run as may.
        """
        why = await ready.check()
        return Readiness(True) if why is None else Reply({"ready": False, "error": why}, 503)
