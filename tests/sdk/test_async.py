"""The official Python SDK, asynchronous."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest
from koyeb.sandbox import AsyncSandbox, CommandStatus, SandboxCommandError, SandboxError, SandboxRequestError
from koyeb.sandbox.errors import SandboxTimeoutError
from koyeb.sandbox.executor_client import AsyncSandboxClient
from koyeb.sandbox.filesystem import AsyncSandboxFilesystem, SandboxFileNotFoundError, SandboxFilesystemError
from koyeb.sandbox.sandbox import ProcessInfo

from tests.daemon import Daemon, alive
from tests.sdk import (
    BINARY,
    PUBLIC_URL,
    TEXT,
    bound_to,
    connection,
    exchange,
    in_asyncio,
    is_closed_at_once,
    listen,
    wait_until_gone,
)

both_prefixes = pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox", "/koyeb-sandbox/"])
streamed_or_not = pytest.mark.parametrize("stream", [True, False])


def client_of(daemon: Daemon, prefix: str = "") -> AsyncSandboxClient:
    """A client, to be entered."""
    return AsyncSandboxClient(connection(daemon, prefix))


@asynccontextmanager
async def sandbox_of(daemon: Daemon) -> AsyncIterator[AsyncSandbox]:
    """A sandbox handle; the daemon has no port bound afterwards."""
    sandbox = bound_to(daemon, AsyncSandbox)
    yield sandbox
    await sandbox.unexpose_port()
    await sandbox._async_client.close()


async def listed(sandbox: AsyncSandbox, id: str) -> ProcessInfo:
    """What the list of processes says of one."""
    (process,) = [process for process in await sandbox.list_processes() if process.id == id]
    return process


# The client


@both_prefixes
@in_asyncio
async def test_health_is_ok(daemon: Daemon, prefix: str) -> None:
    async with client_of(daemon, prefix) as client:
        assert (await client.health())["status"] == "ok"


@in_asyncio
async def test_a_wrong_secret_is_refused(daemon: Daemon) -> None:
    async with AsyncSandboxClient(connection(daemon, secret="wrong")) as client:
        with pytest.raises(SandboxRequestError) as error:
            await client.run("true")
    assert error.value.status_code == 401


@both_prefixes
@in_asyncio
async def test_run_gives_output_and_exit_code(daemon: Daemon, prefix: str, tmp_path: Path) -> None:
    async with client_of(daemon, prefix) as client:
        reply = await client.run('pwd; echo "$A" >&2; exit 3', cwd=str(tmp_path), env={"A": TEXT})
    assert (reply["stdout"], reply["stderr"], reply["code"]) == (f"{tmp_path}\n", f"{TEXT}\n", 3)


@in_asyncio
async def test_commands_run_side_by_side(daemon: Daemon, tmp_path: Path) -> None:
    async with client_of(daemon) as client:
        waiting = asyncio.create_task(client.run("until [ -e go ]; do sleep 0.02; done", cwd=str(tmp_path)))
        replies = await asyncio.gather(*[client.run(f"echo {number}") for number in range(20)])
        assert [reply["stdout"] for reply in replies] == [f"{number}\n" for number in range(20)]
        await client.write_file(str(tmp_path / "go"), "")
        assert (await waiting)["code"] == 0


@both_prefixes
@in_asyncio
@pytest.mark.slow
async def test_run_streaming_tells_lines_in_order_and_then_the_exit_code(daemon: Daemon, prefix: str) -> None:
    async with client_of(daemon, prefix) as client:
        stream = client.run_streaming("echo 1; sleep 0.2; echo 2 >&2; sleep 0.2; printf 3; exit 4")
        events = [event async for event in stream]
    assert events == [
        {"stream": "stdout", "data": "1"},
        {"stream": "stderr", "data": "2"},
        {"stream": "stdout", "data": "3"},
        {"code": 4, "error": True},
    ]


@in_asyncio
async def test_run_streaming_does_not_wait_for_the_end(daemon: Daemon, tmp_path: Path) -> None:
    seen = []
    command = "echo one; until [ -e go ]; do sleep 0.02; done; echo two"
    async with client_of(daemon) as client:
        async for event in client.run_streaming(command, cwd=str(tmp_path)):
            seen.append(event.get("data"))
            (tmp_path / "go").touch()
    assert seen == ["one", "two", None]


@in_asyncio
async def test_run_streaming_keeps_every_character_of_a_line(daemon: Daemon) -> None:
    async with client_of(daemon) as client:
        events = [event async for event in client.run_streaming('printf "%s\\n" "$LINE"', env={"LINE": TEXT})]
    assert events == [{"stream": "stdout", "data": TEXT}, {"code": 0, "error": False}]


@in_asyncio
async def test_run_streaming_into_a_missing_directory_is_refused(daemon: Daemon) -> None:
    async with client_of(daemon) as client:
        with pytest.raises(httpx.HTTPStatusError, match="400"):
            [event async for event in client.run_streaming("true", cwd="/no/such/directory")]


@both_prefixes
@in_asyncio
async def test_binding_a_second_port_is_a_conflict(daemon: Daemon, prefix: str) -> None:
    async with client_of(daemon, prefix) as client:
        await client.unbind_port()  # whatever a test before this one left bound
        assert (await client.bind_port(8080))["port"] == "8080"
        with pytest.raises(SandboxRequestError, match="Port already bound") as error:
            await client.bind_port(8081)
        assert error.value.status_code == 409
        with pytest.raises(SandboxRequestError) as error:
            await client.unbind_port(8081)
        assert error.value.status_code == 409
        assert (await client.unbind_port(8080))["success"]
        assert (await client.unbind_port())["success"]


@both_prefixes
@in_asyncio
async def test_files_through_the_client(daemon: Daemon, prefix: str, tmp_path: Path) -> None:
    folder, file = str(tmp_path / "a/b"), str(tmp_path / "a/b/file")
    async with client_of(daemon, prefix) as client:
        assert (await client.make_dir(folder))["success"]
        assert (await client.write_file(file, TEXT))["success"]
        assert await client.read_file(file) == {"content": TEXT}
        assert await client.list_dir(folder) == {"entries": ["file"]}
        assert (await client.delete_file(file))["success"]
        assert await client.list_dir(folder) == {"entries": []}
        assert (await client.delete_dir(str(tmp_path / "a")))["success"]


# Commands of a sandbox


@streamed_or_not
@in_asyncio
async def test_exec_gives_output_and_exit_code(daemon: Daemon, tmp_path: Path, stream: bool) -> None:
    async with sandbox_of(daemon) as sandbox:
        command = 'printf "$PWD $A"; printf err >&2; exit 3'
        result = await sandbox.exec(command, cwd=str(tmp_path), env={"A": TEXT}, stream=stream)
        assert (result.stdout, result.stderr, result.exit_code) == (f"{tmp_path} {TEXT}", "err", 3)
        assert result.status is CommandStatus.FAILED
        assert (await sandbox.exec("true", stream=stream)).success


@streamed_or_not
@in_asyncio
async def test_exec_raises_for_a_failure_when_told_to(daemon: Daemon, stream: bool) -> None:
    async with sandbox_of(daemon) as sandbox:
        with pytest.raises(SandboxCommandError, match="exit code 7: sorry"):
            await sandbox.exec("printf sorry >&2; exit 7", stream=stream, raise_on_error=True)


@streamed_or_not
@in_asyncio
async def test_exec_gives_a_very_long_line_whole(daemon: Daemon, stream: bool) -> None:
    async with sandbox_of(daemon) as sandbox:
        result = await sandbox.exec("head -c 300000 /dev/zero | tr '\\0' x", stream=stream)
        assert result.stdout == "x" * 300_000


@pytest.mark.slow
@streamed_or_not
@in_asyncio
async def test_exec_that_times_out_leaves_nothing_running(daemon: Daemon, tmp_path: Path, stream: bool) -> None:
    command = "sleep 300 & echo $! >child; echo $$ >shell; wait"
    async with sandbox_of(daemon) as sandbox:
        with pytest.raises(SandboxTimeoutError):
            await sandbox.exec(command, cwd=str(tmp_path), timeout=1, stream=stream)
    for name in ("shell", "child"):
        wait_until_gone(int((tmp_path / name).read_text()))


@streamed_or_not
@in_asyncio
async def test_exec_that_is_cancelled_leaves_nothing_running(daemon: Daemon, tmp_path: Path, stream: bool) -> None:
    command = "sleep 300 & echo $! >child; echo $$ >shell; wait"
    async with sandbox_of(daemon) as sandbox:
        task = asyncio.create_task(sandbox.exec(command, cwd=str(tmp_path), stream=stream))
        await sandbox.exec("until [ -s shell ]; do sleep 0.02; done", cwd=str(tmp_path))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    for name in ("shell", "child"):
        wait_until_gone(int((tmp_path / name).read_text()))


@in_asyncio
async def test_exec_in_a_missing_directory_says_so(daemon: Daemon) -> None:
    async with sandbox_of(daemon) as sandbox:
        with pytest.raises(SandboxRequestError, match="Invalid working directory: /no/such/directory"):
            await sandbox.exec("true", cwd="/no/such/directory", stream=False)


@in_asyncio
async def test_exec_calls_back_with_each_line(daemon: Daemon) -> None:
    out: list[str] = []
    err: list[str] = []
    async with sandbox_of(daemon) as sandbox:
        command = "echo a; echo; echo b; echo c >&2; exit 5"
        result = await sandbox.exec(command, on_stdout=out.append, on_stderr=err.append)
    assert (out, err, result.exit_code) == (["a", "", "b"], ["c"], 5)


# Files of a sandbox


@in_asyncio
async def test_text_and_bytes_come_back_as_they_were_written(daemon: Daemon, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    async with sandbox_of(daemon) as sandbox:
        for text in (f"{TEXT}\r\nsecond\n", ""):
            await sandbox.filesystem.write_file(path, text)
            assert (await sandbox.filesystem.read_file(path)).content == text
        await sandbox.filesystem.write_file(path, BINARY, encoding="base64")
        assert (await sandbox.filesystem.read_file(path, encoding="base64")).content == BINARY


@in_asyncio
async def test_upload_and_download(daemon: Daemon, tmp_path: Path) -> None:
    here, there, back = tmp_path / "here", str(tmp_path / "there"), tmp_path / "back"
    async with sandbox_of(daemon) as sandbox:
        here.write_text(TEXT)
        await sandbox.filesystem.upload_file(str(here), there)
        await sandbox.filesystem.download_file(there, str(back))
        assert back.read_text() == TEXT
        here.write_bytes(BINARY)
        await sandbox.filesystem.upload_file(str(here), there, encoding="base64")
        await sandbox.filesystem.download_file(there, str(back), encoding="base64")
        assert back.read_bytes() == BINARY


@in_asyncio
async def test_directories_and_many_files(daemon: Daemon, tmp_path: Path) -> None:
    folder = str(tmp_path / "a/b")
    async with sandbox_of(daemon) as sandbox:
        for _ in range(2):
            await sandbox.filesystem.mkdir(folder)
        await sandbox.filesystem.write_files([{"path": f"{folder}/{name}", "content": name} for name in "cab"])
        assert await sandbox.filesystem.ls(folder) == ["a", "b", "c"]
        assert daemon.log.name in await sandbox.filesystem.list_dir()
        await sandbox.filesystem.delete_dir(str(tmp_path / "a"))
        assert not (tmp_path / "a").exists()
        await sandbox.filesystem.delete_dir(str(tmp_path / "a"))


@in_asyncio
async def test_open_reads_writes_and_appends(daemon: Daemon, tmp_path: Path) -> None:
    path = str(tmp_path / "file")
    async with sandbox_of(daemon) as sandbox:
        for mode in ("a", "a", "w", "a"):
            async with sandbox.filesystem.open(path, mode) as file:
                await file.write(mode)
        async with sandbox.filesystem.open(path) as file:
            assert await file.read() == "wa"


@in_asyncio
async def test_rename_move_and_remove(daemon: Daemon, tmp_path: Path) -> None:
    old, new, folder = str(tmp_path / "it's old"), str(tmp_path / "new $1"), str(tmp_path / "a folder")
    async with sandbox_of(daemon) as sandbox:
        files = sandbox.filesystem
        await files.write_file(old, "content")
        await files.rename_file(old, new)
        assert (await files.exists(old), await files.exists(new)) == (False, True)
        await files.mkdir(folder)
        await files.move_file(new, folder)
        assert (await files.is_file(f"{folder}/new $1"), await files.is_dir(f"{folder}/new $1")) == (True, False)
        assert (await files.is_file(folder), await files.is_dir(folder)) == (False, True)
        await files.rm(f"{folder}/new $1")
        assert await files.list_dir(folder) == []
        await files.rm(folder, recursive=True)
        assert not await files.exists(folder)


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
@in_asyncio
async def test_a_missing_file_is_not_found(
    daemon: Daemon, tmp_path: Path, use: Callable[[AsyncSandboxFilesystem, str], Awaitable[object]]
) -> None:
    async with sandbox_of(daemon) as sandbox:
        with pytest.raises(SandboxFileNotFoundError):
            await use(sandbox.filesystem, str(tmp_path / "missing"))


@in_asyncio
async def test_writing_into_a_missing_directory_is_an_error(daemon: Daemon, tmp_path: Path) -> None:
    async with sandbox_of(daemon) as sandbox:
        with pytest.raises(SandboxFilesystemError, match="no such file or directory"):
            await sandbox.filesystem.write_file(str(tmp_path / "missing/file"), "")


# Processes of a sandbox


@in_asyncio
async def test_a_launched_process_is_listed_until_it_is_killed_and_after(daemon: Daemon, tmp_path: Path) -> None:
    command = 'sleep 300 & echo "$! $A" >out; wait'
    async with sandbox_of(daemon) as sandbox:
        id = await sandbox.launch_process(command, cwd=str(tmp_path), env={"A": "b"})
        running = await listed(sandbox, id)
        assert (running.command, running.status, running.exit_code) == (command, "running", None)
        await sandbox.exec("until [ -s out ]; do sleep 0.02; done", cwd=str(tmp_path))
        child, value = (tmp_path / "out").read_text().split()
        assert value == "b"
        await sandbox.kill_process(id)
        assert not alive(running.pid or 0)
        assert not alive(int(child))
        assert (await listed(sandbox, id)).status == "killed"


@in_asyncio
async def test_killing_what_does_not_run_is_an_error(daemon: Daemon) -> None:
    async with sandbox_of(daemon) as sandbox:
        with pytest.raises(SandboxError, match="process not found: nonesuch"):
            await sandbox.kill_process("nonesuch")


@in_asyncio
async def test_launching_nothing_is_an_error(daemon: Daemon) -> None:
    async with sandbox_of(daemon) as sandbox:
        with pytest.raises(SandboxError, match="Command is required"):
            await sandbox.launch_process("")


@in_asyncio
async def test_kill_all_processes_counts_those_that_ran(start_daemon: Callable[..., Daemon]) -> None:
    async with sandbox_of(start_daemon()) as sandbox:
        ids = [await sandbox.launch_process("sleep 300") for _ in range(3)]
        assert [process.id for process in await sandbox.list_processes()] == ids
        assert await sandbox.kill_all_processes() == 3
        assert {process.status for process in await sandbox.list_processes()} == {"killed"}


# Ports and health of a sandbox


@in_asyncio
async def test_an_exposed_port_is_reached_through_the_proxy(daemon: Daemon) -> None:
    async with sandbox_of(daemon) as sandbox:
        with listen() as before, listen() as service:
            port = service.getsockname()[1]
            await sandbox.expose_port(before.getsockname()[1])
            exposed = await sandbox.expose_port(port)
            assert (exposed.port, exposed.exposed_at) == (port, PUBLIC_URL)
            assert exchange(daemon.proxy_port, service) == (b"ping", b"pong")
            await sandbox.unexpose_port()
            assert is_closed_at_once(daemon.proxy_port)


@in_asyncio
async def test_a_sandbox_becomes_ready(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    async def healthy() -> bool:
        return True

    async with sandbox_of(daemon) as sandbox:
        monkeypatch.setattr(sandbox, "_async_is_deployment_healthy", healthy)  # the control plane's part
        assert await sandbox.wait_ready(timeout=5)
        assert await sandbox.is_healthy()
