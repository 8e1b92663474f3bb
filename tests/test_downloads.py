"""``GET /files``: files and ranges of them, sent as they are."""

from __future__ import annotations

import os
import socket
from email import message_from_bytes
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.threads import deferToThread

from sandboxd.files.download import Download
from sandboxd.files.errors import FileError
from sandboxd.files.root import Root
from tests.client import Api
from tests.connection import Connection
from tests.daemon import Daemon
from tests.file_transfers import DATA, MIB, at, curl, get, head
from tests.waiting import within

GIB = 1024 * MIB


@pytest.mark.parametrize("path", ["/proc/self/stat", "/proc/kallsyms", "/sys/kernel/mm/transparent_hugepage/enabled"])
async def test_files_of_the_kernel_that_tell_no_size(api: Api, path: str) -> None:
    response = await get(api, path)
    assert response.status == 200
    assert len(response.body) > 10
    assert head(response, "ETag") is None


async def test_ranges(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f.txt"
    path.write_bytes(DATA)
    size = len(DATA)
    for spec, start, end in (("0-0", 0, 1), ("100-", 100, size), ("-5", size - 5, size), ("5-1048580", 5, 1048581)):
        response = await get(api, path, {"Range": f"bytes={spec}"})
        assert (response.status, response.body) == (206, DATA[start:end])
        assert head(response, "Content-Range") == f"bytes {start}-{end - 1}/{size}"
    response = await get(api, path, {"Range": f"bytes={size}-"})
    assert (response.status, head(response, "Content-Range")) == (416, f"bytes */{size}")
    assert str(size) in response.json()["error"]
    for headers in ({"Range": "lines=1-2"}, {"Range": "bytes=0-1", "If-Range": '"other"'}):
        assert (await get(api, path, headers)).status == 200
    etag = head(response, "ETag") or ""
    assert (await get(api, path, {"Range": "bytes=0-1", "If-Range": etag})).body == DATA[:2]


async def test_several_ranges_come_in_parts(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_bytes(DATA)
    response = await get(api, tmp_path / "f.txt", {"Range": "bytes=9-19,0-1,-70000"})
    assert response.status == 206
    kind = head(response, "Content-Type") or ""
    assert kind.startswith("multipart/byteranges; boundary=")
    message = message_from_bytes(f"Content-Type: {kind}\r\n".encode() + response.body)
    parts: list[Any] = message.get_payload()  # type: ignore[assignment]
    assert [part["Content-Range"] for part in parts] == [
        f"bytes {start}-{end}/{len(DATA)}" for start, end in ((9, 19), (0, 1), (len(DATA) - 70000, len(DATA) - 1))
    ]
    assert {part.get_content_type() for part in parts} == {"text/plain"}
    for part in (DATA[9:20], DATA[:2], DATA[-70000:]):
        assert b"\r\n\r\n" + part + b"\r\n--" in response.body


async def test_conditions(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"text")
    first = await get(api, path)
    etag, modified = head(first, "ETag") or "", head(first, "Last-Modified") or ""
    for headers in ({"If-None-Match": etag}, {"If-None-Match": f'W/"x", {etag}'}, {"If-Modified-Since": modified}):
        response = await get(api, path, headers)
        assert (response.status, response.body, head(response, "ETag")) == (304, b"", etag)
    response = await get(api, path, {"If-Match": '"other"'})
    assert (response.status, response.json()["etag"]) == (412, etag)
    assert (await get(api, path, {"If-Match": "malformed"})).status == 400
    path.chmod(0o600)
    assert (await get(api, path, {"If-None-Match": etag})).status == 200


async def test_head_says_what_get_would(api: Api, tmp_path: Path) -> None:
    (tmp_path / "data.json").write_bytes(DATA)
    got = await get(api, tmp_path / "data.json")
    response = await within(5, api.call("HEAD", at(tmp_path / "data.json"), None, {"Range": "bytes=0-1"}))
    assert (response.status, response.body) == (200, b"")
    assert head(response, "Content-Length") == str(len(got.body))
    for name in ("ETag", "Last-Modified", "Content-Type", "Content-Disposition", "Accept-Ranges"):
        assert head(response, name) == head(got, name) != None  # noqa: E711
    assert head(response, "Content-Type") == "application/json"
    assert (await within(5, api.call("HEAD", at(tmp_path / "nope")))).status == 404


async def test_curl_resumes_downloads_and_uploads(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(DATA)
    (tmp_path / "got").write_bytes(DATA[: MIB + 3])
    url = api.url + at(tmp_path / "f")
    await deferToThread(curl, api, "-C", "-", "-o", str(tmp_path / "got"), url)
    assert (tmp_path / "got").read_bytes() == DATA
    (tmp_path / "up").write_bytes(DATA[: MIB + 5])
    await deferToThread(curl, api, "-C", str(MIB + 5), "-T", str(tmp_path / "f"), api.url + at(tmp_path / "up"))
    assert (tmp_path / "up").read_bytes() == DATA
    await deferToThread(curl, api, "-T", str(tmp_path / "f"), api.url + at(tmp_path / "whole"))
    assert (tmp_path / "whole").read_bytes() == DATA


async def test_a_file_that_shrinks_while_it_is_sent_breaks_the_connection(daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "f"
    with path.open("wb") as file:
        file.truncate(64 * MIB)
    connection = Connection(daemon)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.send(f"GET {at(path)}", connection.auth)
    assert connection.sock.recv(1) == b"H"
    os.truncate(path, MIB)

    def read_all() -> int:
        size = 0
        while data := connection.sock.recv(MIB):
            size += len(data)
        return size

    with pytest.raises(ConnectionResetError):
        await deferToThread(read_all)
    connection.sock.close()


@pytest.mark.slow
async def test_a_reader_with_a_small_window_gets_every_byte_and_its_next_answer(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(DATA * 8)
    half = len(DATA) * 4 + 1
    connection = Connection(daemon)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)

    def response(headers: bytes = b"") -> bytes:
        connection.send(f"GET {at(tmp_path / 'f')}", connection.auth + headers)
        got = HTTPResponse(connection.sock)
        got.begin()
        body = b""
        while piece := got.read(700_001):
            body += piece
        got.close()
        return body

    def read() -> None:
        assert response() == DATA * 8
        assert response(b"Range: bytes=%d-\r\n" % half) == (DATA * 8)[half:]
        parts = response(b"Range: bytes=0-999999,2000000-2999999\r\n")
        assert DATA[:1_000_000] in parts
        assert DATA[2_000_000:3_000_000] in parts
        assert len(parts) < 2_001_000
        assert response(b"Range: bytes=5-6\r\n") == DATA[5:7]

    await deferToThread(read)
    connection.sock.close()


def test_what_is_sent_by_the_kernel_stops_where_the_socket_is_full_or_the_file_ends(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(DATA)
    file = Download(Root(), str(tmp_path / "f"))
    file.open()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        sent = file.send(os.dup(ours.fileno()), 7, len(DATA))
        assert 0 < sent < len(DATA)
        assert theirs.recv(sent, socket.MSG_WAITALL) == DATA[7 : 7 + sent]
        assert file.send(os.dup(ours.fileno()), len(DATA) - 1, len(DATA) + 1) == 1
        assert file.send(os.dup(ours.fileno()), len(DATA), len(DATA) + 1) == 0
        file.close()
        spare = os.dup(ours.fileno())
        with pytest.raises(FileError):
            file.send(spare, 0, 1)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(spare)


@pytest.mark.slow
async def test_five_gibibytes_take_no_memory(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(5 * GIB)
        file.seek(4 * GIB + 1)
        file.write(b"needle")
    daemon.reset_peak()
    before = daemon.peak_memory()
    response = await within(5, api.call("HEAD", at(path)))
    assert head(response, "Content-Length") == str(5 * GIB)
    response = await get(api, path, {"Range": f"bytes={4 * GIB + 1}-{4 * GIB + 6}"})
    assert response.body == b"needle"
    connection = Connection(daemon)

    def download(size: int) -> None:
        connection.send(f"GET {at(path)}", connection.auth)
        while size > 0:
            size -= len(connection.sock.recv(MIB))

    await deferToThread(download, 200 * MIB)
    connection.sock.close()
    assert daemon.peak_memory() - before < 20 * MIB
