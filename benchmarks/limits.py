"""What the machine can do with no server in between: the values that rows are held against."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import subprocess
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from time import perf_counter

from benchmarks.buffers import buffers
from benchmarks.client import PATIENCE, Address, Failed
from benchmarks.processes import Helper

#: Bytes of the pipes that commands write to when nothing else reads them.
PIPE = 1 << 20


def spawn(command: str) -> tuple[int, int]:
    """Start ``sh -c`` with stdout in a pipe, as cheaply as the system can; its pid, and the pipe's end to read."""
    out, into = os.pipe()
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, into, 1),
        (os.POSIX_SPAWN_DUP2, into, 2),
    ]
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", command], os.environ, file_actions=actions)
    os.close(into)
    return pid, out


def finish(pid: int, out: int) -> bytes:
    """All that a spawned command writes, once it has ended."""
    pieces = []
    while data := os.read(out, 1 << 16):
        pieces.append(data)
    os.close(out)
    os.waitpid(pid, 0)
    return b"".join(pieces)


def spawns_per_second(command: str, at_once: int, seconds: float) -> float:
    """Commands that bare loops can run, one loop on each processor, so many at a time in all."""

    def spawns(loop: int, loops: int) -> Iterator[None]:
        running = deque(spawn(command) for _ in range(at_once // loops))
        while True:
            finish(*running.popleft())
            running.append(spawn(command))
            yield

    return per_second(spawns, seconds)


def per_second(work: Callable[[int, int], Iterator[None]], seconds: float) -> float:
    """
    What bare loops can do, one on each processor.

    :param work: called with a loop's number and their count; does one thing at each step.
    """
    loops = os.cpu_count() or 1
    results, into = os.pipe()

    def loop(number: int) -> None:
        steps = work(number, loops)
        count, began = 0, perf_counter()
        while perf_counter() - began < seconds:
            next(steps)
            count += 1
        os.write(into, struct.pack("d", count / (perf_counter() - began)))

    helpers = [Helper(partial(loop, number)) for number in range(loops)]
    try:
        return sum(float(struct.unpack("d", _read(results, 8))[0]) for _ in helpers)
    finally:
        for helper in helpers:
            helper.__exit__()
        os.close(results)
        os.close(into)


def pipe_seconds(command: str, size: int) -> float:
    """How long ``sh -c`` takes until all of its ``size`` bytes have come through a large pipe."""
    (buffer,) = buffers(1, size + 1)
    view = memoryview(buffer)
    began = perf_counter()
    process = subprocess.Popen(["/bin/sh", "-c", command], stdout=subprocess.PIPE, bufsize=0)
    assert process.stdout is not None
    fcntl.fcntl(process.stdout.fileno(), fcntl.F_SETPIPE_SZ, PIPE)
    end = 0
    while count := process.stdout.readinto(view[end:]):
        end += count
    took = perf_counter() - began
    process.stdout.close()
    process.wait()
    if end != size:
        raise Failed(f"{end} bytes instead of {size}: {command}")
    return took


def fan_out_seconds(command: str, size: int, readers: int) -> float:
    """How long a bare loop takes to send what ``sh -c`` writes to so many plain sockets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def loop() -> None:
            sockets = [listener.accept()[0] for _ in range(readers)]
            pid, out = spawn(command)
            while data := os.read(out, 1 << 18):
                for each in sockets:
                    each.sendall(data)
            os.waitpid(pid, 0)

        with Helper(loop):
            sockets = [socket.create_connection(listener.getsockname(), PATIENCE) for _ in range(readers)]
            space = buffers(readers, size + 1)
            ends = dict.fromkeys(range(readers), 0)
            poll = select.epoll()
            for each in sockets:
                poll.register(each.fileno(), select.EPOLLIN)
            numbers = {each.fileno(): number for number, each in enumerate(sockets)}
            began = perf_counter()
            while any(end < size for end in ends.values()):
                for fd, _ in poll.poll(PATIENCE):
                    number = numbers[fd]
                    count = sockets[number].recv_into(memoryview(space[number])[ends[number] :])
                    if not count:
                        poll.unregister(fd)
                    ends[number] += count
            took = perf_counter() - began
            for each in sockets:
                each.close()
            return took


def serve(listener: socket.socket, answer: Callable[[bytes], bytes]) -> None:
    """Answer whatever arrives on any connection, for ever: a bare server with one loop. For a :class:`Helper`."""
    poll = select.epoll()
    listener.setblocking(False)
    poll.register(listener.fileno(), select.EPOLLIN)
    sockets: dict[int, socket.socket] = {}
    while True:
        for fd, _ in poll.poll():
            if fd == listener.fileno():
                try:
                    accepted, _ = listener.accept()
                except BlockingIOError:
                    continue
                sockets[accepted.fileno()] = accepted
                poll.register(accepted.fileno(), select.EPOLLIN)
                continue
            try:
                data = sockets[fd].recv(1 << 16)
                if data:
                    sockets[fd].sendall(answer(data))
                    continue
            except ConnectionError:
                pass
            poll.unregister(fd)
            sockets.pop(fd).close()


def listen() -> tuple[socket.socket, Address]:
    """A listening socket on the loopback interface, and its address."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    return listener, listener.getsockname()


def _read(fd: int, count: int) -> bytes:
    if not select.select([fd], [], [], PATIENCE)[0]:
        raise Failed("a loop of the load side did not end")
    return os.read(fd, count)
