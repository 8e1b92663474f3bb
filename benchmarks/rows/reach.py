"""Reaching in: an attached process, a tunnel, and a server seen through the API."""

from __future__ import annotations

import os
import socket
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from benchmarks import limits
from benchmarks.buffers import buffers
from benchmarks.client import PATIENCE, Address, Failed, NoRoute, request
from benchmarks.measure import Row, Scale, Trial, measures
from benchmarks.processes import Helper
from benchmarks.rows.proxy import MEGABYTE, direct_drain, source

#: A masked binary frame of two bytes, whose mask is zero: the channel of stdin, and a key.
KEY = b"\x82\x82\0\0\0\0\0x"

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@contextmanager
def websocket(trial: Trial, path: str) -> Iterator[socket.socket]:
    """A WebSocket behind its handshake; frames are sent and received as bytes."""
    with socket.create_connection(trial.server.address, PATIENCE) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        upgrade = (
            b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        connection.sendall(trial.server.request("GET", path)[:-2] + upgrade)
        head = b""
        while not head.endswith(b"\r\n\r\n") and (byte := connection.recv(1)):
            head += byte
        if not head.startswith(b"HTTP/1.1 101 "):
            raise NoRoute(f"{path}: {head[:60]!r}")
        yield connection


def echo_time(write: Callable[[], object], read: Callable[[], bytes], count: int) -> float:
    """The median of the milliseconds from a key to its echo."""
    times = []
    for _ in range(count):
        began = perf_counter()
        write()
        if not read().endswith(b"x"):
            raise Failed("something else than the key was echoed")
        times.append(perf_counter() - began)
    return 1000 * statistics.median(times)


def local_echo(scale: Scale, folder: Path) -> Sequence[float]:
    """A pseudo-terminal of this process."""
    ours, theirs = os.openpty()
    try:
        return [echo_time(lambda: os.write(ours, b"x"), lambda: os.read(ours, 100), min(scale.requests, 1000))]
    finally:
        os.close(ours)
        os.close(theirs)


@measures(Row("attach-echo", "attached terminal, key to echo, p50", "ms", less=True), limit=local_echo)
def attach_echo(trial: Trial) -> Sequence[float]:
    """The terminal's own echo of a key."""
    id = trial.server.post("/start_process", cmd="exec sleep 1000", tty=True)["id"]
    try:
        with websocket(trial, f"/processes/{id}/attach") as connection, trial.clock():
            keys = min(trial.scale.requests, 1000)
            return [echo_time(lambda: connection.sendall(KEY), lambda: connection.recv(100), keys)]
    finally:
        trial.server.post("/kill_process", id=id)


def local_output(scale: Scale, folder: Path) -> Sequence[float]:
    """A pipe of this process."""
    size = scale.megabytes * MEGABYTE
    return [size / 1e6 / limits.pipe_seconds(f"head -c {size} /dev/zero", size)]


@measures(Row("attach-bytes", "attached process, its output", "MB/s"), limit=local_output)
def attach_bytes(trial: Trial) -> Sequence[float]:
    """The output of a process that does not wait for its client, without a gap."""
    size = trial.scale.megabytes * MEGABYTE
    command = f"read _; head -c {size} /dev/zero; sleep 1000"
    id = trial.server.post("/start_process", cmd=command, stdin=True)["id"]
    (buffer,) = buffers(1, 1 << 20)
    try:
        with websocket(trial, f"/processes/{id}/attach") as connection, trial.clock():
            connection.sendall(KEY[:-1] + b"\n")
            left, began = size, perf_counter()
            while left > 0 and (count := connection.recv_into(buffer, 1 << 20, socket.MSG_TRUNC)):
                left -= count  # frames' own bytes are one in ten thousand
            took = perf_counter() - began
    finally:
        trial.server.post("/kill_process", id=id)
    if left > 0:
        raise Failed(f"{size - left} bytes of {size} came")
    return [size / 1e6 / took]


@measures(Row("tunnel-bytes", "tunnel through a WebSocket", "Gb/s"), limit=direct_drain)
def tunnel(trial: Trial) -> Sequence[float]:
    """Bytes at full speed, from the target to the client."""
    size = trial.scale.proxy_megabytes * MEGABYTE // 4
    (buffer,) = buffers(1, 1 << 20)
    with source(size) as (target, helper), websocket(trial, f"/ports/{target[1]}/connect") as connection:
        left = size
        with trial.clock(helper):
            began = perf_counter()
            while left > 0 and (count := connection.recv_into(buffer, 1 << 20, socket.MSG_TRUNC)):
                left -= count
            took = perf_counter() - began
    if left > 0:
        raise Failed(f"{size - left} bytes of {size} came")
    return [size * 8 / 1e9 / took]


def answers(address: Address, data: bytes, seconds: float) -> float:
    """Requests per second on one connection, one at a time."""
    count = 0
    with socket.create_connection(address, PATIENCE) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        began = perf_counter()
        while perf_counter() - began < seconds:
            connection.sendall(data)
            received = b""
            while not received.endswith(b"ok"):
                piece = connection.recv(4096)
                if not piece or b" 404 " in piece[:20]:
                    raise NoRoute(f"{piece[:60]!r}")
                received += piece
            count += 1
        return count / (perf_counter() - began)


@contextmanager
def small_server() -> Iterator[tuple[Address, Helper]]:
    """A server that gives one small answer to whatever comes."""
    listener, address = limits.listen()
    with listener, Helper(lambda: limits.serve(listener, lambda data: ANSWER)) as helper:
        yield address, helper


def direct_answers(scale: Scale, folder: Path) -> Sequence[float]:
    """No server in between, and one connection."""
    with small_server() as (address, _):
        return [answers(address, request("GET", "/", ""), scale.seconds)]


@measures(Row("preview", "preview of a server, small requests", "1/s"), limit=direct_answers)
def preview(trial: Trial) -> Sequence[float]:
    """Small requests one at a time, each with a connection of its own to the server of the sandbox."""
    with small_server() as (address, helper), trial.clock(helper):
        data = trial.server.request("GET", f"/proxy/{address[1]}/")
        return [answers(trial.server.address, data, trial.scale.seconds)]


@measures(Row("preview-bytes", "preview of a server, one long answer", "Gb/s"), limit=direct_drain)
def preview_bytes(trial: Trial) -> Sequence[float]:
    """A download at full speed, from a server of the sandbox to the client."""
    size = trial.scale.proxy_megabytes * MEGABYTE
    (buffer,) = buffers(1, 1 << 20)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
    with (
        source(size, answer) as (target, helper),
        socket.create_connection(trial.server.address, PATIENCE) as connection,
        trial.clock(helper),
    ):
        began = perf_counter()
        connection.sendall(trial.server.request("GET", f"/proxy/{target[1]}/"))
        head = b""
        while not head.endswith(b"\r\n\r\n") and (byte := connection.recv(1)):
            head += byte
        if not head.startswith(b"HTTP/1.1 200 "):
            raise NoRoute(f"{head[:60]!r}")
        left = size
        while left > 0 and (count := connection.recv_into(buffer, 1 << 20, socket.MSG_TRUNC)):
            left -= count
        took = perf_counter() - began
    if left > 0:
        raise Failed(f"{size - left} bytes of {size} came")
    return [size * 8 / 1e9 / took]
