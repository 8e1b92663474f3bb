"""``run``, ``start``, ``ps``, ``logs``, ``wait`` and ``kill``."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

from sandboxd.client import Sandbox
from tests.clients.cutting import CuttingProxy
from tests.ctl.conftest import PROGRAM, Ctl
from tests.daemon import Daemon, alive
from tests.waiting import wait_for


@pytest.fixture
def sandbox(daemon: Daemon) -> Any:
    with Sandbox(daemon.url, daemon.secret) as sandbox:
        yield sandbox


def test_run_keeps_the_streams_apart_and_passes_the_code_on(ctl: Ctl, tmp_path: Path) -> None:
    done = ctl("run", "-e", "A=b c", "-e", "HOME", "-C", str(tmp_path), "echo $A; pwd >&2; exit 3", code=3)
    assert (done.stdout, done.stderr) == ("b c\n", f"{tmp_path}\n")
    assert ctl("run", "--", "printf", "%s|", "a b", "$HOME", "-n").stdout == "a b|$HOME|-n|\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("kill -TERM $$",), 143),
        (("-t", "0.2", "sleep 60"), 124),
        (("no-such-command",), 127),
        (("-C", "/no", "x"), 125),
    ],
)
def test_exit_codes(ctl: Ctl, arguments: tuple[str, ...], code: int) -> None:
    ctl("run", *arguments, code=code)


@pytest.mark.slow
def test_run_pipes_stdin_of_any_size(ctl: Ctl) -> None:
    data = "".join(f"{number}\n" for number in range(200_000))
    assert ctl("run", "-i", "cat", input=data).stdout == data
    assert ctl("run", "-i", "head -n 1", input=data).stdout == "0\n"
    assert ctl("run", "cat", input="not sent").stdout == ""


def test_run_reports_input_that_is_not_sent(ctl: Ctl) -> None:
    fd = os.open(os.devnull, os.O_WRONLY)
    done = ctl("run", "-i", "cat", stdin=fd, code=125)
    os.close(fd)
    assert "not sent to its end" in done.stderr
    assert "Bad file descriptor" in done.stderr


def test_output_comes_at_once(environ: dict[str, str], tmp_path: Path) -> None:
    process = subprocess.Popen([*PROGRAM, "run", "echo on; sleep 300"], env=environ, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    with process, process.stdout:
        assert process.stdout.readline() == "on\n"
        process.terminate()
        assert process.wait(20) == 143


@pytest.mark.slow
def test_ctrl_c_ends_the_remote_tree(terminal: Callable[..., Any], tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    cmd = f"trap 'echo bye; exit 7' INT; (echo $$; exec setsid sh -c 'echo $$; sleep 300') >> {pids} & echo on; wait"
    child = terminal("run", cmd)
    child.expect("on")
    wait_for(lambda: pids.exists() and pids.read_text().count("\n") == 2)
    child.sendintr()
    child.expect("bye")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 7
    assert not any(alive(int(pid)) for pid in pids.read_text().split())


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(terminal: Callable[..., Any], tmp_path: Path) -> None:
    child = terminal("run", f"trap 'echo got it' INT; echo $$ > {tmp_path}/pid; echo on; while :; do sleep 1; done")
    child.expect("on")
    pid = int((tmp_path / "pid").read_text())
    begun = time.monotonic()
    child.sendintr()
    child.expect("got it")
    child.sendintr()
    child.wait()
    assert child.exitstatus == 130
    assert time.monotonic() - begun < 2.5
    wait_for(lambda: not alive(pid))


def test_a_reader_that_goes_away_ends_the_command(ctl: Ctl, environ: dict[str, str], tmp_path: Path) -> None:
    assert ended_by_head(environ, "run", f"echo $$ > {tmp_path}/pid; yes") == ("y\n", "141\n")
    wait_for(lambda: not alive(int((tmp_path / "pid").read_text())))


def ended_by_head(environ: dict[str, str], *arguments: str) -> tuple[str, str]:
    """The first line that the program writes to a pipe which is closed then; what is on stderr, then its exit code."""
    script = '{ "$@"; echo $? >&2; } | head -n 1'
    command = ["sh", "-c", script, "sh", *PROGRAM, *arguments]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout, done.stderr


def test_logs_whose_reader_goes_away(environ: dict[str, str], sandbox: Sandbox) -> None:
    id = sandbox.start("seq 1 20000").id  # more than a pipe holds
    sandbox.wait(id)
    first = f"{20001 - 10000}\n"  # what is kept
    assert ended_by_head(environ, "logs", "--tail", "10000", id) == (first, "141\n")


def test_run_through_a_connection_that_breaks(ctl: Ctl, proxy: CuttingProxy) -> None:
    proxy.cuts = [2000, 30_000]
    done = ctl("run", "seq 1 9000", env={"SANDBOX_URL": proxy.url})
    assert done.stdout.split() == [str(number) for number in range(1, 9001)]


@pytest.mark.slow
def test_processes(ctl: Ctl, sandbox: Sandbox) -> None:
    id = ctl("start", "-e", "A=b", "seq 1 5; echo oops >&2; sleep 300").stdout.strip()
    assert sandbox.process(id).status == "running"
    wait_for(lambda: sandbox.process(id).output.records == 6)
    listed = ctl("ps").stdout
    assert "ID" in listed.splitlines()[0]
    assert id[:8] in listed
    assert "\x1b" not in listed
    assert id in [each["id"] for each in json.loads(ctl("ps", "--json", "--running").stdout)]
    done = ctl("logs", "--tail", "3", id[:8])
    assert (done.stdout, done.stderr) == ("4\n5\n", "oops\n")
    assert ctl("logs", "--tail", "0", id).stdout == ""
    assert ctl("logs", "-t", id).stdout.splitlines()[0].endswith("Z 1")
    assert json.loads(ctl("logs", "--json", id).stdout.splitlines()[0])["data"] == "1"
    assert ctl("wait", "-t", "0.1", id, code=124).stdout == ""
    assert ctl("kill", "-s", "TERM", id[:10]).stdout.strip() == id
    assert ctl("wait", id, code=143).stdout == ""
    assert json.loads(ctl("wait", "--json", id, code=143).stdout)["status"] == "killed"
    other = ctl("start", "--", "sh", "-c", "exit 9").stdout.strip()
    ctl("wait", other, code=9)


def test_ids_that_are_not_unique_or_not_there(ctl: Ctl, sandbox: Sandbox) -> None:
    first = sandbox.start("sleep 300")
    while not any(each.id != first.id and each.id[0] == first.id[0] for each in sandbox.processes()):
        sandbox.start("true")
    done = ctl("logs", first.id[0], code=125)
    assert first.id in done.stderr
    assert "Give more" in done.stderr
    assert "sandboxctl ps" in ctl("kill", "zzz", code=125).stderr
    sandbox.kill(first.id)


def test_logs_follow_through_a_connection_that_breaks(
    environ: dict[str, str], sandbox: Sandbox, proxy: CuttingProxy
) -> None:
    id = sandbox.start("for i in $(seq 1 300); do echo $i; sleep 0.003; done").id
    proxy.cuts = [700, 6000, 9000]
    done = subprocess.run(
        [*PROGRAM, "logs", "-f", id],
        env={**environ, "SANDBOX_URL": proxy.url},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert done.stdout.split() == [str(number) for number in range(1, 301)]
    assert proxy.connections >= 4


@pytest.mark.slow
def test_ps_on_a_terminal(terminal: Callable[..., Any], sandbox: Sandbox) -> None:
    id = sandbox.start("sleep 300; echo '\x1b[31m'").id
    child = terminal("ps", "--running")
    child.expect(id[:8])
    child.expect(r"\x1b\[32mrunning")  # green
    child.expect(r"x1b\[31m")  # what a command contains does not steer the terminal
    plain = terminal("ps", "--running", env={"NO_COLOR": "1"})
    assert "\x1b" not in plain.read()
    watching = terminal("ps", "--watch")
    watching.expect(id[:8])
    watching.expect(id[:8])
    watching.sendintr()
    watching.wait()
    assert watching.exitstatus == 0
    sandbox.kill(id)
