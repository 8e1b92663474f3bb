"""What is left of commands when the daemon dies, and what it inherits while it lives."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

from tests.client import Api
from tests.daemon import Daemon, alive
from tests.waiting import gone, pids_in, until


def children(pid: int) -> dict[int, str]:
    """The state of each child of a process."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(parent) == pid:
                found[int(entry.name)] = state
    return found


def guardian_of(daemon: Daemon) -> int:
    """The pid of the guardian, the only child of a daemon that runs nothing."""
    (pid,) = children(daemon.pid)
    return pid


def lasting(folder: Path, name: str) -> str:
    """The text of a process that lasts, and writes its pid to the file ``name``."""
    return f"sh -c 'echo $$ > {folder}/{name}; exec sleep 300'"


async def test_a_daemon_that_is_killed_leaves_nothing_running(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    guardian = guardian_of(daemon)
    names = ["plain", "streamed", "session", "orphan", "bare", "stubborn", "left", "left_session"]
    plain, streamed, session, orphan, bare, stubborn, left, left_session = (lasting(tmp_path, name) for name in names)
    await api.start(plain)
    stream = await api.stream(streamed)
    await api.start(f"setsid {session}; sleep 300")
    await api.start(f"(setsid {orphan} > /dev/null 2>&1 &); sleep 300")
    await api.start(f"env -i setsid /bin/{bare}; sleep 300")
    await api.start(f'trap "" TERM HUP INT; {stubborn}')
    await api.run(f"{left} &")
    await api.run(f"(env -i setsid /bin/{left_session} > /dev/null 2>&1 &)")
    pids = {name: (await pids_in(tmp_path / name))[0] for name in names}
    assert all(map(alive, pids.values()))
    daemon.stop(signal.SIGKILL)
    await gone([*pids.values(), guardian])
    stream.close()


async def test_a_stopped_process_does_not_outlive_a_daemon_that_is_killed(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    await Api(daemon.url, daemon.secret).start(f"echo $$ > {tmp_path}/pid; kill -STOP $$")
    pids = await pids_in(tmp_path / "pid")
    await until(lambda: children(daemon.pid)[pids[0]] == "T")
    daemon.stop(signal.SIGKILL)
    await gone(pids)


async def test_what_is_to_survive_a_daemon_that_is_killed_does(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    guardian = guardian_of(daemon)
    await api.start(lasting(tmp_path, "survivor"), survive=True)
    await api.start(f"setsid {lasting(tmp_path, 'session')}; sleep 300", survive=True)
    await api.start(lasting(tmp_path, "other"))
    survivors = [(await pids_in(tmp_path / name))[0] for name in ("survivor", "session")]
    others = await pids_in(tmp_path / "other")
    try:
        daemon.stop(signal.SIGKILL)
        await gone([*others, guardian])
        assert all(map(alive, survivors))
    finally:
        for pid in filter(alive, survivors):
            os.kill(pid, signal.SIGKILL)


async def test_what_may_survive_a_death_does_not_survive_a_stop(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    await Api(daemon.url, daemon.secret).start(lasting(tmp_path, "survivor"), survive=True)
    pids = await pids_in(tmp_path / "survivor")
    assert daemon.stop() == 0
    assert not any(map(alive, pids))


async def test_what_another_daemon_runs_is_left_alone(start_daemon: Callable[..., Daemon], api: Api) -> None:
    id = await api.start("sleep 300")
    daemon = start_daemon()
    guardian = guardian_of(daemon)
    daemon.stop(signal.SIGKILL)
    await gone([guardian])
    assert (await api.process(id))["status"] == "running"
    await api.post("/kill_process", {"id": id})


async def test_the_guardian_ends_with_a_daemon_that_stops(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    guardian = guardian_of(daemon)
    assert alive(guardian)
    assert daemon.stop() == 0
    await gone([guardian])


async def test_the_guardian_ignores_what_ends_the_daemon(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = start_daemon()
    guardian = guardian_of(daemon)
    await Api(daemon.url, daemon.secret).start(lasting(tmp_path, "pid"))
    pids = await pids_in(tmp_path / "pid")
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(guardian, signum)
    daemon.stop(signal.SIGKILL)
    await gone([*pids, guardian])


async def test_orphans_that_have_ended_are_reaped(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    guardian = guardian_of(daemon)
    file = tmp_path / "pids"
    for _ in range(30):
        await api.run(f"(setsid sh -c 'echo $$ >> {file}' > /dev/null 2>&1 &)")
    orphans = await pids_in(file, 30)
    await gone(orphans)
    await until(lambda: list(children(daemon.pid)) == [guardian])
    assert not any(Path(f"/proc/{pid}").exists() for pid in orphans)


async def test_commands_that_have_ended_are_reaped(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    for cmd in ("true", "exit 3", "kill -9 $$"):
        await api.run(cmd)
    guardian_of(daemon)
