"""Ending things works when threads, descriptors or rights are short, and says what it cannot end."""

from __future__ import annotations

import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from sandboxd.processes.reaper import Reaper
from sandboxd.reactor.threads import ThreadPool
from tests.client import Api
from tests.daemon import Daemon, alive
from tests.hanging import HangingDirectory
from tests.waiting import gone, pids_in, until, within

RESERVED = """
import os, resource, signal, subprocess
from sandboxd.processes.marks import Marks
from sandboxd.processes.trees import _Reserve

mark = Marks().new()
soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
resource.setrlimit(resource.RLIMIT_RTTIME, (mark, hard))
children = [subprocess.Popen(["sleep", "300"], start_new_session=True) for _ in range(10)]
resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))
choose = {mark: signal.SIGKILL}.get
reserve = _Reserve()
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
try:
    while True:
        os.dup(0)
except OSError:
    pass
found = reserve.sweep(choose, 1.0, frozenset())
assert sorted(found[mark].pids) == sorted(child.pid for child in children), found
assert [child.wait(10) for child in children] == [-signal.SIGKILL] * 10
"""


def test_a_walk_finds_and_kills_all_without_a_descriptor_left() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", RESERVED], check=True, timeout=30)


@pytest.fixture
def no_threads() -> Iterator[None]:
    """No thread can be started: there is no address space for its stack."""
    before = threading.stack_size(1 << 46)
    yield
    threading.stack_size(before)


async def test_a_pool_recovers_when_threads_could_not_be_started(no_threads: None) -> None:
    pool = ThreadPool(reactor, 2, "test")  # type: ignore[arg-type]
    for _ in range(3):
        with pytest.raises(OSError, match="temporarily unavailable"):
            await pool(os.getpid)
    assert pool.under_way == 0
    threading.stack_size(0)
    assert await within(5, called(pool)) == os.getpid()
    assert pool.under_way == 0
    pool.stop()


async def called(pool: ThreadPool) -> int:
    return await pool(os.getpid)


async def test_a_pool_that_was_started_needs_no_more_threads() -> None:
    pool = ThreadPool(reactor, 2, "test")  # type: ignore[arg-type]
    pool.start()
    before = threading.stack_size(1 << 46)
    try:
        assert await within(5, called(pool)) == os.getpid()
    finally:
        threading.stack_size(before)
        pool.stop()


async def details(api: Api, id: str) -> dict[str, Any]:
    """All that is known of an execution."""
    found: dict[str, Any] = (await api.get(f"/processes/{id}")).json()
    return found


def lower(daemon: Daemon, limit: int, value: int) -> Callable[[], None]:
    """Lower a soft limit of a daemon; return what raises it again."""
    before = resource.prlimit(daemon.pid, limit)
    resource.prlimit(daemon.pid, limit, (value, before[1]))
    return lambda: resource.prlimit(daemon.pid, limit, before) and None


