"""What is left of commands when the daemon dies, and what it inherits while it lives."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from functools import partial
from http.client import HTTPConnection
from pathlib import Path

import pytest
from twisted.internet.defer import Deferred

from sandboxd.processes import reaper
from sandboxd.processes.spawn_client import SPAWN_SERVERS
from sandboxd.processes.spawn_server import SpawnServer
from tests.client import Api, Response
from tests.daemon import Daemon, alive
from tests.waiting import Gate, gone, pids_in, until


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


def comm(pid: int) -> str:
    """The name of a process; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().rstrip("\n")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def state(pid: int) -> str:
    """The state of a process, as ps(1) shows it."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


async def guardians_of(daemon: Daemon) -> list[int]:
    """The pids of the spawn servers, once all run. Each is a guardian, too."""
    return await until(lambda: pids if len(pids := daemon.spawn_servers()) == SPAWN_SERVERS else [])


def made_gate(folder: Path) -> Gate:
    """A gate in a folder of its own."""
    folder.mkdir()
    return Gate(folder)


def at_least(answers: list[Response], count: int) -> bool:
    """Whether so many answers have come."""
    return len(answers) >= count


def has_limit(pid: int, limit: tuple[int, int]) -> bool:
    """Whether that is how many files a process may have open."""
    return resource.prlimit(pid, resource.RLIMIT_NOFILE) == limit


def command_line(pid: int) -> bytes:
    """A process's arguments; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def lasting(folder: Path, name: str) -> str:
    """The text of a process that lasts, and writes its pid to the file ``name``."""
    return f"sh -c 'echo $$ > {folder}/{name}; exec sleep 300'"


