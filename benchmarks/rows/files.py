"""``/write_file`` and ``/read_file``: many small files, and large ones."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from pathlib import Path
from time import perf_counter

from benchmarks import limits
from benchmarks.buffers import buffers
from benchmarks.client import Connection, Failed, closed_loop
from benchmarks.measure import Row, Scale, Trial, measures
from benchmarks.server import decoded

#: Requests on their way at a time.
AT_ONCE = 8

SMALL = "".join(map(chr, range(97, 123))) * 39 + "0123456789"
assert len(SMALL) == 1024


def large(scale: Scale) -> str:
    """The content of a large file."""
    return "".join([f"{number:099d}\n" for number in range(scale.file_megabytes * 10_000)])


def bare_writes(scale: Scale, folder: Path) -> Sequence[float]:
    """The file system, by itself."""

    def writes(loop: int, loops: int) -> Iterator[None]:
        paths = [folder / f"bare-{number}" for number in range(loop, AT_ONCE, loops)]
        for path in cycle(paths):
            with path.open("wb", 0) as file:
                file.write(SMALL.encode())
            yield

    return [limits.per_second(writes, scale.seconds)]


def bare_reads(scale: Scale, folder: Path) -> Sequence[float]:
    """The file system, by itself."""
    path = folder / "bare"
    path.write_text(SMALL)

    def reads(loop: int, loops: int) -> Iterator[None]:
        while True:
            with path.open("rb", 0) as file:
                file.read()
            yield

    return [limits.per_second(reads, scale.seconds)]


def bare_large_write(scale: Scale, folder: Path) -> Sequence[float]:
    """The file system, by itself."""
    path, content = folder / "bare-large", large(scale).encode()
    began = perf_counter()
    with path.open("wb", 0) as file:
        file.write(content)
    return [len(content) / 1e6 / (perf_counter() - began)]


def bare_large_read(scale: Scale, folder: Path) -> Sequence[float]:
    """The file system, by itself."""
    path, content = folder / "bare-large", large(scale).encode()
    path.write_bytes(content)
    (buffer,) = buffers(1, len(content))
    began = perf_counter()
    with path.open("rb", 0) as file:
        count = file.readinto(memoryview(buffer))
    took = perf_counter() - began
    assert count == len(content)
    return [len(content) / 1e6 / took]


def loop(trial: Trial, requests: list[bytes], right: str) -> float:
    """Requests per second, ``AT_ONCE`` at a time."""
    text = right.encode()
    connections = [trial.server.connect() for _ in requests]
    try:
        with trial.clock():
            rate = closed_loop(connections, requests, trial.scale.seconds, lambda connection: connection.holds(text))
            return rate.per_second
    finally:
        for connection in connections:
            connection.close()


@measures(Row("write-1k", "/write_file, 1 kB, 8 at once", "/s"), limit=bare_writes)
def small_writes(trial: Trial) -> Sequence[float]:
    """Small files, each written over and over."""
    paths = [trial.folder / f"small-{number}" for number in range(AT_ONCE)]
    for path in paths:
        path.unlink(missing_ok=True)
    bodies = [{"path": str(path), "content": SMALL} for path in paths]
    found = loop(trial, [trial.server.request("POST", "/write_file", body) for body in bodies], '"success":true')
    if any(path.read_text() != SMALL for path in paths):
        raise Failed("a file has not what was written")
    return [found]


@measures(Row("read-1k", "/read_file, 1 kB, 8 at once", "/s"), limit=bare_reads)
def small_reads(trial: Trial) -> Sequence[float]:
    """Small files, each read over and over."""
    paths = [trial.folder / f"small-{number}" for number in range(AT_ONCE)]
    for path in paths:
        path.write_text(SMALL)
    requests = [trial.server.request("POST", "/read_file", {"path": str(path)}) for path in paths]
    return [loop(trial, requests, SMALL)]  # not with what is around it: a reply may come in chunks


def timed_calls(trial: Trial, connection: Connection, request: bytes) -> float:
    """The median of a few calls, in seconds."""
    times = []
    for _ in range(5):
        with trial.clock() as window:
            connection.call(request)
        times.append(window.seconds)
    return sorted(times)[2]


@measures(Row("write-10m", "/write_file, 10 MB", "MB/s"), limit=bare_large_write)
def large_write(trial: Trial) -> Sequence[float]:
    """A large file, one at a time."""
    path, content = trial.folder / "large", large(trial.scale)
    path.unlink(missing_ok=True)
    with trial.server.connect() as connection:
        seconds = timed_calls(
            trial, connection, trial.server.request("POST", "/write_file", {"path": str(path), "content": content})
        )
        decoded(connection)
    if path.read_text() != content:
        raise Failed("the file has not what was written")
    return [len(content) / 1e6 / seconds]


@measures(Row("read-10m", "/read_file, 10 MB", "MB/s"), limit=bare_large_read)
def large_read(trial: Trial) -> Sequence[float]:
    """A large file, one at a time."""
    path, content = trial.folder / "large", large(trial.scale)
    path.write_text(content)
    (buffer,) = buffers(1, len(content) * 2)
    with trial.server.connect(buffer) as connection:
        seconds = timed_calls(trial, connection, trial.server.request("POST", "/read_file", {"path": str(path)}))
        if decoded(connection)["content"] != content:
            raise Failed("it has not what is in the file")
    return [len(content) / 1e6 / seconds]
