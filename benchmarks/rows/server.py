"""The server itself: health, memory, start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from benchmarks import limits
from benchmarks.client import Connection, closed_loop, one_by_one, request
from benchmarks.measure import Row, Scale, Trial, measures
from benchmarks.processes import Helper

#: Requests on their way at a time.
AT_ONCE = 8

#: Requests for each that the rows of other routes send.
HEALTHS = 10

#: Bytes of a line in a full log, its line end included.
WIDTH = 100

LOG = 10_000


def is_ok(connection: Connection) -> bool:
    """Whether a reply says that all is well."""
    return connection.holds(b'"status":"ok"')


def healthy(connections: list[Connection], data: bytes, seconds: float) -> float:
    """Replies per second to ``GET /health``."""
    try:
        return closed_loop(connections, [data] * len(connections), seconds, is_ok).per_second
    finally:
        for connection in connections:
            connection.close()


@contextmanager
def bare_server() -> Iterator[tuple[str, int]]:
    """A loop that sends the same bytes whatever it is asked: also the most that the load side can do; its address."""
    body = b'{"status":"ok"}'
    reply = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    listener, address = limits.listen()
    with listener, Helper(lambda: limits.serve(listener, lambda _: reply)):
        yield address


def bare_health(scale: Scale, folder: Path) -> Sequence[float]:
    """Replies per second of :func:`bare_server`."""
    with bare_server() as address:
        connections = [Connection(address) for _ in range(AT_ONCE)]
        return [healthy(connections, request("GET", "/health", "none"), scale.seconds)]


@measures(Row("health", "/health, 8 at once", "/s"), limit=bare_health)
def health(trial: Trial) -> Sequence[float]:
    """The cheapest request."""
    connections = [trial.server.connect() for _ in range(AT_ONCE)]
    with trial.clock():
        return [healthy(connections, trial.server.request("GET", "/health"), trial.scale.seconds)]


def bare_latency(scale: Scale, folder: Path) -> Sequence[float]:
    """p50 and p99 of :func:`bare_server`."""
    with bare_server() as address, Connection(address) as connection:
        return one_by_one(connection, request("GET", "/health", "none"), HEALTHS * scale.requests, is_ok)


@measures(
    Row("health-p50", "/health, one at a time, p50", "ms", less=True),
    Row("health-p99", "/health, one at a time, p99", "ms", less=True),
    limit=bare_latency,
)
def health_latency(trial: Trial) -> Sequence[float]:
    """The same, one after the other."""
    with trial.server.connect() as connection, trial.clock():
        data = trial.server.request("GET", "/health")
        return one_by_one(connection, data, HEALTHS * trial.scale.requests, is_ok)


@measures(Row("memory-idle", "memory, idle", "MB", less=True), fresh=True)
def idle_memory(trial: Trial) -> Sequence[float]:
    """What is resident when nothing runs."""
    return [trial.server.memory() / 1e6]


@measures(
    Row("memory-process", "memory, process with a full log of 1 MB", "kB", less=True),
    limit=lambda scale, folder: [LOG * WIDTH / 1e3],
    fresh=True,
)
def process_memory(trial: Trial) -> Sequence[float]:
    """Background processes that have written 10,000 lines each and live on. The limit is the text itself."""
    done = trial.folder / f"full-{os.urandom(4).hex()}"
    os.mkfifo(done)
    opened = os.open(done, os.O_RDWR)
    command = f"seq -f %0{WIDTH - 1}.0f 1 {LOG}; echo > {done}; exec sleep 1000"
    ids: list[str] = []

    def fill(count: int) -> None:
        for _ in range(count):
            ids.append(trial.server.post("/start_process", cmd=command)["id"])
            os.read(opened, 1)

    try:
        fill(1)
        before = _settled(trial)
        fill(trial.scale.full_logs)
        grown = _settled(trial) - before
        for id in ids:  # they are as full as they should be
            with trial.server.connect() as stream:
                stream.send(trial.server.request("GET", f"/process_logs_streaming?id={id}"))
                for number in (1, LOG):
                    stream.wait_for(b"%0*d" % (WIDTH - 1, number))
        return [grown / trial.scale.full_logs / 1e3]
    finally:
        os.close(opened)
        for id in ids:
            trial.server.post("/kill_process", id=id)


def _settled(trial: Trial) -> int:
    """The memory that is resident once it has not changed for a while; nobody tells when all is read."""
    last, still = 0, 0
    for _ in range(100):
        now = trial.server.memory()
        still = still + 1 if abs(now - last) < 50_000 else 0
        if still == 5:
            break
        last = now
        time.sleep(0.1)
    return now


def interpreter(scale: Scale, folder: Path) -> Sequence[float]:
    """The start of a Python that does nothing."""
    began = perf_counter()
    subprocess.run([sys.executable, "-c", ""], check=True)
    return [(perf_counter() - began) * 1000]


@measures(Row("start", "start to first answer (limit: python itself)", "ms", less=True), limit=interpreter, fresh=True)
def start(trial: Trial) -> Sequence[float]:
    """One more server, from nothing to its first answer."""
    server = trial.target.start(trial.folder)
    server.stop()
    return [server.seconds * 1000]
