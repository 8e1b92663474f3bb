"""
The adapter to the OpenAI Agents SDK: the SDK's own clients, runner and tools, without a model.

What a session does is tested on the SDK's own local sandbox too, so that it is the SDK's view of it.
"""

from __future__ import annotations

import asyncio
import io
import os
import tarfile
import urllib.request
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from agents import RunConfig, Runner
from agents.editor import ApplyPatchOperation
from agents.sandbox import LocalSnapshotSpec, Manifest, SandboxAgent, SandboxRunConfig
from agents.sandbox.entries import Dir, File
from agents.sandbox.errors import (
    ExecNonZeroError,
    ExecTimeoutError,
    ExecTransportError,
    InvalidManifestPathError,
    WorkspaceReadNotFoundError,
)
from agents.sandbox.sandboxes.unix_local import UnixLocalSandboxClient, UnixLocalSandboxClientOptions
from agents.testing import ScriptedModel, assistant_message, function_call

from sandboxd.client import Sandbox
from sandboxd.integrations.openai_agents import SandboxdClient, SandboxdClientOptions
from tests.daemon import Daemon


@pytest.fixture(params=["sandboxd", "the SDK's own"])
def client(request: pytest.FixtureRequest, daemon: Daemon, tmp_path: Path) -> Any:
    if request.param == "sandboxd":
        return SandboxdClient(daemon.url, daemon.secret, directory=str(tmp_path))
    return UnixLocalSandboxClient()


@pytest.fixture
def ours(daemon: Daemon, tmp_path: Path) -> SandboxdClient:
    return SandboxdClient(daemon.url, daemon.secret, directory=str(tmp_path))


@pytest.fixture
async def session(client: Any) -> AsyncIterator[Any]:
    manifest = Manifest(
        entries={"given.txt": File(content=b"given\n"), "dir": Dir(children={"below.txt": File(content=b"below\n")})},
        environment={"value": {"NAME": "a value"}},
    )
    session = await client.create(manifest=manifest)
    async with session:
        yield session
    await client.delete(session)
    assert not Path(session.state.manifest.root).exists()


async def text(session: Any, path: str) -> str:
    with await session.read(Path(path)) as stream:
        return stream.read().decode()


async def test_commands(session: Any) -> None:
    assert await session.running()
    result = await session.exec("pwd; echo $NAME; cat given.txt dir/below.txt; echo err >&2; exit 3")
    assert result.stdout.decode().splitlines()[1:] == ["a value", "given", "below"]
    assert Path(result.stdout.decode().splitlines()[0]).samefile(session.state.manifest.root)
    assert (result.stderr, result.exit_code) == (b"err\n", 3)
    assert (await session.exec("echo", "a b", "$HOME", shell=False)).stdout == b"a b $HOME\n"
    with pytest.raises(ExecTimeoutError):
        await session.exec("sleep 60", timeout=0.5)


async def test_files(session: Any) -> None:
    await session.write(Path("a/new/é.bin"), io.BytesIO(bytes(range(256)) * 5000))
    with await session.read(Path("a/new/é.bin")) as stream:
        assert stream.read() == bytes(range(256)) * 5000
    assert await session.read_bounded(Path("a/new/é.bin"), max_bytes=3) == b"\0\1\2"
    await session.write(Path("empty"), io.BytesIO(b""))
    assert await session.read_bounded(Path("empty"), max_bytes=3) == b""
    with pytest.raises(WorkspaceReadNotFoundError):
        await session.read(Path("none"))
    await session.mkdir("made/deep", parents=True)
    await session.mv("given.txt", "made/moved.txt")
    root = Path(session.state.manifest.root)
    found = {Path(entry.path).name: entry for entry in await session.ls("made")}
    assert {name: (entry.kind.value, entry.size) for name, entry in found.items() if name != "deep"} == {
        "moved.txt": ("file", 6)
    }
    assert found["deep"].is_dir()
    assert found["moved.txt"].permissions.to_mode() == (root / "made/moved.txt").stat().st_mode & 0o777
    await session.rm("made", recursive=True)
    assert not (root / "made").exists()
    with pytest.raises(ExecNonZeroError):
        await session.ls("made")


