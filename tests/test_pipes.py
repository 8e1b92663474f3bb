"""A child's descriptors, on the real reactor."""

from __future__ import annotations

import os
from typing import cast

from twisted.internet import reactor
from twisted.internet.task import deferLater

from sandboxd.processes.pipes import OutputPipe
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.turn_budget import TurnBudget
from tests.waiting import until


async def test_a_new_pipe_is_not_taken_for_one_that_was_closed_in_the_same_turn() -> None:
    """The reactor has events of two pipes; the handler of the first closes the second, and opens a new one."""
    turns = TurnBudget(reactor)
    received: list[bytes] = []
    closed: list[str] = []
    new: list[int] = []

    def replace(data: bytes) -> None:
        old.close()
        reading, writing = os.pipe()
        OutputPipe(cast(Reactor, reactor), turns, reading, received.append, lambda: closed.append("new")).resume()
        new.append(writing)

    old_reading, old_writing = os.pipe()
    old = OutputPipe(cast(Reactor, reactor), turns, old_reading, received.append, lambda: closed.append("old"))
    first_reading, first_writing = os.pipe()
    first = OutputPipe(cast(Reactor, reactor), turns, first_reading, replace, lambda: None)
    first.resume()
    old.resume()
    os.write(first_writing, b"go")
    os.close(old_writing)
    await until(lambda: new)
    await deferLater(reactor, 0)
    assert closed == ["old"]
    os.write(new[0], b"alive")
    os.close(new[0])
    await until(lambda: closed == ["old", "new"])
    assert received == [b"alive"]
    os.close(first_writing)
    first.close()
