# ruff: noqa: T201
"""
A soak: thousands of requests of all kinds, many of them broken off, after which the daemon must be as it was before.

``python -m tests.soak`` (or ``make soak``) starts a daemon of its own.
``--health`` measures ``GET /health`` under load.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import multiprocessing
import os
import random
import re
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from multiprocessing.synchronize import Event as EventOfProcesses
from pathlib import Path
from typing import Any, NamedTuple

from tests.daemon import Daemon

#: Requests after which the daemon has all its threads and caches, and is measured for the first time.
WARM_UP = 1000

#: Megabytes by which its memory may have grown in the end.
GROWTH = 32

#: Threads that it may have: its own, two that walk over processes, sixteen for files; each is started when needed.
MAX_THREADS = 20

#: Executions that the daemon remembers: few, so that all that it may keep is there when the warm-up is over.
KEEP = 50

#: Seconds that one operation may take, and that the daemon has to come to rest in the end.
PATIENCE = 60.0
REST = 20.0

#: In the environment of every command, and in the arguments of those that would run for ever.
MARK = f"soak-{os.getpid()}"
FOREVER = f"3155{os.getpid()}"


class Response(NamedTuple):
    """A response with its whole body."""

    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    """A client of the daemon: each request has a connection of its own, which can be broken off at any time."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.sent = 0

    async def open(self, method: str, path: str, body: Any = None) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Send a request. ``body`` is sent as JSON unless it is bytes."""
        self.sent += 1
        reader, writer = await asyncio.open_connection("127.0.0.1", self.daemon.port)
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {self.daemon.secret}\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()
        return reader, writer

    async def call(self, method: str, path: str, body: Any = None) -> Response:
        """Send a request and return its response."""
        reader, writer = await self.open(method, path, body)
        try:
            head, _, rest = (await reader.read(-1)).partition(b"\r\n\r\n")
        finally:
            writer.close()
        status = int(head.split()[1]) if head else 0
        return Response(status, unchunked(rest) if b"chunked" in head else rest)

    async def post(self, route: str, expected: int = 200, **fields: Any) -> Any:
        """The JSON reply to a POST, which must have the status that is expected."""
        response = await self.call("POST", route, fields)
        assert response.status == expected, f"{route}: {response.status} {response.body[:200]!r}"
        return response.json()

    async def broken_off(self, method: str, path: str, body: Any, after: float) -> None:
        """Send a request, and hang up after that many seconds without having read its response."""
        _, writer = await self.open(method, path, body)
        await asyncio.sleep(after)
        writer.transport.abort()


def unchunked(body: bytes) -> bytes:
    """A chunked body's content. Fails if it ends too early."""
    found: list[bytes] = []
    while True:
        size, _, body = body.partition(b"\r\n")
        assert size, "the response broke off"
        if int(size, 16) == 0:
            return b"".join(found)
        found.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]


