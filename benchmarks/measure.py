"""What a row is, and what measures it. A new row is one function under :func:`measures`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.processes import Helper
from benchmarks.server import Server, Target


class Row(NamedTuple):
    """
    A row of the table.

    :ivar name: for the command line.
    :ivar title: for readers.
    :ivar unit: of its values.
    :ivar less: whether less is better.
    """

    name: str
    title: str
    unit: str
    less: bool = False


class Scale(NamedTuple):
    """How much is done in a measurement."""

    seconds: float
    requests: int
    lines: int
    log_lines: int
    replayed: int
    megabytes: int
    file_megabytes: int
    raw_megabytes: int
    proxy_megabytes: int
    processes: int
    followers: int
    connections: int
    full_logs: int
    tree: int


FULL = Scale(
    seconds=0.7,
    requests=300,
    lines=1_000_000,
    log_lines=200_000,
    replayed=10_000,
    megabytes=100,
    file_megabytes=10,
    raw_megabytes=256,
    proxy_megabytes=2_000,
    processes=1_000,
    followers=500,
    connections=1_000,
    full_logs=20,
    tree=10_000,
)

#: Also what warms a server up.
QUICK = Scale(
    seconds=0.2,
    requests=20,
    lines=20_000,
    log_lines=5_000,
    replayed=10_000,
    megabytes=5,
    file_megabytes=1,
    raw_megabytes=8,
    proxy_megabytes=50,
    processes=20,
    followers=10,
    connections=50,
    full_logs=2,
    tree=200,
)


class Trial:
    """
    One measurement of one server.

    :ivar folder: for files; the server can read and write there.
    :ivar limits: a measurement that has its limit from the same server leaves it here.
    :ivar seconds: the time that clocks ran, in all.
    :ivar load_cpu: seconds of processor time that the busiest process of the load side used in it.
    :ivar server_cpu: that the server used in it.
    """

    def __init__(self, target: Target, server: Server, scale: Scale, folder: Path) -> None:
        self.target = target
        self.server = server
        self.scale = scale
        self.folder = folder
        self.limits: Sequence[float] = ()
        self.seconds = self.load_cpu = self.server_cpu = 0.0

    @contextmanager
    def clock(self, *helpers: Helper) -> Iterator[Window]:
        """
        Time what is done in the block.

        :param helpers: processes that belong to the load side.
        """
        window = Window()
        server, load, loads = self.server.cpu(), time.process_time(), [helper.cpu() for helper in helpers]
        began = time.perf_counter()
        yield window
        window.seconds = time.perf_counter() - began
        self.seconds += window.seconds
        used = [helper.cpu() - before for helper, before in zip(helpers, loads, strict=True)]
        self.load_cpu += max(time.process_time() - load, *used, 0.0)
        self.server_cpu += self.server.cpu() - server


class Window:
    """
    A time that was taken.

    :ivar seconds: its length, once it is over.
    """

    seconds = 0.0


Measure = Callable[[Trial], Sequence[float]]
Limit = Callable[[Scale, Path], Sequence[float]]


class Bench(NamedTuple):
    """
    A measurement of one or more rows.

    :ivar measure: returns a value for each row.
    :ivar limit: returns what the machine could do at best, or is None if nothing says so.
    :ivar fresh: whether it is about a server that has done nothing before.
    :ivar most: how often it is repeated, at most, if it takes long.
    """

    rows: Sequence[Row]
    measure: Measure
    limit: Limit | None
    fresh: bool
    most: int | None


#: All of them, in the table's order.
BENCHES: list[Bench] = []


def measures(
    *rows: Row, limit: Limit | None = None, fresh: bool = False, most: int | None = None
) -> Callable[[Measure], Measure]:
    """Make a function that returns a value for each of ``rows`` a part of the benchmark; see :class:`Bench`."""

    def add(measure: Measure) -> Measure:
        BENCHES.append(Bench(rows, measure, limit, fresh, most))
        return measure

    return add
