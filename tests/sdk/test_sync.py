"""The official Python SDK, synchronous."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from koyeb.sandbox import CommandStatus, Sandbox, SandboxCommandError, SandboxError, SandboxRequestError
from koyeb.sandbox.errors import SandboxTimeoutError
from koyeb.sandbox.executor_client import SandboxClient
from koyeb.sandbox.filesystem import (
    SandboxFileNotFoundError,
    SandboxFilesystem,
    SandboxFilesystemError,
)
from koyeb.sandbox.sandbox import ProcessInfo

from tests.daemon import Daemon, alive
from tests.sdk import (
    BINARY,
    PUBLIC_URL,
    TEXT,
    bound_to,
    connection,
    exchange,
    is_closed_at_once,
    listen,
    wait_until_gone,
)


@pytest.fixture(params=["", "/koyeb-sandbox", "/koyeb-sandbox/"])
def client(daemon: Daemon, request: pytest.FixtureRequest) -> Iterator[SandboxClient]:
    with SandboxClient(connection(daemon, request.param)) as client:
        yield client


@pytest.fixture
def sandbox(daemon: Daemon) -> Iterator[Sandbox]:
    sandbox = bound_to(daemon, Sandbox)
    yield sandbox
    sandbox.unexpose_port()
    sandbox._client.close()


@pytest.fixture
def files(sandbox: Sandbox) -> SandboxFilesystem:
    return sandbox.filesystem


# The client


def test_health_is_ok(client: SandboxClient) -> None:
    assert client.health()["status"] == "ok"


def test_health_needs_no_secret_but_a_command_does(daemon: Daemon) -> None:
    with SandboxClient(connection(daemon, secret="wrong")) as client:
        assert client.health()["status"] == "ok"
        with pytest.raises(SandboxRequestError) as error:
            client.run("true")
    assert error.value.status_code == 401


def test_run_gives_output_and_exit_code(client: SandboxClient) -> None:
    reply = client.run("echo out; echo err >&2; exit 3")
    assert (reply["stdout"], reply["stderr"], reply["code"]) == ("out\n", "err\n", 3)


def test_run_takes_a_directory_and_an_environment(client: SandboxClient, tmp_path: Path) -> None:
    reply = client.run('pwd; echo "$GREETING"', cwd=str(tmp_path), env={"GREETING": TEXT})
    assert reply["stdout"] == f"{tmp_path}\n{TEXT}\n"


@pytest.mark.slow
def test_run_streaming_tells_lines_in_order_and_then_the_exit_code(client: SandboxClient) -> None:
    events = list(client.run_streaming("echo 1; sleep 0.2; echo 2 >&2; sleep 0.2; printf 3; exit 4"))
    assert events == [
        {"stream": "stdout", "data": "1"},
        {"stream": "stderr", "data": "2"},
        {"stream": "stdout", "data": "3"},
        {"code": 4, "error": True},
    ]


def test_run_streaming_does_not_wait_for_the_end(client: SandboxClient, tmp_path: Path) -> None:
    seen = []
    for event in client.run_streaming("echo one; until [ -e go ]; do sleep 0.02; done; echo two", cwd=str(tmp_path)):
        seen.append(event.get("data"))
        (tmp_path / "go").touch()
    assert seen == ["one", "two", None]


def test_run_streaming_keeps_every_character_of_a_line(client: SandboxClient) -> None:
    first, last = client.run_streaming('printf "%s\\n" "$LINE"', env={"LINE": TEXT})
    assert first == {"stream": "stdout", "data": TEXT}
    assert last == {"code": 0, "error": False}


def test_run_streaming_into_a_missing_directory_is_refused(client: SandboxClient) -> None:
    with pytest.raises(httpx.HTTPStatusError, match="400"):
        list(client.run_streaming("true", cwd="/no/such/directory"))


def test_binding_a_second_port_is_a_conflict(client: SandboxClient) -> None:
    client.unbind_port()  # whatever a test before this one left bound
    assert client.bind_port(8080)["port"] == "8080"
    with pytest.raises(SandboxRequestError, match="Port already bound") as error:
        client.bind_port(8081)
    assert error.value.status_code == 409
    with pytest.raises(SandboxRequestError) as error:
        client.unbind_port(8081)
    assert error.value.status_code == 409
    assert client.unbind_port(8080)["success"]
    assert client.unbind_port()["success"]


def test_processes_through_the_client(client: SandboxClient, tmp_path: Path) -> None:
    started = client.start_process("sleep 300", cwd=str(tmp_path), env={"A": "b"})
    assert started["status"] == "running"
    assert client.kill_process(started["id"])["success"]
    listed = {process["id"]: process for process in client.list_processes()["processes"]}
    assert listed[started["id"]]["status"] == "killed"
    assert listed[started["id"]]["pid"] == started["pid"]


def test_files_through_the_client(client: SandboxClient, tmp_path: Path) -> None:
    folder, file = str(tmp_path / "a/b"), str(tmp_path / "a/b/file")
    assert client.make_dir(folder)["success"]
    assert client.write_file(file, TEXT)["success"]
    assert client.read_file(file) == {"content": TEXT}
    assert client.list_dir(folder) == {"entries": ["file"]}
    assert client.delete_file(file)["success"]
    assert client.list_dir(folder) == {"entries": []}
    assert client.delete_dir(str(tmp_path / "a"))["success"]
    assert not (tmp_path / "a").exists()


# Commands of a sandbox


@pytest.mark.parametrize("stream", [True, False])
def test_exec_gives_output_and_exit_code(sandbox: Sandbox, stream: bool) -> None:
    result = sandbox.exec("printf out; printf err >&2; exit 3", stream=stream)
    assert (result.stdout, result.stderr, result.exit_code) == ("out", "err", 3)
    assert result.status is CommandStatus.FAILED


@pytest.mark.parametrize("stream", [True, False])
def test_exec_of_a_command_that_succeeds_is_a_success(sandbox: Sandbox, stream: bool) -> None:
    assert sandbox.exec("true", stream=stream).success


@pytest.mark.parametrize("stream", [True, False])
def test_exec_of_a_command_that_a_signal_ends_is_a_failure(sandbox: Sandbox, stream: bool) -> None:
    result = sandbox.exec("kill -9 $$", stream=stream)
    assert (result.exit_code, result.success) == (-1, False)


@pytest.mark.parametrize("stream", [True, False])
def test_exec_takes_a_directory_and_an_environment(sandbox: Sandbox, tmp_path: Path, stream: bool) -> None:
    result = sandbox.exec('printf "$PWD $A"', cwd=str(tmp_path), env={"A": TEXT}, stream=stream)
    assert result.stdout == f"{tmp_path} {TEXT}"


@pytest.mark.parametrize("stream", [True, False])
def test_exec_raises_for_a_failure_when_told_to(sandbox: Sandbox, stream: bool) -> None:
    with pytest.raises(SandboxCommandError, match="exit code 7: sorry"):
        sandbox.exec("printf sorry >&2; exit 7", stream=stream, raise_on_error=True)


@pytest.mark.parametrize("stream", [True, False])
def test_exec_gives_a_very_long_line_whole(sandbox: Sandbox, stream: bool) -> None:
    assert sandbox.exec("head -c 300000 /dev/zero | tr '\\0' x", stream=stream).stdout == "x" * 300_000


@pytest.mark.slow
@pytest.mark.parametrize("stream", [True, False])
def test_exec_that_times_out_leaves_nothing_running(sandbox: Sandbox, tmp_path: Path, stream: bool) -> None:
    with pytest.raises(SandboxTimeoutError):
        sandbox.exec("sleep 300 & echo $! >child; echo $$ >shell; wait", str(tmp_path), timeout=1, stream=stream)
    for name in ("shell", "child"):
        wait_until_gone(int((tmp_path / name).read_text()))


def test_exec_in_a_missing_directory_says_so(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxRequestError, match="Invalid working directory: /no/such/directory") as error:
        sandbox.exec("true", cwd="/no/such/directory", stream=False)
    assert error.value.status_code == 400


def test_exec_calls_back_with_each_line(sandbox: Sandbox) -> None:
    out: list[str] = []
    err: list[str] = []
    result = sandbox.exec("echo a; echo; echo b; echo c >&2; exit 5", on_stdout=out.append, on_stderr=err.append)
    assert (out, err, result.exit_code) == (["a", "", "b"], ["c"], 5)


# Files of a sandbox


def test_a_text_file_comes_back_as_it_was_written(files: SandboxFilesystem, tmp_path: Path) -> None:
    text = f"{TEXT}\r\nsecond\n"
    files.write_file(str(tmp_path / "file"), text)
    assert files.read_file(str(tmp_path / "file")).content == text
    assert (tmp_path / "file").read_bytes() == text.encode()


def test_an_empty_file_reads_as_empty(files: SandboxFilesystem, tmp_path: Path) -> None:
    files.write_file(str(tmp_path / "file"), "")
    assert files.read_file(str(tmp_path / "file")).content == ""


def test_base64_mode_brings_bytes_back(files: SandboxFilesystem, tmp_path: Path) -> None:
    files.write_file(str(tmp_path / "file"), BINARY, encoding="base64")
    assert files.read_file(str(tmp_path / "file"), encoding="base64").content == BINARY


def test_upload_and_download(files: SandboxFilesystem, tmp_path: Path) -> None:
    here, there, back = tmp_path / "here", str(tmp_path / "there"), tmp_path / "back"
    here.write_text(TEXT)
    files.upload_file(str(here), there)
    files.download_file(there, str(back))
    assert back.read_text() == TEXT
    here.write_bytes(BINARY)
    files.upload_file(str(here), there, encoding="base64")
    files.download_file(there, str(back), encoding="base64")
    assert back.read_bytes() == BINARY


def test_write_files_writes_them_all(files: SandboxFilesystem, tmp_path: Path) -> None:
    files.write_files([{"path": str(tmp_path / name), "content": name} for name in "abc"])
    assert files.list_dir(str(tmp_path)) == ["a", "b", "c"]
    assert (tmp_path / "b").read_text() == "b"


def test_list_dir_lists_the_working_directory_unless_told_otherwise(files: SandboxFilesystem, daemon: Daemon) -> None:
    assert daemon.log.name in files.list_dir()
    assert files.ls() == files.list_dir(str(daemon.log.parent))


def test_mkdir_makes_parents_and_may_be_repeated(files: SandboxFilesystem, tmp_path: Path) -> None:
    for _ in range(2):
        files.mkdir(str(tmp_path / "a/b/c"))
    assert (tmp_path / "a/b/c").is_dir()
    files.delete_dir(str(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


def test_open_reads_writes_and_appends(files: SandboxFilesystem, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    for mode in ("a", "a", "w", "a"):
        with files.open(path, mode) as file:
            file.write(mode)
    with files.open(path) as file:
        assert file.read() == "wa"


def test_rename_move_and_remove(files: SandboxFilesystem, tmp_path: Path) -> None:
    old, new, folder = str(tmp_path / "it's old"), str(tmp_path / "new $1"), str(tmp_path / "a folder")
    files.write_file(old, "content")
    files.rename_file(old, new)
    assert (files.exists(old), files.exists(new)) == (False, True)
    files.mkdir(folder)
    files.move_file(new, folder)
    assert files.read_file(f"{folder}/new $1").content == "content"
    files.rm(f"{folder}/new $1")
    assert files.list_dir(folder) == []
    files.rm(folder, recursive=True)
    assert not files.exists(folder)


def test_is_file_and_is_dir_tell_them_apart(files: SandboxFilesystem, tmp_path: Path) -> None:
    files.write_file(str(tmp_path / "file"), "")
    assert (files.is_file(str(tmp_path / "file")), files.is_dir(str(tmp_path / "file"))) == (True, False)
    assert (files.is_file(str(tmp_path)), files.is_dir(str(tmp_path))) == (False, True)


@pytest.mark.parametrize(
    "use",
    [
        lambda files, path: files.read_file(path),
        lambda files, path: files.list_dir(path),
        lambda files, path: files.delete_file(path),
        lambda files, path: files.download_file(path, path),
        lambda files, path: files.rename_file(path, path + "x"),
        lambda files, path: files.move_file(path, path + "x"),
        lambda files, path: files.rm(path),
    ],
    ids=["read_file", "list_dir", "delete_file", "download_file", "rename_file", "move_file", "rm"],
)
def test_a_missing_file_is_not_found(
    files: SandboxFilesystem, tmp_path: Path, use: Callable[[SandboxFilesystem, str], object]
) -> None:
    with pytest.raises(SandboxFileNotFoundError):
        use(files, str(tmp_path / "missing"))


def test_deleting_a_missing_directory_succeeds(files: SandboxFilesystem, tmp_path: Path) -> None:
    files.delete_dir(str(tmp_path / "missing"))


def test_writing_into_a_missing_directory_is_an_error(files: SandboxFilesystem, tmp_path: Path) -> None:
    with pytest.raises(SandboxFilesystemError, match="no such file or directory"):
        files.write_file(str(tmp_path / "missing/file"), "")


@pytest.mark.parametrize("path", ["file", "file/below"])
def test_making_a_directory_where_a_file_is_fails(files: SandboxFilesystem, tmp_path: Path, path: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SandboxFilesystemError, match="not a directory"):
        files.mkdir(str(tmp_path / path))


def test_reading_a_directory_as_a_file_is_an_error(files: SandboxFilesystem, tmp_path: Path) -> None:
    with pytest.raises(SandboxFilesystemError, match="is a directory"):
        files.read_file(str(tmp_path))


# Processes of a sandbox


def test_a_launched_process_is_listed_until_it_is_killed_and_after(sandbox: Sandbox, tmp_path: Path) -> None:
    command = 'sleep 300 & echo "$! $A" >out; wait'
    id = sandbox.launch_process(command, cwd=str(tmp_path), env={"A": "b"})
    running = listed(sandbox, id)
    assert (running.command, running.status, running.exit_code) == (command, "running", None)
    assert running.pid
    assert running.started_at
    sandbox.exec("until [ -s out ]; do sleep 0.02; done", cwd=str(tmp_path))
    child, value = (tmp_path / "out").read_text().split()
    assert value == "b"
    sandbox.kill_process(id)
    assert not alive(running.pid)
    assert not alive(int(child))
    killed = listed(sandbox, id)
    assert killed.status == "killed"
    assert killed.completed_at
    assert killed.started_at == running.started_at


@pytest.mark.parametrize(("code", "status"), [(0, "completed"), (6, "failed")])
def test_a_process_that_ends_is_listed_with_its_exit_code(sandbox: Sandbox, code: int, status: str) -> None:
    id = sandbox.launch_process(f"exit {code}")
    deadline = time.monotonic() + 5
    while (ended := listed(sandbox, id)).status == "running":
        assert time.monotonic() < deadline
    assert (ended.status, ended.exit_code) == (status, code)
    assert ended.completed_at


def test_killing_what_does_not_run_is_an_error(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxError, match="process not found: nonesuch"):
        sandbox.kill_process("nonesuch")
    id = sandbox.launch_process("sleep 300")
    sandbox.kill_process(id)
    with pytest.raises(SandboxError, match=r"process is not running \(status: killed\)"):
        sandbox.kill_process(id)


def test_launching_nothing_is_an_error(sandbox: Sandbox) -> None:
    with pytest.raises(SandboxError, match="Command is required"):
        sandbox.launch_process("")


def test_kill_all_processes_counts_those_that_ran(start_daemon: Callable[..., Daemon]) -> None:
    sandbox = bound_to(start_daemon(), Sandbox)
    first = sandbox.launch_process("sleep 300")
    sandbox.kill_process(first)
    ids = [sandbox.launch_process("sleep 300") for _ in range(3)]
    assert [process.id for process in sandbox.list_processes()] == [first, *ids]
    assert sandbox.kill_all_processes() == 3
    assert {process.status for process in sandbox.list_processes()} == {"killed"}
    assert sandbox.kill_all_processes() == 0
    sandbox._client.close()


def listed(sandbox: Sandbox, id: str) -> ProcessInfo:
    """What the list of processes says of one."""
    (process,) = [process for process in sandbox.list_processes() if process.id == id]
    return process


# Ports and health of a sandbox


def test_an_exposed_port_is_reached_through_the_proxy(sandbox: Sandbox, daemon: Daemon) -> None:
    with listen() as service:
        port = service.getsockname()[1]
        exposed = sandbox.expose_port(port)
        assert (exposed.port, exposed.exposed_at) == (port, PUBLIC_URL)
        assert exchange(daemon.proxy_port, service) == (b"ping", b"pong")
        sandbox.unexpose_port()
        assert is_closed_at_once(daemon.proxy_port)


def test_exposing_a_port_replaces_the_one_before(sandbox: Sandbox, daemon: Daemon) -> None:
    with listen() as before, listen() as after:
        sandbox.expose_port(before.getsockname()[1])
        sandbox.expose_port(after.getsockname()[1])
        assert exchange(daemon.proxy_port, after) == (b"ping", b"pong")


def test_unexposing_nothing_succeeds(sandbox: Sandbox) -> None:
    for _ in range(2):
        sandbox.unexpose_port()


def test_a_sandbox_becomes_ready(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "_is_deployment_healthy", lambda: True)  # the control plane's part
    assert sandbox.wait_ready(timeout=5)
    assert sandbox.is_healthy()