class Soak:
    """The operations. Each leaves nothing behind."""

    def __init__(self, client: Client, folder: Path, echo_port: int, rng: random.Random) -> None:
        self.client = client
        self.folder = folder
        self.echo_port = echo_port
        self.rng = rng
        self.weights: dict[Callable[[], Awaitable[None]], int] = {
            self.run: 20,
            self.run_much: 4,
            self.run_broken_off: 8,
            self.stream: 8,
            self.stream_broken_off: 8,
            self.start_and_kill: 6,
            self.follow: 6,
            self.files: 6,
            self.bind: 4,
            self.proxy: 6,
            self.bad: 8,
            self.half_a_request: 4,
            self.stdin: 5,
            self.time_out: 2,
        }

    async def one(self) -> None:
        """Any operation."""
        (operation,) = self.rng.choices(list(self.weights), list(self.weights.values()))
        try:
            await asyncio.wait_for(operation(), PATIENCE)
        except Exception as error:
            what = "took too long" if isinstance(error, asyncio.TimeoutError) else repr(error)
            raise AssertionError(f"{operation.__name__}: {what}") from error

    def command(self, cmd: str, **fields: Any) -> dict[str, Any]:
        return {"cmd": cmd, "env": {"SOAK": MARK}, **fields}

    def endless(self) -> str:
        """A command that runs until it is killed, with descendants of several kinds."""
        return self.rng.choice(
            (
                f"sleep {FOREVER}",
                f"sleep {FOREVER} & sleep {FOREVER} & wait",
                f"(setsid sleep {FOREVER} > /dev/null 2>&1 &); sleep {FOREVER}",
                f'trap "" TERM; echo begun; sleep {FOREVER} & wait; sleep {FOREVER}',
                f"while :; do echo line; sleep 0.01 # {MARK}\ndone",
                f"yes {MARK}",
            )
        )

    async def run(self) -> None:
        code = self.rng.choice((0, 0, 0, 3))
        word = self.rng.randbytes(8).hex()
        reply = await self.client.post("/run", **self.command(f"echo {word}; echo {word} >&2; exit {code}"))
        assert (reply["stdout"], reply["stderr"], reply["code"]) == (word + "\n", word + "\n", code), reply

    async def run_much(self) -> None:
        size = self.rng.randrange(1, 2_000_000)
        reply = await self.client.post("/run", **self.command(f"head -c {size} /dev/zero | tr '\\0' x"))
        assert len(reply["stdout"]) == size, f"{len(reply.pop('stdout'))} of {size} bytes: {reply}"

    async def run_broken_off(self) -> None:
        body = self.command(self.endless())
        await self.client.broken_off("POST", "/run", body, self.rng.uniform(0, 0.3))

    async def stream(self) -> None:
        count = self.rng.randrange(1, 3000)
        response = await self.client.call("POST", "/run_streaming", self.command(f"seq 1 {count}; exit 5"))
        assert response.body.count(b"event: output") == count, f"{response.body.count(b'event: output')} of {count}"
        assert response.body.count(b"event: complete") == 1, response.body[-200:]

    async def stream_broken_off(self) -> None:
        reader, writer = await self.client.open("POST", "/run_streaming", self.command(self.endless()))
        with suppress(asyncio.TimeoutError):
            await asyncio.wait_for(reader.read(self.rng.randrange(1, 100_000)), self.rng.uniform(0, 0.3))
        writer.transport.abort()

    async def start_and_kill(self) -> None:
        id = (await self.client.post("/start_process", 201, **self.command(self.endless())))["id"]
        await asyncio.sleep(self.rng.uniform(0, 0.1))
        if self.rng.random() < 0.3:
            await self.client.broken_off("POST", "/kill_process", {"id": id}, self.rng.uniform(0, 0.02))
        fields = self.rng.choice(({}, {"signal": "TERM", "grace": 0.1}))
        response = await self.client.call("POST", "/kill_process", {"id": id, **fields})
        assert response.status in (200, 400), response  # 400: the one that was broken off has done it

    async def follow(self) -> None:
        id = (await self.client.post("/start_process", 201, **self.command("seq 1 500; sleep 0.2; seq 501 1000")))["id"]
        path = f"/process_logs_streaming?id={id}"
        for _ in range(self.rng.randrange(3)):
            await self.client.broken_off("GET", path, None, self.rng.uniform(0, 0.1))
        body = (await self.client.call("GET", path)).body
        assert body.count(b"event: log") == 1000, f"{body.count(b'event: log')} of 1000 lines"

    async def files(self) -> None:
        path = str(self.folder / self.rng.randbytes(8).hex())
        text = "x\u20ac\n" * self.rng.randrange(1, 30_000)
        if self.rng.random() < 0.2:
            await self.client.broken_off("POST", "/write_file", {"path": path, "content": text}, 0.01)
        await self.client.post("/write_file", path=path, content=text)
        assert (await self.client.post("/read_file", path=path))["content"] == text
        assert (await self.client.post("/stat_file", path=path))["entry"]["size"] == len(text.encode())
        await self.client.post("/list_dir", path=str(self.folder))
        await self.client.post("/delete_file", path=path)
        assert "no such file" in (await self.client.post("/read_file", path=path))["error"]

    async def bind(self) -> None:
        path, body = self.rng.choice(
            (
                ("/bind_port", {"port": str(self.echo_port)}),
                ("/bind_port", {"port": 1}),
                ("/unbind_port", {}),
                ("/unbind_port", {"port": self.echo_port}),
            )
        )
        response = await self.client.call("POST", path, body)
        assert response.status in (200, 409), response

    async def proxy(self) -> None:
        """Whatever it is bound to now, the connection comes to an end."""
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.client.daemon.proxy_port)
            self.client.sent += 1
            writer.write(b"p" * self.rng.randrange(1, 200_000))
            if self.rng.random() < 0.5:
                await asyncio.sleep(self.rng.uniform(0, 0.02))
                writer.transport.abort()
                return
            writer.write_eof()
            await reader.read(-1)
            writer.close()

    async def bad(self) -> None:
        method, path, body, status = self.rng.choice(
            (
                ("POST", "/run", b"{not json", 400),
                ("POST", "/run", {"cmd": "true", "cwd": "/no/such/folder"}, 400),
                ("POST", "/kill_process", {"id": "none"}, 400),
                ("POST", "/bind_port", {"port": "abc"}, 400),
                ("GET", "/no-such-route", None, 404),
                ("PUT", "/run", None, 405),
                ("GET", "/processes/none", None, 404),
                ("GET", "/process_logs_streaming?id=none", None, 200),
                ("GET", "/list_processes", None, 200),
            )
        )
        response = await self.client.call(method, path, body)
        assert response.status == status, response

    async def half_a_request(self) -> None:
        self.client.sent += 1
        _, writer = await asyncio.open_connection("127.0.0.1", self.client.daemon.port)
        head = f"POST /run HTTP/1.1\r\nHost: soak\r\nAuthorization: Bearer {self.client.daemon.secret}\r\n"
        request = (head + 'Content-Length: 100000\r\n\r\n{"cmd": "').encode()
        writer.write(request[: self.rng.randrange(len(request))])
        await asyncio.sleep(self.rng.uniform(0, 0.05))
        writer.transport.abort()

    async def stdin(self) -> None:
        started = await self.client.post("/start_process", 201, **self.command("cat", stdin=True))
        path = f"/processes/{started['id']}"
        text = b"line\n" * self.rng.randrange(1, 20_000)
        response = await self.client.call("POST", f"{path}/stdin", text)
        assert response.status == 200, response
        if self.rng.random() < 0.3:
            await self.client.post("/kill_process", id=started["id"])
            return
        await self.client.call("POST", f"{path}/stdin?close=true", b"")
        ended = await self.client.post(f"{path}/wait", timeout=PATIENCE / 2)
        assert (ended["status"], ended["output"]["bytes"]) == ("completed", len(text)), ended

    async def time_out(self) -> None:
        reply = await self.client.post("/run", **self.command(f"sleep {FOREVER} & sleep {FOREVER}", timeout=0.1))
        assert (reply["code"], reply["timed_out"]) == (-1, True), reply


