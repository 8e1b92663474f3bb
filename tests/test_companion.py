"""The command that is run beside the daemon: its output, its signals, its end, its exit code."""

from __future__ import annotations

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.internet import reactor
from twisted.internet.task import deferLater

from tests.client import Api
from tests.daemon import SECRET, TWISTD, Daemon
from tests.test_daemon import AS_DAEMON, IN_FOREGROUND, assert_refused, twistd
from tests.waiting import gone, hard_to_end, pids_in, until

#: Seconds within which a daemon that ends by itself must have ended.
PATIENCE = 20


def run(folder: Path, *command: str, stdin: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    """Run the daemon with a companion that ends."""
    return subprocess.run(
        [sys.executable, TWISTD, *IN_FOREGROUND, "sandboxd", "--port=0", "--proxy-port=0", "--", *command],
        cwd=folder, env={**os.environ, "SANDBOX_SECRET": SECRET, **environ}, input=stdin,
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip


# Its exit code


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -TERM $$", 128 + 15)])
@pytest.mark.slow
def test_its_exit_code_becomes_the_daemons(tmp_path: Path, script: str, code: int) -> None:
    ended = run(tmp_path, "sh", "-c", script)
    assert ended.returncode == code
    assert "sandboxd has stopped" in ended.stdout, "in order, with the log complete"
    assert ended.stderr == ""


@pytest.mark.parametrize(
    ("command", "code", "why"), [("no-such-program", 127, "No such file"), ("/etc", 126, "denied")]
)
@pytest.mark.slow
def test_one_that_cannot_be_run_ends_the_daemon_as_a_shell_would(
    tmp_path: Path, command: str, code: int, why: str
) -> None:
    ended = run(tmp_path, command)
    assert ended.returncode == code
    assert f"cannot run {command}: " in ended.stdout
    assert why in ended.stdout
    assert "Traceback" not in ended.stdout


@pytest.mark.slow
async def test_its_exit_code_does_not_depend_on_what_it_leaves_behind(tmp_path: Path) -> None:
    file = tmp_path / "pids"
    child = f"setsid sh -c 'echo $$ >> {file}; exec sleep 300' &"
    ended = run(tmp_path, "sh", "-c", f"{child} until [ -s {file} ]; do :; done; exit 3")
    assert ended.returncode == 3
    await gone(await pids_in(file))


# What it gets


@pytest.mark.slow
def test_its_arguments_output_input_and_environment_are_passed_through(tmp_path: Path) -> None:
    script = 'cat; echo "$1" >&2; pwd; env; ls -l /proc/self/fd | grep -c "[0-9] ->"'
    ended = run(tmp_path, "sh", "-c", script, "sh", "--a  b", stdin="from stdin\n", KEPT="kept", NOTIFY_SOCKET="/nope")
    assert ended.returncode == 0
    assert ended.stderr == "--a  b\n"
    lines = ended.stdout.splitlines()
    assert "from stdin" in lines
    assert str(tmp_path) in lines
    assert "KEPT=kept" in lines
    assert "4" in lines, "no descriptor of the daemon's but the three (and that of ls)"
    assert SECRET not in ended.stdout
    assert "NOTIFY_SOCKET" not in ended.stdout


def test_an_end_of_options_without_a_command_is_none(tmp_path: Path, start_daemon: Callable[..., Daemon]) -> None:
    assert start_daemon("--").stop() == 0


@pytest.mark.parametrize("options", [["surplus", "--", "true"], ["surplus"], ["--nope", "--", "true"]], ids=str)
def test_what_is_before_the_end_of_options_is_still_checked(tmp_path: Path, options: list[str]) -> None:
    assert_refused(twistd(tmp_path, *IN_FOREGROUND, "sandboxd", *options, SANDBOX_SECRET=SECRET))


async def test_the_api_is_served_beside_it_and_does_not_list_it(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--", "sleep", "300")
    api = Api(daemon.url, SECRET)
    assert (await api.run("echo hi"))["stdout"] == "hi\n"
    assert (await api.get("/list_processes")).json() == {"processes": []}
    assert daemon.stop() == 0


# Signals


async def started(daemon: Daemon, word: str = "ready") -> None:
    """Returns once it has written a word."""
    await until(lambda: f"\n{word}\n" in daemon.log.read_text())


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
async def test_a_stop_is_forwarded_and_its_exit_code_kept(
    start_daemon: Callable[..., Daemon], signum: signal.Signals
) -> None:
    script = f"trap 'echo got it; exit 42' {signum.name[3:]}; echo ready; while :; do sleep 0.05; done"
    daemon = start_daemon("--", "sh", "-c", script)
    await started(daemon)
    assert daemon.stop(signum) == 42
    assert "\ngot it\n" in daemon.log.read_text()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
async def test_one_that_dies_of_the_stop_is_a_clean_end(
    start_daemon: Callable[..., Daemon], signum: signal.Signals
) -> None:
    daemon = start_daemon("--", "sh", "-c", "echo ready; exec sleep 300")
    await started(daemon)
    assert daemon.stop(signum) == 0


async def test_other_signals_are_for_it_alone(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(
        "--", "sh", "-c",
        "for s in USR1 USR2 QUIT; do trap \"echo got $s\" $s; done; echo ready; while :; do sleep 0.05; done",
    )  # fmt: skip
    await started(daemon)
    for name in ("USR1", "USR2", "QUIT"):
        os.kill(daemon.pid, signal.Signals[f"SIG{name}"])
        await started(daemon, f"got {name}")
    os.kill(daemon.pid, signal.SIGHUP)
    await until(lambda: "sandboxd reloads" in daemon.log.read_text())
    assert (await Api(daemon.url, SECRET).run("true"))["code"] == 0
    assert daemon.stop() == 0


async def test_it_has_five_seconds_in_which_the_api_goes_on_and_then_all_of_it_is_killed(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    cmd, file = hard_to_end(tmp_path)
    daemon = start_daemon("--", "sh", "-c", cmd)
    pids = await pids_in(file, 6)
    os.kill(daemon.pid, signal.SIGTERM)
    await until(lambda: "sandboxd stops" in daemon.log.read_text())
    assert (await Api(daemon.url, SECRET).run("echo served"))["stdout"] == "served\n"
    os.kill(daemon.pid, signal.SIGTERM)  # impatience changes nothing
    assert daemon.stop() == 128 + signal.SIGKILL
    await gone(pids)
    log = daemon.log.read_text()
    assert "has not ended within 5.0 seconds" in log
    assert "Traceback" not in log


async def test_if_the_daemon_is_killed_nothing_of_it_is_left(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    file = tmp_path / "pids"
    daemon = start_daemon("--", "sh", "-c", f"echo $$ >> {file}; setsid sh -c 'echo $$ >> {file}; exec sleep 300'")
    pids = await pids_in(file, 2)
    daemon.stop(signal.SIGKILL)
    await gone(pids)


# In the background


@pytest.mark.slow
def test_daemonised_its_end_is_the_daemons_too(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    gate = os.open(fifo, os.O_RDWR)
    ended = twistd(
        tmp_path, *AS_DAEMON, "sandboxd", "--", "sh", "-c", f"exec 9>{fifo}; sleep 0.1", SANDBOX_SECRET=SECRET
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    pidfd = os.pidfd_open(int((tmp_path / "daemon.pid").read_text()))
    os.write(gate, b"\n")
    assert select.select([pidfd], [], [], PATIENCE)[0]
    os.close(pidfd)
    os.close(gate)
    assert "the command has ended with code 0" in (tmp_path / "daemon.log").read_text()


async def test_one_that_may_not_be_signalled_does_not_keep_the_daemon(start_daemon: Callable[..., Daemon]) -> None:
    if os.geteuid() != 0 or not shutil.which("setpriv"):
        pytest.skip("NOT TESTED: needs root and setpriv(1) of util-linux")
    command = ("setpriv", "--reuid=65534", "--clear-groups", "sh", "-c", "echo ready; exec sleep 60")
    daemon = start_daemon("--", *command, via=("setpriv", "--bounding-set=-kill"))
    await started(daemon)
    found = re.search(r"runs beside, as pid (\d+)", daemon.log.read_text())
    assert found is not None
    try:
        assert daemon.stop(patience=30) == 0
        log = daemon.log.read_text()
        assert "may not be signalled" in log
        assert "Traceback" not in log
    finally:
        os.kill(int(found[1]), signal.SIGKILL)


async def test_it_does_not_count_as_what_a_command_has_left_behind(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon("--", "sleep", "300")
    api = Api(daemon.url, SECRET)
    await api.run("true")

    async def idle() -> float:
        return float((await api.get("/status")).json()["idle"])

    deadline = time.monotonic() + 10
    while await idle() < 0.5:  # it stays 0 while something runs
        assert time.monotonic() < deadline
        await deferLater(reactor, 0.05)
