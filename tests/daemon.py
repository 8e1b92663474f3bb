"""The real daemon, as a child process, for tests that talk to it over a socket."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

SECRET = "a-secret-for-tests-1f6c"
SPAWN_SERVER = "sandboxd-spawn\n"
TWISTD = str(Path(sysconfig.get_path("scripts")) / "twistd")


class Daemon:
    """
    ``twistd -n sandboxd`` on free ports.

    :param options: those of ``sandboxd``.
    :param via: what it is started by, if not directly; it must end in an exec of its arguments.
    :param pass_fds: descriptors that it inherits.
    :param environ: variables over those of the tests.
    :ivar url: where its HTTP API is.
    :ivar proxy_port: where its proxy listens.
    :ivar pid: its process id.
    :ivar log: the file with all that it has logged.
    """

    def __init__(
        self, folder: Path, *options: str, via: Sequence[str] = (), pass_fds: Sequence[int] = (), **environ: str
    ) -> None:
        self.log = folder / "daemon.log"
        self.secret = environ.get("SANDBOX_SECRET", SECRET)
        env = {**os.environ, "SANDBOX_SECRET": SECRET, "PORT": "0", "PROXY_PORT": "0", **environ}
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [*via, sys.executable, TWISTD, "-n", "--pidfile=", "sandboxd", *options],
                cwd=folder,
                env=env,
                pass_fds=pass_fds,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.pid = self._process.pid
        where = self._wait_for(rb"listens on (.*), proxy on (.*)\n", 20)
        self.port, self.proxy_port = (
            int(port[1]) if (port := re.search(rb"port (\d+)", text)) else 0 for text in where.groups()
        )
        self.url = f"http://127.0.0.1:{self.port}"

    def _wait_for(self, pattern: bytes, seconds: float) -> re.Match[bytes]:
        """The first match in the log."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.log.read_bytes())
            if found:
                return found
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"the daemon did not start: {self.log.read_text()}")
            select.select([], [], [], 0.02)  # there is no event to wait for: a file grows

    def memory(self) -> int:
        """Bytes of resident memory."""
        return self._status("VmRSS") * 1024

    def peak_memory(self) -> int:
        """Most bytes of resident memory since the start, or since :meth:`reset_peak`."""
        return self._status("VmHWM") * 1024

    def reset_peak(self) -> None:
        """Let :meth:`peak_memory` begin anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def _status(self, field: str) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"^{field}:\s+(\d+)", status, re.M)
        assert found
        return int(found[1])

    def zombies(self) -> list[int]:
        """Its children that have ended and were not reaped."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in children if not alive(int(pid))]

    def spawn_servers(self) -> list[int]:
        """
        The pids of its spawn servers that run; they are children of it or of each other.

        So are the children of spawn servers, under the same name, until they execute their programs. But those always
        have a mark, and a server only while it starts one.
        """
        parents: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            with suppress(OSError):  # it has ended meanwhile
                if entry.name.isdigit() and (entry / "comm").read_text() == SPAWN_SERVER:
                    state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                    if state not in "ZX":
                        parents[int(entry.name)] = int(parent)
        found = []
        deadline = time.monotonic() + 0.1
        for server, of in parents.items():
            if of == self.pid or parents.get(of) == self.pid:
                while (unmarked := _is_unmarked_server(server)) is False and time.monotonic() < deadline:
                    time.sleep(0.001)  # there is no event to wait for
                if unmarked:
                    found.append(server)
        return found

    def open_files(self) -> list[str]:
        """What each descriptor is; of a pidfd also whose, -1 for a process that is gone."""
        found = []
        for name in os.listdir(f"/proc/{self.pid}/fd"):
            with suppress(OSError):
                info = Path(f"/proc/{self.pid}/fdinfo/{name}").read_text()
                pid = re.search(r"^Pid:\s+(-?\d+)", info, re.M)
                of = f" of {pid[1]}" if pid else ""
                found.append(f"{name} -> {os.readlink(f'/proc/{self.pid}/fd/{name}')}{of}")
        return found

    def max_descriptors(self) -> int:
        """Its soft limit of open files."""
        limits = Path(f"/proc/{self.pid}/limits").read_text()
        return int(limits.split("Max open files")[1].split()[0])

    def descriptors(self) -> int:
        """How many files it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def stop(self, signum: int = signal.SIGTERM, patience: float = 15) -> int:
        """End it; return its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signum)
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"the daemon did not stop: {self.log.read_text()}") from None


def _is_unmarked_server(pid: int) -> bool | None:
    """Whether a process that has a spawn server's name has no mark; None if it has another name now, or is gone."""
    try:
        limits = Path(f"/proc/{pid}/limits").read_text()
        name = Path(f"/proc/{pid}/comm").read_text()  # after its mark, which is that of the same program
    except (FileNotFoundError, ProcessLookupError):
        return None
    if name != SPAWN_SERVER:
        return None
    soft = limits.split("Max realtime timeout")[1].split()[0]
    return not (soft.isdigit() and int(soft) >= 1 << 61)


def _port(text: bytes) -> int:
    found = re.search(rb"port (\d+)", text)
    return int(found[1]) if found else 0


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
