"""``GET /archive``: a tree in one response."""

from __future__ import annotations

import gzip
import io
import os
import socket
import stat
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from twisted.internet.threads import deferToThread

from sandboxd.files.archive.compression import compressor, zstd
from sandboxd.files.archive.pack import Packing
from sandboxd.files.errors import FileError
from sandboxd.files.root import Root
from tests.archives import MIB, difference, fetch, get, names, put
from tests.client import Api
from tests.daemon import Daemon
from tests.waiting import until, within

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")


@pytest.fixture(scope="module")
def memory() -> Iterator[Path]:
    """A directory in memory, where there is such a thing: making 10,000 files takes seconds on some disks."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def big(memory: Path) -> Path:
    """10,000 small files, and some of every other kind."""
    top = memory / "tree"
    for n in range(100):
        folder = top / f"d{n}"
        folder.mkdir(parents=True)
        for m in range(100):
            (folder / f"f{m}").write_bytes(b"%d %d\n" % (n, m) * (m % 7))
    (top / "link").symlink_to("/nowhere/at all")
    os.link(top / "d0/f1", top / "hard")
    (top / "empty").mkdir()
    (top / os.fsdecode(b"not\xffutf8")).write_text("text")
    (top / "/".join(["long" * 20] * 6)).mkdir(parents=True)
    (top / "script").write_text("#!/bin/sh\n")
    (top / "script").chmod(0o750)
    os.utime(top / "script", ns=(1, 1_600_000_000_123_456_789))
    return top


@pytest.mark.slow
async def test_ten_thousand_files_go_out_and_in(api: Api, big: Path, memory: Path) -> None:
    archive = await get(api, big)
    assert archive.status == 200
    assert archive.headers.getRawHeaders("Content-Type") == ["application/x-tar"]
    target = memory / "target"
    reply = await put(api, target, archive.body, "&parents=true")
    assert reply.status == 200, reply
    assert reply.json() == {"path": str(target), "entries": 10_111, "bytes": reply.json()["bytes"]}
    assert difference(big, target) == ""
    script = (target / "script").stat()
    assert (stat.S_IMODE(script.st_mode), script.st_mtime_ns) == (0o750, 1_600_000_000_123_456_789)
    assert (target / "hard").stat().st_ino == (target / "d0/f1").stat().st_ino


@pytest.mark.parametrize("format", ["tar", "tar.gz", "tar.zst"])
@pytest.mark.slow
async def test_tar_reads_what_is_sent_and_its_archives_are_read(
    api: Api, daemon: Daemon, tmp_path: Path, format: str
) -> None:
    source = tmp_path / "source"
    (source / "d").mkdir(parents=True)
    (source / "d/f").write_bytes(os.urandom(3 * MIB + 1))
    (source / "l").symlink_to("d/f")
    (source / os.fsdecode(b"\xff" * 120)).write_text("long, and not UTF-8")
    headers, body = await fetch(daemon, source, f"&format={format}", "gzip, zstd")
    assert "Content-Encoding" not in headers
    assert headers["Content-Disposition"] == f"attachment; filename*=UTF-8''source.{format}"
    data = body if format != "tar.zst" else zstd.decompress(body)
    (tmp_path / "a.tar").write_bytes(data)
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "-xf", tmp_path / "a.tar", "-C", tmp_path / "out"], check=True, capture_output=True)
    assert difference(source, tmp_path / "out") == ""
    for flavour in ("gnu", "pax"):
        made = subprocess.run(["tar", f"--format={flavour}", "-C", source, "-c", "."], check=True, capture_output=True)
        compress: dict[str, Callable[[bytes], bytes]] = {
            "tar": bytes,
            "tar.gz": gzip.compress,
            "tar.zst": zstd.compress,
        }
        packed = compress[format](made.stdout)
        assert (await put(api, tmp_path / flavour, packed, "&parents=1")).status == 200
        assert difference(source, tmp_path / flavour) == ""


@pytest.mark.parametrize(("accepted", "coding"), [("gzip", "gzip"), ("zstd, gzip", "zstd"), ("br", None)])
async def test_accept_encoding(daemon: Daemon, tmp_path: Path, accepted: str, coding: str | None) -> None:
    (tmp_path / "f").write_bytes(bytes(MIB))
    headers, body = await fetch(daemon, tmp_path, "", accepted)
    assert headers.get("Content-Encoding") == coding
    assert headers["Vary"] == "Accept-Encoding"
    decode: dict[str | None, Callable[[bytes], bytes]] = {None: bytes, "gzip": gzip.decompress, "zstd": zstd.decompress}
    data = decode[coding](body)
    assert names(data) == ["f"]


async def test_a_file_is_an_archive_of_one(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("text")
    with tarfile.open(fileobj=io.BytesIO((await get(api, tmp_path / "f")).body)) as archive:
        assert archive.getnames() == ["f"]
        assert archive.extractfile("f").read() == b"text"  # type: ignore[union-attr]


async def test_what_is_excluded_is_left_out(api: Api, tmp_path: Path) -> None:
    for name in ("node_modules/m/f", "src/node_modules/f", "src/f.o", "src/f.c", "f.o", ".git/f"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    reply = await get(api, tmp_path, "&exclude=node_modules&exclude=src/*.o&exclude=.git/")
    assert names(reply.body) == ["f.o", "src", "src/f.c"]


async def test_what_cannot_be_packed_is_left_out(api: Api, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    (tmp_path / "f").touch()
    assert names((await get(api, tmp_path)).body) == ["f"]


async def test_files_that_change_their_size_meanwhile_do_not_harm_the_archive(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"x" * MIB)
    (tmp_path / "g").write_text("text")
    over = threading.Event()

    def change() -> None:
        sizes = [0, 3 * MIB, 100, 2 * MIB]
        while not over.is_set():
            os.truncate(path, sizes[0])
            sizes.append(sizes.pop(0))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(20):
            with tarfile.open(fileobj=io.BytesIO((await get(api, tmp_path)).body)) as archive:
                assert archive.getnames() == ["f", "g"]
                assert archive.extractfile("g").read() == b"text"  # type: ignore[union-attr]
    finally:
        over.set()
        thread.join()


def test_a_file_that_shrinks_while_it_is_read_is_filled_up(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * MIB)
    packing = Packing(Root(), str(tmp_path), lambda path: False, compressor("identity"))
    packing.open()
    made = [packing.read()]
    os.truncate(tmp_path / "f", 300_000)
    while (piece := packing.read()) is not None:
        made.append(piece)
    with tarfile.open(fileobj=io.BytesIO(b"".join(filter(None, made)))) as archive:
        data = archive.extractfile("f").read()  # type: ignore[union-attr]
    assert len(data) == MIB
    assert data.strip(b"\0").strip(b"x") == b""


@pytest.mark.slow
async def test_holes_stay_holes_and_memory_stays_bounded(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    with (source / "f").open("wb") as file:
        file.truncate(256 * MIB)
        file.write(b"begin")
        file.seek(-3, os.SEEK_END)
        file.write(b"end")
    daemon.reset_peak()
    before = daemon.memory()
    archive = await get(api, source, "&format=tar.zst")
    assert (await put(api, tmp_path / "target", archive.body, "&parents=true")).status == 200
    assert daemon.peak_memory() - before < 48 * MIB
    assert difference(source, tmp_path / "target") == ""
    assert (tmp_path / "target/f").stat().st_blocks * 512 < 8 * MIB


async def test_a_slow_reader_costs_no_memory_and_no_thread(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(4096 * MIB)
    daemon.reset_peak()
    before, descriptors = daemon.memory(), daemon.descriptors()
    head = f"GET /archive?path={tmp_path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {daemon.secret}\r\n\r\n"
    readers = []
    for _ in range(20):
        sock = socket.create_connection(("127.0.0.1", daemon.port))
        sock.sendall(head.encode())
        readers.append(sock)
    for sock in readers:
        assert (await deferToThread(sock.recv, 12)) == b"HTTP/1.1 200"
    assert await within(5, api.run("echo hi")) == {"stdout": "hi\n", "stderr": "", "code": 0}
    assert (await within(5, api.post("/list_dir", {"path": str(tmp_path)}))).json() == {"entries": ["f"]}
    assert daemon.peak_memory() - before < 64 * MIB
    for sock in readers:
        sock.close()
    await until(lambda: daemon.descriptors() <= descriptors)


@needs_root
async def test_what_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    (tmp_path / "g").touch(mode=0)
    (tmp_path / "h").mkdir(mode=0)
    (tmp_path / "i").touch()
    fd = os.open(tmp_path, os.O_RDONLY)  # pytest's directories are its user's alone
    tmp_path.chmod(0o755)

    def packed(skip: bool) -> list[str]:
        packing = Packing(Root(), f"/proc/self/fd/{fd}", lambda path: False, compressor("identity"), skip)
        os.seteuid(65534)
        try:
            packing.open()
            data = packing.read()
        finally:
            os.seteuid(0)
            packing.close()
        return names(data or b"")

    assert packed(True) == ["f", "h", "i"]
    with pytest.raises(FileError, match="g: permission denied"):
        packed(False)
    os.close(fd)


@pytest.mark.parametrize(("path", "status"), [("missing", 404), ("fifo", 409)])
async def test_what_is_no_directory_and_no_file(api: Api, tmp_path: Path, path: str, status: int) -> None:
    os.mkfifo(tmp_path / "fifo")
    reply = await get(api, tmp_path / path)
    assert reply.status == status
    assert set(reply.json()) == {"error"}


def test_an_archive_that_was_opened_and_not_read_keeps_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    before = os.listdir("/proc/self/fd")
    for path in (tmp_path, tmp_path / "file"):
        packing = Packing(Root(), str(path), lambda path: False, compressor("identity"))
        packing.open()
        packing.close()
    assert os.listdir("/proc/self/fd") == before
