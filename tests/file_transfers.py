"""What the tests of ``/files`` call."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import subprocess
from pathlib import Path
from urllib.parse import quote, quote_from_bytes

from tests.client import Api, Response
from tests.daemon import Daemon
from tests.waiting import within

MIB = 1024 * 1024


def at(path: Path | str | bytes, **query: object) -> str:
    """The request target of a file."""
    more = "".join(f"&{name}={quote(str(value))}" for name, value in query.items())
    return f"/files?path={quote_from_bytes(os.fsencode(path), safe='/')}{more}"


async def put(
    api: Api, path: Path | str, data: bytes, headers: dict[str, str] | None = None, **query: object
) -> Response:
    return await within(10, api.call("PUT", at(path, **query), data, headers))


async def get(api: Api, path: Path | str | bytes, headers: dict[str, str] | None = None) -> Response:
    return await within(10, api.call("GET", at(path), None, headers))


def head(response: Response, name: str) -> str | None:
    values = response.headers.getRawHeaders(name)
    return None if values is None else str(values[0])


def digest(data: bytes, name: str = "sha-256") -> str:
    return f"{name}=:{base64.b64encode(hashlib.new(name.replace('-', ''), data).digest()).decode()}:"


DATA = random.Random(1).randbytes(3 * MIB + 17)


def curl(api: Api, *arguments: str) -> str:
    """The output of curl(1)."""
    auth = f"Authorization: {api.headers['Authorization']}"
    return subprocess.run(
        ["curl", "-sS", "--fail", "--noproxy", "*", "-H", auth, *arguments],
        check=True, capture_output=True, text=True, timeout=20,
    ).stdout  # fmt: skip


def open_files(daemon: Daemon) -> list[str]:
    found = []
    for name in os.listdir(f"/proc/{daemon.pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{daemon.pid}/fd/{name}"))
        except OSError:
            continue
    return found
