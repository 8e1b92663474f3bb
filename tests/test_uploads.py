"""``PUT /files``: files of any size and kind, in one step or in parts."""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from twisted.internet.threads import deferToThread

from tests.client import Api
from tests.connection import Connection
from tests.daemon import Daemon
from tests.file_transfers import DATA, MIB, at, digest, get, head, put
from tests.waiting import within

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")


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
