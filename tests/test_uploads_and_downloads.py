"""``/files``: bytes of any size and kind, streamed in both directions; every file is the old one or the new."""

from __future__ import annotations

import base64
import errno
import fcntl
import hashlib
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from email import message_from_bytes
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import quote, quote_from_bytes

import pytest
from twisted.internet.threads import deferToThread

from sandboxd.files import copying
from sandboxd.files.download import Download
from sandboxd.files.errors import FileError
from sandboxd.files.root import Root
from sandboxd.files.upload import STALE, Patch, Replacement, Upload
from tests.client import Api, Response
from tests.daemon import Daemon
from tests.test_http import Connection
from tests.waiting import until, within

MIB = 1024 * 1024
GIB = 1024 * MIB

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")


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


# There and back


@pytest.mark.parametrize("size", [0, 1, 65_536, 65_537, len(DATA)])
async def test_what_is_put_is_got_back(api: Api, tmp_path: Path, size: int) -> None:
    data = DATA[:size]
    response = await put(api, tmp_path / "f", data)
    assert response.status == 201
    etag = head(response, "ETag")
    assert response.json() == {"path": f"{tmp_path}/f", "size": size, "etag": etag, "created": True}
    assert (tmp_path / "f").read_bytes() == data
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644
    back = await get(api, tmp_path / "f")
    assert (back.status, back.body) == (200, data)
    assert head(back, "ETag") == etag
    assert head(back, "Content-Type") == "application/octet-stream"
    assert head(back, "X-Content-Type-Options") == "nosniff"
    assert head(back, "Accept-Ranges") == "bytes"
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize(
    "name",
    [b"line\nbreak", b"quote\"s'", "\u20ac \U0001f600".encode(), b"n\xff\xfe", b"a&b=c+d%41", b"x" * 255],
    ids=repr,
)
async def test_odd_names(api: Api, tmp_path: Path, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    response = await put(api, os.fsdecode(path), DATA)
    assert response.json()["path"] == os.fsdecode(path)
    assert os.listdir(os.fsencode(tmp_path)) == [name]
    back = await get(api, path)
    assert back.body == DATA
    assert quote(name.decode("utf-8", "replace"), safe="") in quote(
        head(back, "Content-Disposition") or "", safe="%"
    ) + name.decode("utf-8", "replace")
    assert (await api.call("DELETE", at(path))).json() == {"path": os.fsdecode(path)}
    assert os.listdir(tmp_path) == []


async def test_a_semicolon_in_a_query_is_part_of_the_name(api: Api, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kept")
    (tmp_path / "a;b").write_text("deleted")
    response = await api.call("DELETE", f"/files?path={tmp_path}/a;b")
    assert response.json() == {"path": f"{tmp_path}/a;b"}
    assert os.listdir(tmp_path) == ["a"]


async def test_a_second_put_replaces_and_keeps_mode_and_link(api: Api, tmp_path: Path) -> None:
    (tmp_path / "target").write_text("old")
    (tmp_path / "target").chmod(0o4711)
    (tmp_path / "link").symlink_to("target")
    response = await put(api, tmp_path / "link", b"new")
    assert (response.status, response.json()["created"]) == (200, False)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "target").stat().st_mode) == 0o4711


@needs_root
async def test_mode_owner_and_parents(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "a/b/f"
    assert (await put(api, path, b"x")).status == 404
    response = await put(api, path, b"x", mode="2750", owner="1234:daemon", parents="true")
    assert response.status == 201
    info = path.stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid) == (0o2750, 1234)
    assert path.group() == "daemon"
    assert (await put(api, path, b"y", owner=":0")).status == 200
    assert (path.stat().st_uid, path.stat().st_gid) == (1234, 0)


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ({"mode": "9"}, "mode"),
        ({"mode": "rw"}, "mode"),
        ({"owner": "no-such-user"}, "owner"),
        ({"offset": "-1"}, "offset"),
        ({"size": "5"}, "size"),
        ({"offset": "0", "parents": "true"}, "parents"),
    ],
)
async def test_bad_queries_name_the_parameter(api: Api, tmp_path: Path, query: dict[str, Any], field: str) -> None:
    response = await put(api, tmp_path / "f", b"x", **query)
    assert response.status == 400
    assert response.json()["error"].startswith(field)
    assert os.listdir(tmp_path) == []


