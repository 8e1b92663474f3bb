"""
agent-sandbox's own router between its client and the daemon: the one in Python, which is in the source archive of the
client's package.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import requests
from k8s_agent_sandbox import SandboxClient
from k8s_agent_sandbox.exceptions import SandboxRequestError
from k8s_agent_sandbox.models import SandboxDirectConnectionConfig

from tests.agent_sandbox.cluster import Cluster
from tests.daemon import Daemon

TOKEN = "a-token-of-the-router"

#: Starts the router with a name server that finds every sandbox on this machine.
LAUNCHER = """
import os, socket, sys
import uvicorn

find = socket.getaddrinfo

def getaddrinfo(host, *arguments, **keywords):
    inside = os.fsdecode(host).endswith(".svc.cluster.local")
    return find("127.0.0.1" if inside else host, *arguments, **keywords)

socket.getaddrinfo = getaddrinfo
import sandbox_router
uvicorn.run(sandbox_router.app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the router's program."""
    folder = tmp_path_factory.mktemp("router")
    package = f"k8s-agent-sandbox=={version('k8s-agent-sandbox')}"
    options = ("--quiet", "--no-deps", "--no-binary", "k8s-agent-sandbox", "--dest", str(folder))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, package],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if done.returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"NOT TESTED, no archive of {package}: {done.stderr}")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        (member,) = [each for each in tar if each.name.endswith("/sandbox-router/sandbox_router.py")]
        file = tar.extractfile(member)
        assert file is not None
        (folder / "sandbox_router.py").write_bytes(file.read())
    return folder


@contextmanager
def router(program: Path) -> Iterator[str]:
    """The URL of a router that runs. It wants a token of its own in ``Authorization``."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    environ = {**os.environ, "ROUTER_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(program)}
    process = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(port)], env=environ, stdin=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 30
        while True:
            try:
                assert requests.get(f"{url}/healthz", timeout=5).status_code == 200
                break
            except requests.ConnectionError:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)  # nothing is signalled when it listens
        yield url
    finally:
        process.terminate()
        process.wait(15)


def test_commands_and_files_through_the_router(
    api_server: Cluster, daemon: Daemon, program: Path, tmp_path: Path
) -> None:
    api_server.pod_ips = []  # the router refuses those of this machine
    blob = os.urandom(3_000_000)
    with router(program) as url:

        def client(**headers: str) -> SandboxClient[Any]:
            return SandboxClient(
                SandboxDirectConnectionConfig(
                    api_url=url,
                    server_port=daemon.port,
                    extra_headers={name.replace("_", "-"): f"Bearer {value}" for name, value in headers.items()},
                )
            )

        with client(Authorization=TOKEN, X_Sandboxd_Authorization=daemon.secret) as right:
            sandbox = right.create_sandbox("sandboxd")
            assert sandbox.commands.run("echo hello; exit 3").exit_code == 3
            path = f"{tmp_path.name}/a/ü b"
            with (tmp_path / "blob").open("w+b") as file:
                file.write(blob)
                file.seek(0)
                sandbox.files.write(path, file)
            assert sandbox.files.read(path) == blob
            assert [entry.name for entry in sandbox.files.list(os.path.dirname(path))] == ["ü b"]
            assert sandbox.files.exists(path)
        for headers in (
            {"Authorization": TOKEN},
            {"Authorization": TOKEN, "X_Sandboxd_Authorization": TOKEN},
            {"Authorization": daemon.secret, "X_Sandboxd_Authorization": daemon.secret},
        ):
            with client(**headers) as wrong:
                sandbox = wrong.create_sandbox("sandboxd")
                with pytest.raises(SandboxRequestError) as caught:
                    sandbox.commands.run("true")
                assert caught.value.status_code == 401
