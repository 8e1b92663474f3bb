"""What bounds a command, what bounds the daemon, and what sets those bounds."""

from __future__ import annotations

import json
import os
import pwd
import re
import resource
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPResponse
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import gatherResults

from sandboxd import __version__
from sandboxd.options import LIMITS
from sandboxd.tap import Options
from tests.client import Api, Response
from tests.daemon import SECRET, TWISTD, Daemon
from tests.waiting import HARD, Gate, gone, hard_to_end, pids_in, until, within

ROUTES = ["/run", "/run_streaming", "/start_process"]

KILLED = {"code": -1, "error": "Non-zero exit code", "signal": "SIGKILL"}


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.close()


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with every limit low."""
    daemon = Daemon(
        tmp_path_factory.mktemp("strict"),
        SANDBOX_MAX_EXECUTIONS="2",
        SANDBOX_MAX_STREAMS="1",
        SANDBOX_MAX_BODY="1000",
        SANDBOX_MAX_HEADER="2000",
        SANDBOX_REQUEST_TIMEOUT="1",
        SANDBOX_HEARTBEAT="1",
    )
    yield daemon
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


@pytest.fixture
def tight(strict: Daemon) -> Api:
    """A client of the strict daemon."""
    return Api(strict.url, strict.secret)


async def wait(api: Api, id: str) -> Any:
    return (await api.post(f"/processes/{id}/wait", {"timeout": 20})).json()


async def lines(api: Api, id: str) -> list[str]:
    return [record["data"] for record in (await api.get(f"/processes/{id}/logs")).json()["records"]]


# Silence


@pytest.mark.slow
async def test_silence_for_idle_timeout_kills_the_whole_tree(api: Api, tmp_path: Path) -> None:
    cmd, file = hard_to_end(tmp_path)
    began = time.monotonic()
    # Long enough for all of them to start, on a busy machine too.
    reply = await within(10, api.run("echo out;" + cmd, idle_timeout=2))
    assert time.monotonic() - began >= 2
    assert reply == {"stdout": "out\n", "stderr": "", **KILLED, "idle_timed_out": True}
    await gone(await pids_in(file, HARD))


async def test_a_stream_tells_that_it_was_silent_for_too_long(api: Api) -> None:
    *_, end = await within(5, (await api.stream("sleep 300", idle_timeout=0.2)).all())
    assert end.data == {"code": -1, "error": True, "signal": "SIGKILL", "idle_timed_out": True}


@pytest.mark.slow
@pytest.mark.parametrize("stream", ["1", "2"])
async def test_output_keeps_a_command_alive(api: Api, stream: str) -> None:
    reply = await api.run(f"for n in $(seq 16); do sleep 0.1; printf . >&{stream}; done", idle_timeout=1.5)
    assert reply["code"] == 0


@pytest.mark.parametrize("idle_timeout", [0, None])
@pytest.mark.slow
async def test_no_idle_timeout(api: Api, idle_timeout: int | None) -> None:
    assert await api.run("sleep 0.3", idle_timeout=idle_timeout) == {"stdout": "", "stderr": "", "code": 0}


@pytest.mark.parametrize(
    ("timeout", "idle_timeout", "told"),
    [(0.3, 20, "timed_out"), (20, 0.3, "idle_timed_out"), (0, 0.3, "idle_timed_out")],
)
@pytest.mark.slow
async def test_the_timeout_that_comes_first_is_told(api: Api, timeout: float, idle_timeout: float, told: str) -> None:
    reply = await within(5, api.run("sleep 300", timeout=timeout, idle_timeout=idle_timeout))
    assert reply == {"stdout": "", "stderr": "", **KILLED, told: True}


@pytest.mark.slow
async def test_output_does_not_put_off_the_other_timeout(api: Api) -> None:
    reply = await within(5, api.run("while :; do echo .; sleep 0.05; done", timeout=1.2, idle_timeout=1))
    assert {**reply, "stdout": ""} == {"stdout": "", "stderr": "", **KILLED, "timed_out": True}


@pytest.mark.slow
async def test_a_command_that_waits_for_its_slow_reader_is_not_silent(api: Api) -> None:
    stream = await api.stream("seq 500000", idle_timeout=1.5)
    (id,) = stream.headers.getRawHeaders("X-Execution-Id")
    stream.pause()
    await api.post(f"/processes/{id}/wait", {"timeout": 2.5})
    stream.resume()
    *lines, end = await within(30, stream.all())
    assert (end.data, len(lines)) == ({"code": 0, "error": False}, 500_000)


@pytest.mark.parametrize("field", ["idle_timeout", "max_output"])
@pytest.mark.parametrize("value", [-1, "1", True])
async def test_a_bad_value_is_named(api: Api, field: str, value: Any) -> None:
    for route in ROUTES:
        response = await api.post(route, {"cmd": "true", field: value})
        assert response.status == 400
        assert field in response.json()["error"]


# Output


async def test_the_head_and_the_tail_are_kept_and_what_was_dropped_is_counted(api: Api) -> None:
    output = "".join(f"{n}\n" for n in range(1, 100_001))
    reply = await api.run("seq 100000", max_output=1000)
    dropped = reply.pop("stdout_dropped")
    kept = reply.pop("stdout")
    assert reply == {"stderr": "", "code": 0}
    assert dropped == len(output) - len(kept)
    assert 0 < len(kept) <= 1000
    assert kept.startswith("1\n2\n3\n")
    assert kept.endswith("\n99999\n100000\n")


async def test_each_stream_is_bounded_by_itself(api: Api) -> None:
    reply = await api.run("head -c 5000 /dev/zero >&2; printf 1234567890", max_output=10)
    assert reply["stdout"] == "1234567890"
    assert len(reply["stderr"]) + reply["stderr_dropped"] == 5000
    assert "stdout_dropped" not in reply


async def test_output_at_the_limit_is_kept_whole(api: Api) -> None:
    assert await api.run("printf 12345; sleep 0.05; printf 67890", max_output=10) == {
        "stdout": "1234567890", "stderr": "", "code": 0,
    }  # fmt: skip


async def test_one_byte_over_the_limit(api: Api) -> None:
    reply = await api.run("printf 12345; sleep 0.05; printf 678901", max_output=10)
    assert reply == {"stdout": "1234578901", "stderr": "", "code": 0, "stdout_dropped": 1}


async def test_no_output_is_kept_when_none_is_wanted(api: Api) -> None:
    reply = await api.run("echo out; echo err >&2", max_output=0)
    assert reply == {"stdout": "", "stderr": "", "code": 0, "stdout_dropped": 4, "stderr_dropped": 4}


async def test_megabytes_over_the_limit_are_counted_exactly(api: Api) -> None:
    reply = await api.run("head -c 50000000 /dev/zero | tr '\\0' x", max_output=1_000_000)
    assert len(reply["stdout"]) + reply["stdout_dropped"] == 50_000_000
    assert 900_000 <= len(reply["stdout"]) <= 1_000_000


# Resources

#: How /proc/<pid>/limits calls them, and a value for each.
RESOURCES = {
    "as": ("Max address space", 1 << 30),
    "core": ("Max core file size", 4096),
    "cpu": ("Max cpu time", 17),
    "data": ("Max data size", 1 << 29),
    "fsize": ("Max file size", 8192),
    "nofile": ("Max open files", 33),
    "nproc": ("Max processes", 4321),
    "stack": ("Max stack size", 1 << 20),
}


@pytest.mark.parametrize("name", RESOURCES)
async def test_a_limit_holds_for_the_shell_and_for_its_first_child(api: Api, name: str) -> None:
    title, value = RESOURCES[name]
    cmd = f"grep '^{title}' /proc/self/limits; grep '^{title}' /proc/$$/limits"
    replies = await gatherResults([within(10, api.run(cmd, limits={name: value})) for _ in range(20)])
    for reply in replies:
        assert [line[len(title) :].split()[:2] for line in reply["stdout"].splitlines()] == [[str(value)] * 2] * 2


async def test_limits_are_not_the_daemons(api: Api, daemon: Daemon) -> None:
    await api.run("true", limits={name: value for name, (_, value) in RESOURCES.items()})
    limits = Path(f"/proc/{daemon.pid}/limits").read_text()
    for title, value in RESOURCES.values():
        (line,) = re.findall(f"^{title} +(.*)", limits, re.M)
        assert line.split()[0] != str(value)


@pytest.mark.slow
async def test_cpu_time_ends_a_command(api: Api) -> None:
    reply = await within(10, api.run("while :; do :; done", limits={"cpu": 1}))
    assert reply["code"] == -1
    assert reply["signal"] in ("SIGKILL", "SIGXCPU")


async def test_file_size_is_bounded(api: Api, tmp_path: Path) -> None:
    reply = await api.run(f"head -c 100000 /dev/zero > {tmp_path}/file", limits={"fsize": 4096})
    assert reply["code"] != 0
    assert (tmp_path / "file").stat().st_size == 4096


async def test_memory_is_bounded(api: Api) -> None:
    hungry = f"{sys.executable} -c 'bytes(1 << 30)'"
    assert (await api.run(hungry))["code"] == 0
    reply = await api.run(hungry, limits={"as": 1 << 29})
    assert reply["code"] == 1
    assert "MemoryError" in reply["stderr"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "limits", [{"rttime": 1}, {"NOFILE": 10}, {"nofile": -1}, {"nofile": "10"}, {"nofile": 1.5}, {"as_": 1}, [], 5]
)
async def test_a_bad_limit_is_refused(api: Api, tmp_path: Path, route: str, limits: Any) -> None:
    response = await api.post(route, {"cmd": f"touch {tmp_path}/executed", "limits": limits})
    assert response.status == 400
    assert "limits" in response.json()["error"]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("route", ROUTES)
async def test_a_limit_that_the_system_refuses_is_the_callers_mistake(api: Api, tmp_path: Path, route: str) -> None:
    response = await api.post(route, {"cmd": f"touch {tmp_path}/executed", "limits": {"nofile": 1 << 40}})
    assert not (tmp_path / "executed").exists()
    assert response.status == 400


@pytest.mark.parametrize("limits", [{}, None])
async def test_no_limits(api: Api, limits: Any) -> None:
    assert (await api.run("echo hi", limits=limits))["stdout"] == "hi\n"


async def test_a_limited_command_has_the_same_surroundings(api: Api, tmp_path: Path) -> None:
    cmd = 'echo $0 $#; pwd; echo "$A"; readlink /proc/self/fd/0; ls /proc/$$/fd; cat; echo \'q"\' $$'
    fields = {"cwd": str(tmp_path), "env": {"A": " é\n'"}}
    plain = (await api.run(cmd, **fields))["stdout"].splitlines()
    limited = (await api.run(cmd, **fields, limits={"nofile": 100}))["stdout"].splitlines()
    assert plain[:-1] == limited[:-1]


async def test_a_limited_command_is_the_process_that_is_told(api: Api) -> None:
    response = await api.post("/start_process", {"cmd": "echo $$", "limits": {"nofile": 100}})
    id, pid = response.json()["id"], response.json()["pid"]
    await wait(api, id)
    assert await lines(api, id) == [str(pid)]


async def test_a_limited_command_gets_its_stdin(api: Api, tmp_path: Path) -> None:
    data = b"\nfirst\\\n\0" + os.urandom(1_000_000)
    file = tmp_path / "file"
    id = await api.start(f"ulimit -n; cat > {file}", stdin=True, limits={"nofile": 77})
    response = await within(10, api.post(f"/processes/{id}/stdin?close=1", data))
    assert response.status == 200
    assert (await wait(api, id))["exit_code"] == 0
    assert await lines(api, id) == ["77"]
    assert file.read_bytes() == data


@pytest.mark.slow
async def test_the_end_of_a_limited_command_is_told_as_ever(api: Api) -> None:
    limits = {"nofile": 100}
    assert (await api.run("exit 255", limits=limits))["code"] == 255
    assert (await api.run("kill -TERM $$", limits=limits))["signal"] == "SIGTERM"
    assert (await api.run("sleep 300", limits=limits, timeout=0.3))["timed_out"] is True


# Users

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="COMMANDS OF OTHER USERS ARE NOT TESTED: this needs root")


@as_root
@pytest.mark.parametrize("limits", [{}, {"nofile": 100}])
async def test_a_command_of_another_user(api: Api, limits: dict[str, int]) -> None:
    nobody = pwd.getpwnam("nobody")
    groups = " ".join(map(str, sorted(os.getgrouplist("nobody", nobody.pw_gid))))
    cmd = "id -u; id -g; id -G; id -ur; echo $HOME $USER $LOGNAME; cat /etc/shadow"
    reply = await api.run(cmd, user="nobody", limits=limits)
    expected = [nobody.pw_uid, nobody.pw_gid, groups, nobody.pw_uid, f"{nobody.pw_dir} nobody nobody"]
    assert reply["stdout"].splitlines() == list(map(str, expected))
    assert reply["code"] != 0


@as_root
async def test_a_program_is_found_for_a_user_who_cannot_read_our_library(api: Api) -> None:
    """As where Python is installed in the home of root. What looks a program up must have been imported before."""
    response = await api.post("/run", {"argv": ["id", "-un"], "user": "nobody"})
    assert response.json()["stdout"] == "nobody\n"


@as_root
async def test_a_directory_is_entered_with_the_rights_of_the_commands_user(api: Api) -> None:
    private = tempfile.mkdtemp()  # mode 0700; all directories above it are open to everyone
    below = os.path.join(private, "below")
    os.mkdir(below, 0o755)
    try:
        assert (await api.run("pwd", cwd=private))["stdout"] == f"{private}\n"
        for cwd in (private, below):
            for route in ROUTES:
                reply = await api.post(route, {"cmd": "pwd", "cwd": cwd, "user": "nobody"})
                assert (reply.status, reply.json()) == (400, {"error": f"Invalid working directory: {cwd}"}), route
        os.chown(private, pwd.getpwnam("nobody").pw_uid, -1)
        assert (await api.run("pwd", cwd=below, user="nobody"))["stdout"] == f"{below}\n"
    finally:
        shutil.rmtree(private)


@as_root
async def test_a_command_of_another_user_can_be_fed_watched_and_killed(api: Api) -> None:
    id = await api.start("read line; echo $line; setsid sleep 300 & wait", user="nobody", stdin=True)
    assert (await api.post(f"/processes/{id}/stdin", b"hi\n")).status == 200
    async for event in await api.logs(id):
        assert event.data["data"] == "hi"
        break
    assert (await api.get(f"/processes/{id}")).json()["user"] == "nobody"
    assert (await within(5, api.post("/kill_process", {"id": id}))).status == 200


@as_root
async def test_nproc_counts_the_processes_of_that_user(api: Api) -> None:
    reply = await within(10, api.run("sleep 0.1 & sleep 0.1 & sleep 0.1 & wait", user="nobody", limits={"nproc": 1}))
    assert reply["code"] != 0
    assert "fork" in reply["stderr"].lower()


@as_root
@pytest.mark.parametrize("limits", [{}, {"core": 0}])
async def test_a_command_may_open_as_many_files_as_the_daemon_was_started_with(
    start_daemon: Callable[..., Daemon], limits: dict[str, int]
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, hard))
    try:
        daemon = start_daemon()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    api = Api(daemon.url, daemon.secret)
    replies = [await api.run("ulimit -n", user=user, limits=limits) for user in (None, "root", "nobody")]
    assert [reply["stdout"] for reply in replies] == ["1000\n"] * 3


async def test_the_variables_of_the_request_win_over_those_of_the_user(api: Api) -> None:
    me = pwd.getpwuid(os.geteuid()).pw_name
    assert (await api.run("echo $HOME $USER", user=me, env={"HOME": "/mine"}))["stdout"] == f"/mine {me}\n"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("user", ["no-such-user-5d1c", "", "0x0", "é", "a\0b", -1, 1.5, ["nobody"]])
async def test_an_unknown_user_is_named(api: Api, tmp_path: Path, route: str, user: Any) -> None:
    response = await api.post(route, {"cmd": f"touch {tmp_path}/executed", "user": user})
    assert response.status == 400
    assert "user" in response.json()["error"]
    assert not (tmp_path / "executed").exists()


# Memory that runs short


@pytest.mark.parametrize("limits", [{}, {"nofile": 100}])
async def test_the_kernel_prefers_to_kill_a_command(api: Api, daemon: Daemon, limits: dict[str, int]) -> None:
    own = int(Path(f"/proc/{daemon.pid}/oom_score_adj").read_text())
    cmd = "read first < /proc/self/oom_score_adj; echo $first; cat /proc/self/oom_score_adj"
    replies = await gatherResults([within(10, api.run(cmd, limits=limits)) for _ in range(20)])
    scores = {int(score) for reply in replies for score in reply["stdout"].split()}
    assert min(scores) > own


# How much at a time


def assert_refused(response: Response, *words: str) -> None:
    assert response.status == 503
    assert response.headers.getRawHeaders("Retry-After") == ["1"]
    for word in words:
        assert word in response.json()["error"]


@pytest.mark.slow
async def test_too_many_commands_are_refused_and_not_executed(tight: Api, tmp_path: Path) -> None:
    ids = [await tight.start("sleep 300") for _ in range(2)]
    for route in ROUTES:
        assert_refused(await tight.post(route, {"cmd": f"touch {tmp_path}/executed"}), "2 commands are running")
    await tight.post("/kill_process", {"id": ids[0]})
    assert (await tight.run("echo hi"))["stdout"] == "hi\n"
    await tight.post("/kill_process", {"id": ids[1]})
    assert not (tmp_path / "executed").exists()


async def test_a_request_that_comes_again_is_not_one_more_command(tight: Api, gate: Gate) -> None:
    other = await tight.start("sleep 300")
    key = {"Idempotency-Key": "at the limit"}
    first = await tight.post("/start_process", {"cmd": gate.wait}, key)
    again = await tight.post("/start_process", {"cmd": gate.wait}, key)
    assert (again.status, again.body) == (201, first.body)
    gate.open()
    await wait(tight, first.json()["id"])
    await tight.post("/kill_process", {"id": other})


async def test_too_many_streams_are_refused_before_anything_runs(tight: Api, tmp_path: Path, gate: Gate) -> None:
    stream = await tight.stream(gate.wait)
    assert_refused(await tight.post("/run_streaming", {"cmd": f"touch {tmp_path}/executed"}), "1 event streams")
    (id,) = stream.headers.getRawHeaders("X-Execution-Id")
    assert_refused(await tight.get(f"/process_logs_streaming?id={id}"), "1 event streams")
    assert (await tight.run("echo hi"))["stdout"] == "hi\n"
    gate.open()
    await within(10, stream.all())
    assert not (tmp_path / "executed").exists()
    assert len(await (await tight.logs(id)).all()) == 1


async def test_a_stream_whose_client_hung_up_makes_room(tight: Api) -> None:
    id = await tight.start("sleep 300")
    (await tight.logs(id)).close()
    deadline = time.monotonic() + 5
    while (await tight.get("/status")).json()["streams"]:
        assert time.monotonic() < deadline
    stream = await tight.logs(id)
    assert stream.status == 200
    await tight.post("/kill_process", {"id": id})
    await within(5, stream.all())


# How large, how slowly


async def test_a_body_over_the_limit_is_413(tight: Api, tmp_path: Path) -> None:
    body = json.dumps({"cmd": f"touch {tmp_path}/executed #"})
    assert (await tight.post("/run", body.encode().ljust(1001))).status == 413
    assert not (tmp_path / "executed").exists()
    assert (await tight.post("/run", body.encode().ljust(1000))).status == 200


async def test_headers_over_the_limit_are_refused_in_json(tight: Api) -> None:
    response = await tight.get("/health", {"X-Long": "x" * 2000})
    assert response.status == 400
    assert "headers" in response.json()["error"]
    assert (await tight.get("/health", {"X-Long": "x" * 1500})).status == 200


def drip(daemon: Daemon, at_once: bytes, drop: bytes) -> tuple[int, Any]:
    """Send a drop every tenth of a second until there is an answer; return that, once the connection is closed."""
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=5) as sock:
        sock.sendall(at_once)
        deadline = time.monotonic() + 5
        while not select.select([sock], [], [], 0.1)[0]:
            assert time.monotonic() < deadline, "no answer"
            sock.sendall(drop)
        response = HTTPResponse(sock)
        response.begin()
        body = json.loads(response.read())
        assert sock.recv(1) == b""
        return response.status, body


HEAD = f"POST /run HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {SECRET}\r\n".encode()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("at_once", "drop"),
    [
        (b"G", b"E"),
        (HEAD, b"X-A: b\r\n"),
        (HEAD + b"X-A: ", b"x"),
        (HEAD + b"Content-Length: 900\r\n\r\n", b" "),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    ],
    ids=["request line", "header lines", "one header", "body", "chunked body"],
)
def test_a_request_that_drips_in_is_408_and_closed(strict: Daemon, at_once: bytes, drop: bytes) -> None:
    began = time.monotonic()
    status, body = drip(strict, at_once, drop)
    assert 0.9 < time.monotonic() - began < 4
    assert (status, list(body)) == (408, ["error"])


@pytest.mark.slow
def test_a_second_request_that_drips_in_is_408_too(strict: Daemon) -> None:
    with socket.create_connection(("127.0.0.1", strict.port), timeout=5) as sock:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: test\r\n\r\n")
        assert sock.recv(4096).startswith(b"HTTP/1.1 200")
        deadline = time.monotonic() + 5
        sock.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
        while not select.select([sock], [], [], 0.1)[0]:
            assert time.monotonic() < deadline, "no answer"
            sock.sendall(b"x")
        assert sock.recv(4096).startswith(b"HTTP/1.1 408")


@pytest.mark.slow
def test_a_connection_may_idle_between_requests_and_a_command_may_run_for_longer_than_that(strict: Daemon) -> None:
    connection = HTTPConnection("127.0.0.1", strict.port, timeout=5)
    headers = {"Authorization": f"Bearer {SECRET}"}
    for cmd in ("echo hi", "sleep 1.2; echo hi"):
        connection.request("POST", "/run", json.dumps({"cmd": cmd}), headers)
        response = connection.getresponse()
        assert (response.status, json.loads(response.read())["stdout"]) == (200, "hi\n")
        assert not select.select([connection.sock], [], [], 1.2)[0], "closed, or spoken to"
    connection.request("GET", "/list_processes", headers=headers)
    assert connection.getresponse().status == 200
    connection.close()


# Heartbeats


@pytest.mark.slow
async def test_a_silent_stream_gets_comments_and_nothing_else_changes(tight: Api, gate: Gate) -> None:
    stream = await tight.stream(f"echo a; {gate.wait}; echo b")
    events = within(20, stream.all())
    await until(lambda: len(stream.comments) >= 2)
    gate.open()
    assert [event.data.get("data", event.data.get("code")) for event in await events] == ["a", "b", 0]
    assert [event.id for event in await events] == ["1", "2", "2"]


@pytest.mark.slow
async def test_a_stream_that_speaks_gets_no_comments(tight: Api) -> None:
    stream = await tight.stream("for n in $(seq 16); do echo $n; sleep 0.1; done")
    assert len(await within(20, stream.all())) == 17
    assert stream.comments == []


# The status


async def test_the_status_in_full(tight: Api, gate: Gate) -> None:
    began = time.monotonic()
    status = (await tight.get("/status")).json()
    assert {name: type(value) for name, value in status.items()} == {
        "version": str,
        "uptime": float,
        "executions": int,
        "streams": int,
        "proxy_connections": int,
        "longest_stall": float,
        "idle": float,
        "marks": str,
        "root": type(None),
    }
    assert (status["version"], status["executions"], status["streams"]) == (__version__, 0, 0)
    assert 0 <= status["longest_stall"] <= status["uptime"]
    stream = await tight.stream(gate.wait)
    busy = (await tight.get("/koyeb-sandbox/status")).json()
    assert (busy["executions"], busy["streams"], busy["proxy_connections"]) == (1, 1, 0)
    assert 0 < busy["uptime"] - status["uptime"] <= time.monotonic() - began + 0.01
    gate.open()
    await within(10, stream.all())
    assert (await Api(tight.url, None).get("/status")).status == 401


# The options


@pytest.mark.parametrize(
    ("option", "value"),
    list(zip(LIMITS, cycle(["0", "-1", "1.5", "many", "1e3", " 5", "²", "1_000"]))),
)
@pytest.mark.slow
def test_a_bad_value_is_told_in_one_line(tmp_path: Path, option: str, value: str) -> None:
    variable = f"SANDBOX_{option.replace('-', '_').upper()}"
    env = {**os.environ, "SANDBOX_SECRET": SECRET, "PORT": "0", "PROXY_PORT": "0", variable: value}
    ended = subprocess.run(
        [sys.executable, TWISTD, "-n", "--pidfile=", "sandboxd"],
        cwd=tmp_path, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, timeout=20,
    )  # fmt: skip
    assert ended.returncode != 0
    assert ended.stdout == ""
    (line,) = ended.stderr.splitlines()
    least = 0 if option == "drain" else 1
    assert line == f"twistd sandboxd: {variable} (--{option}): {value!r} is not a number of {least} or more"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        (option, value)
        for option in LIMITS
        for value in ["", "0", "00", "-5", "+5", "5s", "0x10", "²", "nan"]
        if option != "drain" or value not in ("0", "00")
    ],
)
def test_what_is_no_number_of_1_or_more_is_refused(option: str, value: str) -> None:
    with pytest.raises(SystemExit, match=rf"^twistd sandboxd: SANDBOX_\w+ \(--{option}\): .*$"):
        Options().parseOptions([f"--{option}={value}", "--secret=x"])


def test_a_number_of_absurd_length_is_accepted_or_refused_without_a_traceback() -> None:
    with suppress(SystemExit):
        Options().parseOptions(["--max-body=" + "9" * 5000, "--secret=x"])


def test_the_command_line_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_MAX_STREAMS", "5")
    monkeypatch.setenv("SANDBOX_HEARTBEAT", "")
    options, more = Options(), Options()
    options.parseOptions(["--secret=x"])
    more.parseOptions(["--secret=x", "--max-streams=6"])
    assert (options["settings"].max_streams, options["settings"].heartbeat) == (5, 15)
    assert (more["settings"].max_streams, more["settings"].heartbeat) == (6, 15)