async def test_what_is_no_file_is_refused(api: Api, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for method in ("GET", "PUT"):
        for path, status, why in (
            (tmp_path, 409, "is a directory"),
            (tmp_path / "fifo", 409, "not a regular file"),
            ("/dev/null", 409, "not a regular file"),
            (tmp_path / "nope/f", 404, "no such file or directory"),
            (tmp_path / "fifo/f", 409, "not a directory"),
            (tmp_path / ("n" * 256), 400, "file name too long"),
        ):
            response = await within(5, api.call(method, at(path), b"x" if method == "PUT" else None))
            assert (response.status, response.json()) == (status, {"error": f"open {path}: {why}"})
    response = await within(5, api.call("PUT", at("/dev/null", offset=0), b"x"))
    assert response.status == 409
    assert os.listdir(tmp_path) == ["fifo"]
    for target in ("/files", "/files?path=", "/files?path=a%00b"):
        assert (await api.get(target)).status == 400


@pytest.mark.parametrize("path", ["/proc/self/stat", "/proc/kallsyms", "/sys/kernel/mm/transparent_hugepage/enabled"])
async def test_files_of_the_kernel_that_tell_no_size(api: Api, path: str) -> None:
    response = await get(api, path)
    assert response.status == 200
    assert len(response.body) > 10
    assert head(response, "ETag") is None


# Ranges


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


def curl(api: Api, *arguments: str) -> str:
    """The output of curl(1)."""
    auth = f"Authorization: {api.headers['Authorization']}"
    return subprocess.run(
        ["curl", "-sS", "--fail", "--noproxy", "*", "-H", auth, *arguments],
        check=True, capture_output=True, text=True, timeout=20,
    ).stdout  # fmt: skip


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


# Writing in one step


async def test_compare_and_swap(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    first = await put(api, path, b"one", {"If-None-Match": "*"})
    assert first.status == 201
    etag = head(first, "ETag") or ""
    response = await put(api, path, b"two", {"If-None-Match": "*"})
    assert (response.status, response.json()["etag"]) == (412, etag)
    second = await put(api, path, b"three", {"If-Match": etag})
    assert second.status == 200
    assert (await put(api, path, b"four", {"If-Match": etag})).status == 412
    assert (await put(api, tmp_path / "none", b"x", {"If-Match": "*"})).status == 412
    assert path.read_bytes() == b"three"
    assert (await api.call("DELETE", at(path), None, {"If-Match": etag})).status == 412
    assert (await api.call("DELETE", at(path), None, {"If-Match": head(second, "ETag") or ""})).status == 200
    assert (await api.call("DELETE", at(path))).status == 404
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("there", [True, False], ids=["If-Match", "If-None-Match"])
async def test_of_concurrent_swaps_exactly_one_wins(api: Api, tmp_path: Path, there: bool) -> None:
    for turn in range(5):
        path = tmp_path / f"f{turn}"
        condition = {"If-None-Match": "*"}
        if there:
            condition = {"If-Match": head(await put(api, path, b"old"), "ETag") or ""}
        bodies = [bytes([n]) * 100_000 for n in range(8)]
        calls = [within(10, api.call("PUT", at(path), body, condition)) for body in bodies]
        statuses = [(await call).status for call in calls]
        assert sorted(statuses) == [200 if there else 201] + [412] * 7
        assert path.read_bytes() == next(body for body, status in zip(bodies, statuses, strict=True) if status < 300)
    assert len(os.listdir(tmp_path)) == 5


async def test_a_digest_that_does_not_match_changes_nothing(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    for wrong in (digest(b"other"), f"{digest(DATA)}, {digest(b'other', 'sha-512')}"):
        response = await put(api, path, DATA, {"Content-Digest": wrong})
        assert (response.status, response.json()["error"][:14]) == (400, "Content-Digest")
    for malformed in ("sha-256=abc", "md5=:AAAA:"):
        assert (await put(api, path, DATA, {"Content-Digest": malformed})).status == 400
    assert (await put(api, path, DATA, {"Content-Encoding": "gzip"})).status == 415
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]
    response = await put(api, path, DATA, {"Content-Digest": f"{digest(DATA)}, {digest(DATA, 'sha-512')}"})
    assert response.status == 200
    response = await put(api, path, DATA, {"Want-Content-Digest": "sha-256=1"})
    assert head(response, "Content-Digest") == digest(DATA)


# Parts


async def test_parts_are_uploaded_in_parallel(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    step = 500_000
    calls = [
        within(10, api.call("PUT", at(path, offset=start, size=len(DATA)), DATA[start : start + step]))
        for start in range(0, len(DATA), step)
    ]
    responses = [await call for call in calls]
    assert {response.status for response in responses} <= {200, 201}
    assert path.read_bytes() == DATA
    assert os.listdir(tmp_path) == ["f"]


async def test_a_part_may_extend_or_cut_the_file(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    assert (await put(api, path, b"ab", offset=4)).json()["size"] == 10
    assert (await put(api, path, b"xyz", offset=12)).json()["size"] == 15
    assert path.read_bytes() == b"0123ab6789\0\0xyz"
    assert (await put(api, path, b"", offset=0, size=3)).json()["size"] == 3
    assert (await put(api, path, b"AB", {"Content-Range": "bytes 1-2/3"})).status == 200
    assert path.read_bytes() == b"0AB"
    for value, body in (("bytes 1-2/3", b"abc"), ("bytes 2-1/3", b""), ("nonsense", b"x")):
        response = await put(api, path, body, {"Content-Range": value})
        assert (response.status, response.json()["error"][:13]) == (400, "Content-Range")
    assert path.read_bytes() == b"0AB"


# Forms


def form(*files: tuple[str, bytes], end: bool = True) -> tuple[bytes, dict[str, str]]:
    """A form's body and headers."""
    parts = [
        f'--xyz\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in files
    ]
    return b"".join(parts) + (b"--xyz--\r\n" if end else b""), {"Content-Type": "multipart/form-data; boundary=xyz"}


async def test_a_form_writes_its_files(api: Api, tmp_path: Path) -> None:
    body, headers = form(("a", DATA), ("b \u20ac", b""), ('c\\"', b"\r\n--xy\r\n"))
    response = await within(10, api.call("POST", at(tmp_path / "new", parents="true", mode="600"), body, headers))
    assert response.status == 201
    assert [(file["path"], file["size"]) for file in response.json()["files"]] == [
        (f"{tmp_path}/new/a", len(DATA)),
        (f"{tmp_path}/new/b \u20ac", 0),
        (f'{tmp_path}/new/c"', 8),
    ]
    assert (tmp_path / "new/a").read_bytes() == DATA
    assert (tmp_path / 'new/c"').read_bytes() == b"\r\n--xy\r\n"
    assert len(os.listdir(tmp_path / "new")) == 3
    assert stat.S_IMODE((tmp_path / "new/a").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/etc/x"])
async def test_a_form_cannot_leave_the_directory(api: Api, tmp_path: Path, name: str) -> None:
    body, headers = form(("first", b"1"), (name, b"2"), ("third", b"3"))
    response = await within(5, api.call("POST", at(tmp_path), body, headers))
    assert response.status == 400
    assert [file["path"] for file in response.json()["files"]] == [f"{tmp_path}/first"]
    assert os.listdir(tmp_path) == ["first"]


async def test_malformed_forms(api: Api, tmp_path: Path) -> None:
    body, headers = form(("a", b"1"), ("b", DATA), end=False)
    for data, more in (
        (body, headers),
        (b"nonsense", headers),
        (b"", headers),
        (b'--xyz\r\nContent-Disposition: form-data; name="n"\r\n\r\nvalue\r\n--xyz--\r\n', headers),
        (b"--xyz\r\n" + b"X-A: b\r\n" * 1000 + b"\r\n\r\n--xyz--\r\n", headers),
        (body, {"Content-Type": "application/json"}),
        (body, {}),
        (body, {"Content-Type": "multipart/form-data; boundary=" + "x" * 300}),
    ):
        response = await within(5, api.call("POST", at(tmp_path), data, more))
        assert (response.status, bool(response.json()["error"])) == (400, True)
    assert os.listdir(tmp_path) == ["a"]


async def test_curl_sends_a_form(api: Api, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(DATA)
    (tmp_path / "to").mkdir()
    files = [argument for name in ("one", "two") for argument in ("-F", f"file=@{tmp_path}/{name}")]
    await deferToThread(curl, api, *files, api.url + at(tmp_path / "to"))
    assert sorted(os.listdir(tmp_path / "to")) == ["one", "two"]
    assert (tmp_path / "to/two").read_bytes() == DATA


# The way of a body


@pytest.fixture
def connection(daemon: Daemon) -> Iterator[Connection]:
    connection = Connection(daemon)
    yield connection
    connection.sock.close()


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


# Breaking off

OLD = b"old" * 10_000


def litter(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".sandboxd-")]


async def test_clients_that_break_off_leave_the_old_file(daemon: Daemon, tmp_path: Path) -> None:
    """Hundreds of them, anywhere in the request, the last bytes included."""
    path = tmp_path / "f"
    path.write_bytes(OLD)
    new = b"new" * 10_000
    request = f"PUT {at(path)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(new)}\r\n".encode()

    def break_off(cut: int) -> None:
        connection = Connection(daemon)
        whole = request + connection.auth + b"\r\n" + new
        connection.sock.sendall(whole[: len(whole) - cut])
        if cut % 2:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sock.close()

    def all_of_them() -> None:
        for turn in range(300):
            break_off(1 + turn * 100 if turn % 3 else 1 + turn % 7)

    await deferToThread(all_of_them)
    await until(lambda: not [fd for fd in open_files(daemon) if str(tmp_path) in fd])
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["f"]
    await deferToThread(lambda: [break_off(0) for _ in range(20)])
    await until(lambda: not [fd for fd in open_files(daemon) if str(tmp_path) in fd])
    assert path.read_bytes() in (OLD, new)
    assert os.listdir(tmp_path) == ["f"]


def open_files(daemon: Daemon) -> list[str]:
    found = []
    for name in os.listdir(f"/proc/{daemon.pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{daemon.pid}/fd/{name}"))
        except OSError:
            continue
    return found


#: Puts one of two versions after the other into a file, as the daemon does it, until it is killed.
WRITER = """
import sys
from sandboxd.files.root import Root
from sandboxd.files.upload import Patch, Replacement, Upload
print(flush=True)
while True:
    for letter in b"ab":
        upload = Replacement(Root(), sys.argv[1], lambda old: None, durable=False)
        upload.open(None)
        for _ in range(4):
            upload.write(bytes([letter]) * 50_000)
        upload.commit()
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    """Some dozens of them, anywhere in their work."""
    path = tmp_path / "f"
    versions = [bytes([letter]) * 200_000 for letter in b"ab"]
    path.write_bytes(versions[0])
    seen = set()
    for _ in range(30):
        with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(random.random() * 0.01)  # no event tells of the middle of a write
            writer.kill()
        content = path.read_bytes()
        assert content in versions
        seen.add(content)
        # Between two system calls the new file has a name of its own, always the same, which the next upload takes.
        assert len(litter(tmp_path)) <= 1
    assert len(seen) == 2
    upload = Replacement(Root(), str(path), lambda old: None)
    upload.open(None)
    upload.commit()
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.slow
def test_a_daemon_that_is_killed_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(OLD)
    folder = tmp_path / "daemon"
    folder.mkdir()
    daemon = Daemon(folder)
    connections = [Connection(daemon) for _ in range(10)]
    for connection in connections:
        connection.send(f"PUT {at(path)}", connection.auth + b"Content-Length: 1000000\r\n", b"new" * 200_000)
    deadline = time.monotonic() + 10
    while len([fd for fd in open_files(daemon) if str(tmp_path / "#") in fd]) < len(connections):
        assert time.monotonic() < deadline, open_files(daemon)
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    for connection in connections:
        connection.sock.close()
    assert sorted(os.listdir(tmp_path)) == ["daemon", "f"]
    assert path.read_bytes() == OLD


@pytest.fixture
def no_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel says of O_TMPFILE where it knows none of it is what it says of O_DIRECTORY: EISDIR."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)


def upload_later(folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, content: bytes = b"text") -> None:
    """Upload the file ``f`` as it would be done so many seconds from now."""
    now = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now() + seconds)
        upload = Replacement(Root(), str(folder / "f"), lambda old: None)
        upload.open(None)
        assert len(litter(folder)) > 0
        upload.write(content)
        upload.commit()
    assert (folder / "f").read_bytes() == content


def test_without_files_that_have_no_name(tmp_path: Path, no_tmpfile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".sandboxd-left", ".sandboxd-locked", "other"):
        (tmp_path / name).write_text("x")
    with (tmp_path / ".sandboxd-locked").open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        upload_later(tmp_path, monkeypatch, STALE / 2)
        assert sorted(litter(tmp_path)) == [".sandboxd-left", ".sandboxd-locked"]
        upload_later(tmp_path, monkeypatch, STALE + 1, b"again")
        assert litter(tmp_path) == [".sandboxd-locked"]
        upload = Replacement(Root(), str(tmp_path / "f"), lambda old: None)
        upload.open(None)
        upload.write(b"other")
        upload.close()
    assert sorted(os.listdir(tmp_path)) == [".sandboxd-locked", "f", "other"]
    assert (tmp_path / "f").read_bytes() == b"again"


def test_an_upload_does_not_remove_a_copy_that_another_request_makes(
    tmp_path: Path, no_tmpfile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_text("old")
    os.utime(source, (1, 1))
    copy_contents, rename = copying._copy_contents, copying.rename

    def slowly(*args: Any) -> None:
        upload_later(tmp_path, monkeypatch, 2 * STALE)
        copy_contents(*args)

    def after_an_upload(*args: Any, **keywords: Any) -> None:
        upload_later(tmp_path, monkeypatch, 0)
        rename(*args, **keywords)

    monkeypatch.setattr(copying, "_copy_contents", slowly)
    monkeypatch.setattr(copying, "rename", after_an_upload)
    copying.copy(Root(), str(source), str(tmp_path / "target"))
    target = tmp_path / "target"
    assert (target.read_text(), target.stat().st_mtime) == ("old", 1)
    assert litter(tmp_path) == []


# Full disks


@needs_root
@pytest.mark.parametrize("old", [b"old version", None], ids=["overwrite", "create"])
async def test_a_full_disk_is_told_early_and_leaves_the_old_file(
    daemon: Daemon, connection: Connection, api: Api, small_disk: Path, old: bytes | None
) -> None:
    path = small_disk / "f"
    if old is not None:
        path.write_bytes(old)
    connection.send(f"PUT {at(path)}", connection.auth + b"Content-Length: 5000000\r\n", b"some")
    status, headers, body = await deferToThread(connection.response)
    assert (status, headers["connection"]) == (507, "close")
    assert body["error"].startswith(f"open {path}: no space left on device: 5000000 bytes are needed, ")
    late = Connection(daemon)
    data = b"%x\r\n%s\r\n0\r\n\r\n" % (3 * MIB, b"x" * 3 * MIB)

    def send() -> int:
        with suppress(ConnectionError):
            late.send(f"PUT {at(path)}", late.auth + b"Transfer-Encoding: chunked\r\n", data)
        return int(late.response()[0])

    assert await deferToThread(send) == 507
    late.sock.close()
    response = await put(api, path, b"x" * 2 * MIB, offset=0)
    assert response.status == 507
    assert os.listdir(small_disk) == ([] if old is None else ["f"])
    assert old is None or path.read_bytes() == old
