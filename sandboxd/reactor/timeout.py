"""A bound on how long a coroutine runs."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from twisted.internet.defer import CancelledError, Deferred
from twisted.internet.interfaces import IReactorTime


async def within(clock: IReactorTime, seconds: float | None, coroutine: Coroutine[Deferred[Any], Any, object]) -> bool:
    """
    Run a coroutine, and cancel it after some seconds.

    :param seconds: None for no bound.
    :return: whether it has returned by then.
    """
    running = Deferred.fromCoroutine(coroutine)
    if seconds is None:
        await running
        return True
    timer = clock.callLater(seconds, running.cancel)
    try:
        await running
    except CancelledError:
        if timer.active():  # it was not the timer that cancelled
            raise
        return False
    finally:
        if timer.active():
            timer.cancel()
    return True
