# ruff: noqa: T201
"""
A soak: thousands of requests of all kinds, many of them broken off, after which the daemon must be as it was before.

``python -m tests.soak`` (or ``make soak``) starts a daemon of its own.
``--faults`` injects faults meanwhile; then every reply must be right, or an error that says what was short.
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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from multiprocessing.synchronize import Event as EventOfProcesses
from pathlib import Path
from typing import Any, NamedTuple

from sandboxd.processes.spawn_client import SPAWN_SERVERS
from sandboxd.proxy.splicing import POOLED
from tests.clock_shift import ClockShift
from tests.daemon import Daemon
from tests.soak_faults import MAX_PROCESSES, Faults

#: Requests after which the daemon has all its threads and caches, and is measured for the first time.
WARM_UP = 1000

#: Megabytes by which its memory may have grown in the end.
GROWTH = 32

#: Threads that it may have: its own, two that walk over processes, sixteen for files, two for all else; each but those
#: that walk is started when needed.
MAX_THREADS = 21

#: Executions that the daemon remembers: few, so that all that it may keep is there when the warm-up is over.
KEEP = 50

#: Seconds that one operation may take, and that the daemon has to come to rest in the end.
PATIENCE = 60.0
REST = 20.0

#: Seconds within which the daemon returns memory that has become free.
RETURN = 16.0

#: Threads that are there in addition for a file system that has hung.
MORE_THREADS = 16

#: Texts by which a reply says what was short. No other reply has them.
EXPLAINED = re.compile(
    rb"Failed to start command|too many open files|resource temporarily unavailable|cannot fork|run out of resources"
    rb"|status was lost",
    re.IGNORECASE,
)

#: In the environment of every command, and in the arguments of those that would run for ever.
MARK = f"soak-{os.getpid()}"
FOREVER = f"3155{os.getpid()}"


class Response(NamedTuple):
    """A response with its whole body."""

    status: int
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Explained(Exception):
    """The daemon has not done what was asked of it, and has said why."""


class Client:
    """
    A client of the daemon: each request has a connection of its own, which can be broken off at any time.

    :ivar faults: the faults that explain replies, if there are any.
    """

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.sent = 0
        self.faults: Faults | None = None

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
        """
        Send a request and return its response.

        :raise Explained: if that is not what it would be, for a fault.
        """
        reader, writer = await self.open(method, path, body)
        try:
            head, _, rest = (await reader.read(-1)).partition(b"\r\n\r\n")
        finally:
            writer.close()
        if self.faults is not None:
            if not head and self.faults.short_of_descriptors:
                raise Explained("not accepted")
            explanation = EXPLAINED.search(rest)
            if explanation is not None:
                raise Explained(explanation[0].decode("ascii").lower())
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
        """
        Any operation.

        :raise Explained: if a fault has kept it from being done.
        """
        (operation,) = self.rng.choices(list(self.weights), list(self.weights.values()))
        try:
            await asyncio.wait_for(operation(), PATIENCE)
        except Explained:
            raise
        except Exception as error:
            if (
                isinstance(error, OSError)
                and self.client.faults is not None
                and self.client.faults.short_of_descriptors
            ):
                raise Explained("not accepted") from None
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
        if response.status == 409:  # it has ended: its log says why
            await self.client.call("GET", f"{path}/logs")
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
    """What a daemon at rest has. ``marked`` are the processes of commands, those that have ended included."""

    descriptors: int
    pipes: int
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
    files = client.daemon.open_files()
    pipes = sum(" pipe:" in file for file in files)
    for folder in Path("/proc").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            if folder.name.isdigit():
                rest = (folder / "stat").read_text().rpartition(")")[2].split()
                if int(rest[1]) == client.daemon.pid:
                    children.append(rest[0])
                if folder.name != str(os.getpid()) and rest[0] not in "ZX":
                    text = (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes()
                    if any(mark.encode() in text for mark in (FOREVER, MARK)):
                        marked += 1
    return State(
        len(files) - pipes,
        pipes,
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
    """
    The state once nothing runs any more and nothing is left, or after ``REST`` seconds.

    :param before: with what it is compared; None for the first state, to which memory that is free does not belong.
    """
    began = time.monotonic()
    while True:
        await asyncio.sleep(0.5)
        now = await state(client)
        busy = now.executions or now.streams or now.proxied or now.zombies or now.marked
        if before is None:
            more = time.monotonic() < began + RETURN
        else:
            more = now.descriptors > before.descriptors or now.megabytes > before.megabytes + GROWTH
        if not (busy or more) or time.monotonic() > began + REST:
            return now


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """A target for the proxy."""
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()
    writer.close()


class Sent(NamedTuple):
    """What became of operations, and how often: what went wrong, and what faults have kept from being done."""

    wrong: Counter[str]
    explained: Counter[str]


async def send(client: Client, folder: Path, port: int, seed: int, concurrency: int, more: Callable[[], bool]) -> Sent:
    """Do operations, so many at a time, as long as there are to be more."""
    sent = Sent(Counter(), Counter())

    async def work(number: int) -> None:
        soak = Soak(client, folder, port, random.Random(seed * 1000 + number))
        while more() and sum(sent.wrong.values()) < 100:
            try:
                await soak.one()
            except AssertionError as error:
                sent.wrong[str(error)[:300]] += 1
            except Explained as error:
                sent.explained[str(error)] += 1
                await asyncio.sleep(0.05)

    await asyncio.gather(*map(work, range(concurrency)))
    return sent


def requests(client: Client, count: int) -> Callable[[], bool]:
    """Whether fewer than ``count`` requests have been sent from now on."""
    end = client.sent + count
    return lambda: client.sent < end


def until_done(task: asyncio.Future[None]) -> Callable[[], bool]:
    """Whether a task runs."""
    return lambda: not task.done()


async def kill_all(client: Client) -> None:
    """Kill what operations have left that faults have broken off."""
    for process in (await client.call("GET", "/list_processes")).json()["processes"]:
        if process["status"] == "running":
            response = await client.call("POST", "/kill_process", {"id": process["id"]})
            assert response.status in (200, 400), response


class Report:
    """
    Prints a table of measurements.

    :ivar well: whether all are within their bounds.
    """

    def __init__(self, *columns: str) -> None:
        self.well = True
        print(f"{'':20}", " ".join(f"{column:>8}" for column in columns))

    def row(self, name: str, values: Sequence[float], most: float) -> None:
        """Print some values, of which the last has a bound."""
        within = values[-1] <= most
        self.well = self.well and within
        cells = " ".join(f"{value:8.4g}" for value in values)
        print(f"{name:20} {cells:>26}{'' if within else f'  FAIL: at most {most:.4g}'}")

    def states(self, states: Sequence[State], **more: float) -> None:
        """
        Print the states of a daemon at rest: the last one must be as the first.

        :param more: bounds that are others.
        """
        before = states[0]
        zero = dict.fromkeys(("zombies", "executions", "streams", "proxied", "marked"), 0)
        grown = {"threads": MAX_THREADS, "pipes": before.pipes + 2 * POOLED, "megabytes": before.megabytes + GROWTH}
        for name, bound in {**before._asdict(), **zero, **grown, **more}.items():
            self.row(name, [getattr(state, name) for state in states], bound)

    def replies(self, wrong: Counter[str], log: str) -> None:
        """Print what went wrong."""
        self.row("tracebacks in log", [len(re.findall("Traceback|Unhandled", log))], 0)
        self.row("wrong replies", [sum(wrong.values())], 0)
        for text, times in wrong.most_common(10):
            print(f"  {times} x {text}")
        if "Traceback" in log:
            print(log[log.index("Traceback") :][:3000])


async def soaked(daemon: Daemon, folder: Path, seed: int, count: int, concurrency: int) -> bool:
    """Soak the daemon, and print how it was before and after; whether all is well."""
    client = Client(daemon)
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    wrong, _ = await send(client, folder, port, seed, concurrency, requests(client, WARM_UP))
    before = await at_rest(client)
    began = time.monotonic()
    wrong += (await send(client, folder, port, seed + 1, concurrency, requests(client, count // 2))).wrong
    halfway = await at_rest(client, before)
    wrong += (await send(client, folder, port, seed + 2, concurrency, requests(client, count - count // 2))).wrong
    took = time.monotonic() - began
    after = await at_rest(client, before)
    server.close()
    print(f"{count} requests after {WARM_UP} to warm up, seed {seed}: {count / took:.0f} a second")
    report = Report("before", "halfway", "after")
    report.states((before, halfway, after))
    report.replies(wrong, daemon.log.read_text())
    return report.well


async def soaked_with_faults(
    daemon: Daemon, folder: Path, seed: int, rounds: int, concurrency: int, clock: ClockShift | None, own_user: bool
) -> bool:
    """Soak the daemon while faults are injected, and print how it was before and after; whether all is well."""
    client = Client(daemon)
    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    wrong, _ = await send(client, folder, port, seed, concurrency, requests(client, WARM_UP // 2))
    before = await at_rest(client)
    # A spawn server whose parent has died is watched once more, to be reaped.
    before = before._replace(descriptors=before.descriptors + SPAWN_SERVERS)
    client.faults = faults = Faults(daemon, Client(daemon), folder, random.Random(seed), clock, own_user)
    report = Report("before", "after")
    # Without a process to be had, a command may end by itself and leave some of its processes, which are not killed.
    for names, left in ((faults.strict, 0), (faults.others, 1000)):
        injected = asyncio.ensure_future(faults.rounds(names, rounds))
        sent = client.sent
        during = await send(client, folder, port, seed := seed + 1, concurrency, until_done(injected))
        await injected
        print(f"{client.sent - sent} requests; those that were not done, and why:")
        for text, times in during.explained.most_common():
            print(f"  {times} x {text}")
        client.faults = None
        await kill_all(client)
        wrong += (
            during.wrong
            + (await send(client, folder, port, seed := seed + 1, concurrency, requests(client, 200))).wrong
        )
        after = await at_rest(client, before)
        ready = (await client.call("GET", "/ready")).status
        bounds: dict[str, float] = {
            "threads": MAX_THREADS + MORE_THREADS,
            "children": SPAWN_SERVERS + left,
            "marked": left,
        }
        if left:
            bounds["pipes"] = before.pipes + 2 * (POOLED + after.marked)
        report.states((before, after), **bounds)
        if not report.well:
            print(*daemon.open_files(), f"spawn servers: {daemon.spawn_servers()}", sep="\n")
        report.row("spawn servers", [len(daemon.spawn_servers())], SPAWN_SERVERS)
        report.row("not ready", [ready], 200)
        client.faults = faults
    server.close()
    for text in faults.untested:
        print(f"NOT TESTED: {text}")
    report.replies(wrong, daemon.log.read_text())
    return report.well


def sample(
    ports: Sequence[int],
    ready: EventOfProcesses,
    stop: EventOfProcesses,
    times: multiprocessing.Queue[list[list[float]]],
) -> None:
    """
    Ask several servers in turn for ``/health`` until ``stop`` is set, each time on a new connection.

    Runs in a process of its own.
    """
    found: list[list[float]] = [[] for _ in ports]
    ready.set()
    while not stop.is_set() and len(found[0]) < 100_000:
        for port, of_port in zip(ports, found, strict=True):
            began = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
            connection.request("GET", "/health")
            connection.getresponse().read()
            connection.close()
            of_port.append(time.monotonic() - began)
        time.sleep(0.005)
    times.put(found)


#: Twisted's own server, with nothing else to do: what it takes is the machine's share.
BARE = """
from twisted.internet import reactor
from twisted.web import resource, server

