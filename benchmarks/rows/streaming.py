"""``/run_streaming``: lines and bytes at full speed, and how soon the first comes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from time import perf_counter

from benchmarks import limits
from benchmarks.buffers import buffers
from benchmarks.events import check
from benchmarks.measure import Row, Scale, Trial, measures

#: Bytes of an event beside its text, at most.
FRAME = 130

#: Writes a line, and lives on for a while.
FIRST = "echo first; exec sleep 0.02"


@cache
def numbers(count: int) -> bytes:
    """What ``seq 1 count`` writes."""
    return b"".join([b"%d\n" % number for number in range(1, count + 1)])


def streamed(trial: Trial, command: str, expected: bytes, lines: int) -> float:
    """Seconds until the whole output of a command has come as events; checked when they all have."""
    request = trial.server.request("POST", "/run_streaming", {"cmd": command})
    (buffer,) = buffers(1, len(expected) + lines * FRAME + (1 << 20))
    with trial.server.connect(buffer) as connection:
        with trial.clock() as window:
            connection.call(request)
        check(connection.body(), expected)
    return window.seconds


@cache
def wide(scale: Scale, folder: Path) -> tuple[Path, bytes]:
    """A file of lines of 1,000 bytes, each different, and its content."""
    content = b"".join([b"%0999d\n" % (number * 7919) for number in range(scale.megabytes * 1000)])
    path = folder / f"wide-{scale.megabytes}"
    path.write_bytes(content)
    return path, content


@cache
def long(scale: Scale, folder: Path) -> tuple[Path, bytes]:
    """A file that is one line, and its content."""
    content = b"".join([b"%099d" % (number * 104729) for number in range(scale.megabytes * 1_000_000 // 99)]) + b"\n"
    path = folder / f"long-{scale.megabytes}"
    path.write_bytes(content)
    return path, content


def seq_limit(scale: Scale, folder: Path) -> Sequence[float]:
    """The same command into a pipe."""
    return [scale.lines / limits.pipe_seconds(f"seq 1 {scale.lines}", len(numbers(scale.lines)))]


def wide_limit(scale: Scale, folder: Path) -> Sequence[float]:
    """The same command into a pipe."""
    path, content = wide(scale, folder)
    return [len(content) / 1e6 / limits.pipe_seconds(f"cat {path}", len(content))]


def long_limit(scale: Scale, folder: Path) -> Sequence[float]:
    """The same command into a pipe."""
    path, content = long(scale, folder)
    return [len(content) / 1e6 / limits.pipe_seconds(f"cat {path}", len(content))]


@measures(Row("stream-lines", "/run_streaming, seq 1 1000000", "lines/s"), limit=seq_limit)
def lines(trial: Trial) -> Sequence[float]:
    """Short lines."""
    count = trial.scale.lines
    return [count / streamed(trial, f"seq 1 {count}", numbers(count), count)]


@measures(Row("stream-1k", "/run_streaming, lines of 1,000 bytes", "MB/s"), limit=wide_limit)
def wide_lines(trial: Trial) -> Sequence[float]:
    """Lines of 1,000 bytes."""
    path, content = wide(trial.scale, trial.folder)
    return [len(content) / 1e6 / streamed(trial, f"cat {path}", content, trial.scale.megabytes * 1000)]


@measures(Row("stream-100m", "/run_streaming, one line of 100 MB", "MB/s"), limit=long_limit)
def long_line(trial: Trial) -> Sequence[float]:
    """One line."""
    path, content = long(trial.scale, trial.folder)
    return [len(content) / 1e6 / streamed(trial, f"cat {path}", content, trial.scale.megabytes * 100)]


def first_limit(scale: Scale, folder: Path) -> Sequence[float]:
    """A bare spawn, until its first bytes are read."""
    times = []
    for _ in range(scale.requests // 5):
        began = perf_counter()
        pid, out = limits.spawn(FIRST)
        head = os.read(out, 100)
        times.append(perf_counter() - began)
        assert head == b"first\n"
        limits.finish(pid, out)
    return [sorted(times)[len(times) // 2] * 1000]


@measures(Row("first-event", "/run_streaming, first event, p50", "ms", less=True), limit=first_limit)
def first_event(trial: Trial) -> Sequence[float]:
    """From the request to the first event, on a connection that is open."""
    request = trial.server.request("POST", "/run_streaming", {"cmd": FIRST})
    times = []
    with trial.server.connect() as connection:
        for _ in range(trial.scale.requests // 5):
            with trial.clock():
                began = perf_counter()
                connection.send(request)
                connection.wait_for(b'"first"')
                times.append(perf_counter() - began)
            connection.wait_for(b"event: complete\n")
            connection.finish()
    return [sorted(times)[len(times) // 2] * 1000]