async def test_a_timeout_ends_the_tree_though_no_descriptor_is_left(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    id = await api.start(f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 300' & sleep 300", timeout=1.5)
    pids = await pids_in(tmp_path / "pid")
    # No descriptor above those that are open now, and clients that take what is free below.
    restore = lower(daemon, resource.RLIMIT_NOFILE, max(map(int, os.listdir(f"/proc/{daemon.pid}/fd"))) + 1)
    clients = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(50)]
    await gone(pids, 5)
    for client in clients:
        client.close()
    restore()
    ended = await details(api, id)
    assert (ended["status"], ended["timed_out"], ended["survivors"]) == ("killed", True, [])


async def test_a_timeout_ends_the_tree_though_no_thread_can_be_started(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    id = await api.start(f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 300' & sleep 300", timeout=1.5)
    pids = await pids_in(tmp_path / "pid")
    restore = lower(daemon, resource.RLIMIT_AS, 1 << 20)  # a new thread has no room for its stack
    try:
        await gone(pids, 5)
    finally:
        restore()
    assert (await details(api, id))["status"] == "killed"
    assert daemon.stop() == 0


async def test_a_second_signal_is_sent_while_the_first_one_is_waited_for(api: Api, tmp_path: Path) -> None:
    traps = f"trap 'echo > {tmp_path}/term' TERM; trap 'exit 3' INT"
    id = await api.start(f"{traps}; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done")
    await pids_in(tmp_path / "pid")
    first = Deferred.fromCoroutine(api.post("/kill_process", {"id": id, "signal": "TERM", "grace": 50}))
    await until((tmp_path / "term").exists)
    assert (await within(10, api.post("/kill_process", {"id": id, "signal": "INT", "grace": 50}))).status == 200
    assert (await first.addTimeout(10, reactor)).status == 200
    assert (await details(api, id))["exit_code"] == 3


UNPRIVILEGED = ("setpriv", "--bounding-set", "-kill", "--inh-caps", "-kill")


@pytest.fixture
def powerless(start_daemon: Callable[..., Daemon]) -> Daemon:
    """A daemon that may not signal the processes of another user, which its commands can start."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("NOT TESTED: only root can start processes that it may not signal")
    return start_daemon(via=UNPRIVILEGED)


@pytest.fixture
def foreign() -> Iterator[tuple[str, Path]]:
    """The text of a process of another user, and the file in which it writes its pid."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        file = Path(folder) / "pid"
        yield f"setpriv --reuid=65534 --clear-groups sh -c 'echo $$ > {file}; exec sleep 300'", file


@pytest.mark.parametrize("path", ["/run", "/run_streaming"])
@pytest.mark.parametrize("whole", [True, False], ids=["shell", "child"])
async def test_a_timeout_answers_on_time_and_names_what_it_cannot_end(
    powerless: Daemon, foreign: tuple[str, Path], path: str, whole: bool
) -> None:
    api = Api(powerless.url, powerless.secret)
    cmd, file = foreign
    began = time.monotonic()
    cmd = f"echo out; exec {cmd}" if whole else f"echo out; {cmd}; :"
    reply = await within(10, api.post(path, {"cmd": cmd, "timeout": 0.5}))
    (pid,) = await pids_in(file)
    try:
        assert time.monotonic() - began < 5
        (id,) = reply.headers.getRawHeaders("X-Execution-Id") or []
        text = reply.body.decode()
        for part in ('"timed_out":true', f'"survivors":[{pid}]', '"code":-1', "out"):
            assert part in text
        assert (await details(api, id))["status"] == ("running" if whole else "killed")
    finally:
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not alive(pid))
    assert (await api.post(f"/processes/{id}/wait", {"timeout": 5})).json()["status"] == "killed"


async def test_an_agents_command_that_cannot_be_ended_is_answered_on_time(
    powerless: Daemon, foreign: tuple[str, Path]
) -> None:
    api = Api(powerless.url, powerless.secret)
    cmd, file = foreign
    arguments = {"command": f"exec {cmd}", "timeout": 0.5}
    message = {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "run_command", "arguments": arguments},
    }
    calling = Deferred.fromCoroutine(api.post("/mcp", message, {"Accept": "application/json, text/event-stream"}))
    (pid,) = await pids_in(file)
    try:
        result = (await calling.addTimeout(10, reactor)).json()["result"]
        assert result["structuredContent"]["still_running"] == [pid]
        assert "could not be killed" in result["content"][0]["text"]
    finally:
        os.kill(pid, signal.SIGKILL)


async def test_what_may_not_be_signalled_is_named(powerless: Daemon, foreign: tuple[str, Path]) -> None:
    api = Api(powerless.url, powerless.secret)
    cmd, file = foreign
    id = await api.start(f"{cmd} & sleep 300")
    (pid,) = await pids_in(file)
    refused = await api.post(f"/processes/{id}/signal", {"signal": "CHLD"})
    assert (refused.status, refused.json()["error"]) == (409, f"{pid}: operation not permitted")
    refused = await within(10, api.post("/kill_process", {"id": id}))
    assert (refused.status, refused.json()["survivors"]) == (409, [pid])
    ended = await details(api, id)
    assert (ended["status"], ended["survivors"]) == ("killed", [pid])
    os.kill(pid, signal.SIGKILL)
    await gone([pid])
    assert (await details(api, id))["survivors"] == []


@pytest.mark.slow
async def test_what_a_command_has_left_is_named_and_can_be_ended(api: Api, tmp_path: Path) -> None:
    trap = f'trap "echo > {tmp_path}/got" USR1'
    cmd = f"setsid sh -c '{trap}; echo $$ > {tmp_path}/pid; while :; do sleep 0.1; done' &"
    reply = await api.post("/run", {"cmd": f"{cmd} sleep 0.3"})
    (id,) = reply.headers.getRawHeaders("X-Execution-Id") or []
    (pid,) = await pids_in(tmp_path / "pid")
    ended = await details(api, id)
    assert ended["status"] == "completed"
    assert pid in ended["survivors"]
    assert (await api.post(f"/processes/{id}/signal", {"signal": "USR1"})).status == 200
    await until((tmp_path / "got").exists)
    assert (await api.post("/kill_process", {"id": id})).status == 200
    assert not alive(pid)
    ended = await details(api, id)
    assert (ended["status"], ended["survivors"]) == ("completed", [])
    again = await api.post("/kill_process", {"id": id})
    assert (again.status, again.json()["error"]) == (400, "process is not running (status: completed)")
    assert (await api.post(f"/processes/{id}/signal", {"signal": "USR1"})).status == 409


async def test_what_is_left_may_write_for_ever_and_costs_nothing(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    await api.run(f"yes & echo $! > {tmp_path}/yes")
    await api.run(f"(while echo line; do echo >> {tmp_path}/lines; sleep 0.01; done) &")
    (pid,) = await pids_in(tmp_path / "yes")
    await until((tmp_path / "lines").exists)
    lines = (tmp_path / "lines").stat().st_size
    before, began = cpu(daemon.pid), time.monotonic()
    await until(lambda: (tmp_path / "lines").stat().st_size > lines + 200)  # it is neither ended nor blocked
    assert alive(pid)
    assert cpu(daemon.pid) - before < 0.15 * (time.monotonic() - began)


def cpu(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_a_status_is_not_that_of_an_earlier_process_with_the_same_pid() -> None:
    reaper = Reaper()
    child = subprocess.Popen(["sleep", "300"])
    reaper._unclaimed[child.pid] = 0  # of an orphan that had this pid before
    statuses: list[int] = []
    try:
        assert reaper.adopt(reactor, child.pid, statuses.append)  # type: ignore[arg-type]
        assert statuses == []
    finally:
        child.kill()
        child.wait()


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Path]:
    """A directory whose entering hangs."""
    path = tmp_path / "hanging"
    path.mkdir()
    try:
        mounted = HangingDirectory(path)
    except OSError as error:
        pytest.skip(f"NOT TESTED: no FUSE: {error}")
    yield path
    mounted.close()


async def test_a_directory_that_hangs_holds_up_its_own_command_only(
    start_daemon: Callable[..., Daemon], hanging: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    began = time.monotonic()
    body = {"cmd": "true", "cwd": str(hanging)}
    starts = [Deferred.fromCoroutine(api.post("/run", body)) for _ in range(4)]
    timed = Deferred.fromCoroutine(api.post("/run", {**body, "timeout": 1}))
    for _ in range(5):
        assert (await within(2, api.run("echo on")))["stdout"] == "on\n"
    reply = (await timed.addTimeout(5, reactor)).json()
    assert reply == {"stdout": "", "stderr": "", "code": -1, "error": ANY, "timed_out": True}
    assert time.monotonic() - began < 6
    assert [(await start.addTimeout(20, reactor)).status for start in starts] == [503] * 4
    last = Deferred.fromCoroutine(api.post("/run", body))
    last.addBoth(lambda _: None)
    assert daemon.stop() == 0


#: Each process leaves its session, forks another one and exits, for 20 seconds at most.
FORKS_AND_EXITS = r"""
#include <time.h>
#include <unistd.h>

int main(void) {
    time_t end = time(NULL) + 20;
    write(1, "x", 1);
    while (time(NULL) < end) {
        setsid();
        if (fork())
            _exit(0);
    }
    return 0;
}
"""


async def test_a_kill_ends_processes_that_fork_and_exit_at_once(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("NOT TESTED: this needs cc")
    source, program, fifo = tmp_path / "forks.c", tmp_path / "forks", tmp_path / "fifo"
    source.write_text(FORKS_AND_EXITS)
    subprocess.run([compiler, "-O2", "-w", "-o", program, source], check=True, timeout=30)
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    for _ in range(3):
        os.mkfifo(fifo)
        alive_while_open = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
        try:
            id = await api.start(f"{program} > {fifo}; exec sleep 300")
            poll = select.poll()
            poll.register(alive_while_open, select.POLLIN)
            assert poll.poll(10_000)
            assert os.read(alive_while_open, 1) == b"x"
            assert (await api.post("/kill_process", {"id": id})).status == 200
            assert os.read(alive_while_open, 1) == b""  # EAGAIN if one of them is alive
        finally:
            os.close(alive_while_open)
            fifo.unlink()