async def test_a_daemon_that_is_killed_leaves_nothing_running(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    guardians = await guardians_of(daemon)
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
    await gone([*pids.values(), *guardians])
    stream.close()


async def test_a_stopped_process_does_not_outlive_a_daemon_that_is_killed(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    await Api(daemon.url, daemon.secret).start(f"echo $$ > {tmp_path}/pid; kill -STOP $$")
    pids = await pids_in(tmp_path / "pid")
    await until(lambda: state(pids[0]) == "T")
    daemon.stop(signal.SIGKILL)
    await gone(pids)


async def test_what_is_to_survive_a_daemon_that_is_killed_does(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    guardians = await guardians_of(daemon)
    await api.start(lasting(tmp_path, "survivor"), survive=True)
    await api.start(f"setsid {lasting(tmp_path, 'session')}; sleep 300", survive=True)
    await api.start(lasting(tmp_path, "other"))
    survivors = [(await pids_in(tmp_path / name))[0] for name in ("survivor", "session")]
    others = await pids_in(tmp_path / "other")
    try:
        daemon.stop(signal.SIGKILL)
        await gone([*others, *guardians])
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
    guardians = await guardians_of(daemon)
    daemon.stop(signal.SIGKILL)
    await gone(guardians)
    assert (await api.process(id))["status"] == "running"
    await api.post("/kill_process", {"id": id})


async def test_the_guardian_ends_with_a_daemon_that_stops(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    guardians = await guardians_of(daemon)
    assert all(map(alive, guardians))
    assert daemon.stop() == 0
    await gone(guardians)


async def test_the_guardian_ignores_what_ends_the_daemon(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = start_daemon()
    guardians = await guardians_of(daemon)
    await Api(daemon.url, daemon.secret).start(lasting(tmp_path, "pid"))
    pids = await pids_in(tmp_path / "pid")
    for guardian in guardians:
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(guardian, signum)
    daemon.stop(signal.SIGKILL)
    await gone([*pids, *guardians])


async def test_orphans_that_have_ended_are_reaped(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    guardians = await guardians_of(daemon)
    file = tmp_path / "pids"
    for _ in range(30):
        await api.run(f"(setsid sh -c 'echo $$ >> {file}' > /dev/null 2>&1 &)")
    orphans = await pids_in(file, 30)
    await gone(orphans)
    await until(lambda: set(children(daemon.pid)) <= set(guardians))
    assert not any(Path(f"/proc/{pid}").exists() for pid in orphans)


async def test_commands_that_have_ended_are_reaped(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    for cmd in ("true", "exit 3", "kill -9 $$"):
        await api.run(cmd)
    guardians = await guardians_of(daemon)
    await until(lambda: {pid for each in (daemon.pid, *guardians) for pid in children(each)} <= set(guardians))


async def test_what_a_spawner_has_started_outlives_it(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    gates = [made_gate(tmp_path / name) for name in ("first", "second")]
    ids = [await api.start(f"{gate.wait}; echo out; exit 3") for gate in gates]
    spawners = await guardians_of(daemon)
    for spawner in spawners:
        os.kill(spawner, signal.SIGKILL)
    await gone(spawners)
    assert (await api.run("echo more"))["stdout"] == "more\n"
    killed = await api.start("setsid sleep 300; sleep 300")
    assert (await api.post("/kill_process", {"id": killed})).status == 200
    for gate, id in zip(gates, ids, strict=True):
        gate.open()
        ended = (await api.post(f"/processes/{id}/wait", {"timeout": 10})).json()
        assert (ended["status"], ended["exit_code"]) == ("failed", 3)
        records = (await api.get(f"/processes/{id}/logs")).json()["records"]
        assert [record["data"] for record in records] == ["out"]
        gate.close()
    assert "is replaced: it has died" in daemon.log.read_text()
    await guardians_of(daemon)


async def test_what_a_dead_spawner_has_started_can_be_killed(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    ids = [await api.start("sleep 300 & setsid sleep 300") for _ in range(4)]
    for spawner in await guardians_of(daemon):
        os.kill(spawner, signal.SIGKILL)
    for id in ids:
        assert (await api.post("/kill_process", {"id": id})).status == 200
        assert (await api.process(id))["status"] == "killed"


async def test_commands_started_while_spawners_die_are_answered_for(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    seconds = f"300.{os.getpid():010}"  # to know our own sleeps by
    answers: list[Response] = []

    async def start() -> None:
        for _ in range(10):
            answers.append(await api.post("/start_process", {"cmd": f"exec sleep {seconds}"}))

    starting = [Deferred.fromCoroutine(start()) for _ in range(8)]
    for more in range(1, 6):
        await until(partial(at_least, answers, 10 * more))
        for spawner in daemon.spawn_servers():
            os.kill(spawner, signal.SIGKILL)
    for each in starting:
        await each
    assert {answer.status for answer in answers} <= {201, 500}
    started = [answer.json()["pid"] for answer in answers if answer.status == 201]
    assert started
    listed = (await api.get("/list_processes")).json()["processes"]
    assert sorted(process["pid"] for process in listed if process["status"] == "running") == sorted(started)
    processes = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    assert sorted(pid for pid in processes if seconds.encode() in command_line(pid)) == sorted(started)
    assert (await api.get("/status")).json()["executions"] == len(started)
    assert daemon.stop() == 0


async def test_a_spawner_may_have_as_many_files_as_the_daemon(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)[1]
    for spawner in await guardians_of(daemon):
        await until(partial(has_limit, spawner, (hard, hard)))


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")
async def test_a_daemon_that_is_not_root_starts_commands_of_every_kind(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    # The capability lets it read its own code wherever that is; it grants no write.
    capability = "+dac_read_search"
    nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    daemon = start_daemon(via=(*nobody, f"--inh-caps={capability}", f"--ambient-caps={capability}"))
    api = Api(daemon.url, daemon.secret)
    for fields in ({}, {"cwd": "/"}, {"tty": True}, {"limits": {"nofile": 50}}, {"input": "text"}):
        reply = await api.run("id -u", **fields)
        assert (reply["code"], reply["stdout"].strip()) == (0, "65534"), fields
    tmp_path.chmod(0o777)
    assert (await api.run(f"setsid sh -c 'echo $$ > {tmp_path}/pid; exec sleep 300' & sleep 300", timeout=1))[
        "timed_out"
    ]
    await gone(await pids_in(tmp_path / "pid"))
    assert (await api.get("/ready")).status == 200


async def test_spawn_servers_for_which_there_is_no_descriptor_are_not_left(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    client = HTTPConnection("127.0.0.1", daemon.port, timeout=10)
    # Routes with parameters are imported now, not when there is no descriptor for that.
    client.request("GET", "/processes/none", headers={"Authorization": f"Bearer {daemon.secret}"})
    client.getresponse().read()
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    lowest = max(map(int, os.listdir(f"/proc/{daemon.pid}/fd"))) - 8
    for limit in range(lowest, lowest + 16):  # the descriptors last until a later step each time
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
        for pid in daemon.spawn_servers():
            os.kill(pid, signal.SIGKILL)
        client.request("POST", "/run", b'{"cmd":"true"}', {"Authorization": f"Bearer {daemon.secret}"})
        response = client.getresponse()
        assert response.status in (200, 500, 503)
        assert "internal error" not in response.read().decode()
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
    await until(lambda: len(daemon.spawn_servers()) == SPAWN_SERVERS, 5)
    await until(lambda: not any(file.endswith("of -1") for file in daemon.open_files()), 5)
    assert (await Api(daemon.url, daemon.secret).run("echo on"))["stdout"] == "on\n"
    client.close()
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


async def test_output_for_which_there_is_no_descriptor_fails_its_command_only(
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon = start_daemon()
    await guardians_of(daemon)
    servers = daemon.spawn_servers()
    headers = {"Authorization": f"Bearer {daemon.secret}"}
    with closing(HTTPConnection("127.0.0.1", daemon.port, timeout=20)) as client:

        def run(cmd: str) -> tuple[int, bytes]:
            """Always on the same connection, so that the daemon opens and closes none meanwhile."""
            client.request("POST", "/run", json.dumps({"cmd": cmd}).encode(), headers)
            response = client.getresponse()
            return response.status, response.read()

        before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        for free in range(2):
            for _ in range(20):
                run("true")  # meanwhile, what was in use for the last command is closed
                used = set(map(int, os.listdir(f"/proc/{daemon.pid}/fd")))
                limit = [fd for fd in range(before[0]) if fd not in used][free]
                resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, before[1]))
                status, body = run("exec sleep 0.2")  # longer than the server itself collects output
                resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
                if status != 200:  # else more were free, as some had been in use for a moment
                    break
            assert (status, b"too many open files" in body) == (500, True)
            assert json.loads(run("echo on")[1])["stdout"] == "on\n"
    assert daemon.spawn_servers() == servers
    assert daemon.stop() == 0
    assert "is replaced" not in daemon.log.read_text()


#: Nothing is read from the first server, so the daemon does not know yet that it has forked the second one.
FORK_NOT_REPORTED = """
import os, resource, select
from twisted.internet import reactor
from sandboxd.processes.marks import Marks
from sandboxd.processes.spawn_client import SpawnClient
from sandboxd.processes.spawn_messages import StartRequest
from sandboxd.reactor.turn_budget import TurnBudget

marks = Marks()
client = SpawnClient(reactor, TurnBudget(reactor), marks.base, lambda children: None, None)
client.start()
first, second = client._servers
poll = select.poll()
poll.register(first.fileno(), select.POLLIN)
assert poll.poll(10_000) and first.pid is not None and second.pid is None
resource.setrlimit(resource.RLIMIT_NOFILE, (0, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
client.replace(first, "this is a test")
try:
    client.launch(None, StartRequest([b"sh"], b"", marks.new(), collect=True), [])
except OSError:
    pass
else:
    raise AssertionError(second.starting)
"""


def test_no_request_goes_to_a_spawn_server_whose_fork_is_not_reported() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORK_NOT_REPORTED], check=True, timeout=30)


class Refusing:
    """An epoll instance that can watch nothing more."""

    def register(self, fd: int, events: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_child_that_cannot_be_watched_is_ended_and_may_have_run() -> None:
    server = SpawnServer.__new__(SpawnServer)
    server._epoll, server._children, server._watched = Refusing(), {}, {}  # type: ignore[assignment]
    pid = os.posix_spawn("/bin/sleep", ["sleep", "300"], os.environ, setsid=True)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="it has run for a moment") as raised:
        server._add(1, pid, -1, False)
    assert raised.value.errno == errno.EIO  # so it is not started again for the same Idempotency-Key
    assert not alive(pid)
    assert (os.listdir("/proc/self/fd"), server._children, server._watched) == (before, {}, {})


def test_children_are_unknown_where_the_kernel_does_not_list_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: Path) -> str:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

    monkeypatch.setattr(Path, "read_text", missing)  # as without CONFIG_PROC_CHILDREN
    with pytest.raises(FileNotFoundError):
        reaper.children()
