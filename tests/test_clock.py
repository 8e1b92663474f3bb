"""Durations: neither the wall clock nor a pause of the daemon changes them."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.reactor.clock import LONGEST_GAP, RunningTime
from tests.client import Api
from tests.daemon import Daemon
from tests.waiting import gone, pids_in

#: Runs the program in its arguments with a wall clock that is ahead by the seconds in a file.
SHIFTED = """
import os, runpy, sys, time
real, file = time.time, os.environ["CLOCK_SHIFT"]
time.time = lambda: real() + float(open(file).read())
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""

TWO_HOURS = 7200


@given(st.lists(st.floats(0, 100)))
def test_it_never_goes_back_and_counts_at_most_the_longest_gap(steps: list[float]) -> None:
    now = 0.0
    clock = RunningTime(lambda: now)
    before = clock()
    for step in steps:
        now += step
        after = clock()
        assert after - before == pytest.approx(min(step, LONGEST_GAP), abs=1e-6)
        before = after


@pytest.fixture
def shift(tmp_path: Path) -> Path:
    """A file of seconds by which the wall clock of the daemon is ahead."""
    path = tmp_path / "shift"
    path.write_text("0")
    return path


@pytest.fixture
def shifted(start_daemon: Callable[..., Daemon], shift: Path) -> Api:
    daemon = start_daemon(via=(sys.executable, "-c", SHIFTED), CLOCK_SHIFT=str(shift))
    return Api(daemon.url, daemon.secret)


def set_shift(shift: Path, seconds: int) -> None:
    new = shift.with_suffix(".new")
    new.write_text(str(seconds))
    new.rename(shift)


@pytest.mark.slow
async def test_the_wall_clock_is_set_forward(shifted: Api, shift: Path) -> None:
    id = await shifted.start("sleep 300", timeout=3600, idle_timeout=3600)
    set_shift(shift, TWO_HOURS)
    # Longer than the daemon's own timers: whatever the jump fires has fired by then.
    assert (await shifted.run("sleep 1; echo done"))["stdout"] == "done\n"
    assert (await shifted.process(id))["status"] == "running"


@pytest.mark.slow
async def test_the_wall_clock_is_set_back(shifted: Api, shift: Path) -> None:
    id = await shifted.start("sleep 300", timeout=1)
    set_shift(shift, -TWO_HOURS)
    assert (await shifted.run("sleep 300", timeout=0.5))["timed_out"]
    assert (await shifted.post(f"/processes/{id}/wait", {"timeout": 10})).json()["timed_out"]


def test_the_watchdog_is_fed_though_the_wall_clock_is_set_back(
    start_daemon: Callable[..., Daemon], shift: Path, tmp_path: Path
) -> None:
    address = str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address)
        manager.settimeout(10)
        start_daemon(
            via=(sys.executable, "-c", SHIFTED),
            CLOCK_SHIFT=str(shift),
            NOTIFY_SOCKET=address,
            WATCHDOG_USEC="200000",
        )
        set_shift(shift, -TWO_HOURS)
        for _ in range(20):  # more than can have been on their way
            while manager.recv(4096) != b"WATCHDOG=1":
                pass


async def test_timestamps_are_of_the_wall_clock(shifted: Api, shift: Path) -> None:
    set_shift(shift, TWO_HOURS)
    id = await shifted.start("echo line")
    found = (await shifted.post(f"/processes/{id}/wait", {"timeout": 10})).json()
    (record,) = (await shifted.get(f"/processes/{id}/logs")).json()["records"]
    for text in (found["started_at"], found["ended_at"], found["output"]["last_at"], record["timestamp"]):
        ahead = datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp() - time.time()
        assert ahead == pytest.approx(TWO_HOURS, abs=60)


async def test_time_in_which_the_daemon_is_stopped_does_not_count(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    pid = tmp_path / "pid"
    id = await api.start(f"echo $$ > {pid}; exec sleep 300", timeout=LONGEST_GAP + 2)
    sleeper = await pids_in(pid)
    os.kill(daemon.pid, signal.SIGSTOP)
    time.sleep(LONGEST_GAP + 2.5)  # longer than the timeout; nothing happens meanwhile that could be awaited
    os.kill(daemon.pid, signal.SIGCONT)
    assert (await api.process(id))["status"] == "running"
    await gone(sleeper)
    assert (await api.get(f"/processes/{id}")).json()["timed_out"]
