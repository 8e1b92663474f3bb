"""A faster loop for the epoll reactor, in which a new connection is served in the turn in which it is accepted."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, cast

from twisted.internet.epollreactor import EPollReactor
from twisted.internet.tcp import Port
from twisted.logger import Logger

_log = Logger()


def replace_poll(reactor: object) -> None:
    """
    Replace an epoll reactor's ``doPoll`` with :func:`_poll`. Any other reactor stays as it is.
    """
    if type(reactor) is EPollReactor:
        cast(Any, reactor).doIteration = partial(_poll, reactor)


def _poll(reactor: Any, timeout: float | None) -> None:
    """
    Wait for events and handle them, like ``EPollReactor.doPoll`` but for two things.

    Listening ports come first, and then epoll is asked again, as most clients have sent their request by the time they
    are accepted. On a machine whose processors are all busy, each turn of the reactor may be some ten milliseconds
    that the request would wait.

    No log context is set for each event, which saves a tenth of the time of a small request. It only names the protocol
    in what is logged by ``twisted.python.log``.
    """
    selectables, poll = reactor._selectables, reactor._poller.poll
    events = poll(-1 if timeout is None else timeout, len(selectables))
    ports = [each for each in events if isinstance(selectables.get(each[0]), Port)]
    if ports:
        _handle(reactor, ports)
        events = poll(0, len(selectables))
    _handle(reactor, events)


def _handle(reactor: Any, events: Iterable[tuple[int, int]]) -> None:
    """Have the events handled by those that they are of."""
    selectables = reactor._selectables
    for fd, event in events:
        selectable = selectables.get(fd)  # None: closed by one of the events before
        if selectable is not None:
            try:
                reactor._doReadOrWrite(selectable, fd, event)
            except Exception:
                _log.failure("an event of {selectable!r} could not be handled", selectable=selectable)
