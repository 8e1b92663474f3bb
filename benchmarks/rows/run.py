"""``/run``: one at a time and many at once, alone and beside a thousand processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

from benchmarks import limits
from benchmarks.client import Connection, closed_loop, one_by_one, percentiles
from benchmarks.measure import Row, Scale, Trial, measures
from benchmarks.rows.crowd import crowd

COMMAND = "echo hello"


def right(connection: Connection) -> bool:
    """Whether a reply is that of ``COMMAND``."""
    return (
        connection.status == 200
        and connection.holds(b'"stdout":"hello\\n"')
        and connection.holds(b'"stderr":""')
        and connection.holds(b'"code":0')
    )


def latency(trial: Trial) -> tuple[float, float]:
    """p50 and p99 of commands that are sent one at a time."""
    request = trial.server.request("POST", "/run", {"cmd": COMMAND})
    with trial.server.connect() as connection:
        connection.call(request)
        with trial.clock():
            return one_by_one(connection, request, trial.scale.requests, right)


def rate(trial: Trial, at_once: int) -> float:
    """Commands per second, with so many on their way."""
    requests = [trial.server.request("POST", "/run", {"cmd": COMMAND})] * at_once
    connections = [trial.server.connect() for _ in range(at_once)]
    try:
        with trial.clock():
            return closed_loop(connections, requests, trial.scale.seconds, right).per_second
    finally:
        for connection in connections:
            connection.close()


def spawn_latency(scale: Scale, folder: Path) -> Sequence[float]:
    """p50 and p99 of a bare spawn."""
    times = []
    for _ in range(scale.requests):
        began = perf_counter()
        limits.finish(*limits.spawn(COMMAND))
        times.append(perf_counter() - began)
    return percentiles(times)


@measures(
    Row("run-p50", "/run, one at a time, p50", "ms", less=True),
    Row("run-p99", "/run, one at a time, p99", "ms", less=True),
    limit=spawn_latency,
)
def one_at_a_time(trial: Trial) -> Sequence[float]:
    """Commands one after the other."""
    return latency(trial)


@measures(
    Row("run-8", "/run, 8 at once", "/s"),
    limit=lambda scale, folder: [limits.spawns_per_second(COMMAND, 8, scale.seconds)],
)
def eight_at_once(trial: Trial) -> Sequence[float]:
    """Eight commands at a time."""
    return [rate(trial, 8)]


@measures(
    Row("run-32", "/run, 32 at once", "/s"),
    limit=lambda scale, folder: [limits.spawns_per_second(COMMAND, 32, scale.seconds)],
)
def thirty_two_at_once(trial: Trial) -> Sequence[float]:
    """Thirty-two commands at a time."""
    return [rate(trial, 32)]


@measures(
    Row("run-p50-crowded", "  beside 1,000 processes, 500 followers (limit: none), p50", "ms", less=True),
    Row("run-p99-crowded", "  the same, p99", "ms", less=True),
    Row("run-8-crowded", "  the same, 8 at once", "/s"),
    Row("run-32-crowded", "  the same, 32 at once", "/s"),
    most=3,
)
def crowded(trial: Trial) -> Sequence[float]:
    """All of these beside a crowd. The limit is what the same server does without it, just before."""

    def all_four() -> Sequence[float]:
        return [*latency(trial), rate(trial, 8), rate(trial, 32)]

    trial.limits = all_four()
    with crowd(trial.server, trial.scale.processes, trial.scale.followers):
        return all_four()
