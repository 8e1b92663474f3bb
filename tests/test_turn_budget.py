"""Fairness between kinds of work, on a clock that the test moves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from twisted.internet.task import Clock

from sandboxd.reactor.turn_budget import BUDGET, TurnBudget


class Reactor(Clock):
    """A reactor on which work takes time, and whose turns the test takes."""

    def __init__(self) -> None:
        super().__init__()
        self.due: list[Callable[[], None]] = []
        self.worked = 0.0
        self.turns = TurnBudget(self, lambda: self.worked)
        self.done: list[str] = []

    def work(self, name: str, seconds: float) -> Callable[[], None]:
        def do() -> None:
            self.worked += seconds
            self.done.append(name)

        return do

    def callLater(self, delay: float, call: Callable[[], None]) -> None:  # type: ignore[override]
        assert delay == 0
        self.due.append(call)

    def turn(self) -> None:
        """As a real reactor has it, what is due at once but asked for in this turn is done in the next."""
        due, self.due = self.due, []
        for call in due:
            call()


@pytest.fixture
def reactor() -> Reactor:
    return Reactor()


def test_work_is_done_at_once_while_there_is_time(reactor: Reactor) -> None:
    assert reactor.turns.take(reactor.work("a", BUDGET / 3))
    assert reactor.turns.take(reactor.work("b", BUDGET / 3))
    assert reactor.done == ["a", "b"]


def test_what_is_more_waits_for_the_turns_to_come_in_order(reactor: Reactor) -> None:
    names = list("abcdefgh")
    for name in names:
        reactor.turns.take(reactor.work(name, BUDGET * 0.6))
    assert reactor.done == ["a", "b"]
    reactor.turn()
    assert reactor.done == ["a", "b", "c", "d"]
    reactor.turn()
    reactor.turn()
    assert reactor.done == names


def test_nobody_overtakes_those_who_wait(reactor: Reactor) -> None:
    for name in "abc":
        reactor.turns.take(reactor.work(name, BUDGET))
    assert not reactor.turns.take(reactor.work("late", 0))
    reactor.turn()
    assert reactor.done == ["a", "b"]
    reactor.turn()
    assert reactor.done == ["a", "b", "c"]
    reactor.turn()
    assert reactor.done == ["a", "b", "c", "late"]


def test_a_new_turn_has_its_full_time_again(reactor: Reactor) -> None:
    assert reactor.turns.take(reactor.work("a", BUDGET))
    reactor.turn()
    assert reactor.turns.take(reactor.work("b", BUDGET))


def test_work_within_work_is_part_of_it(reactor: Reactor) -> None:
    def outer() -> None:
        reactor.work("outer", 2 * BUDGET)()
        assert reactor.turns.take(reactor.work("inner", 0))

    reactor.turns.take(outer)
    assert reactor.done == ["outer", "inner"]


def test_work_that_fails_does_not_keep_the_rest_from_its_turn(reactor: Reactor) -> None:
    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        reactor.turns.take(fail)
    assert reactor.turns.take(reactor.work("a", 0))


def test_waiting_for_a_turn_can_be_cancelled(reactor: Reactor) -> None:
    reactor.turns.take(reactor.work("a", BUDGET))
    waiting = reactor.turns.turn()
    waiting.addErrback(lambda failure: None)
    waiting.cancel()
    reactor.turn()
    assert reactor.turns.take(reactor.work("b", 0))


def test_a_turn_with_little_work_asks_the_reactor_for_nothing(reactor: Reactor) -> None:
    reactor.turns.take(reactor.work("a", BUDGET / 3))
    assert reactor.due == []
    reactor.turns.take(reactor.work("b", BUDGET))
    assert len(reactor.due) == 1
