"""What the tests of ``/archive`` call."""

from __future__ import annotations

import io
import os
import subprocess
import tarfile
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

from twisted.internet.threads import deferToThread

from tests.client import Api, Response
from tests.daemon import Daemon
from tests.waiting import within

MIB = 1024 * 1024


async def get(api: Api, path: Path, query: str = "", headers: dict[str, str] | None = None) -> Response:
    url = f"/archive?path={quote(os.fsencode(path))}{query}"
    return await within(30, api.get(url, {"Accept-Encoding": "identity", **(headers or {})}))


async def fetch(daemon: Daemon, path: Path, query: str, accepted: str) -> tuple[dict[str, str], bytes]:
    """The headers and the body, as they are sent: treq takes a coding off by itself."""

    def call() -> tuple[dict[str, str], bytes]:
        connection = HTTPConnection("127.0.0.1", daemon.port, timeout=20)
        headers = {"Authorization": f"Bearer {daemon.secret}", "Accept-Encoding": accepted}
        connection.request("GET", f"/archive?path={quote(os.fsencode(path))}{query}", headers=headers)
        response = connection.getresponse()
        assert response.status == 200
        body = response.read()
        connection.close()
        return dict(response.getheaders()), body

    return await deferToThread(call)


async def put(api: Api, path: Path, data: bytes, query: str = "") -> Response:
    return await within(30, api.call("PUT", f"/archive?path={quote(os.fsencode(path))}{query}", data))


def tar(*members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    """An archive, made by the standard library."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for info, data in members:
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def member(name: str, data: bytes = b"", type: bytes = tarfile.REGTYPE, **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = type
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def names(archive: bytes) -> list[str]:
    with tarfile.open(fileobj=io.BytesIO(archive)) as found:
        return found.getnames()


def difference(one: Path, other: Path) -> str:
    """What diff(1) says; it compares contents, links and names."""
    done = subprocess.run(["diff", "-r", "--no-dereference", one, other], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def unnamed_files(daemon: Daemon) -> list[str]:
    """The files that the daemon has open and that have no name."""
    top = Path(f"/proc/{daemon.pid}/fd")
    return [
        link for fd in os.listdir(top) if (link := os.readlink(top / fd)).endswith("(deleted)") and "memfd" not in link
    ]


def litter(top: Path) -> list[Path]:
    return list(top.rglob(".sandboxd-*"))
