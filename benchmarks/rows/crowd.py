"""Background processes that do nothing, and followers of their logs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from benchmarks.client import Connection, Failed
from benchmarks.server import Server, decoded


@contextmanager
def crowd(server: Server, processes: int, followers: int) -> Iterator[None]:
    """So many live processes, and so many open streams of their logs, while the block runs."""
    ids: list[str] = []
    streams: list[Connection] = []
    start = server.request("POST", "/start_process", {"cmd": "echo ready; exec sleep 1000"})
    with server.connect() as connection:
        try:
            for _ in range(processes):
                connection.call(start)
                ids.append(decoded(connection)["id"])
            for number in range(followers):
                stream = server.connect(bytearray(4096))
                streams.append(stream)
                stream.send(server.request("GET", f"/process_logs_streaming?id={ids[number % len(ids)]}"))
            for stream in streams:
                stream.wait_for(b'"ready"')
            yield
        finally:
            for id in ids:
                connection.call(server.request("POST", "/kill_process", {"id": id}))
            for stream in streams:
                stream.close()
        if connection.status != 200:
            raise Failed(f"a process was not killed: {connection.body()!r}")
