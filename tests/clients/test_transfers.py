"""Files and trees, up and down."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sandboxd.client import Conflict, Forbidden, NotFound, PreconditionFailed, Sandbox, SandboxError, SandboxGone
from sandboxd.client.transfers import LARGE
from sandboxd.client.trees import Unpacking, pack, walk
from tests.clients.cutting import CuttingProxy
from tests.daemon import Daemon
from tests.waiting import wait_for

Connect = Callable[..., Sandbox]

MIB = 1024 * 1024


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A file that is uploaded in parts."""
    path = tmp_path / "large"
    path.write_bytes(os.urandom(MIB) * 24)
    return path


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A directory of the sandbox, which is on this machine too."""
    path = tmp_path / "sandbox"
    path.mkdir()
    return path


def test_small_files(sandbox: Sandbox, there: Path) -> None:
    path = f"{there}/a b?&#é"
    stored = sandbox.write(path, "text\n")
    assert (stored.created, stored.size) == (True, 5)
    assert sandbox.read(path) == b"text\n"
    assert sandbox.read(path, start=1, size=2) == b"ex"
    assert sandbox.read_text(path) == "text\n"
    assert sandbox.edit(path, ("ext", "EXT"), if_match=sandbox.stat(path).etag).size == 5
    sandbox.append(path, b"\xff")
    assert sandbox.read(path, start=1) == b"EXT\n\xff"
    sandbox.move(path, f"{there}/b")
    sandbox.copy(f"{there}/b", f"{there}/c")
    assert sandbox.chmod(f"{there}/c", "600") == 1
    sandbox.link(f"{there}/d", "c")
    sandbox.touch(f"{there}/e")
    assert [(info.name, info.type) for info in sandbox.list_files(str(there))] == [
        ("b", "file"),
        ("c", "file"),
        ("d", "link"),
        ("e", "file"),
    ]
    assert [found.path for found in sandbox.glob(str(there), "[bc]")] == ["b", "c"]
    sandbox.delete(f"{there}/b")
    assert not sandbox.exists(f"{there}/b")
    sandbox.make_dir(f"{there}/x/y")
    sandbox.delete_tree(f"{there}/x")
    assert not (there / "x").exists()


def test_names_that_are_not_utf_8(sandbox: Sandbox, there: Path) -> None:
    name = os.fsdecode(b"n\xff")
    sandbox.write(f"{there}/{name}", b"x")
    assert os.listdir(os.fsencode(there)) == [b"n\xff"]
    assert [info.name for info in sandbox.list_files(str(there))] == [name]
    assert sandbox.stat(f"{there}/{name}").size == 1
    assert sandbox.read(f"{there}/{name}") == b"x"


def test_errors_are_typed(sandbox: Sandbox, there: Path) -> None:
    with pytest.raises(NotFound):
        sandbox.read(f"{there}/none")
    with pytest.raises(Conflict):
        sandbox.make_dir("/dev/null/x")
    etag = sandbox.write(f"{there}/f", "1").etag
    with pytest.raises(PreconditionFailed):
        sandbox.write(f"{there}/f", "2", exclusive=True)
    sandbox.write(f"{there}/f", "2", if_match=etag)
    with pytest.raises(PreconditionFailed) as caught:
        sandbox.write(f"{there}/f", "3", if_match=etag)
    assert caught.value.fields["etag"] == sandbox.stat(f"{there}/f").etag
    with pytest.raises(Conflict) as conflict:
        sandbox.edit(f"{there}/f", ("absent", "x"))
    assert conflict.value.fields["count"] == 0


def test_grep(sandbox: Sandbox, there: Path) -> None:
    (there / "f").write_text("one\ntwo\n")
    (match,) = sandbox.grep(str(there), "t.o").matches
    assert (match.path, match.line, match.text) == ("f", 2, "two")


def test_watch_through_a_cut(connect: Connect, proxy: CuttingProxy, there: Path) -> None:
    sandbox = connect(proxy.url)
    seen = []
    with sandbox.watch(str(there)) as changes:
        for change in changes:
            seen.append((change.event, change.path))
            if change.event == "ready":
                proxy.cut()
                (there / "a").write_text("")
            elif change.path == f"{there}/a":
                (there / "b").write_text("")
            else:
                break
    assert seen == [("ready", str(there)), ("created", f"{there}/a"), ("created", f"{there}/b")]


@pytest.mark.parametrize("what", ["bytes", "path", "file", "pieces"])
def test_upload_and_download(sandbox: Sandbox, tmp_path: Path, there: Path, what: str) -> None:
    data = os.urandom(3 * MIB + 1)
    local = tmp_path / "local"
    local.write_bytes(data)
    local.chmod(0o755)
    seen: list[tuple[int, int | None]] = []
    with local.open("rb") as file:
        source = {"bytes": data, "path": local, "file": file, "pieces": iter([data[:5], data[5:]])}[what]
        sandbox.upload(source, f"{there}/up", progress=lambda done, total: seen.append((done, total)))  # type: ignore[arg-type]
    assert (there / "up").read_bytes() == data
    assert (there / "up").stat().st_mode & 0o777 == (0o755 if what == "path" else 0o644)
    assert seen[-1] == (len(data), len(data) if what in ("bytes", "path") else None)
    assert sandbox.download(f"{there}/up", tmp_path / "down", progress=lambda *now: seen.append(now)) == len(data)
    assert (tmp_path / "down").read_bytes() == data
    assert seen[-1] == (len(data), len(data))
    into = io.BytesIO()
    sandbox.download(f"{there}/up", into)
    assert into.getvalue() == data


def test_empty_files(sandbox: Sandbox, tmp_path: Path, there: Path) -> None:
    (tmp_path / "empty").touch()
    sandbox.upload(tmp_path / "empty", f"{there}/up")
    assert sandbox.download(f"{there}/up", tmp_path / "down") == 0
    assert (tmp_path / "down").read_bytes() == b""


def test_a_file_without_a_size(sandbox: Sandbox, tmp_path: Path) -> None:
    sandbox.download("/proc/version", tmp_path / "version")
    assert (tmp_path / "version").read_text().startswith("Linux")
    sandbox.upload("/proc/version", f"{tmp_path}/up")
    assert (tmp_path / "up").read_bytes() == (tmp_path / "version").read_bytes()


@pytest.mark.parametrize("size", [2 * MIB, 17 * MIB], ids=["small", "large"])
def test_a_file_that_changes_during_an_upload(sandbox: Sandbox, tmp_path: Path, there: Path, size: int) -> None:
    local = tmp_path / "local"
    local.write_bytes(bytes(size))

    def grow(done: int, total: int | None) -> None:
        os.truncate(local, size + MIB)

    def shrink(done: int, total: int | None) -> None:
        os.truncate(local, MIB)

    if size < LARGE:
        sandbox.upload(local, f"{there}/up", progress=grow)
        assert (there / "up").stat().st_size == size
    else:
        with pytest.raises(Conflict, match="changed while it was sent"):
            sandbox.upload(local, f"{there}/up", progress=grow)
    with pytest.raises(Conflict, match="changed while it was sent"):
        sandbox.upload(local, f"{there}/other", progress=shrink)
    assert not (there / "other").exists()


@pytest.mark.slow
def test_a_large_upload_that_is_cut_is_resumed(connect: Connect, proxy: CuttingProxy, large: Path, there: Path) -> None:
    sandbox = connect(proxy.url)
    (there / "up").write_bytes(b"old")
    (there / "up").chmod(0o640)
    proxy.cuts = [3 * MIB, 100, 5 * MIB, MIB, 2 * MIB]
    seen: list[int] = []
    stored = sandbox.upload(large, f"{there}/up", progress=lambda done, total: seen.append(done))
    assert digest(there / "up") == digest(large)
    assert stored.size == large.stat().st_size
    assert (there / "up").stat().st_mode & 0o777 == 0o640
    assert os.listdir(there) == ["up"]
    assert proxy.connections > 4
    assert seen[-1] == large.stat().st_size
    # What reached the server is not sent again: without resuming, 11 MiB would be.
    assert proxy.forwarded < large.stat().st_size + 4 * MIB


def test_a_later_upload_goes_on_where_an_earlier_one_was_ended(
    connect: Connect, proxy: CuttingProxy, large: Path, there: Path
) -> None:
    proxy.cuts = [9 * MIB]

    class Ended(Exception):
        pass

    def stop(done: int, total: int | None) -> None:
        if done > 8 * MIB:  # some of it is on its way
            wait_for(lambda: any(part.stat().st_size > MIB for part in there.glob(".*.part")))
            raise Ended

    with pytest.raises((Ended, SandboxGone)):
        connect(proxy.url, patience=0).upload(large, f"{there}/up", progress=stop)
    assert not (there / "up").exists()
    first: list[int] = []
    connect(proxy.url).upload(large, f"{there}/up", progress=lambda done, total: first.append(done))
    assert first[0] > MIB
    assert digest(there / "up") == digest(large)


def test_a_link_at_the_target_of_an_upload_is_kept(sandbox: Sandbox, large: Path, there: Path) -> None:
    (there / "real").write_text("old")
    (there / "link").symlink_to("real")
    sandbox.upload(large, f"{there}/link")
    assert (there / "link").is_symlink()
    assert digest(there / "real") == digest(large)


@pytest.mark.slow
def test_a_download_that_is_cut_is_resumed(connect: Connect, proxy: CuttingProxy, large: Path, tmp_path: Path) -> None:
    sandbox = connect(proxy.url)
    proxy.cuts = [3 * MIB, 400, 5 * MIB]
    assert sandbox.download(str(large), tmp_path / "down") == large.stat().st_size
    assert digest(tmp_path / "down") == digest(large)
    proxy.cuts = [3 * MIB, 5 * MIB]
    with (tmp_path / "file").open("wb") as file:
        sandbox.download(str(large), file)
    assert digest(tmp_path / "file") == digest(large)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["down", "file", "large"]


@pytest.mark.slow
def test_a_later_download_goes_on_if_the_file_is_the_same(
    connect: Connect, proxy: CuttingProxy, large: Path, tmp_path: Path
) -> None:
    (tmp_path / "down").write_text("old")
    seen: list[int] = []
    for change in (False, True):
        proxy.cuts = [9 * MIB] + [1] * 100
        with pytest.raises(SandboxGone):
            connect(proxy.url, patience=0.3).download(str(large), tmp_path / "down")
        assert (tmp_path / "down").read_text() == "old"
        if change:
            large.write_bytes(os.urandom(20 * MIB))
        proxy.cuts = []
        seen.clear()
        connect(proxy.url).download(str(large), tmp_path / "down", progress=lambda done, total: seen.append(done))
        assert digest(tmp_path / "down") == digest(large)
        assert (seen[0] > 6 * MIB) is not change
        (tmp_path / "down").write_text("old")


@pytest.mark.slow
def test_a_file_that_changes_during_a_download(
    connect: Connect, proxy: CuttingProxy, large: Path, tmp_path: Path
) -> None:
    def changing() -> Callable[[int, int | None], None]:
        changed = False

        def change(done: int, total: int | None) -> None:
            nonlocal changed
            if not changed and done > 4 * MIB:
                changed = True
                new = tmp_path / "new"
                new.write_bytes(os.urandom(20 * MIB))
                new.replace(large)

        return change

    proxy.cuts = [9 * MIB]
    connect(proxy.url).download(str(large), tmp_path / "down", progress=changing())
    assert digest(tmp_path / "down") == digest(large)
    proxy.cuts = [9 * MIB]
    with (tmp_path / "file").open("wb") as file, pytest.raises(PreconditionFailed):
        connect(proxy.url).download(str(large), file, progress=changing())


def test_progress_may_raise(sandbox: Sandbox, large: Path, tmp_path: Path) -> None:
    def full(done: int, total: int | None) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        sandbox.download(str(large), tmp_path / "down", progress=full)
    with pytest.raises(OSError, match="No space"):
        sandbox.upload(large, f"{tmp_path}/up", progress=full)
    assert sandbox.run("echo ok").stdout == "ok\n"


def make_tree(top: Path) -> None:
    (top / "sub/deep").mkdir(parents=True)
    (top / "empty").mkdir()
    (top / "a").write_text("a")
    (top / "sub/run.sh").write_text("#!/bin/sh\n")
    (top / "sub/run.sh").chmod(0o755)
    (top / "sub/deep/large").write_bytes(os.urandom(MIB + 7))
    (top / "sub/up").symlink_to("../a")
    os.link(top / "a", top / "hard")
    os.utime(top / "a", ns=(0, 1_234_567_890_123_456_789))
    (top / os.fsdecode(b"n\xff")).write_text("x")
    (top / ("l" * 200)).write_text("y")


def listing(top: Path) -> dict[str, object]:
    return {
        os.path.relpath(path, top): os.readlink(path)
        if path.is_symlink()
        else None
        if path.is_dir()
        else (path.read_bytes(), path.stat().st_mode & 0o755)
        for path in top.rglob("*")
    }


def test_a_walk_leaves_out_what_is_removed_meanwhile(tmp_path: Path) -> None:
    for name in ("b/c/d", "z"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("a", "e", "f", "z/g"):
        (tmp_path / name).touch()
    found = walk(tmp_path)
    assert [next(found)[0], next(found)[0]] == ["a", "b"]
    (tmp_path / "e").unlink()
    shutil.rmtree(tmp_path / "b")
    (tmp_path / "b").touch()
    assert [name for name, _ in found] == ["f", "z", "z/g"]
    found = walk(tmp_path)
    next(found)
    shutil.rmtree(tmp_path)
    with pytest.raises(FileNotFoundError):
        list(found)


def test_a_tree_that_changes_while_it_is_uploaded(sandbox: Sandbox, tmp_path: Path, there: Path) -> None:
    tree = tmp_path / "tree"
    make_tree(tree)
    entries = list(walk(tree))
    (tree / "a").unlink()
    shutil.rmtree(tree / "sub")
    for name in ("hard", "empty"):  # of another type now
        (tree / name).rmdir() if name == "empty" else (tree / name).unlink()
        (tree / name).symlink_to("a")
    (tree / ("l" * 200)).write_text("longer than it was")
    sandbox.upload_entries(tree, entries, str(there))
    assert listing(there) == listing(tree)
    shutil.rmtree(tree)
    with pytest.raises(FileNotFoundError):
        sandbox.upload_entries(tree, entries, str(there))


def test_a_file_has_the_size_that_its_header_says(tmp_path: Path) -> None:
    sizes = {"grows": 2 * MIB, "shrinks": 2 * MIB, "after": 3}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    pieces = pack(tmp_path, [(name, os.stat(tmp_path / name)) for name in sizes])
    archive = next(pieces)  # the first one is open now
    with (tmp_path / "grows").open("ab") as file:
        file.write(b"y" * MIB)
    while len(archive) < 2 * MIB + 2048:
        archive += next(pieces)  # and the second one
    os.truncate(tmp_path / "shrinks", 0)
    with tarfile.open(fileobj=io.BytesIO(archive + b"".join(pieces))) as read:
        contents = {member.name: read.extractfile(member).read() for member in read}  # type: ignore[union-attr]
    assert {name: len(data) for name, data in contents.items()} == sizes
    assert set(contents["grows"]) == {ord("x")}
    assert contents["shrinks"].strip(b"x").strip(b"\0") == b""
    assert contents["after"] == b"xxx"


def test_trees(sandbox: Sandbox, tmp_path: Path, there: Path) -> None:
    tree = tmp_path / "tree"
    make_tree(tree)
    seen: list[tuple[int, int | None]] = []
    unpacked = sandbox.upload_tree(tree, f"{there}/new/tree", progress=lambda *now: seen.append(now))
    assert unpacked.entries == len(listing(tree))
    assert listing(there / "new/tree") == listing(tree)
    assert (there / "new/tree/a").stat().st_mtime_ns == 1_234_567_890_123_456_789
    assert seen[-1][1] is not None
    for compress in (False, True):
        done = sandbox.download_tree(f"{there}/new/tree", tmp_path / f"back{compress}/x", compress=compress)
        assert listing(tmp_path / f"back{compress}/x") == listing(tree)
        assert (done.entries, done.skipped) == (len(listing(tree)), [])
        assert (tmp_path / f"back{compress}/x/a").stat().st_mtime_ns == 1_234_567_890_123_456_789
    sandbox.upload_tree(tree, f"{there}/less", exclude=["deep", "sub/run*"])
    assert set(listing(there / "less")) == set(listing(tree)) - {"sub/deep", "sub/deep/large", "sub/run.sh"}


@pytest.mark.slow
def test_trees_that_are_cut_begin_anew(connect: Connect, proxy: CuttingProxy, tmp_path: Path, there: Path) -> None:
    sandbox = connect(proxy.url)
    tree = tmp_path / "tree"
    make_tree(tree)
    proxy.cuts = [500_000, 700]
    sandbox.upload_tree(tree, f"{there}/tree")
    assert listing(there / "tree") == listing(tree)
    proxy.cut()
    proxy.cuts = [500_000, 700]
    sandbox.download_tree(f"{there}/tree", tmp_path / "back")
    assert listing(tmp_path / "back") == listing(tree)
    assert threading.active_count() < 20


def test_a_missing_tree(sandbox: Sandbox, tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        sandbox.download_tree(f"{tmp_path}/none", tmp_path / "back")
    with pytest.raises(FileNotFoundError):
        sandbox.upload_tree(tmp_path / "none", f"{tmp_path}/x")


def member(name: str, type: bytes = tarfile.REGTYPE, link: str = "", data: bytes = b"evil") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, link
    info.size = len(data) if type == tarfile.REGTYPE else 0
    body = data + bytes(-len(data) % 512) if type == tarfile.REGTYPE else b""
    return info.tobuf(tarfile.PAX_FORMAT) + body


@pytest.mark.parametrize(
    "members",
    [
        [member("../out")],
        [member("/tmp/out-of-the-tree")],
        [member("a/../../out")],
        [member("link", tarfile.SYMTYPE, ".."), member("link/out")],
        [member("link", tarfile.SYMTYPE, "/"), member("link/out")],
        [member("out", tarfile.LNKTYPE, "../secret")],
        [member("d", tarfile.DIRTYPE), member("d/l", tarfile.SYMTYPE, "../.."), member("d/l/out")],
        [
            member("d/a", tarfile.SYMTYPE, "x/../.."),
            member("d/x", tarfile.SYMTYPE, ".."),
            member("d/a/out"),
        ],
        [member("fifo", tarfile.FIFOTYPE), member("dev", tarfile.CHRTYPE)],
        [member("existing/out")],
    ],
)
def test_nothing_that_is_sent_gets_out_of_the_tree(tmp_path: Path, members: list[bytes]) -> None:
    top = tmp_path / "outer/top"
    top.mkdir(parents=True)
    (tmp_path / "outer/secret").write_text("secret")
    (tmp_path / "elsewhere").mkdir()
    (top / "existing").symlink_to(tmp_path / "elsewhere")
    unpacking = Unpacking(top)
    unpacking.write(b"".join(members) + bytes(1024))
    done = unpacking.finish()
    assert done.skipped
    assert sorted(os.listdir(tmp_path / "outer")) == ["secret", "top"]
    assert os.listdir(tmp_path / "elsewhere") == []
    assert not Path("/tmp/out-of-the-tree").exists()
    for path in top.rglob("*"):
        if path.is_symlink() and path.name != "existing":
            assert os.path.realpath(path).startswith(str(top))


def test_a_link_that_is_there_is_not_written_through(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (tmp_path / "secret").write_text("secret")
    (top / "f").symlink_to(tmp_path / "secret")
    unpacking = Unpacking(top)
    unpacking.write(member("f") + bytes(1024))
    assert unpacking.finish().skipped == []
    assert (tmp_path / "secret").read_text() == "secret"
    assert (top / "f").read_text() == "evil"


def test_what_is_no_archive(tmp_path: Path) -> None:
    unpacking = Unpacking(tmp_path)
    unpacking.write(b"hello" * 1000)
    with pytest.raises(SandboxError, match="no archive"):
        unpacking.finish()


def test_a_local_disk_error_is_reported(sandbox: Sandbox, small_disk: Path, tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree/f").write_bytes(bytes(3 * MIB))
    with pytest.raises(OSError, match="No space"):
        sandbox.download_tree(str(tmp_path / "tree"), small_disk / "back")
    with pytest.raises(OSError, match="No space"):
        sandbox.download(str(tmp_path / "tree/f"), small_disk / "f")


def test_a_forbidden_file(start_daemon: Callable[..., Daemon], connect: Connect, tmp_path: Path) -> None:
    daemon = start_daemon(SANDBOX_ROOT=str(tmp_path))
    with pytest.raises(Forbidden):
        connect(daemon.url).write("/etc/x", "x")


MEMORY = """
import resource, sys
from sandboxd.client import Sandbox
url, secret, where = sys.argv[1:]
size = 256 * 2**20
def zeros():
    piece = bytes(2**18)
    for _ in range(size // len(piece)):
        yield piece
with Sandbox(url, secret) as sandbox:
    sandbox.run("true")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sandbox.upload(zeros(), where + "/up")
    sandbox.upload(where + "/up", where + "/up2")
    sandbox.download(where + "/up2", where + "/down")
    sandbox.download_tree(where, where + "/tree", exclude=["up", "up2", "tree"])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_a_file(daemon: Daemon, there: Path) -> None:
    try:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, daemon.url, daemon.secret, there],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    finally:
        for path in there.rglob("*"):
            if path.is_file():
                path.unlink()
    assert int(done.stdout) < 16 * 1024, "KiB"
