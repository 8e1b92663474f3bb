"""Run coroutines side by side until one of them ends."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from twisted.internet.defer import Deferred, DeferredList, FirstError


async def first_to_end(*coroutines: Coroutine[Deferred[Any], Any, object]) -> int:
    """
    Run coroutines until the first has returned or raised, then cancel the others.

    :return: the index of that one.
    :raise Exception: what that one has raised.
    """
    running = [Deferred.fromCoroutine(coroutine) for coroutine in coroutines]
    try:
        _, index = await DeferredList(running, fireOnOneCallback=True, fireOnOneErrback=True, consumeErrors=True)
    except FirstError as error:
        error.subFailure.raiseException()
    finally:
        for each in running:
            each.cancel()
    assert isinstance(index, int)
    return index
