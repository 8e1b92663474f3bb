"""agent-sandbox's own Python client, unmodified, over its direct connection to the real daemon."""

from __future__ import annotations

import asyncio
import io
import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import yaml
from k8s_agent_sandbox import AsyncSandboxClient, SandboxClient
from k8s_agent_sandbox.exceptions import SandboxRequestError
from k8s_agent_sandbox.models import SandboxDirectConnectionConfig, SandboxInClusterConnectionConfig

from tests.agent_sandbox.cluster import SANDBOX, Cluster
from tests.agents_page import python
from tests.daemon import Daemon

CLAIM = Path(__file__).resolve().parents[2] / "deploy/agent-sandbox/claim.yaml"

#: Where the example connects to.
ROUTER = "http://sandbox-router-svc.agent-sandbox-system.svc.cluster.local:8080"

HEADERS = ("Authorization", "X-Sandboxd-Authorization")


def direct(daemon: Daemon, token: str | None = None, header: str = HEADERS[0]) -> SandboxDirectConnectionConfig:
    """A direct connection, with the daemon's token unless another is given."""
    headers = {header: f"Bearer {daemon.secret if token is None else token}"}
    return SandboxDirectConnectionConfig(api_url=daemon.url, server_port=daemon.port, extra_headers=headers)


@pytest.mark.parametrize("header", HEADERS)
def test_commands(api_server: Cluster, daemon: Daemon, header: str) -> None:
    with SandboxClient(direct(daemon, header=header)) as client:
        sandbox = client.create_sandbox("sandboxd", shutdown_after_seconds=600)
        assert sandbox.sandbox_id == SANDBOX
        assert list(api_server.claims) == [sandbox.claim_name]
        result = sandbox.commands.run("echo out; echo 'err ä' >&2; exit 3")
        assert (result.stdout, result.stderr, result.exit_code, result.timed_out) == ("out\n", "err ä\n", 3, False)
        result = sandbox.commands.run("echo first; sleep 300", command_timeout=0.3)
        assert (result.stdout, result.exit_code, result.timed_out) == ("first\n", 124, True)
        result = sandbox.commands.run("head -c 3000000 /dev/zero | tr '\\0' x")
        assert len(result.stdout) == 3_000_000
    assert api_server.claims == {}
    (claim,), example = api_server.claimed, yaml.safe_load(CLAIM.read_text())
    assert [claim[name] for name in ("apiVersion", "kind")] == [example[name] for name in ("apiVersion", "kind")]
    assert claim["spec"]["warmPoolRef"] == example["spec"]["warmPoolRef"]
    assert set(claim["spec"]["lifecycle"]) == set(example["spec"]["lifecycle"])


def test_a_command_ends_with_its_caller(api_server: Cluster, daemon: Daemon, tmp_path: Path) -> None:
    with SandboxClient(direct(daemon)) as client:
        sandbox = client.create_sandbox("sandboxd")
        command = f"trap 'touch {tmp_path}/ended' HUP TERM EXIT; echo $$ > {tmp_path}/pid; sleep 300"
        with pytest.raises(SandboxRequestError):
            sandbox.commands.run(command, timeout=1)
        pid = int((tmp_path / "pid").read_text())
        gone = sandbox.commands.run(f"for i in $(seq 500); do [ -d /proc/{pid} ] || exit 0; sleep 0.02; done; exit 1")
        assert gone.exit_code == 0


