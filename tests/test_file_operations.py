"""``/files/...``: move, copy, chmod, append, touch and link."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from twisted.internet.defer import gatherResults

from sandboxd.files import copying
from sandboxd.files.copying import copy
from sandboxd.files.errors import FileError
from sandboxd.files.permissions import parse_mode
from sandboxd.files.root import Root
from tests.client import Api
from tests.daemon import Daemon
from tests.file_routes import done, lines, litter, paths, post, told
from tests.waiting import until, within

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")


async def test_move(api: Api, tree: Path) -> None:
    reply = await done(api, "move", from_=tree / "src", to=tree / "new")
    assert reply == {"from": str(tree / "src"), "to": str(tree / "new"), "copied": False}
    assert (tree / "new/lib/c.py").exists()
    assert not (tree / "src").exists()
    taken = await post(api, "move", from_=tree / "README.md", to=tree / "new/a.py")
    assert taken.status == 409
    assert taken.json() == {"error": f"move to {tree}/new/a.py: file exists"}
    await done(api, "move", from_=tree / "README.md", to=tree / "new/a.py", overwrite=True)
    assert (tree / "new/a.py").read_text() == "this is README.md\n"
    await done(api, "move", from_=tree / "new/a.py", to=tree / "deep/er/a.py", parents=True)
    assert (tree / "deep/er/a.py").exists()
    await done(api, "move", from_=tree / "link", to=tree / "link2")
    assert os.readlink(tree / "link2") == "src"


@pytest.mark.parametrize("route", ["move", "copy"])
async def test_what_cannot_be_moved_or_copied(api: Api, tree: Path, route: str) -> None:
    for source, target, status in (
        ("missing", "x", 404),
        ("src", "src/lib/x", 400),
        ("src", "missing/x", 404),
        ("src", "README.md/x", 409),
        ("README.md", "src", 409),
    ):
        response = await post(api, route, from_=tree / source, to=tree / target, overwrite=True)
        assert (response.status, set(response.json())) == (status, {"error"}), response
    assert (await post(api, route, from_="", to="x")).status == 400
    assert (await post(api, route, from_=tree)).status == 400
    assert litter(tree) == []


async def test_move_to_another_file_system(api: Api, tree: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("NOT TESTED: cannot mount another file system")
    try:
        reply = await done(api, "move", from_=tree, to=disk / "tree")
        assert (reply["copied"], reply["entries"]) == (True, 12)
        assert not tree.exists()
        assert (disk / "tree/src/lib/c.py").read_text() == "this is src/lib/c.py\n"
        big = tmp_path / "big"
        big.mkdir()
        (big / "f").write_bytes(b"x" * (2 << 20))
        response = await post(api, "move", from_=big, to=disk / "big")
        assert response.status == 507
        assert (big / "f").exists()
        assert os.listdir(disk) == ["tree"]
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.slow
async def test_copy_keeps_what_cp_a_keeps(api: Api, tree: Path, tmp_path: Path) -> None:
    (tree / "src/a.py").chmod(0o751)
    os.utime(tree / "src/a.py", ns=(1, 1_600_000_000_123_456_789))
    (tree / "src/lib").chmod(0o555)
    os.utime(tree / "src/lib", ns=(1, 1_600_000_000_000_000_000))
    os.mkfifo(tree / "fifo")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tree / "socket"))
    with (tree / "sparse").open("wb") as file:
        file.truncate(64 << 20)
        file.write(b"begin")
        file.seek(40 << 20)
        file.write(b"middle")
    target = tmp_path / "copy"
    reply = await done(api, "copy", from_=tree, to=target)
    assert (reply["copied"], reply["skipped"]) == (True, ["socket"])
    assert (target / "sparse").stat().st_blocks * 512 < 1 << 20
    assert stat.S_ISFIFO((target / "fifo").lstat().st_mode)
    (tree / "socket").unlink()
    for path in (tree / "fifo", target / "fifo"):
        path.unlink()  # diff(1) would read them
    compared = subprocess.run(["diff", "-r", "--no-dereference", tree, target], capture_output=True, check=False)
    assert compared.stdout == b""
    for name in ("src/a.py", "src/lib"):
        one, other = (tree / name).stat(), (target / name).stat()
        assert (one.st_mode, one.st_mtime_ns, one.st_uid) == (other.st_mode, other.st_mtime_ns, other.st_uid)
    again = await post(api, "copy", from_=tree, to=target)
    assert again.status == 409
    assert (await post(api, "copy", from_=tree, to=target, overwrite=True)).status == 409  # it is not empty
    await done(api, "copy", from_=tree / "README.md", to=target / "src/a.py", overwrite=True)
    assert (target / "src/a.py").read_text() == "this is README.md\n"
    assert litter(tmp_path) == []


async def test_chmod(api: Api, tree: Path) -> None:
    assert await done(api, "chmod", path=tree / "src/a.py", mode="0750") == {
        "path": str(tree / "src/a.py"),
        "changed": 1,
    }
    assert stat.S_IMODE((tree / "src/a.py").stat().st_mode) == 0o750
    await done(api, "chmod", path=tree / "src/b.py", mode="u+x,go=")
    assert stat.S_IMODE((tree / "src/b.py").stat().st_mode) == 0o700
    outside = tree.parent / "outside"
    outside.touch(mode=0o600)
    (tree / "src/out").symlink_to(outside)
    reply = await done(api, "chmod", path=tree, mode="a+rX", recursive=True)
    assert reply["changed"] == 13
    assert stat.S_IMODE((tree / "src/b.py").stat().st_mode) == 0o755
    assert stat.S_IMODE((tree / "src/lib/c.py").stat().st_mode) & 0o111 == 0
    assert stat.S_IMODE(outside.stat().st_mode) == 0o600
    for fields in ({}, {"mode": "9"}, {"mode": "u+q"}, {"owner": "no-such-user"}, {"group": "no-such-group"}):
        response = await post(api, "chmod", path=tree, **fields)
        assert response.status == 400, response
        assert set(response.json()) == {"error"}


@needs_root
async def test_chown(api: Api, tree: Path) -> None:
    await done(api, "chmod", path=tree, owner="12345:54321", recursive=True, mode="6755")
    for path in (tree, tree / "src/a.py", tree / "link"):
        assert (path.lstat().st_uid, path.lstat().st_gid) == (12345, 54321)
    assert stat.S_IMODE((tree / "src/a.py").stat().st_mode) == 0o6755
    await done(api, "chmod", path=tree, group="0")
    assert (tree.stat().st_uid, tree.stat().st_gid) == (12345, 0)


async def test_append(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "log"
    reply = await done(api, "append", path=path, content="one\n")
    assert reply == {"path": str(path), "size": 4, "etag": (await told(api, "stat", path))["etag"]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    await done(api, "append", path=path, base64="/wA=")
    assert path.read_bytes() == b"one\n\xff\0"
    path.unlink()
    await gatherResults([within(9, done(api, "append", path=path, content=f"{n}" * 3000 + "\n")) for n in range(10)])
    assert sorted(path.read_text().split()) == [f"{n}" * 3000 for n in range(10)]
    os.mkfifo(tmp_path / "fifo")
    for target, status in (("fifo", 409), (".", 409), ("missing/f", 404)):
        assert (await post(api, "append", path=tmp_path / target, content="x")).status == status
    for fields in ({}, {"content": "x", "base64": ""}, {"base64": "!"}):
        assert (await post(api, "append", path=path, **fields)).status == 400
    await done(api, "append", path=tmp_path / "a/b/f", content="x", parents=True)


async def test_touch(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    assert (await done(api, "touch", path=path))["size"] == 0
    await done(api, "touch", path=path, mtime="2001-02-03T04:05:06.789Z")
    assert path.stat().st_mtime_ns == 981_173_106_789_000_000
    await done(api, "touch", path=path)
    assert path.stat().st_mtime_ns > 1_600_000_000_000_000_000
    await done(api, "touch", path=tmp_path, mtime="2001-02-03T04:05:06+01:00")
    assert tmp_path.stat().st_mtime_ns == 981_169_506_000_000_000
    assert (await post(api, "touch", path=path, mtime="yesterday")).status == 400


@pytest.mark.parametrize("mtime", ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"])
async def test_touch_with_a_time_that_is_outside_of_the_calendar_in_utc(api: Api, tmp_path: Path, mtime: str) -> None:
    path = tmp_path / "f"
    await done(api, "touch", path=path, mtime=mtime)
    assert (path.stat().st_mtime < 0) == mtime.startswith("0001")  # the file system sets the nearest that it can keep


async def test_link(api: Api, tree: Path) -> None:
    response = await post(api, "link", path=tree / "new", target="../nowhere")
    assert response.status == 201
    assert response.json() == {"path": str(tree / "new"), "target": "../nowhere", "kind": "symbolic"}
    assert os.readlink(tree / "new") == "../nowhere"
    assert (await post(api, "link", path=tree / "new", target="x")).status == 409
    await done(api, "link", path=tree / "new", target="src", overwrite=True)
    assert os.readlink(tree / "new") == "src"
    for _ in range(2):
        await done(api, "link", path=tree / "new", target=tree / "README.md", kind="hard", overwrite=True)
    assert (tree / "new").stat().st_ino == (tree / "README.md").stat().st_ino
    assert (await post(api, "link", path=tree / "x", target=tree / "missing", kind="hard")).status == 404
    assert (await post(api, "link", path=tree / "x", target="")).status == 400
    assert litter(tree) == []


async def test_names_that_are_not_utf8(api: Api, tmp_path: Path) -> None:
    odd = os.fsdecode(b"odd\xff\xe2\x82")
    path = tmp_path / odd
    path.write_text("one")
    assert (await told(api, "stat", path))["name"] == odd
    page = await told(api, "list", tmp_path, "&depth=2&limit=1")
    assert paths(page) == [odd]
    await done(api, "move", from_=path, to=tmp_path / f"d{odd}/{odd}", parents=True)
    await done(api, "copy", from_=tmp_path / f"d{odd}", to=tmp_path / f"e{odd}")
    await done(api, "edit", path=tmp_path / f"e{odd}/{odd}", edits=[{"old": "one", "new": "\udcff"}])
    assert (tmp_path / f"e{odd}/{odd}").read_bytes() == b"\xff"
    assert paths(await done(api, "glob", path=tmp_path, pattern=f"e{odd}/*")) == [f"e{odd}/{odd}"]
    found = await done(api, "grep", path=tmp_path / f"d{odd}", pattern="one")
    assert lines(found) == [(odd, 1, "one")]
    await done(api, "link", path=tmp_path / "link", target=odd)
    assert (await told(api, "stat", tmp_path / "link"))["target"] == odd


@pytest.mark.parametrize(
    ("text", "mode", "is_dir", "expected"),
    [
        ("0644", 0o777, False, 0o644),
        ("755", 0, False, 0o755),
        ("u+x", 0o644, False, 0o744),
        ("+x", 0o644, False, 0o755),
        ("go-rw", 0o666, False, 0o600),
        ("u=rw,go=r", 0o777, False, 0o644),
        ("a=", 0o777, False, 0),
        ("a+X", 0o644, False, 0o644),
        ("a+X", 0o744, False, 0o755),
        ("a+X", 0o644, True, 0o755),
        ("u+s,o+t", 0o755, False, 0o5755),
        ("g+s", 0o755, True, 0o2755),
        ("u+rw-x", 0o100, False, 0o600),
    ],
)
def test_modes(text: str, mode: int, is_dir: bool, expected: int) -> None:
    assert parse_mode(text)(mode, is_dir) == expected


@pytest.mark.parametrize("text", ["", "8", "77777", "u+q", "x", "u", "u+x,", "0x1ff"])
def test_bad_modes(text: str) -> None:
    with pytest.raises(ValueError, match="mode"):
        parse_mode(text)


async def test_a_file_without_a_size_is_copied_whole(api: Api, tmp_path: Path) -> None:
    copied = await done(api, "copy", from_="/proc/version", to=tmp_path / "version")
    assert (tmp_path / "version").read_text() == Path("/proc/version").read_text()
    assert copied["bytes"] == len(Path("/proc/version").read_text())


@pytest.mark.skipif(not os.path.exists("/sys/class/net/lo/mtu"), reason="NOT TESTED: needs /sys")
async def test_a_file_that_is_shorter_than_its_size_is_not_filled_with_zeros(api: Api, tmp_path: Path) -> None:
    source = Path("/sys/class/net/lo/mtu")
    copied = await done(api, "copy", from_=source, to=tmp_path / "mtu")
    assert (tmp_path / "mtu").read_bytes() == source.read_bytes()
    assert copied["bytes"] == len(source.read_bytes())


def test_a_hole_at_the_end_is_copied(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"text")
    os.truncate(tmp_path / "a", 1_000_000)
    copy(Root(), str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()


def test_a_fifo_keeps_mode_owner_and_times(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    fifo = tmp_path / "tree" / "fifo"
    os.mkfifo(fifo)
    if os.geteuid() == 0:
        os.chown(fifo, 1234, 1235)
    fifo.chmod(0o666)  # more than the umask leaves
    os.utime(fifo, ns=(10**18, 10**18))
    for source, target in ((fifo, tmp_path / "one"), (fifo.parent, tmp_path / "copy")):
        copy(Root(), str(source), str(target))
    for made in (tmp_path / "one", tmp_path / "copy" / "fifo"):
        ours, theirs = made.lstat(), fifo.lstat()
        assert (ours.st_mode, ours.st_uid, ours.st_gid, ours.st_mtime_ns) == (
            theirs.st_mode,
            theirs.st_uid,
            theirs.st_gid,
            theirs.st_mtime_ns,
        )


@pytest.fixture
def as_nobody() -> Iterator[Path]:
    """Be another user than root, and yield an empty directory of that user's."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() != 0:
            yield Path(folder)
            return
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("when", ["before", "at the end"])
def test_a_copy_of_read_only_directories_that_fails_leaves_nothing(
    as_nobody: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = as_nobody / "source", as_nobody / "target"
    for folder in (source, source / "a", source / "a" / "b", target):
        folder.mkdir()
        (folder / "f").write_text("text")
    for folder in (source / "a" / "b", source / "a", source):
        folder.chmod(0o555)
    if when == "at the end":
        monkeypatch.setattr(copying, "_check_empty", lambda fd, name: None)  # as if the file was made meanwhile
    else:
        monkeypatch.setattr(copying, "_copy_tree", lambda *whatever: pytest.fail("the copy began"))
    with pytest.raises(FileError, match="not empty") as raised:
        copy(Root(), str(source), str(target), overwrite=True)
    assert raised.value.status == 409
    assert sorted(os.listdir(as_nobody)) == ["source", "target"]
    assert os.listdir(target) == ["f"]
    assert stat.S_IMODE((source / "a").stat().st_mode) == 0o555


async def test_a_move_onto_another_link_to_the_same_file_leaves_one(api: Api, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    os.link(tmp_path / "a", tmp_path / "b")
    await done(api, "move", from_=tmp_path / "a", to=tmp_path / "b", overwrite=True)
    assert os.listdir(tmp_path) == ["b"]
    await done(api, "move", from_=tmp_path / "b", to=tmp_path / "b", overwrite=True)
    assert (tmp_path / "b").read_text() == "text"


async def test_a_directory_that_cannot_be_copied_keeps_no_descriptor(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    await post(api, "copy", from_=tmp_path / "from", to="/proc/x")
    before = len(daemon.open_files())
    for _ in range(10):
        assert (await post(api, "copy", from_=tmp_path / "from", to="/proc/x")).status >= 400
    await until(lambda: len(daemon.open_files()) < before + 5)  # of others, some may be open now
