"""The body of ``PUT /files``: in chunks, behind others, too long, too slow, not permitted."""

from __future__ import annotations

import errno
import os
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.threads import deferToThread

from sandboxd.files.errors import FileError
from sandboxd.files.root import Root
from sandboxd.files.upload import Patch, Replacement, Upload
from tests.client import Api
from tests.connection import Connection
from tests.daemon import Daemon
from tests.file_transfers import DATA, at, put


async def test_bodies_in_chunks_and_requests_in_a_row(connection: Connection, tmp_path: Path) -> None:
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (b"ab", b"c" * 300_000)) + b"0\r\n\r\n"
    auth = connection.auth

    def send() -> list[int]:
        connection.send(f"PUT {at(tmp_path / 'a')}", auth + b"Transfer-Encoding: chunked\r\n", chunked)
        connection.send(f"PUT {at(tmp_path / 'b')}", auth + b"Content-Length: 3\r\n", b"xyz")
        connection.send(f"PUT {at(tmp_path / 'c')}", auth + b"Content-Length: 0\r\n")
        connection.send("GET /health")
        return [connection.response()[0] for _ in range(4)]

    assert await deferToThread(send) == [201, 201, 201, 200]
    assert (tmp_path / "a").read_bytes() == b"ab" + b"c" * 300_000
    assert (tmp_path / "b").read_bytes() == b"xyz"
    assert (tmp_path / "c").read_bytes() == b""


async def test_what_follows_a_large_body_is_the_next_request(connection: Connection, tmp_path: Path) -> None:
    data, auth = DATA * 8, connection.auth
    behind = f"PUT {at(tmp_path / 'b')} HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n".encode() + auth + b"\r\nxyz"
    (tmp_path / "c").write_bytes(b"start" + b"." * len(data) + b"end")

    def send() -> list[int]:
        length = b"Content-Length: %d\r\n" % len(data)
        connection.send(f"PUT {at(tmp_path / 'a')}", auth + length, data + behind)
        connection.send(f"PUT {at(tmp_path / 'c', offset=5)}", auth + length, data)
        return [connection.response()[0] for _ in range(3)]

    assert await deferToThread(send) == [201, 201, 200]
    assert (tmp_path / "a").read_bytes() == data
    assert (tmp_path / "b").read_bytes() == b"xyz"
    assert (tmp_path / "c").read_bytes() == b"start" + data + b"end"


