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
from tests.waiting import gone, pids_in, within

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


#: Every listing after the first finds that pidfds have used up all descriptors.
LISTS_AGAIN = """
import os, resource, signal, subprocess
from sandboxd.processes import marks

mark = marks.Marks().new()
soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
resource.setrlimit(resource.RLIMIT_RTTIME, (mark, hard))
ended = subprocess.Popen(["true"])
os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)  # a zombie of the tree: /proc is listed again
children = [subprocess.Popen(["sleep", "300"]) for _ in range(30)]
resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, hard))
assert marks.sweep({mark: signal.SIGKILL}.get, 5.0)
assert [child.wait(10) for child in children] == [-signal.SIGKILL] * 30
"""


#: A walk whose pidfds use up the descriptors finds none to read a mark for the second time.
LAST_DESCRIPTOR = """
import os, resource, signal, subprocess
from sandboxd.processes import marks

marks._by_limit = False
mark = marks.Marks().new()
children = [subprocess.Popen(["sleep", "300"], env={**os.environ, **marks.mark_variable(mark)}) for _ in range(10)]
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
used = len(os.listdir("/proc/self/fd")) - 1
for spare in (1, 2, 3):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + spare, hard))
    found = marks.sweep({mark: signal.SIGKILL if spare == 3 else 0}.get, 1.0)
    assert sorted(found[mark].pids) == sorted(child.pid for child in children)
    assert len(os.listdir("/proc/self/fd")) - 1 == used
assert [child.wait(10) for child in children] == [-signal.SIGKILL] * 10
"""


def test_a_walk_keeps_no_descriptor_when_there_are_no_others() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", LAST_DESCRIPTOR], check=True, timeout=30)


def test_a_walk_lists_the_processes_again_though_no_descriptor_is_left() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", LISTS_AGAIN], check=True, timeout=30)


def test_a_tree_is_gone_even_if_its_processes_are_more_than_the_descriptors() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", WALK], check=True, timeout=30)


#: A process forks and exits while a walk looks at others: after the walk has listed it, before it is looked at.
FORKS_MEANWHILE = """
import os, resource, signal, subprocess, sys
from sandboxd.processes.marks import Marks, sweep

mark = Marks().new()
soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
fork, forked = os.pipe(), os.pipe()
earlier = subprocess.Popen(["sleep", "300"])
resource.setrlimit(resource.RLIMIT_RTTIME, (mark, hard))
parent = os.fork()
if parent == 0:
    os.read(fork[0], 1)
    child = os.fork()
    if child:
        os.write(forked[1], b"%d" % child)
        os._exit(0)
    while True:
        signal.pause()
resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))
later = subprocess.Popen(["sleep", "300"])
child = 0

def choose(other):
    global child
    if child == 0:  # the first process that is looked at is another one
        os.write(fork[1], b"x")
        child = int(os.read(forked[0], 16))
        os.waitpid(parent, 0) if sys.argv[1] == "reaped" else os.waitid(os.P_PID, parent, os.WEXITED | os.WNOWAIT)
    return 0 if other == mark else None

try:
    found = sweep(choose, 0)
    assert child and mark in found and found[mark].pids == [child], (child, found)
finally:
    earlier.kill()
    later.kill()
    os.kill(child, signal.SIGKILL)
"""


@pytest.mark.parametrize("parent", ["reaped", "zombie"])
def test_a_walk_finds_a_process_whose_parent_has_forked_it_and_ended_meanwhile(parent: str) -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKS_MEANWHILE, parent], check=True, timeout=30)


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
    emptied = {"argv": ["env", "-i", "sleep", "300"]}  # the command's own process has no mark, and no marked parent
    assert (await within(10, api.post("/run", {**emptied, "timeout": 0.2}))).json()["timed_out"]
    left = (await api.post("/start_process", emptied)).json()["pid"]
    other = await api.start("sleep 300")
    assert (await api.post("/kill_process", {"id": id})).status == 200
    assert not any(map(alive, pids))
    assert (await api.get(f"/processes/{other}")).json()["status"] == "running"
    (tmp_path / "pids").unlink()
    await api.start(cmd)
    pids = await pids_in(tmp_path / "pids", 4)
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    await gone([*pids, left])
