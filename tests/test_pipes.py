"""A child's descriptors, on the real reactor."""

from __future__ import annotations

import os

from twisted.internet import reactor
from twisted.internet.task import deferLater

from sandboxd.execution.pipes import OutputPipe
from sandboxd.turns import Turns
from tests.waiting import until


async def test_a_new_pipe_is_not_taken_for_one_that_was_closed_in_the_same_turn() -> None:
    """Both old pipes are hung up, so the reactor has an event for each when the first handler opens a new one."""
    turns = Turns(reactor)
    olds: list[OutputPipe] = []
    news: list[tuple[OutputPipe, int]] = []
    closed: list[str] = []
    started: list[bool] = []
    received: list[bytes] = []

    def replace_all() -> None:
        """What a handler may do: close another descriptor, and open one that would get its number."""
        if started:
            return
        started.append(True)
        for old in olds:
            old.close()
        for _ in olds:
            reading, writing = os.pipe()
            new = OutputPipe(reactor, turns, reading, received.append, lambda: closed.append("new"))
            new.resume()
            news.append((new, writing))

    for _ in range(2):
        reading, writing = os.pipe()
        old = OutputPipe(reactor, turns, reading, received.append, replace_all)
        olds.append(old)
        old.resume()
        os.close(writing)
    await until(lambda: news)
    await deferLater(reactor, 0)
    assert closed == []
    for _, writing in news:
        os.write(writing, b"alive")
        os.close(writing)
    await until(lambda: len(closed) == 2)
    assert received == [b"alive", b"alive"]
