"""Bounded waits, for facts that no event tells of."""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, TypeVar, cast

from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.task import deferLater

from tests.daemon import alive

T = TypeVar("T")


async def until(fact: Callable[[], T], seconds: float = 10) -> T:
    """The first true value of ``fact()``. Fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := fact()):
        assert time.monotonic() < deadline, f"still {value!r} after {seconds} s"
        await deferLater(reactor, 0.01)
    return value


def wait_for(fact: Callable[[], object], seconds: float = 10) -> None:
    """Return once ``fact()`` is true, where no reactor runs in this thread. Fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not fact():
        assert time.monotonic() < deadline, f"not so after {seconds} s"
        time.sleep(0.01)


async def settled(fact: Callable[[], T], still: float = 0.3, seconds: float = 10) -> T:
    """The value of ``fact()`` once it has not changed for ``still`` seconds. Fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    value, since = fact(), time.monotonic()
    while time.monotonic() - since < still:
        assert time.monotonic() < deadline, f"no rest within {seconds} s, now at {value!r}"
        await deferLater(reactor, 0.02)
        if (now := fact()) != value:
            value, since = now, time.monotonic()
    return value


def within(seconds: float, work: Awaitable[T]) -> Deferred[T]:
    """The result of ``work``, which fails if it takes longer."""
    return Deferred.fromCoroutine(cast("Coroutine[Deferred[Any], Any, T]", work)).addTimeout(seconds, reactor)


async def pids_in(file: Path, count: int = 1) -> list[int]:
    """The pids that a command writes to ``file``, one a line, once there are ``count``."""

    def written() -> list[int]:
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [int(line) for line in lines if line.endswith("\n")] if len(lines) >= count else []

    return await until(written)


async def gone(pids: Iterable[int], seconds: float = 10) -> None:
    """Returns once no process of ``pids`` runs."""
    pids = list(pids)
    await until(lambda: not any(map(alive, pids)), seconds)


class Gate:
    """A place where a command waits: ``gate.wait`` in its text, until the test calls ``open``."""

    def __init__(self, folder: Path) -> None:
        path = folder / "gate"
        os.mkfifo(path)
        self._fd = os.open(path, os.O_RDWR)
        self.wait = f"read _ < {path}"

    def open(self) -> None:
        """Let the command pass, once."""
        os.write(self._fd, b"\n")

    def close(self) -> None:
        os.close(self._fd)


#: Processes that :func:`hard_to_end` starts, its ``sh`` included.
HARD = 6


def hard_to_end(folder: Path) -> tuple[str, Path]:
    """A command whose processes leave group and session, ignore SIGTERM or are stopped; the file of their pids."""
    file = folder / "pids"
    child = f"echo $$ >> {file}; exec sleep 300"
    stubborn = f'trap "" TERM HUP INT; echo $$ >> {file}; while :; do sleep 300; done'
    cmd = f"""
        echo $$ >> {file}
        sh -c '{child}' &
        setsid sh -c '{child}' &
        (setsid sh -c '{child}' > /dev/null 2>&1 &)
        (setsid sh -c '{stubborn}' &)
        sh -c 'echo $$ >> {file}; kill -STOP $$; sleep 300' &
        trap "" TERM
        while :; do sleep 300; done
    """
    return cmd, file
