"""Commands that attack the spawn servers, which run as the same user: the daemon goes on, and says what happened."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred, gatherResults

from tests.client import Api, Response
from tests.daemon import Daemon, alive
from tests.test_spawn_server import guardians_of
from tests.waiting import gone, pids_in, until, within

#: The signals 32 and 33, which the C library lets nobody change.
RESERVED = 0b11 << 31


async def all_run(api: Api, cmds: list[str]) -> list[Response]:
    """The replies to commands that are run at the same time."""
    requests = [Deferred.fromCoroutine(api.post("/run", {"cmd": cmd})) for cmd in cmds]
    return await gatherResults(requests)


async def test_a_command_that_stops_its_spawn_server_stops_nothing(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    await guardians_of(daemon)
    replies = await within(20, all_run(api, ["kill -STOP $PPID; echo stopped"] * 4 + ["echo other"] * 20))
    # A server that is stopped for too long is replaced; what it had received and not answered is said to be unknown.
    for reply, text in zip(replies, ["stopped\n"] * 4 + ["other\n"] * 20, strict=True):
        assert reply.json().get("stdout") == text or (reply.status == 500 and "has died" in reply.json()["error"]), (
            reply
        )
    again = await within(20, all_run(api, ["echo again"] * 20))
    assert [reply.json()["stdout"] for reply in again] == ["again\n"] * 20
    assert daemon.stop() == 0


async def test_stopped_spawn_servers_do_not_outlive_the_daemon(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    spawners = await guardians_of(daemon)
    for pid in spawners:
        os.kill(pid, signal.SIGSTOP)
    assert daemon.stop() == 0
    await gone(spawners)


@pytest.mark.parametrize(
    "limit", ["--nofile=3:3", "--rttime=1000000:1000000", "--nproc=1:1", "--fsize=0:0", "--core=0:0"]
)
async def test_a_command_that_changes_limits_of_its_spawn_server_changes_no_other_command(
    start_daemon: Callable[..., Daemon], limit: str
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    spawners = await guardians_of(daemon)
    shown = "ulimit -a; grep -i realtime.timeout /proc/self/limits | cut -c 1-22"
    before = (await api.run(shown))["stdout"]
    for pid in spawners:
        changed = await api.post("/run", {"cmd": f"prlimit --pid {pid} {limit}"})
        if changed.status == 500:  # its own server could not watch it any more: this command alone may fail
            assert "Input/output error" in changed.json()["error"]
        else:
            assert (changed.status, changed.json()["code"]) == (200, 0), changed
    after = [(await api.run(shown))["stdout"] for _ in range(10)]
    assert after == [before] * 10
    assert set(await guardians_of(daemon)).isdisjoint(spawners)
    file = Path(f"/proc/{daemon.pid}/cwd/pid")
    id = await api.start(f"setsid sh -c 'echo $$ > {file}; exec sleep 300' & wait")
    (pid,) = await pids_in(file)
    assert (await api.post("/kill_process", {"id": id})).status == 200
    assert not alive(pid)


async def test_commands_cannot_inspect_a_spawn_server(start_daemon: Callable[..., Daemon]) -> None:
    # Root may inspect anything, unless it lacks the capability for it.
    unprivileged = ("setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace")
    daemon = start_daemon(via=unprivileged if os.geteuid() == 0 else ())
    api = Api(daemon.url, daemon.secret)
    take_descriptor = "libc.syscall(438, os.pidfd_open(int(sys.argv[1])), 4, 0)"  # pidfd_getfd(2)
    attack = f"import ctypes, os, sys; libc = ctypes.CDLL(None); sys.exit({take_descriptor} >= 0)"
    for pid in await guardians_of(daemon):
        found = await api.run(f"head -c 1 /proc/{pid}/mem; python3 -c '{attack}' {pid}")
        assert found["code"] == 0
        assert "Permission denied" in found["stderr"]


async def test_a_malformed_record_ends_that_spawn_server_alone(start_daemon: Callable[..., Daemon]) -> None:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: only root can take a descriptor of a process that is not dumpable")
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    await guardians_of(daemon)
    id = await api.start("sleep 300")
    # pidfd_open and pidfd_getfd of the spawn server, by their numbers; its socket is one of the first descriptors.
    attack = """
import ctypes, os, socket
libc = ctypes.CDLL(None, use_errno=True)
pidfd = os.pidfd_open(os.getppid())
for number in range(3, 20):
    fd = libc.syscall(438, pidfd, number, 0)
    if fd >= 0:
        try:
            control = socket.socket(fileno=fd)
            control.send(b"[" * 60000)
            control.send(bytes(13))
        except OSError:
            pass
os._exit(0)
"""
    spawners = set(daemon.spawn_servers())
    await api.post("/run", {"cmd": f"exec python3 -c '{attack}'"})
    await until(lambda: not spawners <= set(daemon.spawn_servers()))
    assert (await api.run("echo on"))["stdout"] == "on\n"
    assert (await api.process(id))["status"] == "running"
    assert (await api.post("/kill_process", {"id": id})).status == 200
    assert "malformed" in daemon.log.read_text().lower() or "record" in daemon.log.read_text()
    assert len(await guardians_of(daemon)) == 2


async def test_requests_that_a_dead_spawn_server_has_not_received_are_executed_once(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    spawners = await guardians_of(daemon)
    for pid in spawners:
        os.kill(pid, signal.SIGSTOP)
    file = tmp_path / "ran"
    cmds = [f"echo {number} >> {file}" for number in range(20)]
    requests = [Deferred.fromCoroutine(api.post("/start_process", {"cmd": cmd})) for cmd in cmds]
    await until(lambda: descriptors_in_flight(daemon.pid, requests))
    for pid in spawners:
        os.kill(pid, signal.SIGKILL)
    replies = await within(20, _all(requests))
    assert [reply.status for reply in replies] == [201] * 20
    for reply in replies:
        assert (await api.post(f"/processes/{reply.json()['id']}/wait", {"timeout": 10})).json()[
            "status"
        ] == "completed"
    assert sorted(map(int, file.read_text().split())) == list(range(20))


def descriptors_in_flight(pid: int, requests: list[Deferred[Response]]) -> bool:
    """Whether the daemon reads the output of all these requests' commands: two pipes each."""
    fds = [
        os.readlink(f"/proc/{pid}/fd/{fd}")
        for fd in os.listdir(f"/proc/{pid}/fd")
        if os.path.lexists(f"/proc/{pid}/fd/{fd}")
    ]
    return sum(link.startswith("pipe:") for link in fds) >= 2 * len(requests)


async def _all(requests: list[Deferred[Response]]) -> list[Response]:
    return await gatherResults(requests)


async def test_spawn_servers_are_small(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    sizes = []
    for pid in await guardians_of(daemon):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        sizes.append(int(rollup.split("\nPss:")[1].split()[0]))
    assert sum(sizes) < 9_000, sizes  # KiB; alone each would be as much


async def test_signals_are_as_by_default_however_the_daemon_was_started(start_daemon: Callable[..., Daemon]) -> None:
    ignoring = "trap '' INT QUIT HUP PIPE CHLD USR1; exec \"$@\""
    daemon = start_daemon(via=("sh", "-c", ignoring, "sh"))
    for body in ({}, {"cwd": "/"}):
        reply = await Api(daemon.url, daemon.secret).post("/run", {"cmd": "exec cat /proc/self/status", **body})
        status = dict(line.split(":\t", 1) for line in reply.json()["stdout"].splitlines())
        masks = [int(status[name], 16) & ~RESERVED for name in ("SigBlk", "SigIgn", "SigCgt")]
        assert masks == [0, 0, 0]
