"""
Limits for whole trees, in a real cgroup v2.

Which controllers can be had depends on the machine: what needs none of them is tested wherever a cgroup can be made.
"""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sandboxd.processes.cgroup import Cgroup, CgroupError, Cgroups
from tests.client import Api
from tests.daemon import Daemon, alive
from tests.test_attach import Attached, described, start
from tests.test_marks import WITHOUT_RTTIME
from tests.waiting import gone, pids_in, until


def mount() -> Path | None:
    """Where cgroup v2 is mounted."""
    found = re.search(r"^\d+ \d+ \S+ \S+ (\S+) .* - cgroup2 ", Path("/proc/self/mountinfo").read_text(), re.MULTILINE)
    return Path(found[1]) if found else None


@pytest.fixture
def delegated() -> Iterator[Path]:
    """A cgroup of the test's own."""
    root = mount()
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("NOT TESTED: needs root and a writable cgroup v2 mount")
    path = root / f"sandboxd-test-{os.getpid()}"
    path.mkdir()
    yield path
    # The processes that a daemon has started end a moment after it.
    deadline = time.monotonic() + 10
    while "populated 1" in (path / "cgroup.events").read_text():
        assert time.monotonic() < deadline, f"{path} still has processes"
        time.sleep(0.01)
    for child in [*path.iterdir()]:
        if child.is_dir():
            child.rmdir()
    path.rmdir()


@pytest.fixture
def limited(delegated: Path, start_daemon: Callable[..., Daemon]) -> Iterator[Daemon]:
    """A daemon that has the cgroup."""
    daemon = start_daemon(SANDBOX_CGROUP=str(delegated))
    yield daemon
    daemon.stop()


async def test_the_daemon_moves_into_a_leaf(limited: Daemon, delegated: Path) -> None:
    assert Path(f"/proc/{limited.pid}/cgroup").read_text().splitlines()[-1] == f"0::/{delegated.name}/sandboxd"


async def test_a_limit_is_had_or_refused_with_the_reason(limited: Daemon, delegated: Path) -> None:
    api = Api(limited.url, limited.secret)
    response = await api.post("/run", {"cmd": "tail -n 1 /proc/self/cgroup; cat", "limits": {"memory": 50_000_000}})
    if "memory" in (delegated / "cgroup.controllers").read_text().split():
        assert response.json()["stdout"].startswith(f"0::/{delegated.name}/")
    else:
        assert response.status == 400
        assert response.json() == {"error": "limits.memory: the daemon's cgroup has no memory controller"}
    await until(lambda: [child.name for child in delegated.iterdir() if child.is_dir()] == ["sandboxd"])


async def test_without_a_cgroup_a_limit_of_the_tree_is_refused(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    response = await Api(daemon.url, daemon.secret).post("/run", {"cmd": "true", "limits": {"pids": 5}})
    assert response.status == 400
    assert response.json() == {"error": "limits: memory, pids and cpus need a cgroup that is delegated to the daemon"}


def test_what_is_no_cgroup_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CgroupError, match=str(tmp_path)):
        Cgroups(tmp_path)


def test_all_that_is_in_a_cgroup_is_killed(delegated: Path) -> None:
    sleep = subprocess.Popen(["sleep", "300"])
    cgroup = Cgroup(delegated / "one")
    cgroup.path.mkdir()
    cgroup.join(sleep.pid)
    cgroup.kill()
    assert sleep.wait(10) == -signal.SIGKILL
    assert not cgroup.oom_killed
    assert cgroup.remove()
    assert not cgroup.path.exists()


#: Run in a process of its own, since making a Cgroups moves the process into it.
RETIRES = """
import subprocess, sys
from pathlib import Path
from sandboxd.processes.cgroup import Cgroups

cgroups = Cgroups(Path(sys.argv[1]))
cgroup = cgroups.make("one", {})
sleep = subprocess.Popen(["sleep", "300"])
cgroup.join(sleep.pid)
cgroups.retire(cgroup)
cgroups.remove_retired()
assert cgroup.path.exists()
cgroup.kill()
sleep.wait(10)
cgroups.remove_retired()
assert not cgroup.path.exists()
"""


def test_one_that_still_has_processes_is_removed_when_they_are_gone(delegated: Path) -> None:
    subprocess.run([sys.executable, "-c", RETIRES, str(delegated)], check=True, timeout=30)


def test_a_terminal_is_in_the_cgroup_of_its_execution(limited: Daemon, delegated: Path) -> None:
    id = start(limited, "tail -n 1 /proc/self/cgroup; read line", tty=True)
    with Attached(limited, id) as client:
        client.shows("::")
        (name,) = re.findall(rf"/{delegated.name}/(\S+)", client.text)
        assert str(described(limited, id)["pid"]) in (delegated / name / "cgroup.procs").read_text().split()
        client.type("\r")
        client.to_the_end()


async def test_where_the_rlimit_cannot_be_set_the_cgroup_is_the_mark(
    delegated: Path, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    if platform.machine() != "x86_64":
        pytest.skip("NOT TESTED: the seccomp filter is for x86-64")
    root = str(Path(__file__).parent.parent)
    daemon = start_daemon(via=WITHOUT_RTTIME, PYTHONPATH=root, SANDBOX_CGROUP=str(delegated))
    api = Api(daemon.url, daemon.secret)
    assert (await api.get("/status")).json()["marks"] == "cgroup"
    # An orphan in a session of its own, without an environment.
    orphan = f"(env -i setsid sh -c 'echo $$ >> {tmp_path}/pids; exec sleep 300' &)"
    id = await api.start(f"{orphan}; sleep 300")
    pids = await pids_in(tmp_path / "pids")
    assert (await api.post("/kill_process", {"id": id})).status == 200
    assert not any(map(alive, pids))
    (tmp_path / "pids").unlink()
    await api.start(f"{orphan}; sleep 300")
    pids = await pids_in(tmp_path / "pids")
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    await gone(pids)
