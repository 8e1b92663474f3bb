"""The daemon as a process: how it is configured, how it starts and stops, what it keeps to itself."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.logger import LogLevel

from sandboxd import tap
from sandboxd.processes.spawn_client import SPAWN_SERVERS
from tests.client import Api
from tests.daemon import SECRET, TWISTD, Daemon, alive
from tests.waiting import gone, pids_in, until

IN_FOREGROUND = ("-n", "--pidfile=")
AS_DAEMON = ("--pidfile=daemon.pid", "--logfile=daemon.log")
BOTH = pytest.mark.parametrize("mode", [IN_FOREGROUND, AS_DAEMON], ids=["foreground", "daemonised"])


def twistd(folder: Path, *arguments: str, umask: int = -1, **environ: Any) -> subprocess.CompletedProcess[str]:
    """Run ``twistd`` until it ends, which it must do soon."""
    env = {name: value for name, value in os.environ.items() if name not in ("SANDBOX_SECRET", "PORT", "LOG_LEVEL")}
    return subprocess.run(
        [sys.executable, TWISTD, *arguments],
        cwd=folder, env={**env, "PORT": "0", "PROXY_PORT": "0", **environ}, umask=umask,
        stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip


def assert_refused(ended: subprocess.CompletedProcess[str], *words: str) -> None:
    """It ended at once, with a reason that a person can read, and with nothing else."""
    assert ended.returncode not in (0, None)
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    assert line.startswith("twistd sandboxd: ")
    for word in words:
        assert word in line


class Daemonised:
    """A daemon that has gone to the background, as it does without ``-n``."""

    def __init__(self, folder: Path, *options: str, umask: int = -1, **environ: str) -> None:
        self.log, self._pidfile = folder / "daemon.log", folder / "daemon.pid"
        self.started = twistd(folder, *AS_DAEMON, "sandboxd", *options, umask=umask, **environ)
        assert (self.started.returncode, self.started.stderr) == (0, "")

    def _listens(self) -> re.Match[str] | None:
        return re.search(r"listens on port (\d+)", self.log.read_text()) if self.log.exists() else None

    async def when_ready(self) -> Api:
        """A client of it, once it listens."""
        found = await until(self._listens)
        assert found is not None
        return Api(f"http://127.0.0.1:{found[1]}", SECRET)

    @property
    def pid(self) -> int:
        return int(self._pidfile.read_text())

    def stop(self) -> None:
        if not self._pidfile.exists():
            return
        descriptor = os.pidfd_open(self.pid)  # readable once the process has ended
        try:
            os.kill(self.pid, signal.SIGTERM)
            if not select.select([descriptor], [], [], 10)[0]:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"the daemon did not stop: {self.log.read_text()}")
        finally:
            os.close(descriptor)


@pytest.fixture
def daemonise(tmp_path: Path) -> Iterator[Callable[..., Daemonised]]:
    """Starts daemons in the background, and ends them by the pid in their pidfile."""
    started: list[Daemonised] = []

    def start(*options: str, umask: int = -1, **environ: str) -> Daemonised:
        started.append(Daemonised(tmp_path, *options, umask=umask, **{"SANDBOX_SECRET": SECRET, **environ}))
        return started[-1]

    yield start
    for daemon in started:
        daemon.stop()


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")

# Configuration


def test_a_log_file_is_rotated_a_bounded_number_of_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tap._logging, "file", str(tmp_path / "log"))
    monkeypatch.setitem(tap._logging, "options", {"log-level": LogLevel.info, "log-format": "text"})
    monkeypatch.setitem(tap._logging, "outlet", None)
    tap.log_observer()
    write = tap._logging["outlet"]._write
    for _ in range(30):
        write(b"x" * 600_000)
    write.__self__.close()
    assert len(os.listdir(tmp_path)) == 1 + tap.MAX_ROTATED


@needs_root
@pytest.mark.slow
def test_without_proc_it_says_so(tmp_path: Path) -> None:
    hide = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh")
    with pytest.raises(AssertionError, match="twistd sandboxd: /proc has to be mounted") as failed:
        Daemon(tmp_path, via=hide)
    assert "Traceback" not in str(failed.value)


@BOTH
def test_without_a_secret_it_does_not_start(tmp_path: Path, mode: tuple[str, ...]) -> None:
    assert_refused(twistd(tmp_path, *mode, "sandboxd"), "SANDBOX_SECRET", "required")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        ({"SANDBOX_SECRET": ""}, ("SANDBOX_SECRET", "required")),
        ({"SANDBOX_SECRET": "two words"}, ("SANDBOX_SECRET",)),
        ({"SANDBOX_SECRET": "line\n"}, ("SANDBOX_SECRET",)),
        ({"PORT": "http"}, ("PORT", "'http'")),
        ({"PORT": "65536"}, ("PORT", "65536")),
        ({"PORT": "-1"}, ("PORT", "-1")),
        ({"PORT": "0000010000000"}, ("PORT", "0000010000000")),
        ({"PROXY_PORT": "80.5"}, ("PROXY_PORT", "80.5")),
        ({"LOG_LEVEL": "loud"}, ("LOG_LEVEL", "'loud'")),
    ],
    ids=lambda value: repr(value)[:40] if isinstance(value, dict) else "",
)
def test_a_bad_value_is_told_in_one_line(tmp_path: Path, environ: dict[str, Any], words: tuple[str, ...]) -> None:
    assert_refused(twistd(tmp_path, *IN_FOREGROUND, "sandboxd", **{"SANDBOX_SECRET": SECRET, **environ}), *words)


@pytest.mark.parametrize("options", [["--port=x"], ["--no-such-option"], ["--port"], ["surplus"]], ids=str)
@pytest.mark.slow
def test_a_bad_option_is_told_in_one_line(tmp_path: Path, options: list[str]) -> None:
    assert_refused(twistd(tmp_path, *AS_DAEMON, "sandboxd", *options, SANDBOX_SECRET=SECRET))
    assert os.listdir(tmp_path) == []


@BOTH
@pytest.mark.parametrize("variable", ["PORT", "PROXY_PORT"])
@pytest.mark.slow
def test_a_port_in_use_is_told_in_one_line(tmp_path: Path, mode: tuple[str, ...], variable: str) -> None:
    environ: dict[str, Any]
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        environ = {"SANDBOX_SECRET": SECRET, variable: port}
        ended = twistd(tmp_path, *mode, "sandboxd", **environ)
    assert_refused(ended, f"{variable} {port}", "Address already in use")
    assert os.listdir(tmp_path) == []


async def test_options_win_over_the_environment(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(
        "--secret=from-the-option", "--port=0", "--proxy-port=0", "--log-level=info",
        PORT="no port", PROXY_PORT="none either", LOG_LEVEL="loud",
    )  # fmt: skip
    assert (await Api(daemon.url, SECRET).get("/port_status")).status == 401
    assert (await Api(daemon.url, "from-the-option").get("/port_status")).status == 200


@pytest.mark.slow
async def test_log_level_error_is_silent_from_start_to_end(tmp_path: Path) -> None:
    # There is no word in the log to wait for, so the port must be known before.
    with socket.create_server(("", 0)) as free:
        port = free.getsockname()[1]
    environ = {**os.environ, "SANDBOX_SECRET": SECRET, "PORT": str(port), "PROXY_PORT": "0", "LOG_LEVEL": "error"}
    process = subprocess.Popen(
        [sys.executable, TWISTD, *IN_FOREGROUND, "sandboxd"],
        cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip

    def listens() -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", port)) == 0

    try:
        await until(listens, 20)
        assert (await Api(f"http://127.0.0.1:{port}", SECRET).get("/health")).status == 200
        process.terminate()
        assert process.communicate(timeout=15)[0] == b""
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate(timeout=5)


def test_the_help_of_twistd_lists_it(tmp_path: Path) -> None:
    ended = twistd(tmp_path, "--help")
    assert ended.returncode == 0
    assert re.search(r"^    sandboxd +An HTTP API", ended.stdout, re.M)


def test_its_help_names_every_setting_and_needs_no_secret(tmp_path: Path) -> None:
    ended = twistd(tmp_path, "sandboxd", "--help")
    assert ended.returncode == 0
    for word in ("--secret", "SANDBOX_SECRET", "--port", "PORT", "--proxy-port", "PROXY_PORT", "--log-level"):
        assert word in ended.stdout


# The end


async def test_sigterm_leaves_nothing_behind(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, SECRET)
    running, finished = tmp_path / "running", tmp_path / "finished"

    def family(file: Path) -> str:
        child = f"'echo $$ >> {file}; exec sleep 300'"
        return (
            f"sh -c {child} & setsid sh -c {child} & (setsid sh -c {child} >/dev/null 2>&1 &)"
            f" ; env -i setsid sh -c {child} & "
        )

    assert (await api.run(family(finished)))["code"] == 0
    await api.start(family(running) + "wait")
    await api.start(f"trap '' TERM; echo $$ >> {running}; while :; do sleep 300; done")
    stream = await api.stream(f"echo $$ >> {running}; sleep 300")
    pids = await pids_in(running, 6) + await pids_in(finished, 4)
    assert all(map(alive, pids))
    assert daemon.stop() == 0
    await gone(pids)
    stream.close()
    assert "Traceback" not in daemon.log.read_text()


def test_an_idle_daemon_ends_with_0_at_once(start_daemon: Callable[..., Daemon]) -> None:
    assert start_daemon().stop(patience=5) == 0


def test_it_ends_in_order_though_it_is_asked_to_again_until_it_is_gone(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    deadline = time.monotonic() + 15
    while alive(daemon.pid) and time.monotonic() < deadline:
        os.kill(daemon.pid, signal.SIGTERM)
        time.sleep(0.0005)  # between two signals, not for something
    assert daemon.stop() == 0


def test_its_interpreter_is_not_finalized_as_threads_may_be_left(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(PYTHONVERBOSE="1")  # the interpreter writes down what it does
    assert daemon.stop() == 0
    log = daemon.log.read_text(errors="replace")
    assert "# cleanup[" not in log
    assert "sandboxd has stopped" in log


def of_daemon(pid: int) -> list[int]:
    """Return the pids of a daemon's spawn servers that run, its children or not: its pid is their last argument."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                arguments = (entry / "cmdline").read_bytes().rstrip(b"\0").split(b"\0")
                if b"spawn_server" in b"".join(arguments) and arguments[-1] == b"%d" % pid and alive(int(entry.name)):
                    found.append(int(entry.name))
    return found


