"""Terminals with limits, timeouts, keys, detach, survive, a root, and at the stop; in cgroups: ``test_cgroup.py``."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from tests.client import Api
from tests.daemon import Daemon, alive
from tests.test_attach import Attached, call, described, kill, start
from tests.test_tunnel import echo, open_tunnel, serving
from tests.waiting import gone, pids_in


def shown(daemon: Daemon, id: str) -> list[str]:
    """The lines that a terminal shows when its process has ended."""
    with Attached(daemon, id) as client:
        client.to_the_end()
        return client.lines


def test_missing_parts_of_a_size_have_defaults_and_input_is_typed_in(daemon: Daemon) -> None:
    body = {"argv": ["sh", "-c", "echo $TERM $(stty size); cat"], "tty": {"cols": 65535}, "merge_stderr": True}
    reply = call(daemon, "POST", "/run", {**body, "input": "typed\r\u0004"})
    assert reply["code"] == 0
    assert "xterm-256color 24 65535\r\n" in reply["stdout"]
    assert reply["stdout"].endswith("typed\r\n")


@pytest.mark.parametrize("route", ["/run", "/start_process"])
def test_limits_hold_in_a_terminal(daemon: Daemon, route: str) -> None:
    command = {"cmd": "ulimit -n; ulimit -c; test -t 0 && echo tty", "tty": True, "limits": {"nofile": 50, "core": 0}}
    reply = call(daemon, "POST", route, command)
    if route == "/run":
        assert reply["stdout"] == "50\r\n0\r\ntty\r\n"
    else:
        assert shown(daemon, reply["id"]) == ["50", "0", "tty"]


@pytest.mark.slow
def test_a_timeout_ends_a_terminal_and_its_jobs(daemon: Daemon, tmp_path: Path) -> None:
    command = f"set -m; sleep 300 & echo $! > {tmp_path}/pid; wait"
    reply = call(daemon, "POST", "/run", {"argv": ["bash", "-c", command], "tty": True, "timeout": 0.5})
    assert (reply["code"], reply["timed_out"]) == (-1, True)
    assert not alive(int((tmp_path / "pid").read_text()))


async def test_a_terminal_that_is_asked_for_again_is_the_same_one(api: Api, daemon: Daemon) -> None:
    body = {"argv": ["cat"], "tty": {"cols": 100, "rows": 30}}
    replies = [await api.post("/start_process", body, {"Idempotency-Key": "terminal-1"}) for _ in range(2)]
    assert replies[0].json() == replies[1].json()
    assert [reply.status for reply in replies] == [201, 201]
    id = replies[0].json()["id"]
    assert described(daemon, id)["tty"] == {"cols": 100, "rows": 30}
    other = await api.post("/start_process", {**body, "tty": True}, {"Idempotency-Key": "terminal-1"})
    assert other.status == 409
    kill(daemon, id)


async def test_a_detached_terminal_outlives_its_stream(api: Api, daemon: Daemon) -> None:
    stream = await api.stream("echo one; read line; echo got $line; exit 3", tty=True, detach=True)
    id = stream.headers.getRawHeaders("X-Execution-Id")[0]
    stream.close()
    with Attached(daemon, id) as client:
        client.shows("one")
        client.type("two\r")
        client.to_the_end()
        assert client.lines == ["one", "two", "got two"]
        assert client.status["details"]["causes"][0]["message"] == "3"


async def test_a_terminal_ends_with_its_stream_unless_detached(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    stream = await api.stream(f"echo $$ > {tmp_path}/pid; read line", tty=True)
    pids = await pids_in(tmp_path / "pid")
    stream.close()
    await gone(pids)


async def test_a_death_of_the_daemon_hangs_terminals_up_and_what_ignores_that_may_survive(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    script = "trap '{}' HUP; echo $$ > {}; while :; do sleep 0.05; done"
    start(daemon, script.format("", tmp_path / "ignores"), tty=True, survive=True)
    start(daemon, script.format(f"echo hup > {tmp_path}/hup; exit", tmp_path / "hangs-up"), tty=True, survive=True)
    start(daemon, script.format("", tmp_path / "ends"), tty=True)
    pids = {name: (await pids_in(tmp_path / name))[0] for name in ("ignores", "hangs-up", "ends")}
    daemon.stop(signal.SIGKILL)
    try:
        await gone([pids["hangs-up"], pids["ends"]])
        assert (tmp_path / "hup").read_text() == "hup\n"
        assert alive(pids["ignores"])
    finally:
        with suppress(ProcessLookupError):
            os.kill(pids["ignores"], signal.SIGKILL)


def test_a_terminal_starts_in_the_root(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "work").mkdir(parents=True)
    daemon = start_daemon(SANDBOX_ROOT=str(top))
    assert call(daemon, "POST", "/run", {"cmd": "pwd", "tty": True})["stdout"] == f"{top}\r\n"
    assert call(daemon, "POST", "/run", {"cmd": "pwd", "tty": True, "cwd": "work"})["stdout"] == f"{top}/work\r\n"
    refused = call(daemon, "POST", "/start_process", {"tty": True, "cwd": "/"})
    assert refused["http"] == 400
    assert "Invalid working directory" in refused["error"]


async def test_a_stop_sends_terminals_hup_then_term_then_kill_and_says_how_they_ended(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    trace = tmp_path / "signals"
    traps = " ".join(f"trap 'echo {name} >> {trace}' {name};" for name in ("HUP", "TERM"))
    id = start(daemon, f"{traps} echo $$ > {tmp_path}/pid; while :; do sleep 0.02; done", tty=True)
    pids = await pids_in(tmp_path / "pid")
    with serving(echo) as port, Attached(daemon, id) as client, open_tunnel(daemon, port) as tunnel:
        began = time.monotonic()
        os.kill(daemon.pid, signal.SIGTERM)
        client.to_the_end()
        assert client.status["details"]["causes"][0]["message"] == str(128 + signal.SIGKILL)
        assert client.code == 1000
        assert time.monotonic() - began > 2.5
        with pytest.raises(ConnectionClosed) as closed:
            tunnel.recv(timeout=10)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
    assert daemon.stop() == 0
    assert trace.read_text() == "HUP\nTERM\n"
    assert not any(map(alive, pids))