async def test_paths_stay_in_the_workspace(session: Any) -> None:
    root = Path(session.state.manifest.root)
    (root / "link").symlink_to("/etc")
    for path in ("../x", "/etc/passwd", "link/passwd"):
        with pytest.raises(InvalidManifestPathError):
            await session.read(Path(path))
        with pytest.raises(InvalidManifestPathError):
            await session.write(Path(path), io.BytesIO(b""))


async def test_patches(session: Any) -> None:
    await session.apply_patch(
        [
            ApplyPatchOperation(type="update_file", path="given.txt", diff="-given\n+changed\n"),
            ApplyPatchOperation(type="create_file", path="made/new.txt", diff="+new\n"),
            ApplyPatchOperation(type="delete_file", path="dir/below.txt"),
        ]
    )
    assert await text(session, "given.txt") == "changed\n"
    assert (await text(session, "made/new.txt")).strip() == "new"
    with pytest.raises(WorkspaceReadNotFoundError):
        await session.read(Path("dir/below.txt"))


async def test_archives_are_unpacked(session: Any) -> None:
    packed = {"tar": io.BytesIO(), "zip": io.BytesIO()}
    with tarfile.open(fileobj=packed["tar"], mode="w") as tar:
        tar.add(__file__, "of-tar/file.py")
    with zipfile.ZipFile(packed["zip"], "w") as archive:
        archive.write(__file__, "of-zip/file.py")
    for kind, data in packed.items():
        data.seek(0)
        await session.extract(f"packed.{kind}", data)
        assert await text(session, f"of-{kind}/file.py") == Path(__file__).read_text()


async def test_a_program_that_runs_on(session: Any) -> None:
    update = await session.pty_exec_start("echo begun; read line; echo got $line; exit 5", tty=True, yield_time_s=2)
    assert b"begun" in update.output
    assert update.exit_code is None
    update = await session.pty_write_stdin(session_id=update.process_id, chars="hello\n", yield_time_s=10)
    assert b"got hello" in update.output
    assert (update.exit_code, update.process_id) == (5, None)
    done = await session.pty_exec_start("echo out; echo err >&2", yield_time_s=10)
    assert (sorted(done.output.split()), done.exit_code) == ([b"err", b"out"], 0)


async def test_programs_end_with_the_session(client: Any) -> None:
    session = await client.create()
    async with session:
        update = await session.pty_exec_start("echo $$; exec sleep 300", yield_time_s=2)
        pid = int(update.output)
        assert Path(f"/proc/{pid}").exists()
    async with asyncio.timeout(10):
        while Path(f"/proc/{pid}/exe").exists():
            await asyncio.sleep(0.02)
    await client.delete(session)


async def test_a_snapshot_is_resumed_from(client: Any, tmp_path: Path) -> None:
    manifest = Manifest(entries={"[kept]": File(content=b"kept"), "[k]": File(content=b"not", ephemeral=True)})
    session = await client.create(manifest=manifest, snapshot=LocalSnapshotSpec(base_path=tmp_path))
    async with session:
        await session.exec("echo made > made.txt; ln -s made.txt link; chmod 750 made.txt; mkdir -p d; echo k > d/k")
    state = client.serialize_session_state(session.state)
    await client.delete(session)
    archives = [tarfile.open(path) for path in tmp_path.glob("*.tar*")]  # noqa: SIM115
    assert {"[k]", "./[k]"}.isdisjoint(archives[0].getnames())
    archives[0].close()
    resumed = await client.resume(client.deserialize_session_state(state))
    async with resumed:
        assert await text(resumed, "link") == "made\n"
        assert await text(resumed, "d/k") == "k\n"
        assert (Path(resumed.state.manifest.root) / "made.txt").stat().st_mode & 0o777 == 0o750
        assert await text(resumed, "[k]") == "not"
        assert await text(resumed, "[kept]") == "kept"
    await client.delete(resumed)


async def test_a_workspace_that_is_still_there_is_gone_on_with(client: Any) -> None:
    session = await client.create()
    async with session:
        await session.write(Path("made.txt"), io.BytesIO(b"made"))
    resumed = await client.resume(client.deserialize_session_state(client.serialize_session_state(session.state)))
    async with resumed:
        assert await text(resumed, "made.txt") == "made"
    await client.delete(resumed)


