"""A server under test, as a client sees it: one connection per request, and every wait bounded."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple
from urllib.parse import urlsplit

#: Seconds after which a socket gives up.
PATIENCE = 10.0


class Failed(Exception):
    """The server has the fault; the text says what it did."""


class NotApplicable(Exception):
    """The fault cannot be probed here; the text says why."""


def check(fact: object, reason: str) -> None:
    """Fail for ``reason`` unless ``fact`` is true."""
    if not fact:
        raise Failed(reason)


class Response(NamedTuple):
    """A response with its whole body."""

    status: int
    type: str
    body: bytes

    def json(self) -> Any:
        """The body, which must be labelled as JSON."""
        check(self.type.startswith("application/json"), f"{self.status} with Content-Type {self.type!r}")
        return json.loads(self.body)


class Event(NamedTuple):
    """A Server-Sent Event."""

    name: str
    data: Any


class Stream:
    """An open event stream."""

    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection
        self._socket = connection.sock
        self._response = connection.getresponse()

    def chunks(self) -> Iterator[bytes]:
        """The raw body."""
        return iter(lambda: self._response.read1(65536), b"")

    def __iter__(self) -> Iterator[Event]:
        pending = b""
        for chunk in self.chunks():
            *blocks, pending = (pending + chunk).split(b"\n\n")
            for block in blocks:
                lines = [line.partition(": ") for line in block.decode().split("\n")]
                fields = {name: value for name, _, value in lines if name}
                if "data" in fields:
                    yield Event(fields.get("event", "message"), json.loads(fields["data"]))
        check(not pending, f"the stream ended within an event: {pending[:80]!r}")

    def hang_up(self) -> None:
        """Go away at once."""
        hang_up(self._connection, self._socket)


def hang_up(connection: http.client.HTTPConnection, sock: socket.socket | None = None) -> None:
    """Go away at once, as a client does that is killed."""
    sock = connection.sock if sock is None else sock
    with contextlib.suppress(OSError):  # the server was faster
        sock.shutdown(socket.SHUT_RDWR)
    connection.close()


class Server:
    """
    The server under test.

    :ivar secret: its bearer token.
    :ivar proxy_port: where its proxy listens, if that is known.
    :ivar full_disk: a directory of its machine on a file system that is almost full, if there is one.
    """

    def __init__(self, url: str, secret: str, proxy_port: int | None = None, full_disk: str | None = None) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"not an http or https URL: {url!r}")
        self._https = parts.scheme == "https"
        self.host = parts.hostname
        self._port = parts.port or (443 if self._https else 80)
        self._prefix = parts.path.rstrip("/")
        self.secret = secret
        self.proxy_port = proxy_port
        self.full_disk = full_disk

    def send(
        self, method: str, path: str, body: Any = None, token: str | None = None, receive_buffer: int | None = None
    ) -> http.client.HTTPConnection:
        """
        Send a request; its response is not awaited.

        :param body: sent as JSON unless it is bytes.
        :param token: another token than the right one; "" for none.
        """
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        connection = kind(self.host, self._port, timeout=PATIENCE)
        connection.connect()
        if receive_buffer is not None:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        token = self.secret if token is None else token
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body)
        connection.request(method, self._prefix + path, data, headers)
        return connection

    def call(self, method: str, path: str, body: Any = None, token: str | None = None) -> Response:
        """Send a request and return its response."""
        return received(self.send(method, path, body, token))

    def post(self, route: str, **fields: Any) -> Any:
        """The JSON reply to a POST, whatever its status."""
        return self.call("POST", route, fields).json()

    def run(self, cmd: str, **fields: Any) -> dict[str, Any]:
        """The reply of ``/run``."""
        reply: dict[str, Any] = self.post("/run", cmd=cmd, **fields)
        check("code" in reply, f"/run replied {reply}")
        return reply

    def stream(self, cmd: str) -> Stream:
        """An open ``/run_streaming``."""
        return Stream(self.send("POST", "/run_streaming", {"cmd": cmd}))

    def start(self, cmd: str) -> str:
        """The id of a new background process."""
        reply: dict[str, str] = self.post("/start_process", cmd=cmd)
        check("id" in reply, f"/start_process replied {reply}")
        return reply["id"]

    def finished(self, id: str) -> str:
        """Wait for the end of a background process; its status."""
        deadline = time.monotonic() + PATIENCE
        while True:
            listed = self.call("GET", "/list_processes").json()["processes"]
            status: str = next(entry["status"] for entry in listed if entry["id"] == id)
            if status != "running":
                return status
            check(time.monotonic() < deadline, f"still running after {PATIENCE:.0f} s")
            time.sleep(0.05)

    def logs(self, id: str, receive_buffer: int | None = None) -> Stream:
        """An open ``/process_logs_streaming``."""
        return Stream(self.send("GET", f"/process_logs_streaming?id={id}", receive_buffer=receive_buffer))

    def lines(self, id: str) -> list[str]:
        """A background process's log until its end."""
        return [event.data["data"] for event in self.logs(id) if event.name == "log"]

    def healthy(self) -> bool:
        """Whether ``/health`` answers."""
        try:
            return self.call("GET", "/health", token="").status == 200
        except (OSError, http.client.HTTPException):
            return False

    def pids(self, file: str, count: int) -> list[int]:
        """The pids that a command writes to ``file``, one a line, once there are ``count``."""
        deadline = time.monotonic() + 5
        while len(found := self.run(f"cat {file} 2>/dev/null || true")["stdout"].split()) < count:
            if time.monotonic() > deadline:
                raise NotApplicable(f"the probe's processes did not start: {found} of {count}")
            time.sleep(0.05)
        return [int(pid) for pid in found]

    def left(self, pids: Iterable[int], seconds: float = 4) -> list[int]:
        """Those of the processes ``pids`` of the server's machine that still run after ``seconds``, at most."""
        files = " ".join(f"/proc/{pid}/stat" for pid in pids)
        deadline = time.monotonic() + seconds
        while True:
            stats = self.run(f"cat {files} 2>/dev/null || true")["stdout"].splitlines()
            alive = [int(stat.split()[0]) for stat in stats if stat.rpartition(")")[2].split()[0] not in "ZX"]
            if not alive or time.monotonic() > deadline:
                return alive
            time.sleep(0.1)

    def end(self, pids: Iterable[int]) -> None:
        """Kill what a fault has left."""
        self.run(f"kill -9 {' '.join(map(str, pids))} 2>/dev/null || true")


def received(connection: http.client.HTTPConnection) -> Response:
    """The response to a request that was sent."""
    try:
        response = connection.getresponse()
        return Response(response.status, response.getheader("Content-Type", ""), response.read())
    finally:
        connection.close()


def differences(found: list[str], expected: list[str]) -> Mapping[str, int]:
    """How many lines are missing and how many are too many."""
    return {
        "lost": len(set(expected) - set(found)),
        "double": len(found) - len(set(found)),
        "foreign": len(set(found) - set(expected)),
    }
