"""The TCP proxy: bytes, connections, and what an idle one costs."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter

from benchmarks import limits
from benchmarks.buffers import buffers
from benchmarks.client import PATIENCE, Address, Failed
from benchmarks.measure import Row, Scale, Trial, measures
from benchmarks.processes import Helper

MEGABYTE = 1_000_000

#: Connections that are being made or echoed at a time.
AT_ONCE = 8

PATTERN = bytes(range(256)) * 4096


@contextmanager
def source(size: int, head: bytes = b"") -> Iterator[tuple[Address, Helper]]:
    """A target that sends so many bytes on each connection and closes it; behind a head, once a request has come."""
    listener, address = limits.listen()

    def work() -> None:
        while True:
            accepted, _ = listener.accept()
            with accepted:
                if head:
                    accepted.recv(1 << 16)
                    accepted.sendall(head)
                left = size
                while left:
                    left -= accepted.send(memoryview(PATTERN)[:left])

    with listener, Helper(work) as helper:
        yield address, helper


@contextmanager
def echo() -> Iterator[tuple[Address, Helper]]:
    """A target that sends back what it gets."""
    listener, address = limits.listen()
    with listener, Helper(lambda: limits.serve(listener, lambda data: data)) as helper:
        yield address, helper


@contextmanager
def bound(trial: Trial, target: Address) -> Iterator[Address]:
    """The proxy's address, while it forwards to ``target``."""
    trial.server.post("/unbind_port")
    trial.server.post("/bind_port", port=str(target[1]))
    try:
        yield trial.server.proxy
    finally:
        trial.server.post("/unbind_port")


def drain(address: Address, size: int) -> float:
    """
    Gigabits per second that come over one connection.

    The kernel drops the bytes that this side has counted, where copying them would make it the slower one; see
    MSG_TRUNC in tcp(7).
    """
    (buffer,) = buffers(1, 1 << 20)
    with socket.create_connection(address, PATIENCE) as connection:
        left, began = size, perf_counter()
        while count := connection.recv_into(buffer, 1 << 20, socket.MSG_TRUNC):
            left -= count
        took = perf_counter() - began
    if left:
        raise Failed(f"{size - left} bytes of {size} came")
    return size * 8 / 1e9 / took


def check(address: Address, size: int) -> None:
    """See that a source's bytes come as they were sent."""
    with socket.create_connection(address, PATIENCE) as connection:
        pieces = []
        while data := connection.recv(1 << 20):
            pieces.append(data)
    received = b"".join(pieces)
    whole, rest = divmod(size, len(PATTERN))
    if received != PATTERN * whole + PATTERN[:rest]:
        raise Failed(f"bytes differ: {len(received)} of {size} came")


def direct_drain(scale: Scale, folder: Path) -> Sequence[float]:
    """No proxy."""
    size = scale.proxy_megabytes * MEGABYTE
    with source(size) as (address, _):
        return [drain(address, size)]


@measures(Row("proxy-bytes", "proxy, one connection", "Gb/s"), limit=direct_drain)
def throughput(trial: Trial) -> Sequence[float]:
    """Bytes at full speed, from the target to the client."""
    small = 10 * MEGABYTE
    with source(small) as (target, _), bound(trial, target) as proxy:
        check(proxy, small)
    size = trial.scale.proxy_megabytes * MEGABYTE
    with source(size) as (target, helper), bound(trial, target) as proxy, trial.clock(helper):
        return [drain(proxy, size)]


def echoes(address: Address, seconds: float) -> float:
    """Connections per second that are made, have 64 bytes echoed, and are closed."""
    message = PATTERN[:64]
    poll = select.epoll()
    waiting: dict[int, socket.socket] = {}

    def connect() -> None:
        connection = socket.create_connection(address, PATIENCE)
        connection.sendall(message)
        waiting[connection.fileno()] = connection
        poll.register(connection.fileno(), select.EPOLLIN)

    for _ in range(AT_ONCE):
        connect()
    count, began = 0, perf_counter()
    while waiting:
        ready = poll.poll(PATIENCE)
        if not ready:
            raise Failed(f"no echo within {PATIENCE:.0f} s")
        for fd, _ in ready:
            with waiting.pop(fd) as connection:
                data = connection.recv(1 << 16)
                if data != message:
                    raise Failed(f"{len(data)} bytes of 64 were echoed")
            count += 1
            if perf_counter() - began < seconds:
                connect()
    poll.close()
    return count / (perf_counter() - began)


def direct_echoes(scale: Scale, folder: Path) -> Sequence[float]:
    """No proxy."""
    with echo() as (address, _):
        return [echoes(address, scale.seconds)]


@measures(Row("proxy-echo", "proxy, connect and echo, 8 at once", "/s"), limit=direct_echoes)
def connect_and_echo(trial: Trial) -> Sequence[float]:
    """Short connections."""
    with echo() as (target, helper), bound(trial, target) as proxy, trial.clock(helper):
        return [echoes(proxy, trial.scale.seconds)]


@measures(Row("proxy-idle", "proxy, memory of an idle connection", "kB", less=True), fresh=True)
def idle(trial: Trial) -> Sequence[float]:
    """Connections that have been used once and wait."""
    with echo() as (target, _), bound(trial, target) as proxy, ExitStack() as stack:

        def call() -> None:
            connection = stack.enter_context(socket.create_connection(proxy, PATIENCE))
            connection.sendall(b"x")
            if connection.recv(1) != b"x":
                raise Failed("no echo")

        for _ in range(5):
            call()
        before = trial.server.memory()
        for _ in range(trial.scale.connections):
            call()
        return [(trial.server.memory() - before) / trial.scale.connections / 1e3]