class State(NamedTuple):
    """What a daemon at rest has."""

    descriptors: int
    threads: int
    children: int
    zombies: int
    executions: int
    streams: int
    proxied: int
    marked: int
    megabytes: float


async def state(client: Client) -> State:
    """Measure the daemon."""
    response = await client.call("GET", "/status")
    status = response.json()
    children, marked = [], 0
    for folder in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if folder.name.isdigit():
                rest = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(rest[1]) == client.daemon.pid:
                    children.append(rest[0])
                if folder.name != str(os.getpid()) and rest[0] not in "ZX":
                    text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
                    marked += any(mark.encode() in text for mark in (FOREVER, MARK))
    return State(
        client.daemon.descriptors(),
        len(os.listdir(f"/proc/{client.daemon.pid}/task")),
        len(children),
        children.count("Z"),
        status["executions"],
        status["streams"],
        status["proxy_connections"],
        marked,
        client.daemon.memory() / (1 << 20),
    )


async def at_rest(client: Client, before: State | None = None) -> State:
    """The state once nothing runs any more and nothing is left, or after ``REST`` seconds."""
    deadline = time.monotonic() + REST
    while True:
        await asyncio.sleep(0.5)
        now = await state(client)
        busy = now.executions or now.streams or now.proxied or now.zombies or now.marked
        more = before is not None and now.descriptors > before.descriptors
        if not (busy or more) or time.monotonic() > deadline:
            return now


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A target for the proxy."""
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    writer.close()


async def send(client: Client, folder: Path, port: int, seed: int, count: int, concurrency: int) -> Counter[str]:
    """Send that many requests, so many operations at a time; what went wrong, and how often."""
    end = client.sent + count
    wrong: Counter[str] = Counter()

    async def work(number: int) -> None:
        soak = Soak(client, folder, port, random.Random(seed * 1000 + number))
        while client.sent < end and sum(wrong.values()) < 100:
            try:
                await soak.one()
            except AssertionError as error:
                wrong[str(error)[:300]] += 1

    await asyncio.gather(*map(work, range(concurrency)))
    return wrong


async def soaked(daemon: Daemon, folder: Path, seed: int, requests: int, concurrency: int) -> bool:
    """Soak the daemon, and print how it was before and after; whether all is well."""
    client = Client(daemon)
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    wrong = await send(client, folder, port, seed, WARM_UP, concurrency)
    before = await at_rest(client)
    began = time.monotonic()
    wrong += await send(client, folder, port, seed + 1, requests // 2, concurrency)
    halfway = await at_rest(client, before)
    wrong += await send(client, folder, port, seed + 2, requests - requests // 2, concurrency)
    took = time.monotonic() - began
    after = await at_rest(client, before)
    server.close()
    log = daemon.log.read_text()
    print(f"{requests} requests after {WARM_UP} to warm up, seed {seed}: {requests / took:.0f} a second")
    print(f"{'':20} {'before':>8} {'halfway':>8} {'after':>8}")
    well = True

    def row(name: str, values: Sequence[float], most: float) -> None:
        nonlocal well
        well = well and values[-1] <= most
        cells = " ".join(f"{value:8.4g}" for value in values)
        print(f"{name:20} {cells:>26}{'' if values[-1] <= most else f'  FAIL: at most {most:.4g}'}")

    most = before._replace(
        threads=MAX_THREADS,
        zombies=0,
        executions=0,
        streams=0,
        proxied=0,
        marked=0,
        megabytes=before.megabytes + GROWTH,
    )
    for name, bound in most._asdict().items():
        row(name, [getattr(found, name) for found in (before, halfway, after)], bound)
    row("tracebacks in log", [len(re.findall("Traceback|Unhandled", log))], 0)
    row("wrong replies", [sum(wrong.values())], 0)
    for text, times in wrong.most_common(10):
        print(f"  {times} x {text}")
    if "Traceback" in log:
        print(log[log.index("Traceback") :][:3000])
    return well


def sample(
    port: int, ready: EventOfProcesses, stop: EventOfProcesses, times: multiprocessing.Queue[list[float]]
) -> None:
    """Ask for ``/health`` until told to stop, each time on a new connection. Runs in a process of its own."""
    found: list[float] = []
    ready.set()
    while not stop.is_set() and len(found) < 100_000:
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("GET", "/health")
        connection.getresponse().read()
        connection.close()
        found.append(time.monotonic() - began)
        time.sleep(0.005)
    times.put(found)


async def health(daemon: Daemon, folder: Path) -> None:
    """Print how fast ``/health`` answers while commands start, streams run and a large file is written."""
    client = Client(daemon)
    context = multiprocessing.get_context("spawn")
    ready, stop, times = context.Event(), context.Event(), context.Queue()
    text = "x" * (64 << 20)
    sampler = context.Process(target=sample, args=(daemon.port, ready, stop, times))
    sampler.start()
    ready.wait(PATIENCE)
    began = time.monotonic()
    try:
        await asyncio.wait_for(
            asyncio.gather(
                *(client.call("POST", "/run", {"cmd": "sleep 0.5; seq 1 1000"}) for _ in range(200)),
                *(
                    client.call("POST", "/run_streaming", {"cmd": "for i in $(seq 1 40); do echo $i; sleep 0.05; done"})
                    for _ in range(100)
                ),
                client.post("/write_file", path=str(folder / "large"), content=text),
            ),
            PATIENCE,
        )
    finally:
        stop.set()
    took = time.monotonic() - began
    found = await asyncio.to_thread(times.get, timeout=PATIENCE)
    sampler.join(PATIENCE)
    stall = (await client.call("GET", "/status")).json()["longest_stall"]
    p99 = statistics.quantiles(found, n=100, method="inclusive")[98]
    print(f"GET /health while 200 commands start, 100 streams run and 64 MB are written ({took:.1f} s):")
    print(f"{len(found)} samples, p50 {statistics.median(found) * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms,", end=" ")
    print(f"max {max(found) * 1000:.1f} ms; longest stall {stall * 1000:.1f} ms")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="how many (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="operations at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31), help="default: any, and it is printed")
    parser.add_argument("--health", action="store_true", help="only measure GET /health under load")
    options = parser.parse_args()
    well = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        daemon = Daemon(folder, f"--keep-finished={KEEP}")
        try:
            if options.health:
                asyncio.run(health(daemon, folder))
            else:
                print(f"seed {options.seed}", flush=True)
                well = asyncio.run(soaked(daemon, folder, options.seed, options.requests, options.concurrency))
        finally:
            code = daemon.stop()
    if code != 0:
        print(f"FAIL: the daemon's exit code is {code}")
    return int(not well or code != 0)


if __name__ == "__main__":
    sys.exit(main())
