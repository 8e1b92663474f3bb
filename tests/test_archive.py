"""``/archive``: trees in one request, both ways; nothing is written elsewhere."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import signal
import socket
import stat
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.defer import Deferred, gatherResults
from twisted.internet.threads import deferToThread

from sandboxd.files.archive.compression import CompressionError, Decompressor, compressor, preferred, zstd
from sandboxd.files.archive.pack import Packing
from sandboxd.files.archive.tar import Member, MemberType, Reader, Receiver, TarError, header
from sandboxd.files.archive.unpack import STEP, Unpacking
from sandboxd.files.errors import FileError
from sandboxd.files.patterns import Pattern, PatternError
from sandboxd.files.root import Root
from tests.client import Api, Response
from tests.daemon import Daemon
from tests.waiting import until, within

MIB = 1024 * 1024

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")


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


# Out


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


# In


def evil(outside: str) -> Iterator[tuple[str, bytes]]:
    """Archives that try to write to a directory beside their own, by what they try."""
    yield "absolute", tar(member(f"{outside}/f", b"evil"))
    yield "two slashes", tar(member(f"/{outside}/f", b"evil"))
    yield "dots", tar(member("../outside/f", b"evil"))
    yield "dots inside", tar(member("a/../../outside/f", b"evil"))
    link = member("link", type=tarfile.SYMTYPE, linkname=outside)
    yield "through a link", tar(link, member("link/f", b"evil"))
    yield (
        "a directory in the place of a link",
        tar(link, member("link", type=tarfile.DIRTYPE), member("link/f", b"evil")),
    )
    yield "a directory below a link", tar(link, member("link/d", type=tarfile.DIRTYPE))
    yield (
        "through a relative link",
        tar(member("l", type=tarfile.SYMTYPE, linkname=".."), member("l/outside/f", b"evil")),
    )
    yield "a link below a link", tar(link, member("link/l", type=tarfile.SYMTYPE, linkname="x"))
    yield (
        "hard link outside",
        tar(member("hard", type=tarfile.LNKTYPE, linkname=f"{outside}/secret"), member("hard", b"evil")),
    )
    yield "hard link with dots", tar(member("hard", type=tarfile.LNKTYPE, linkname="../outside/secret"))
    yield "hard link through a link", tar(link, member("hard", type=tarfile.LNKTYPE, linkname="link/secret"))
    yield "through a link that was there", tar(member("there/f", b"evil"))
    yield "a directory in the place of a link that was there", tar(member("there", type=tarfile.DIRTYPE, mode=0o777))
    yield "by GNU's long name", tar(member("../outside/" + "./" * 100 + "f", b"evil"), format=tarfile.GNU_FORMAT)
    info, _ = member("f", b"")
    info.pax_headers = {"path": "../outside/f"}
    yield "by pax", tar((info, b"evil"))


EVIL = [what for what, _ in evil("/")]


@pytest.mark.parametrize("what", EVIL)
@pytest.mark.parametrize("rooted", [False, True])
def test_nothing_is_written_elsewhere(tmp_path: Path, what: str, rooted: bool) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    target.mkdir()
    (outside / "secret").write_text("secret")
    (target / "there").symlink_to(outside)
    data = dict(evil(str(outside)))[what]
    unpacking = Unpacking(Root(str(target)) if rooted else Root(), str(target))
    unpacking.open()
    with pytest.raises(Exception, match=r"only names below|nothing is written through links"):
        unpacking.feed(data)
    unpacking.close()
    assert os.listdir(outside) == ["secret"]
    assert (outside / "secret").read_text() == "secret"
    assert (outside / "secret").stat().st_nlink == 1
    assert stat.S_IMODE(outside.stat().st_mode) == 0o755
    assert (target / "there").is_symlink()
    assert litter(tmp_path) == []


async def test_an_evil_archive_is_answered_clearly(api: Api, tmp_path: Path) -> None:
    reply = await put(api, tmp_path, tar(member("fine", b"text"), member("../f", b"evil")))
    assert reply.status == 400
    assert reply.json() == {
        "error": "'../f': a name with '..' in it; only names below the directory are unpacked",
        "entries": 1,
        "bytes": 4,
    }
    assert (tmp_path / "fine").read_text() == "text"
    through = tar(member("l", type=tarfile.SYMTYPE, linkname="/"), member("l/f"))
    reply = await put(api, tmp_path, through)
    assert reply.status == 409
    why = "a link, or no directory, is in the way; nothing is written through links"
    assert reply.json() == {"error": f"unpack l/f: {why}", "entries": 1, "bytes": 0}


@pytest.mark.slow
async def test_links_swapped_in_a_race_never_lead_out(api: Api, tmp_path: Path) -> None:
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    (target / "d").mkdir(parents=True)
    over = threading.Event()

    def swap() -> None:
        while not over.is_set():
            try:
                (target / "d").rename(target / "real")
                (target / "d").symlink_to(outside)
                (target / "d").unlink()
                (target / "real").rename(target / "d")
            except OSError:
                shutil.rmtree(target / "real", ignore_errors=True)

    data = tar(*(member(f"d/{n % 3}/f{n}", b"evil") for n in range(300)))
    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(10):
            await put(api, target, data)
    finally:
        over.set()
        thread.join()
    assert os.listdir(outside) == []


async def test_devices_and_fifos_are_skipped_and_told(api: Api, tmp_path: Path) -> None:
    data = tar(
        member("dev", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        member("fifo", type=tarfile.FIFOTYPE),
        member("f", b"text"),
    )
    reply = await put(api, tmp_path, data)
    assert reply.json() == {
        "path": str(tmp_path),
        "entries": 1,
        "bytes": 4,
        "skipped": ["dev", "fifo"],
        "skips": 2,
    }
    assert os.listdir(tmp_path) == ["f"]


@needs_root
async def test_modes_and_owners(api: Api, tmp_path: Path) -> None:
    data = tar(
        member("suid", b"", mode=0o6755, uid=12345, gid=54321),
        member("d", type=tarfile.DIRTYPE, mode=0o1555, uid=12345, gid=54321),
        member("d/f", b"text", mode=0o666),
        member("l", type=tarfile.SYMTYPE, linkname="suid", uid=12345, gid=54321),
    )
    for query, owner in (("", (0, 0)), ("&owner=keep", (12345, 54321))):
        assert (await put(api, tmp_path, data, query)).status == 200
        for name, mode in (("suid", 0o755), ("d", 0o555), ("l", 0o777)):
            info = (tmp_path / name).lstat()
            assert stat.S_IMODE(info.st_mode) == mode
            assert (info.st_uid, info.st_gid) == owner
    assert stat.S_IMODE((tmp_path / "d/f").stat().st_mode) == 0o666  # whatever the umask is


async def test_what_is_there_is_replaced_and_directories_stay(api: Api, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    (tmp_path / "d/old").touch()
    (tmp_path / "other").write_text("other")
    os.link(tmp_path / "other", tmp_path / "f")
    (tmp_path / "link").symlink_to("other")
    data = tar(
        member("d", type=tarfile.DIRTYPE, mode=0o700),
        member("f", b"new"),
        member("link", b"new"),
        member("g", type=tarfile.SYMTYPE, linkname="f"),
        member("g", type=tarfile.LNKTYPE, linkname="f"),
        member("g", type=tarfile.LNKTYPE, linkname="f"),
    )
    assert (await put(api, tmp_path, data)).status == 200
    assert (tmp_path / "other").read_text() == "other"
    assert [(tmp_path / name).read_text() for name in ("f", "link", "g")] == ["new"] * 3
    assert (tmp_path / "d/old").exists()
    assert litter(tmp_path) == []
    assert (await put(api, tmp_path, tar(member("d", b"a file")))).status == 409
    assert (await put(api, tmp_path, tar(member("f", type=tarfile.DIRTYPE)))).status == 409
    assert litter(tmp_path) == []


BROKEN = {
    "nothing": b"",
    "text": b"this is no archive at all\n" * 100,
    "half a header": tar(member("f"))[:100],
    "half a file": tar(member("a", b"x"), member("f", b"y" * 5000))[: 3 * 512 + 700],
    "no end": tar(member("a", b"x"))[:1024],
    "half a gzip": gzip.compress(tar(member("f", os.urandom(10000))))[:-20],
    "a gzip with a wrong sum": gzip.compress(tar(member("f")))[:-8] + bytes(8),
    "half a zstd": zstd.compress(tar(member("f", os.urandom(10000))))[:-20],
    "garbage in zstd": b"\x28\xb5\x2f\xfd" + b"\xff" * 100,
    "a wrong checksum": tar(member("f")).replace(b"ustar", b"ustbr", 1),
    "a header of 8 GB": tar(member("f", type=tarfile.XHDTYPE)).replace(b"00000000000\0", b"77777777777\0", 1),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_what_is_broken_is_told_and_leaves_no_litter(api: Api, tmp_path: Path, what: str) -> None:
    reply = await put(api, tmp_path, BROKEN[what])
    assert reply.status == 400, reply
    found = reply.json()
    assert set(found) == {"error", "entries", "bytes"}
    assert found["entries"] == len(os.listdir(tmp_path))
    assert litter(tmp_path) == []


@pytest.mark.slow
async def test_a_header_that_claims_much_takes_no_memory(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    info = tarfile.TarInfo("f")
    info.type, info.size = tarfile.XHDTYPE, 4 << 30
    data = gzip.compress(info.tobuf() + bytes(200 * MIB), 1)
    daemon.reset_peak()
    before = daemon.memory()
    reply = await put(api, tmp_path, data)
    assert reply.status == 400
    assert "extended header" in reply.json()["error"]
    assert daemon.peak_memory() - before < 48 * MIB


@pytest.mark.parametrize("compress", [gzip.compress, zstd.compress])
async def test_a_bomb_is_bounded(api: Api, tmp_path: Path, compress: Any) -> None:
    bomb = compress(tar(member("small", b"text"), member("bomb", bytes(64 * MIB))))
    reply = await put(api, tmp_path, bomb, f"&max_size={MIB}")
    assert reply.status == 413
    assert reply.json()["entries"] == 1
    assert os.listdir(tmp_path) == ["small"]
    reply = await put(api, tmp_path, tar(*(member(f"f{n}") for n in range(10))), "&max_entries=5")
    assert reply.status == 413
    assert "5 entries" in reply.json()["error"]


async def test_a_full_disk(api: Api, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("NOT TESTED: cannot mount a small disk")
    try:
        reply = await put(api, disk, tar(member("a", b"x"), member("f", b"y" * 3 * MIB)))
        assert reply.status == 507
        assert reply.json() == {"error": "unpack f: no space left on device", "entries": 1, "bytes": 1}
        assert os.listdir(disk) == ["a"]
    finally:
        subprocess.run(["umount", disk], check=True)


async def test_a_client_that_hangs_up_leaves_no_litter(daemon: Daemon, tmp_path: Path) -> None:
    descriptors = daemon.descriptors()
    data = tar(member("a", b"x"), member("f", b"y" * MIB))
    head = f"PUT /archive?path={tmp_path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {daemon.secret}\r\n"
    with socket.create_connection(("127.0.0.1", daemon.port)) as sock:
        sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: MIB // 2])
        await until(lambda: unnamed_files(daemon))
    await until(lambda: os.listdir(tmp_path) == ["a"])
    await until(lambda: daemon.descriptors() <= descriptors)


async def test_bad_requests(api: Api, tmp_path: Path) -> None:
    empty = tar()
    assert (await put(api, tmp_path / "missing", empty)).status == 404
    (tmp_path / "f").touch()
    assert (await put(api, tmp_path / "f", empty)).status == 409
    for query in ("&owner=me", "&max_size=x", "&max_entries=0"):
        assert (await put(api, tmp_path, empty, query)).status == 400
    for query in ("&format=zip", "&exclude=..", "&exclude=" + "x" * 5000, "&unreadable=x"):
        assert (await get(api, tmp_path, query)).status == 400
    url = f"/archive?path={tmp_path}"
    assert (await api.call("PUT", url, empty, {"Content-Encoding": "br"})).status == 415
    assert (await put(api, tmp_path, empty)).json() == {"path": str(tmp_path), "entries": 0, "bytes": 0}


# The parts


class Collected(Receiver):
    def __init__(self) -> None:
        self.members: list[tuple[str, bytes]] = []

    def begin(self, member: Member) -> None:
        self.members.append((member.name, b""))

    def data(self, data: bytes) -> None:
        name, before = self.members.pop()
        self.members.append((name, before + data))

    def end(self) -> None:
        pass


SAMPLE = tar(member("a", b"x" * 600), member("ü" * 80, b"y" * 512), member("d", type=tarfile.DIRTYPE), member("z"))


@settings(deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1))
def test_an_archive_is_read_the_same_in_any_pieces(sizes: list[int]) -> None:
    collected = Collected()
    reader = Reader(collected)
    position = 0
    while position < len(SAMPLE):
        for size in sizes:
            reader.feed(SAMPLE[position : position + size])
            position += size
    reader.finish()
    assert collected.members == [("a", b"x" * 600), ("ü" * 80, b"y" * 512), ("d", b""), ("z", b"")]


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=130)
BYTES = st.binary(min_size=1, max_size=130).filter(lambda data: 0 not in data).map(os.fsdecode)
IDS = st.one_of(st.integers(0, 70_000), st.integers(8**7 - 2, (1 << 32) - 2))


@settings(deadline=None)
@given(
    st.one_of(NAMES, BYTES, st.integers(95, 105).map("n".__mul__)),
    st.sampled_from([MemberType.FILE, MemberType.DIRECTORY, MemberType.SYMLINK, MemberType.HARD_LINK]),
    st.integers(0, 0o7777),
    st.one_of(st.integers(-(1 << 70), 1 << 70), st.integers(-(1 << 33), 1 << 34).map((10**9).__mul__)),
    st.one_of(st.integers(0, 1 << 20), st.integers(8**11 - 2, 1 << 62)),
    st.one_of(NAMES, BYTES),
    st.tuples(IDS, IDS),
    st.tuples(st.text("ab\u00e4", max_size=40), st.text("ab", max_size=40)),
)
def test_headers_are_read_by_others(
    name: str,
    kind: MemberType,
    mode: int,
    mtime: int,
    size: int,
    target: str,
    ids: tuple[int, int],
    owners: tuple[str, str],
) -> None:
    name, target = name.strip("/") or "name", target.rstrip("/") or "target"
    is_link = kind in (MemberType.SYMLINK, MemberType.HARD_LINK)
    size = size if kind is MemberType.FILE else 0
    member = Member(name, kind, mode, mtime, size, target if is_link else "", *ids, *owners)
    blocks = header(member)
    assert len(blocks) % 512 == 0
    archive = tarfile.TarFile(fileobj=io.BytesIO(blocks + bytes(1024)), errors="surrogateescape", encoding="utf-8")
    info = archive.next()
    assert info is not None
    assert (info.name, info.linkname, info.mode, info.size) == (name, member.target, mode, size)
    assert (info.uid, info.gid, info.uname, info.gname) == (*ids, *owners)
    assert info.mtime == pytest.approx(mtime / 10**9)
    assert archive.offset == len(blocks) + (size + 511) // 512 * 512  # what follows is its data


@settings(deadline=None)
@given(st.binary(max_size=2000), st.integers(0, len(SAMPLE)))
def test_garbage_is_refused_and_nothing_else_happens(garbage: bytes, position: int) -> None:
    reader = Reader(Collected())
    try:
        reader.feed(SAMPLE[:position] + garbage + SAMPLE[position:])
        reader.finish()
    except TarError:
        pass


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["gzip", "zstd", "identity"]), st.integers(1, 50))
def test_compression_in_any_pieces(data: bytes, coding: str, size: int) -> None:
    compress = compressor(coding)
    packed = compress.compress(data) + compress.flush()
    decompressor = Decompressor(coding)
    pieces = [packed[n : n + size] for n in range(0, len(packed), size)]
    assert b"".join(piece for part in pieces for piece in decompressor.feed(part)) == data
    decompressor.finish()
    if coding != "identity":
        broken = Decompressor(coding)
        assert data.startswith(b"".join(broken.feed(packed[:-1])))
        with pytest.raises(CompressionError):
            broken.finish()


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        (None, "identity"),
        ("", "identity"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip;q=1.0, zstd;q=0.5", "gzip"),
        ("*", "zstd"),
        ("zstd;q=0, *", "gzip"),
        ("gzip;q=0", "identity"),
        ("identity, gzip;q=0.5", "identity"),
        ("gzip;q=x", "identity"),
    ],
)
def test_preferred_coding(accepted: str | None, coding: str) -> None:
    assert preferred(accepted) == coding


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.py", "a.py", True),
        ("*.py", "d/a.py", False),
        ("**/*.py", "a.py", True),
        ("**/*.py", "d/e/a.py", True),
        ("d/**", "d/e/a.py", True),
        ("d/**/a.py", "d/a.py", True),
        ("d/**/a.py", "e/a.py", False),
        ("{a,b}/[0-9]?", "b/12", True),
        ("{a,b}/[!0-9]?", "b/12", False),
        ("{a}", "{a}", True),
        ("a**b", "axb", True),
        ("**", ".git/x", False),
        ("*", ".x", False),
        (".*", ".x", True),
        ("\udcff*", "\udcffx", True),
    ],
)
def test_patterns(pattern: str, path: str, expected: bool) -> None:
    assert Pattern(pattern, hidden=False).matches_path(path) is expected


@pytest.mark.parametrize("pattern", ["", "/", "a/../b", "{a,b}" * 20, "x" * 5000])
def test_bad_patterns(pattern: str) -> None:
    with pytest.raises(PatternError):
        Pattern(pattern)


async def test_no_pattern_takes_long() -> None:
    def match() -> list[bool]:
        return [
            Pattern("*a" * 60 + "b").matches_path("a" * 255),
            Pattern("**/" * 100 + "b").matches_path("a/" * 2000 + "a"),
            Pattern("{a,b}" * 8 + "/**/x").matches_path("a" * 8 + "/x"),
        ]

    assert await deferToThread(match).addTimeout(10, reactor) == [
        False,
        False,
        True,
    ]


async def test_two_archives_into_one_directory_at_a_time(api: Api, tmp_path: Path) -> None:
    members = [(f"d{number}/e{number}/f{number}", b"%d" % number) for number in range(300)]
    data = tar(*(member(name, contents) for name, contents in members))
    replies = await gatherResults([Deferred.fromCoroutine(put(api, tmp_path, data)) for _ in range(4)])
    assert [reply.status for reply in replies] == [200] * 4
    assert all((tmp_path / name).read_bytes() == contents for name, contents in members)


@pytest.mark.slow
async def test_many_directories_take_little_memory(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    names = [f"{'x' * 200}{number % 100}" for number in range(50_000)]
    data = gzip.compress(tar(*(member(name, type=tarfile.DIRTYPE) for name in names)))
    daemon.reset_peak()
    before = daemon.memory()
    assert (await put(api, tmp_path, data)).status == 200
    assert daemon.peak_memory() - before < 60_000_000
    assert len(os.listdir(tmp_path)) == 100


@pytest.mark.slow
async def test_directories_that_take_too_much_memory_are_refused(api: Api, tmp_path: Path) -> None:
    above = "/".join("x" * 250 for _ in range(15))
    names = [f"{above}/{number % 10}" for number in range(18_000)]
    data = gzip.compress(tar(*(member(name, type=tarfile.DIRTYPE) for name in names), format=tarfile.GNU_FORMAT))
    response = await put(api, tmp_path, data)
    assert response.status == 413
    assert "names of the archive's directories" in response.json()["error"]


@pytest.mark.slow
def test_a_little_that_becomes_much_is_unpacked_in_steps(tmp_path: Path) -> None:
    size = 3 * STEP
    packed = zstd.compress(tar(member("f", bytes(size))))
    unpacking = Unpacking(Root(), str(tmp_path))
    unpacking.open()
    assert unpacking.feed(packed)
    unpacking.close()
    with pytest.raises(OSError, match="canceled"):
        unpacking.feed(b"")
    assert os.listdir(tmp_path) == []
    unpacking = Unpacking(Root(), str(tmp_path))
    unpacking.open()
    steps = [unpacking.feed(packed)]
    while steps[-1]:
        steps.append(unpacking.feed(b""))
    assert len(steps) == 4  # the archive is a little longer than the file
    unpacking.finish()
    unpacking.close()
    assert (tmp_path / "f").stat().st_size == size


async def test_a_daemon_that_is_killed_while_it_unpacks_leaves_nothing(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    top = tmp_path / "top"
    top.mkdir()
    daemon = start_daemon()
    data = tar(member("f", b"y" * MIB))
    head = f"PUT /archive?path={top} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {daemon.secret}\r\n"
    with socket.create_connection(("127.0.0.1", daemon.port)) as sock:
        sock.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data[: MIB // 2])
        await until(lambda: unnamed_files(daemon))
        daemon.stop(signal.SIGKILL)
    assert os.listdir(top) == []
