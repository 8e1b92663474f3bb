"""``/process_logs_streaming``: live to many followers, and the history again."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from benchmarks import limits
from benchmarks.buffers import buffers
from benchmarks.client import PATIENCE, Connection, receive_all
from benchmarks.events import check, lost_lines
from benchmarks.measure import Row, Scale, Trial, measures
from benchmarks.processes import Helper
from benchmarks.rows.streaming import FRAME, numbers


def live(trial: Trial, followers: int) -> Sequence[float]:
    """Lines per second that reach all followers together, and how many of all did not reach one."""
    count = trial.scale.log_lines
    gate = trial.folder / f"gate-{os.urandom(4).hex()}"
    os.mkfifo(gate)
    expected = b"ready\n" + numbers(count)
    space = buffers(followers, len(expected) + count * FRAME + (1 << 16))
    with ExitStack() as stack:
        opened = os.open(gate, os.O_RDWR)
        stack.callback(os.close, opened)
        command = f"echo ready; read _ < {gate}; exec seq 1 {count}"
        id = trial.server.post("/start_process", cmd=command)["id"]
        request = trial.server.request("GET", f"/process_logs_streaming?id={id}")
        streams = [stack.enter_context(trial.server.connect(buffer)) for buffer in space]
        for stream in streams:
            stream.send(request)
        for stream in streams:
            stream.wait_for(b'"ready"')
        with trial.clock() as window:
            os.write(opened, b"\n")
            receive_all(streams)
        lost = _lost(streams, expected)
    return [(count * followers - lost) / window.seconds, lost]


def _lost(streams: Sequence[Connection], expected: bytes) -> int:
    """How many lines all streams together have lost; streams that are the same are looked into once."""
    found: dict[bytes, int] = {}
    total = 0
    for stream in streams:
        body = stream.body()
        if body not in found:
            found = {body: lost_lines(body.replace(b'"ready"', b'"0"', 1), expected.replace(b"ready", b"0", 1))}
        total += found[body]
    return total


def bare(followers: int) -> Callable[[Scale, Path], Sequence[float]]:
    """The limit: the same lines, sent as they are by a bare loop."""

    def limit(scale: Scale, folder: Path) -> Sequence[float]:
        count = scale.log_lines
        took = limits.fan_out_seconds(f"seq 1 {count}", len(numbers(count)), followers)
        return [count * followers / took, 0]

    return limit


@measures(
    Row("logs-1", "live log, 200,000 lines to 1 follower", "lines/s"),
    Row("logs-1-lost", "  lines lost", "lines", less=True),
    limit=bare(1),
)
def one_follower(trial: Trial) -> Sequence[float]:
    """A live log with one follower."""
    return live(trial, 1)


@measures(
    Row("logs-10", "live log to 10 followers, all together", "lines/s"),
    Row("logs-10-lost", "  lines lost", "lines", less=True),
    limit=bare(10),
)
def ten_followers(trial: Trial) -> Sequence[float]:
    """A live log with ten followers."""
    return live(trial, 10)


@measures(
    Row("logs-50", "live log to 50 followers, all together", "lines/s"),
    Row("logs-50-lost", "  lines lost", "lines", less=True),
    limit=bare(50),
)
def fifty_followers(trial: Trial) -> Sequence[float]:
    """A live log with fifty followers."""
    return live(trial, 50)


def replay_limit(scale: Scale, folder: Path) -> Sequence[float]:
    """The same bytes, events and all, over a bare connection."""
    payload = b"x" * (scale.replayed * FRAME)
    (buffer,) = buffers(1, len(payload))
    listener, address = limits.listen()
    times = []
    with (
        listener,
        Helper(lambda: limits.serve(listener, lambda _: payload)),
        socket.create_connection(address, PATIENCE) as connection,
    ):
        for _ in range(3):
            began, end = perf_counter(), 0
            connection.sendall(b"go")
            while end < len(payload):
                end += connection.recv_into(memoryview(buffer)[end:])
            times.append(perf_counter() - began)
    return [min(times) * 1000]


@measures(Row("replay", "replay of a log of 10,000 lines", "ms", less=True), limit=replay_limit)
def replay(trial: Trial) -> Sequence[float]:
    """The whole log of a process that has ended."""
    count = trial.scale.replayed
    done = trial.folder / f"done-{os.urandom(4).hex()}"
    os.mkfifo(done)
    id = trial.server.post("/start_process", cmd=f"seq 1 {count}; echo > {done}")["id"]
    with done.open("rb") as fifo:
        fifo.read()
    request = trial.server.request("GET", f"/process_logs_streaming?id={id}")
    times = []
    (buffer,) = buffers(1, count * FRAME * 2)
    with trial.server.connect(buffer) as connection:
        connection.call(request)  # it may still have been running
    for _ in range(5):
        with trial.server.connect(buffer) as connection:
            with trial.clock() as window:
                connection.call(request)
            times.append(window.seconds)
            check(connection.body(), numbers(count))
    return [sorted(times)[2] * 1000]