@pytest.mark.parametrize("offset", [None, 5])
@pytest.mark.parametrize("splices", [True, False])
def test_what_the_kernel_writes_by_itself(
    tmp_path: Path, offset: int | None, splices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f").write_bytes(b"12345")
    upload: Upload
    if offset is None:
        upload = Replacement(Root(), str(tmp_path / "f"), lambda old: None)
    else:
        upload = Patch(Root(), str(tmp_path / "f"), lambda old: None, offset=offset)
    upload.open(None)
    whole = os.splice

    def from_sockets_only(src: int, dst: int, count: int, **options: Any) -> int:
        if stat.S_ISREG(os.fstat(dst).st_mode):  # as of a file system that knows no splice
            raise OSError(errno.EINVAL, "")
        return whole(src, dst, count, **options)

    if not splices:
        monkeypatch.setattr(os, "splice", from_sockets_only)
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        assert upload.receive(os.dup(ours.fileno()), 10, b"first") == 0
        sender = threading.Thread(target=theirs.sendall, args=(DATA,))
        sender.start()
        received = 0
        while received < len(DATA) - 7:
            received += upload.receive(os.dup(ours.fileno()), len(DATA) - 7 - received)
        sender.join()
        assert ours.recv(100) == DATA[-7:]
        upload.write(b"end")
        theirs.close()
        assert upload.receive(os.dup(ours.fileno()), 10) == 0
        upload.commit()
        spare = os.dup(ours.fileno())
        with pytest.raises(FileError):
            upload.receive(spare, 10)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(spare)
    assert (tmp_path / "f").read_bytes() == (b"" if offset is None else b"12345") + b"first" + DATA[:-7] + b"end"


async def test_a_client_that_waits_for_100_is_told_at_once(connection: Connection, tmp_path: Path) -> None:
    expects = connection.auth + b"Content-Length: 3\r\nExpect: 100-continue\r\n"

    def good() -> int:
        connection.send(f"PUT {at(tmp_path / 'f')}", expects)
        assert connection.sock.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sock.sendall(b"xyz")
        return connection.response()[0]

    def bad() -> int:
        connection.send(f"PUT {at(tmp_path / 'nope/f')}", expects)
        return connection.response()[0]

    assert await deferToThread(good) == 201
    assert await deferToThread(bad) == 404
    assert connection.is_over()


@pytest.mark.parametrize(
    ("header", "target", "status"),
    [
        ("", "nope/f", 404),
        ("If-Match: *\r\n", "f", 412),
        ("Content-Digest: x\r\n", "f", 400),
        ("Content-Range: x\r\n", "f", 400),
    ],
)
async def test_what_cannot_be_is_refused_before_the_body_comes(
    connection: Connection, tmp_path: Path, header: str, target: str, status: int
) -> None:
    connection.send(
        f"PUT {at(tmp_path / target)}",
        connection.auth + b"Content-Length: 1000000000000\r\n" + header.encode(),
        b"some",
    )
    got, headers, body = await deferToThread(connection.response)
    assert (got, headers["connection"], "error" in body) == (status, "close", True)
    assert os.listdir(tmp_path) == []


async def test_without_a_token_no_body_is_read(connection: Connection, tmp_path: Path) -> None:
    connection.send(f"PUT {at(tmp_path / 'f')}", b"Content-Length: 1000000000000\r\n", b"some")
    assert (await deferToThread(connection.response))[0] == 401
    assert os.listdir(tmp_path) == []


async def test_malformed_chunks_leave_nothing(connection: Connection, tmp_path: Path) -> None:
    connection.send(f"PUT {at(tmp_path / 'f')}", connection.auth + b"Transfer-Encoding: chunked\r\n", b"5\r\nabcdeXX")
    assert (await deferToThread(connection.response))[0] == 400
    assert os.listdir(tmp_path) == []


async def test_limits_of_time_and_size(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = start_daemon(SANDBOX_REQUEST_TIMEOUT="1", SANDBOX_MAX_UPLOAD="1000000", SANDBOX_MAX_BODY="1000")
    api = Api(daemon.url, daemon.secret)
    assert (await put(api, tmp_path / "f", b"x" * 1_000_000)).status == 201
    response = await put(api, tmp_path / "g", b"x" * 1_000_001)
    assert (response.status, response.json()["error"]) == (413, "the request body is over the limit of 1000000 bytes")
    (tmp_path / "f").unlink()

    def slow(body: list[bytes]) -> int:
        connection = Connection(daemon)
        connection.send(f"PUT {at(tmp_path / 'f')}", connection.auth + b"Transfer-Encoding: chunked\r\n")
        try:
            for chunk in body:
                connection.sock.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
            return int(connection.response()[0])
        finally:
            connection.sock.close()

    assert await deferToThread(slow, [b"x" * 250_000] * 5) == 413
    assert await deferToThread(slow, [b"x"]) == 408
    assert os.listdir(tmp_path) == ["daemon0"]


@pytest.mark.parametrize(("size", "words"), [(3, "has 7 less"), (50, "has more")])
async def test_a_part_in_chunks_has_the_length_that_its_range_says(
    connection: Connection, tmp_path: Path, size: int, words: str
) -> None:
    (tmp_path / "f").write_bytes(b"A" * 200)
    headers = b"Content-Range: bytes 0-9/200\r\nTransfer-Encoding: chunked\r\n"
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (size, b"B" * size)
    connection.send(f"PUT {at(tmp_path / 'f')}", connection.auth + headers, body)
    status, _, answer = await deferToThread(connection.response)
    assert (status, words in answer["error"]) == (400, True), answer
    assert (tmp_path / "f").read_bytes()[10:] == b"A" * 190
