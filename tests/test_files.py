"""The file routes: what they do to the file system, and what they say of it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from tests.client import Api, Response
from tests.daemon import Daemon

MIB = 1024 * 1024
READ_LIMIT = 64 * MIB

#: Characters at which some client's line splitting or chunking breaks, unless they are escaped.
AWKWARD = "nel\x85 ls\u2028 ps\u2029 vt\x0b ff\x0c cr\r\n nul\0 quote\" slash\\ umlaut\u00fc euro\u20ac emoji\U0001f600"

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")


def promptly(call: Coroutine[Any, Any, Response]) -> Deferred[Response]:
    """A call that must not hang."""
    return Deferred.fromCoroutine(call).addTimeout(5, reactor)


async def done(api: Api, route: str, path: Path | str, **fields: object) -> Any:
    """The JSON of a call that the route accepted: its status is 200, whatever the file system said."""
    response = await promptly(api.post(route, {"path": str(path), **fields}))
    assert response.status == 200, response
    assert response.body.isascii()
    return response.json()


@pytest.fixture()
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


@pytest.fixture()
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, text=True, check=False, timeout=5
    )
    if mounted.returncode != 0:
        pytest.skip(f"NOT TESTED: cannot mount a small disk: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True, timeout=5)


# write_file and read_file


@pytest.mark.parametrize("text", ["", "one line\n", AWKWARD, "\ufeffmark", "x" * MIB], ids=repr_short := lambda text: repr(text[:9]))
async def test_what_is_written_is_read_back(api: Api, tmp_path: Path, text: str) -> None:
    assert await done(api, "/write_file", tmp_path / "f", content=text) == {"success": True}
    assert (tmp_path / "f").read_bytes() == text.encode()
    assert await done(api, "/read_file", tmp_path / "f") == {"content": text}
