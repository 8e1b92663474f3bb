"""The walk over all processes, in a process of its own that has few descriptors."""

from __future__ import annotations

import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.client import Api
from tests.daemon import Daemon, alive
from tests.waiting import gone, pids_in

WALK = """
import os, resource, signal, subprocess
from sandboxd.processes.marks import Marks, sweep

mark = Marks().new()
soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
resource.setrlimit(resource.RLIMIT_RTTIME, (mark, hard))
children = [subprocess.Popen(["sleep", "300"]) for _ in range(30)]
resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))
choose = {mark: signal.SIGKILL}.get
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, hard))
walks = 0
while sweep(choose, 5.0):
    walks += 1
assert walks
assert [child.wait(10) for child in children] == [-signal.SIGKILL] * 30
"""


def test_a_tree_is_gone_even_if_its_processes_are_more_than_the_descriptors() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", WALK], check=True, timeout=30)


WITHOUT_RTTIME = (sys.executable, "-m", "tests.without_rttime")


async def test_where_the_limit_cannot_be_set_trees_are_found_by_other_marks(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("NOT TESTED: the seccomp filter is for x86-64")
    root = str(Path(__file__).parent.parent)
    daemon = start_daemon(via=WITHOUT_RTTIME, PYTHONPATH=root)
    api = Api(daemon.url, daemon.secret)
    status = (await api.get("/status")).json()
    assert status.get("marks") == "environment", status
    assert (await api.run("echo on"))["stdout"] == "on\n"
    assert (await api.run("pwd", cwd="/"))["stdout"] == "/\n"
    child = f"echo $$ >> {tmp_path}/pids; exec sleep 300"
    cmd = f"setsid sh -c '{child}' & env -i sh -c '{child}' & env -i setsid sh -c '{child}' & sh -c '{child}'"
    id = await api.start(cmd)
    pids = await pids_in(tmp_path / "pids", 4)
    other = await api.start("sleep 300")
    assert (await api.post("/kill_process", {"id": id})).status == 200
    assert not any(map(alive, pids))
    assert (await api.get(f"/processes/{other}")).json()["status"] == "running"
    (tmp_path / "pids").unlink()
    await api.start(cmd)
    pids = await pids_in(tmp_path / "pids", 4)
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    await gone(pids)