def test_files(api_server: Cluster, daemon: Daemon, tmp_path: Path) -> None:
    blob = os.urandom(3_000_000)
    folder = tmp_path.name
    with SandboxClient(direct(daemon)) as client:
        files = client.create_sandbox("sandboxd").files
        files.write(f"{folder}/a/text.txt", "ä text\n")
        files.write(f'/{folder}/a/it\'s "quoted" ü.bin', blob)
        files.write(f"{folder}/a/streamed", io.BytesIO(blob))
        assert files.read(f"{folder}/a/text.txt") == "ä text\n".encode()
        assert files.read(f'/{folder}/a/it\'s "quoted" ü.bin') == blob
        into = io.BytesIO()
        assert files.read_to(f"{folder}/a/streamed", into) == len(blob)
        assert into.getvalue() == blob
        with pytest.raises(RuntimeError, match="exceeds limit"):
            files.read_to(f"{folder}/a/streamed", io.BytesIO(), max_bytes=1000)
        entries = {entry.name: entry for entry in files.list(f"{folder}/a")}
        assert {name: entry.size for name, entry in entries.items()} == {
            "text.txt": 8,
            'it\'s "quoted" ü.bin': len(blob),
            "streamed": len(blob),
        }
        assert abs((entries["streamed"].modified - datetime.now(timezone.utc)).total_seconds()) < 60
        assert [(entry.name, entry.type) for entry in files.list(folder)] == [("a", "directory")]
        assert folder in {entry.name for entry in files.list(".")}
        assert files.exists(f"{folder}/a/text.txt")
        assert files.exists(f"{folder}/a")
        assert not files.exists(f"{folder}/none")
        for call, status in [
            (lambda: files.read(f"{folder}/none"), 404),
            (lambda: files.list(f"{folder}/none"), 404),
            (lambda: files.list("../.."), 403),
            (lambda: files.read("../../etc/passwd", allow_unsafe_paths=True), 403),
            (lambda: files.write("../x", b"x", allow_unsafe_paths=True), 403),
        ]:
            with pytest.raises(SandboxRequestError) as caught:
                call()
            assert caught.value.status_code == status


@pytest.mark.parametrize("header", HEADERS)
def test_the_asynchronous_client(api_server: Cluster, daemon: Daemon, tmp_path: Path, header: str) -> None:
    path = f"{tmp_path.name}-{header}/file"

    async def work() -> None:
        async with AsyncSandboxClient(direct(daemon, header=header)) as client:
            sandbox = await client.create_sandbox("sandboxd")
            assert (await sandbox.commands.run("echo hello; exit 3")).exit_code == 3
            await sandbox.files.write(path, b"content")
            assert await sandbox.files.read(path) == b"content"
            assert [entry.name for entry in await sandbox.files.list(os.path.dirname(path))] == ["file"]
            assert await sandbox.files.exists(path)
            await sandbox.terminate()

    asyncio.run(asyncio.wait_for(work(), 30))
    assert api_server.claims == {}


def test_the_first_of_its_clients_claims_a_daemon_of_the_pool(
    api_server: Cluster, start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    path = tmp_path / "state" / "secret"
    daemon = start_daemon(SANDBOX_SECRET="", SANDBOX_AUTH_MODE="pool", SANDBOX_SECRET_PATH=str(path))
    with SandboxClient(direct(daemon, "a-token-of-the-claimant", HEADERS[1])) as client:
        assert client.create_sandbox("sandboxd").commands.run("echo mine").stdout == "mine\n"
    assert path.read_text() == "a-token-of-the-claimant\n"
    refused(SandboxClient(direct(daemon, "a-token-of-another")))


def test_a_client_without_a_token_is_refused(api_server: Cluster, daemon: Daemon) -> None:
    refused(SandboxClient(SandboxDirectConnectionConfig(api_url=daemon.url)))
    # The connections of these kinds can send no header of the caller's.
    refused(SandboxClient(SandboxInClusterConnectionConfig(server_port=daemon.port)))


def test_the_example(
    api_server: Cluster, start_daemon: Callable[..., Daemon], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "secret")
    daemon = start_daemon(SANDBOX_SECRET="", SANDBOX_AUTH_MODE="pool", SANDBOX_SECRET_PATH=path)
    code = python("agent-sandbox")
    assert code.count(ROUTER) == 1
    exec(code.replace(ROUTER, daemon.url), {})
    assert capsys.readouterr().out == "hello\n"
    assert api_server.claims == {}


def refused(client: Any) -> None:
    with client:
        sandbox = client.create_sandbox("sandboxd")
        with pytest.raises(SandboxRequestError) as caught:
            sandbox.commands.run("true")
        assert caught.value.status_code == 401
        with pytest.raises(SandboxRequestError) as caught:
            sandbox.files.exists("x")
        assert caught.value.status_code == 401