@pytest.mark.parametrize("client", ["sandboxd"], indirect=True)
async def test_an_exposed_port_is_one_of_this_machine(client: Any) -> None:
    session = await client.create(options=SandboxdClientOptions(exposed_ports=(18765,)))
    async with session:
        await session.exec("echo served > index.html")
        started = await session.pty_exec_start("exec python3 -m http.server --bind 127.0.0.1 18765", yield_time_s=0.3)
        assert started.process_id is not None
        await session._inner.sandbox.wait_for_port(18765, timeout=20)
        endpoint = await session.resolve_exposed_port(18765)
        assert endpoint.port != 18765
        url = endpoint.url_for("http")
        assert await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read()) == b"served\n"
    await client.delete(session)


async def test_another_user(ours: SandboxdClient) -> None:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: commands run as other users only if the daemon is root")
    session = await SandboxdClient(ours._url, ours._secret).create()  # the test's directory is not for others
    async with session:
        assert (await session.exec("id -un", user="nobody")).stdout == b"nobody\n"
        assert (await session.exec("id", user="no-such-user")).exit_code == 127
        await session.exec(f"chmod 777 {session.state.manifest.root}")
        await session.write(Path("theirs"), io.BytesIO(b""), user="nobody")
        assert (await session.exec("stat -c %U theirs")).stdout == b"nobody\n"
        assert [entry.owner for entry in await session.ls(".", user="nobody")] == ["nobody"]
    await ours.delete(session)


async def test_a_workspace_that_was_named_is_kept(ours: SandboxdClient, tmp_path: Path) -> None:
    session = await ours.create(manifest=Manifest(root=str(tmp_path / "named")))
    async with session:
        await session.write(Path("made.txt"), io.BytesIO(b"made"))
    await ours.delete(session)
    assert (tmp_path / "named/made.txt").read_text() == "made"


async def test_a_daemon_that_is_gone(daemon: Daemon, ours: SandboxdClient) -> None:
    session = await ours.create()
    async with session:
        session._inner.sandbox.url = "http://127.0.0.1:9"
        session._inner.sandbox.patience = 0.1
        assert not await session.running()
        with pytest.raises(ExecTransportError):
            await session.exec("true")
        session._inner.sandbox.url = daemon.url
    await ours.delete(session)


async def test_the_state_has_no_secret(daemon: Daemon, ours: SandboxdClient) -> None:
    session = await ours.create()
    assert daemon.secret not in str(ours.serialize_session_state(session.state))


async def test_a_run_of_an_agent(client: Any) -> None:
    model = ScriptedModel(
        [
            [function_call("exec_command", {"cmd": "echo by-an-agent > made.txt; cat made.txt"}, call_id="1")],
            [
                function_call(
                    "exec_command", {"cmd": "read x; echo got-$x", "tty": True, "yield_time_ms": 300}, call_id="2"
                )
            ],
            [assistant_message("done")],
        ]
    )
    agent = SandboxAgent(name="Coder", model=model)
    options = UnixLocalSandboxClientOptions() if isinstance(client, UnixLocalSandboxClient) else None
    config = RunConfig(sandbox=SandboxRunConfig(client=client, options=options), tracing_disabled=True)
    result = await Runner.run(agent, "go", run_config=config)
    assert result.final_output == "done"
    outputs = [str(item.output) for item in result.new_items if item.type == "tool_call_output_item"]
    assert "by-an-agent" in outputs[0]
    assert "exited with code 0" in outputs[0]
    assert "running with session ID" in outputs[1]


def test_the_example(example: Callable[[str], str], daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_AGENTS_DISABLE_TRACING", "1")
    model = ScriptedModel(
        [[function_call("exec_command", {"cmd": "echo hello"}, call_id="1")], [assistant_message("hi")]]
    )
    names: dict[str, Any] = {"model": model}
    exec(example("sandboxd.integrations.openai_agents"), names)
    assert names["result"].final_output == "hi"
    with Sandbox(daemon.url, daemon.secret) as sandbox:
        assert sandbox.list_files("/tmp", glob="openai-agents-*") == []
