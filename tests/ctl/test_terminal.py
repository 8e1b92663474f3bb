"""``shell`` and ``attach``, in a real pseudo-terminal."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from sandboxd.client import Sandbox
from sandboxd.ctl.terminal import TYPED, Escapes
from tests.clients.cutting import CuttingProxy
from tests.ctl.conftest import PROGRAM, Ctl
from tests.daemon import Daemon
from tests.waiting import wait_for


@pytest.fixture
def sandbox(daemon: Daemon) -> Iterator[Sandbox]:
    with Sandbox(daemon.url, daemon.secret) as sandbox:
        yield sandbox


@pytest.mark.parametrize(
    ("typed", "sent", "left"),
    [
        (["ls\r"], b"ls\r", False),
        (["~."], b"", True),
        (["~", "."], b"", True),
        (["a~.\r~~b\r"], b"a~.\r~b\r", False),
        (["~a"], b"~a", False),
        (["x\r~.y"], b"x\r", True),
    ],
)
def test_escapes(typed: list[str], sent: bytes, left: bool) -> None:
    escapes = Escapes()
    assert b"".join(escapes.feed(text.encode()) for text in typed) == sent
    assert escapes.left is left


def test_shell(terminal: Callable[..., Any]) -> None:
    child = terminal("shell", "-e", "PS1=ready> ", "-C", "/", "sh")
    child.expect("ready> ")
    child.sendline("tty; stty size; pwd; echo $TERM")
    child.expect(r"/dev/pts/\d+\r\n40 120\r\n/\r\nxterm-256color\r\n")
    child.setwinsize(30, 100)
    child.expect("ready> ")
    child.sendline("sleep 0.3; stty size")
    child.expect("30 100")
    child.expect("ready> ")
    # Interrupted while it forks, an interactive sh may lose the signal.
    child.sendline("sh -c 'echo begun; exec sleep 300'")
    child.expect("\nbegun\r\n")
    child.sendintr()
    child.expect("ready> ")
    child.sendline("exit 7")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 7


def test_shell_without_a_terminal(ctl: Ctl) -> None:
    assert "sandboxctl run" in ctl("shell", code=2).stderr


def test_leaving_and_coming_back(terminal: Callable[..., Any], sandbox: Sandbox) -> None:
    child = terminal("shell", "-e", "PS1=ready> ", "sh")
    child.expect("ready> ")
    child.sendline("MARK=here; echo first")
    child.expect("first\r\nready> ")
    child.send("~?")
    child.expect("~.  leave")
    child.send("\r~.")
    child.expect(r"sandboxctl attach ([0-9a-f]{8})")
    id = child.match[1]
    child.wait()
    assert child.exitstatus == 0
    again = terminal("attach", id)
    again.expect("first\r\nready> ")  # its history
    again.sendline("echo $MARK$MARK")
    again.expect("herehere")
    again.sendeof()
    again.expect("$")
    again.wait()
    assert again.exitstatus == 0


def test_shell_through_a_connection_that_breaks(terminal: Callable[..., Any], proxy: CuttingProxy) -> None:
    child = terminal("shell", "-e", "PS1=ready> ", "sh", env={"SANDBOX_URL": proxy.url})
    child.expect("ready> ")
    child.sendline("echo before; sleep 0.5; echo after")
    child.expect("\nbefore\r\n")
    proxy.cut()
    child.expect("after\r\nready> ")
    assert "before" not in child.before  # nothing is shown twice
    child.sendline("echo $((40 + 2))")
    child.expect("42\r\nready> ")
    proxy.cut()
    child.sendline("exit 3")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 3


def test_a_long_shell_goes_on_where_it_was(terminal: Callable[..., Any], proxy: CuttingProxy) -> None:
    child = terminal("shell", "seq 1 30000; echo all; read x; echo last; sleep 60", env={"SANDBOX_URL": proxy.url})
    child.expect("\nall\r\n")
    proxy.cut()
    child.sendline("")
    child.expect("\nlast\r\n")
    assert "lost" not in child.before
    child.send("\r~.")
    child.expect("to come back")


def test_after_a_gap_the_screen_is_drawn_anew(
    terminal: Callable[..., Any], proxy: CuttingProxy, tmp_path: Path
) -> None:
    cmd = (
        f"trap 'echo size $(stty size)' WINCH; echo ready; until [ -e {tmp_path}/go ]; do :; done; seq 1 200000;"
        " while :; do sleep 0.1; done"
    )
    child = terminal("shell", cmd, env={"SANDBOX_URL": proxy.url}, timeout=40)
    child.expect("ready")
    (tmp_path / "go").touch()
    proxy.cut()
    child.expect("lines are no longer kept")
    child.expect("size 40 120")
    child.send("\r~.")
    child.expect("to come back")


def test_the_terminal_is_as_it_was(environ: dict[str, str], tmp_path: Path) -> None:
    command = f"stty -a > {tmp_path}/before; {' '.join(PROGRAM)} shell sh -c 'exit 5'; echo code $?; stty -a"
    child = pexpect.spawn("sh", ["-c", command], env=environ, encoding="utf-8", timeout=20)
    output = child.read().replace("\r\n", "\n")
    child.close()
    assert output == "code 5\n" + (tmp_path / "before").read_text()


def test_attach_to_output(ctl: Ctl, sandbox: Sandbox) -> None:
    id = sandbox.start("echo out; printf err >&2; read line; echo got $line; exit 4", stdin=True).id
    done = ctl("attach", "-i", id[:8], input="this\n", code=4)
    assert (done.stdout, done.stderr) == ("out\ngot this\n", "err")


@pytest.mark.slow
def test_attach_pipes_files(ctl: Ctl, sandbox: Sandbox, tmp_path: Path) -> None:
    lines = "".join(f"{number}\n" for number in range(5_000))  # fewer than a log keeps
    (tmp_path / "file").write_text(lines)
    with (tmp_path / "file").open() as file:
        assert ctl("attach", "-i", sandbox.start("cat; exit 4", stdin=True).id, stdin=file, code=4).stdout == lines
    with Path("/dev/zero").open() as file:  # nobody reads most of it
        assert len(ctl("attach", "-i", sandbox.start("head -c 9", stdin=True).id, stdin=file).stdout) == 9
    assert ctl("attach", "-i", sandbox.start("cat; exit 4", stdin=True).id, code=4).stdout == ""
    typed = ctl("attach", "-i", sandbox.start("read line; echo got $line", tty=True).id, input="this\n").stdout
    assert "got this" in typed


@pytest.mark.slow
def test_attach_reports_input_that_is_not_sent(
    ctl: Ctl, sandbox: Sandbox, environ: dict[str, str], proxy: CuttingProxy
) -> None:
    id = sandbox.start("exec sleep 300", stdin=True).id
    fd = os.open(os.devnull, os.O_WRONLY)
    assert "Bad file descriptor" in ctl("attach", "-i", id, stdin=fd, code=125).stderr
    os.close(fd)
    command = [*PROGRAM, "attach", "-i", id]
    with (
        Path("/dev/zero").open("rb") as zeros,
        subprocess.Popen(
            command, env={**environ, "SANDBOX_URL": proxy.url}, stdin=zeros, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        wait_for(lambda: proxy.forwarded > 128 * 1024)  # more than the pipe takes
        proxy.cut()
        assert "not sent to its end" in process.communicate(timeout=20)[1]
        assert process.returncode == 125
    sandbox.kill(id)
    id = sandbox.start("exec sleep 300").id
    assert "started without stdin" in ctl("attach", "-i", id, input="x", code=125).stderr
    sandbox.kill(id)


@pytest.mark.slow
def test_what_is_typed_without_a_connection(
    terminal: Callable[..., Any], proxy: CuttingProxy, sandbox: Sandbox
) -> None:
    child = terminal("--patience", "100", "shell", "echo ready; exec sleep 300", env={"SANDBOX_URL": proxy.url})
    child.expect("ready")
    proxy.close()
    child.send("x" * (TYPED + 100_000))
    child.expect("\a")  # this does not fit
    child.send("\r~.")
    child.expect(r"sandboxctl attach ([0-9a-f]{8})")
    assert "Traceback" not in child.before
    assert "Queue" not in child.before
    id = child.match[1]
    child.wait()
    assert child.exitstatus == 0
    (found,) = [each.id for each in sandbox.processes() if each.id.startswith(id)]
    sandbox.kill(found)
