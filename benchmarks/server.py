"""The servers that are measured: started here, or running somewhere already."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks import processes
from benchmarks.client import Address, Connection, Failed, request

#: Seconds in which a server must answer after its start, and end after SIGTERM.
START = 20.0

#: Starts the daemon of this environment.
SANDBOXD = [sys.executable, str(Path(sysconfig.get_path("scripts")) / "twistd"), "-n", "--pidfile=", "sandboxd"]


class Server:
    """
    A running server of the contract.

    :ivar address: of its HTTP API.
    :ivar proxy: of its TCP proxy.
    :ivar pid: its process, or None if that is not known: then its memory and its processor time are not, either.
    """

    def __init__(self, address: Address, secret: str, proxy: Address, pid: int | None) -> None:
        self.address = address
        self.proxy = proxy
        self.pid = pid
        self._secret = secret
        self._family = processes.family(pid) if pid else []

    def request(self, method: str, path: str, body: object = None) -> bytes:
        """The bytes of a request to it."""
        return request(method, path, self._secret, body)

    def connect(self, buffer: bytearray | None = None) -> Connection:
        """A new connection."""
        return Connection(self.address, buffer)

    def post(self, path: str, **body: object) -> Any:
        """
        Call a route, on a connection of its own; its JSON.

        :raise Failed: if the reply is an error.
        """
        with self.connect() as connection:
            connection.call(self.request("POST", path, body))
            return decoded(connection)

    def cpu(self) -> float:
        """Seconds of processor time that it and the processes it keeps have used; not that of its commands."""
        return processes.cpu(self._family)

    def memory(self, field: str = "VmRSS") -> int:
        """
        Bytes that are resident, the processes that it keeps included; with ``VmHWM``, the most that were.

        :raise Failed: if its process is not known.
        """
        if not self._family:
            raise Failed("its process is not known: give its pid")
        return sum(processes.memory(pid, field) for pid in self._family)

    def reset_peak(self) -> None:
        """Let the most begin anew, where that is allowed."""
        for pid in self._family:
            with suppress(OSError):
                processes.reset_peak(pid)

    def crash(self) -> str:
        """How it has ended, or nothing if it is not known to have."""
        return ""

    def stop(self) -> None:
        """Have done with it."""


class Started(Server):
    """
    A server that was started here.

    :param command: gets ``SANDBOX_SECRET``, ``PORT`` and ``PROXY_PORT`` in its environment.
    :param folder: its working directory, and where its log goes.
    :ivar seconds: how long it took from its start to its first answer.
    """

    def __init__(self, command: Sequence[str], secret: str, folder: Path) -> None:
        port, proxy_port = _free_ports()
        environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
        environ |= {"SANDBOX_SECRET": secret, "PORT": str(port), "PROXY_PORT": str(proxy_port)}
        self._log = folder / f"{Path(command[-1]).name}-{port}.log"
        with self._log.open("wb") as log:
            began = time.perf_counter()
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # as a daemon; its share of the processors is its own, sched(7) on autogroups
            )
        address = ("127.0.0.1", port)
        try:
            self._wait(address, request("GET", "/health", secret))
            self.seconds = time.perf_counter() - began
            super().__init__(address, secret, ("127.0.0.1", proxy_port), self._process.pid)
        except BaseException:
            self.stop()
            raise

    def _wait(self, address: Address, health: bytes) -> None:
        deadline = time.perf_counter() + START
        while True:
            if self._process.poll() is not None or time.perf_counter() > deadline:
                said = self._log.read_text(errors="replace").split("\n")
                raise Failed(
                    f"it does not start: {next(filter(None, map(str.strip, reversed(said))), 'no reason given')}"
                )
            try:
                with Connection(address) as connection:
                    connection.call(health)
                    return
            except ConnectionError:
                time.sleep(0.001)  # nobody tells when it listens

    def crash(self) -> str:
        """How it has ended, with what it has said of that."""
        try:
            code = self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            return ""
        found = re.search(r"^(panic|fatal|Traceback).*", self._log.read_text(errors="replace"), re.M)
        return f"the server has ended with code {code}" + (f": {found[0]}" if found else "")

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(START)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Target:
    """
    Where a server comes from.

    :param name: what the table calls it.
    :param url: of one that runs already, or None.
    :param command: starts one, if there is no ``url``.
    """

    def __init__(
        self, name: str, url: str | None, command: str | None, secret: str, proxy_port: int, pid: int | None
    ) -> None:
        self.name = name
        self._url = urlsplit(url) if url else None
        self._command = shlex.split(command) if command else SANDBOXD
        self._secret = secret
        self._proxy_port = proxy_port
        self._pid = pid

    def open(self, folder: Path) -> Server:
        """
        The running server, or one that is started now.

        :raise Failed: if it does not start, or is gone.
        """
        if self._url is None:
            return self.start(folder)
        host = self._url.hostname or "127.0.0.1"
        if self._pid is not None and not Path(f"/proc/{self._pid}").exists():
            raise Failed("it has ended")
        return Server((host, self._url.port or 80), self._secret, (host, self._proxy_port), self._pid)

    def start(self, folder: Path) -> Started:
        """
        One that is started now.

        :raise Failed: if it cannot be.
        """
        if self._url is not None:
            raise Failed("it is not started here")
        return Started(self._command, self._secret, folder)


def decoded(connection: Connection) -> Any:
    """
    The JSON of a complete reply.

    :raise Failed: if it is an error.
    """
    body = connection.body()
    if connection.status >= 300:
        raise Failed(f"status {connection.status}: {body[:200]!r}")
    reply = json.loads(body)
    if reply.get("error"):
        raise Failed(f"error: {reply['error']}")
    return reply


def _free_ports() -> tuple[int, int]:
    with socket.create_server(("127.0.0.1", 0)) as first, socket.create_server(("127.0.0.1", 0)) as second:
        return first.getsockname()[1], second.getsockname()[1]
