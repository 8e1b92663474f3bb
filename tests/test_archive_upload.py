"""``PUT /archive``: a tree in one request; nothing is written elsewhere."""

from __future__ import annotations

import gzip
import os
import shutil
import signal
import socket
import stat
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, gatherResults

from sandboxd.files.archive.compression import zstd
from sandboxd.files.archive.unpack import STEP, Unpacking
from sandboxd.files.root import Root
from tests.archives import MIB, get, litter, member, put, tar, unnamed_files
from tests.client import Api
from tests.daemon import Daemon
from tests.waiting import until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")


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