def catches_sigterm(pid: int) -> bool:
    """Return whether a process has a handler of SIGTERM."""
    caught = re.search(r"^SigCgt:\s+(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    assert caught
    return bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.slow
async def test_it_ends_in_order_though_it_is_asked_to_while_it_starts(tmp_path: Path) -> None:
    for delay, times in ((0.0, 2), (0.05, 1), (0.15, 2)):  # from the handler on
        with (tmp_path / "log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, TWISTD, *IN_FOREGROUND, "sandboxd"], cwd=tmp_path, stdout=log, stderr=log,
                env={**os.environ, "SANDBOX_SECRET": SECRET, "PORT": "0", "PROXY_PORT": "0"},
            )  # fmt: skip
        try:
            await until(partial(catches_sigterm, process.pid), 20)
            time.sleep(delay)  # at any moment of the start
            for _ in range(times):
                process.terminate()
            assert process.wait(15) == 0
        finally:
            process.kill()
            process.wait()
        assert "Traceback" not in (tmp_path / "log").read_text()
        await until(lambda pid=process.pid: not of_daemon(pid), 15)  # type: ignore[misc]


@pytest.mark.parametrize("signum", [signal.SIGSTOP, signal.SIGKILL])
async def test_it_ends_in_order_though_its_spawn_servers_are_being_replaced(
    start_daemon: Callable[..., Daemon], tmp_path: Path, signum: int
) -> None:
    daemon = start_daemon(SANDBOX_DRAIN="0")
    api = Api(daemon.url, SECRET)
    cmd = f"echo $$ >> {tmp_path}/pids; sleep 300"
    await api.start(cmd)
    await pids_in(tmp_path / "pids", 1)
    await until(lambda: len(of_daemon(daemon.pid)) == SPAWN_SERVERS, 5)
    for pid in daemon.spawn_servers():
        os.kill(pid, signum)
    pending = [Deferred.fromCoroutine(api.post(route, {"cmd": cmd})) for route in ("/run", "/start_process")]
    for start in pending:
        start.addErrback(lambda _: None)
    if signum == signal.SIGSTOP:  # until the next look at them, which continues them
        while (await api.get("/status")).json()["executions"] < 1 + len(pending):
            pass
    for _ in range(2):
        os.kill(daemon.pid, signal.SIGTERM)
    assert daemon.stop() == 0
    await until(lambda: not of_daemon(daemon.pid), 15)
    await gone([int(pid) for pid in (tmp_path / "pids").read_text().split()])
    assert "Traceback" not in daemon.log.read_text()


def test_ctrl_c_ends_it_in_order(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    assert daemon.stop(signal.SIGINT, patience=5) in (0, -signal.SIGINT)
    assert "sandboxd has stopped" in daemon.log.read_text()


async def test_a_stopping_daemon_tells_the_streams_that_are_open(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    stream = await Api(daemon.url, SECRET).stream(
        "echo ready; exec sleep 300"
    )  # a shell could report the signal of its child
    events = []
    async for event in stream:
        events.append(event)
        if len(events) == 1:
            os.kill(daemon.pid, signal.SIGTERM)
    assert [event.name for event in events] == ["output", "complete"]
    assert events[-1].data == {"code": -1, "error": True, "signal": "SIGTERM"}
    assert daemon.stop() == 0


async def test_a_command_that_ends_soon_gives_its_answer_though_the_daemon_stops(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, SECRET)
    cmd = f"echo $$ >> {tmp_path}/pids; sleep 0.7; echo done"
    run = Deferred.fromCoroutine(api.post("/run", {"cmd": cmd}))
    stream = await api.stream(cmd)
    await api.start(f"echo $$ >> {tmp_path}/pids; sleep 300")
    pids = await pids_in(tmp_path / "pids", 3)
    os.kill(daemon.pid, signal.SIGTERM)
    await until(lambda: refuses(daemon.port))
    assert (await run.addTimeout(10, reactor)).json() == {"stdout": "done\n", "stderr": "", "code": 0}
    assert [event.data.get("code") for event in await stream.all()] == [None, 0]
    assert daemon.stop() == 0
    await gone(pids)


def refuses(port: int) -> bool:
    """Whether nothing listens on a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) != 0


async def test_the_drain_is_bounded_and_can_be_switched_off(start_daemon: Callable[..., Daemon]) -> None:
    for drain, least, most in (("0", 0.0, 0.9), ("1", 0.9, 5.0)):
        daemon = start_daemon(SANDBOX_DRAIN=drain)
        stream = await Api(daemon.url, SECRET).stream("echo; sleep 300")
        began = time.monotonic()
        assert daemon.stop() == 0
        assert least < time.monotonic() - began < most
        stream.close()


async def test_a_client_that_never_reads_does_not_hold_up_the_end(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    body = b'{"cmd": "yes"}'
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=10) as client:
        client.sendall(
            b"POST /run_streaming HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
            % (SECRET.encode(), len(body), body)
        )
        assert client.recv(15) == b"HTTP/1.1 200 OK"
        assert daemon.stop(patience=10) == 0


# In the background


@pytest.mark.slow
async def test_daemonised_it_serves_and_notices_how_commands_end(daemonise: Callable[..., Daemonised]) -> None:
    daemon = daemonise()
    api = await daemon.when_ready()
    assert daemon.started.stdout == ""
    assert alive(daemon.pid)
    assert (await api.run("echo hi; exit 3"))["code"] == 3
    id = await api.start("exit 4")
    events = await (await api.logs(id)).all()
    assert events[-1].name == "complete"
    assert (await api.process(id))["exit_code"] == 4
    pid = daemon.pid
    daemon.stop()
    assert not alive(pid)
    assert "Traceback" not in daemon.log.read_text()


@pytest.mark.parametrize("umask", [0o027, 0o002], ids=oct)
@pytest.mark.slow
async def test_daemonised_commands_and_files_have_the_umask_of_the_starter(
    daemonise: Callable[..., Daemonised], tmp_path: Path, umask: int
) -> None:
    api = await daemonise(umask=umask).when_ready()
    assert (await api.run("umask"))["stdout"] == f"{umask:04o}\n"
    await api.run("touch made", cwd=str(tmp_path))
    assert (tmp_path / "made").stat().st_mode & 0o777 == 0o666 & ~umask
    await api.post("/write_file", {"path": str(tmp_path / "written"), "content": ""})
    assert (tmp_path / "written").stat().st_mode & 0o777 == 0o644


# The secret


@pytest.mark.parametrize("way", ["option", "variable", "both", "two words option"])
async def test_the_secret_is_in_no_log_and_not_in_proc(start_daemon: Callable[..., Daemon], way: str) -> None:
    secret = "a-very-private-token-77ae"
    options = {"option": [f"--secret={secret}"], "both": [f"--secret={secret}"], "two words option": ["-s", secret]}
    daemon = start_daemon(
        *options.get(way, []), LOG_LEVEL="debug", **({} if "option" in way else {"SANDBOX_SECRET": secret})
    )
    api = Api(daemon.url, secret)
    for headers in ({}, {"Authorization": f"Basic {secret}"}, {"Authorization": f"Bearer {secret}x"}):
        await api.get(f"/port_status?token={secret}", headers)
        await api.post("/run", {"cmd": f"echo {secret}", "cwd": f"/nope/{secret}"}, headers)
        await api.post("/run", f"{{{secret}".encode(), headers)
    assert (await api.post("/run", {"cmd": "true"})).status == 200
    for kind in ("cmdline", "environ"):
        shown = Path(f"/proc/{daemon.pid}/{kind}").read_bytes()
        assert shown
        assert secret.encode() not in shown
    command = "cat /proc/$PPID/cmdline /proc/$PPID/environ /proc/self/environ 2>/dev/null; env"
    assert secret not in (await api.run(command))["stdout"]
    assert daemon.stop() == 0
    log = daemon.log.read_text()
    assert "/port_status" in log
    assert secret not in log


async def test_the_secret_of_the_environment_is_hidden_when_an_option_wins(
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon = start_daemon("--secret=from-the-option-9c", SANDBOX_SECRET="from-the-variable-3d")
    api = Api(daemon.url, "from-the-option-9c")
    for kind in ("cmdline", "environ"):
        shown = Path(f"/proc/{daemon.pid}/{kind}").read_bytes()
        assert b"from-the-option-9c" not in shown
        assert b"from-the-variable-3d" not in shown
    stdout = (await api.run("env"))["stdout"]
    assert "SANDBOX_SECRET" not in stdout
    assert "from-the" not in stdout


@pytest.mark.parametrize(
    ("module", "late"),
    [
        ("sandboxd.tap", ["klein", "sandboxd.service", "twisted.web.server"]),
        ("sandboxd.service", ["klein", "prometheus_client", "treq", "twisted.web.client", "websockets", "werkzeug"]),
    ],
)
def test_what_a_start_does_not_need_is_not_imported(module: str, late: list[str]) -> None:
    code = f"import sys, {module}; print(*sorted(set({late!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "\n"


@pytest.mark.slow
def test_threads_give_the_interpreter_up_sooner_than_in_other_programs() -> None:
    code = """
import sys
from sandboxd.tap import Options, makeService
before, options = sys.getswitchinterval(), Options()
options.parent = {}
options.parseOptions(["--port=0", "--proxy-port=0", "--secret=a-secret"])
makeService(options)
print(sys.getswitchinterval() < before / 5)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True\n"