class Health(resource.Resource):
    isLeaf = True

    def render_GET(self, request):
        return b'{"status":"ok"}'

port = reactor.listenTCP(0, server.Site(Health()), interface="127.0.0.1")
print(port.getHost().port, flush=True)
reactor.run()
"""


#: How often the load is put on, to have enough samples.
STORMS = 5

#: What each stream is of.
TICKS = "for i in $(seq 1 40); do echo $i; sleep 0.05; done"


async def health(daemon: Daemon, folder: Path) -> None:
    """
    Print how fast ``/health`` answers while commands start, streams run and a large file is written.

    Beside it, how fast a process answers meanwhile that has nothing else to do.
    """
    client = Client(daemon)
    context = multiprocessing.get_context("spawn")
    ready, stop, times = context.Event(), context.Event(), context.Queue()
    text = "x" * (64 << 20)
    with subprocess.Popen([sys.executable, "-c", BARE], stdout=subprocess.PIPE) as bare:
        assert bare.stdout is not None
        port = int(bare.stdout.readline())
        sampler = context.Process(target=sample, args=((daemon.port, port), ready, stop, times))
        sampler.start()
        ready.wait(PATIENCE)
        try:
            for _ in range(STORMS):
                await asyncio.wait_for(
                    asyncio.gather(
                        *(client.call("POST", "/run", {"cmd": "sleep 0.5; seq 1 1000"}) for _ in range(200)),
                        *(client.call("POST", "/run_streaming", {"cmd": TICKS}) for _ in range(100)),
                        client.post("/write_file", path=str(folder / "large"), content=text),
                    ),
                    PATIENCE,
                )
        finally:
            stop.set()
            found = await asyncio.to_thread(times.get, timeout=PATIENCE)
            sampler.join(PATIENCE)
            bare.kill()
    stall = (await client.call("GET", "/status")).json()["longest_stall"]
    print(f"GET /health, in ms, while 200 commands start, 100 streams run and 64 MB are written, {STORMS} times:")
    print(f"{'':20} {'samples':>8} {'p50':>8} {'p99':>8} {'max':>8}")
    p99s = []
    for name, of_server in zip(("the daemon", "a bare Twisted loop"), found, strict=True):
        p99s.append(statistics.quantiles(of_server, n=100, method="inclusive")[98])
        numbers = (1000 * number for number in (statistics.median(of_server), p99s[-1], max(of_server)))
        print(f"{name:20} {len(of_server):8}", *(f"{number:8.1f}" for number in numbers))
    print(f"ratio of p99: {p99s[0] / p99s[1]:.1f}; the daemon's longest stall: {stall * 1000:.1f} ms")


def as_own_user(folder: Path) -> list[str]:
    """The start of a command that runs as a user whom nobody else is, with a bound on that one's processes."""
    uid = 60_000 + os.getpid() % 5000
    os.chown(folder, uid, uid)
    # The capability lets it read its own code wherever that is; it grants no write.
    capability = "+dac_read_search"
    return [
        "setpriv",
        f"--reuid={uid}",
        f"--regid={uid}",
        "--clear-groups",
        f"--inh-caps={capability}",
        f"--ambient-caps={capability}",
        "prlimit",
        f"--nproc={MAX_PROCESSES}:{MAX_PROCESSES}",
    ]


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="how many (default: %(default)s)")
    parser.add_argument("--concurrency", type=int, default=32, help="operations at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 31), help="default: any, and it is printed")
    parser.add_argument("--faults", type=int, metavar="N", help="inject each fault N times, for as long as that takes")
    parser.add_argument("--health", action="store_true", help="only measure GET /health under load")
    options = parser.parse_args()
    well = True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clock: ClockShift | None = None
        own_user = options.faults is not None and os.geteuid() == 0
        keywords: dict[str, Any] = {"via": as_own_user(folder)} if own_user else {}
        if options.faults is not None:
            with suppress(OSError):
                clock = ClockShift(folder)
                keywords |= clock.environ
        daemon = Daemon(folder, f"--keep-finished={KEEP}", **keywords)
        try:
            if options.faults is not None:
                print(f"seed {options.seed}", flush=True)
                well = asyncio.run(
                    soaked_with_faults(
                        daemon, folder, options.seed, options.faults, options.concurrency, clock, own_user
                    )
                )
            elif options.health:
                asyncio.run(health(daemon, folder))
            else:
                print(f"seed {options.seed}", flush=True)
                well = asyncio.run(soaked(daemon, folder, options.seed, options.requests, options.concurrency))
        except BaseException:
            print("the end of the log:\n", daemon.log.read_text()[-3000:])
            raise
        finally:
            code = daemon.stop()
    if code != 0:
        print(f"FAIL: the daemon's exit code is {code}")
    return int(not well or code != 0)


if __name__ == "__main__":
    sys.exit(main())
