"""Runs measurements: both servers in turn, then the limit, over and over, and what came of it."""

from __future__ import annotations

import signal
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from benchmarks.client import Failed, NoRoute
from benchmarks.measure import QUICK, Bench, Row, Scale, Trial
from benchmarks.server import Server, Target

#: Seconds that one measurement may take.
BOUND = 120.0


class Sample(NamedTuple):
    """What one measurement has found: a value and a limit (or None) for each row, and what it cost."""

    values: Sequence[float]
    limits: Sequence[float]
    load_cpu: float | None
    server_cpu: float | None
    peak: int | None


@dataclass
class Series:
    """
    The measurements of one server, in order.

    :ivar failed: why there are no more, or None.
    :ivar absent: whether that is because the server has no such route.
    """

    samples: list[Sample] = field(default_factory=list)
    failed: str | None = None
    absent: bool = False


@dataclass
class Result:
    """A row, with what was measured for it: ``[0]`` is the server in question, ``[1]`` its peer if there is one."""

    row: Row
    index: int
    series: list[Series]
    limits: list[Sequence[float]]

    def values(self, which: int) -> list[float]:
        """The values of one server."""
        return [sample.values[self.index] for sample in self.series[which].samples]

    def limit_values(self) -> list[float]:
        """The limits: of the machine, or those that the first server's measurements brought."""
        found = self.limits or [sample.limits for sample in self.series[0].samples if sample.limits]
        return [limit[self.index] for limit in found]

    def limit_ratio(self, which: int = 0) -> float | None:
        """How near a server comes to the limit: 1 is there."""
        own = [sample.limits[self.index] for sample in self.series[which].samples if sample.limits]
        return self._ratio(self.values(which), own or self.limit_values())

    def peer_ratio(self) -> float | None:
        """How many times as good as its peer the server is."""
        return self._ratio(self.values(0), self.values(1)) if len(self.series) > 1 else None

    def _ratio(self, values: Sequence[float], others: Sequence[float]) -> float | None:
        """The median of ratios of what was measured side by side, over 1 where ``values`` are the better ones."""
        if self.row.less:
            values, others = others, values
        found = [value / other for value, other in zip(values, others, strict=False) if other > 0 and value > 0]
        return statistics.median(found) if found else None


def run(
    bench: Bench, targets: Sequence[Target], scale: Scale, repeat: int, folder: Path, say: Callable[[str], None]
) -> list[Result]:
    """Measure the servers and the limit in turn; a server that fails is left out from then on."""
    series = [Series() for _ in targets]
    limits: list[Sequence[float]] = []
    repeat = min(repeat, bench.most or repeat)
    servers: list[Server | None] = [None for _ in targets]
    try:
        for number in range(repeat):
            for which, (target, each) in enumerate(zip(targets, series, strict=True)):
                if each.failed is not None:
                    continue
                say(f"{bench.rows[0].name}: {target.name}, {number + 1} of {repeat}")
                with _failing(each, servers, which):
                    server = servers[which]
                    if server is not None and bench.fresh:
                        server.stop()
                        server = servers[which] = None
                    if server is None:
                        server = servers[which] = target.open(folder)
                        if scale is not QUICK and not bench.fresh:
                            _measure(bench, target, server, QUICK, folder)  # warms up
                    each.samples.append(_measure(bench, target, server, scale, folder))
            if bench.limit is not None:
                limits.append(bench.limit(scale, folder))
    finally:
        for server in servers:
            if server is not None:
                server.stop()
    return [Result(row, index, series, limits) for index, row in enumerate(bench.rows)]


def _measure(bench: Bench, target: Target, server: Server, scale: Scale, folder: Path) -> Sample:
    server.reset_peak()
    trial = Trial(target, server, scale, folder)
    with _bounded(BOUND):
        values = bench.measure(trial)
    timed = trial.seconds
    return Sample(
        values,
        trial.limits,
        trial.load_cpu / timed if timed else None,
        trial.server_cpu / timed if timed and server.pid else None,
        server.memory("VmHWM") if server.pid else None,
    )


@contextmanager
def _failing(series: Series, servers: Sequence[Server | None], which: int) -> Iterator[None]:
    """Note what goes wrong as the reason why a series ends."""
    try:
        yield
    except (Failed, OSError, ValueError, KeyError) as error:
        server = servers[which]
        crash = server.crash() if server is not None else ""
        series.absent = isinstance(error, NoRoute)
        series.failed = crash or (str(error) if isinstance(error, Failed) else f"{type(error).__name__}: {error}")


@contextmanager
def _bounded(seconds: float) -> Iterator[None]:
    """Raise :exc:`Failed` in the block if it takes longer."""

    def expired(signum: int, frame: FrameType | None) -> None:
        raise Failed(f"not done within {seconds:.0f} s")

    signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
