"""Waits for a process to be ready: its output has a text, it listens on a port, answers over HTTP, or ends."""

from __future__ import annotations

from contextlib import closing
from typing import Literal, TypedDict

from sandboxd.api.probe import HttpProbe
from sandboxd.execution.execution import Execution
from sandboxd.execution.output_search import OutputMatch, OutputSearch
from sandboxd.messages.executions import WaitRequest
from sandboxd.processes.listeners import ListenerPoll, marks_at
from sandboxd.reactor.first_to_end import first_to_end
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.threads import ThreadPool
from sandboxd.reactor.timeout import within
from sandboxd.reactor.turn_budget import TurnBudget

#: Seconds that the first HTTP probe gets even if the whole wait has less.
FIRST_PROBE = 1.0


class _Reason(TypedDict):
    reason: Literal["output", "port", "http", "exit", "timeout"]


class WaitResult(_Reason, total=False):
    """The outcome of a wait: fields of its reply."""

    seq: int
    line: str


class Waits:
    """
    The waits that requests ask for.

    :param poll: looks for sockets that listen.
    :param blocking: runs a blocking function off the reactor's thread.
    """

    def __init__(
        self, reactor: Reactor, turns: TurnBudget, poll: ListenerPoll, probe: HttpProbe, blocking: ThreadPool
    ) -> None:
        self._reactor = reactor
        self._turns = turns
        self._poll = poll
        self._probe = probe
        self._blocking = blocking

    async def wait(self, execution: Execution, body: WaitRequest) -> WaitResult:
        """
        Wait for the first of the conditions that a request names.

        All is looked at once, in the order of the document, before anything is waited for; also with a timeout of 0.

        :return: ``reason``, and what belongs to it.
        """
        deadline = None if body.timeout is None else self._reactor.seconds() + body.timeout
        search = OutputSearch(execution.log, body.output or "", self._turns)
        with closing(search):
            match = await search.available() if body.output is not None else None
            if match is not None:
                return _found(match)
            if body.port is not None and await self._is_ready(execution, body.port, body.http, deadline):
                return {"reason": "port" if body.http is None else "http"}
            if execution.ended_at is not None:
                return {"reason": "exit"}
            left = None if deadline is None else max(0.0, deadline - self._reactor.seconds())
            waiting = _Waiting()
            if not await within(self._reactor, left, self._first(waiting, execution, search, body)):
                return {"reason": "timeout"}
            return waiting.found

    async def _first(self, waiting: _Waiting, execution: Execution, search: OutputSearch, body: WaitRequest) -> None:
        coroutines = [self._output_or_end(waiting, execution, search, body.output is not None)]
        if body.port is not None:
            coroutines.append(self._port(waiting, execution, body.port, body.http))
        await first_to_end(*coroutines)

    async def _output_or_end(
        self, waiting: _Waiting, execution: Execution, search: OutputSearch, searching: bool
    ) -> None:
        """Wait for the text in the output, or for the end, which comes after all output."""
        match = await search.until_ended() if searching else None
        if match is None:
            await execution.when_ended()
        waiting.found = {"reason": "exit"} if match is None else _found(match)

    async def _port(self, waiting: _Waiting, execution: Execution, port: int, http: str | None) -> None:
        if http is not None:
            await self._probe.when_answered(port, http)
            waiting.found = {"reason": "http"}
            return
        while not await self._listens(execution, port):
            pass
        waiting.found = {"reason": "port"}

    async def _is_ready(self, execution: Execution, port: int, http: str | None, deadline: float | None) -> bool:
        """Check the port, or probe it over HTTP, once."""
        if http is None:
            return await self._listens(execution, port)
        answers: list[bool] = []

        async def probe() -> None:
            answers.append(await self._probe.answers(port, http))

        left = None if deadline is None else max(FIRST_PROBE, deadline - self._reactor.seconds())
        await within(self._reactor, left, probe())
        return answers == [True]

    async def _listens(self, execution: Execution, port: int) -> bool:
        """Return whether one of the execution's processes listens on a port, at the next look at the sockets."""
        if all(each.port != port for each in await self._poll.when_looked()):
            return False
        return execution.mark in await self._blocking(marks_at, port)


class _Waiting:
    """The holder of a wait's result."""

    found: WaitResult


def _found(match: OutputMatch) -> WaitResult:
    return {"reason": "output", "seq": match.seq, "line": match.line}
