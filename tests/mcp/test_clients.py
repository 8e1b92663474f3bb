"""The official client and fastmcp's, unmodified, against the real daemon."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastmcp import Client as FastClient
from fastmcp.client.transports import StreamableHttpTransport
from mcp.client import Client
from mcp.client.streamable_http import streamable_http_client

from tests.daemon import Daemon


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"))
    yield daemon
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


def headers(server: Daemon) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.secret}"}


@pytest.mark.parametrize("url", ["/mcp", "/koyeb-sandbox/mcp"])
def test_fastmcp(server: Daemon, url: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    async def progress(done: float, total: float | None, message: str | None) -> None:
        seen.append(message)

    async def work() -> None:
        transport = StreamableHttpTransport(server.url + url, headers=headers(server))
        async with FastClient(transport, progress_handler=progress) as client:
            assert await client.ping()
            assert "run_command" in {tool.name for tool in await client.list_tools()}
            result = await client.call_tool("run_command", {"command": "echo hello"})
            assert result.structured_content["stdout"] == "hello\n"
            failed = await client.call_tool("read_file", {"path": "/nowhere"}, raise_on_error=False)
            assert failed.is_error

    asyncio.run(asyncio.wait_for(work(), 30))
    assert seen == ["hello"]


def test_the_official_client(server: Daemon, tmp_path: Path) -> None:
    async def work() -> None:
        async with (
            httpx.AsyncClient(headers=headers(server), timeout=30) as http,
            Client(streamable_http_client(f"{server.url}/mcp", http_client=http)) as client,
        ):
            tools = (await client.list_tools()).tools
            assert "edit_file" in {tool.name for tool in tools}
            path = str(tmp_path / "f")
            await client.call_tool("write_file", {"path": path, "content": "one\n"})
            result = await client.call_tool("read_file", {"path": path})
            assert result.structured_content["content"] == "one\n"
            assert (await client.call_tool("run_command", {"command": ""})).is_error

    asyncio.run(asyncio.wait_for(work(), 30))
