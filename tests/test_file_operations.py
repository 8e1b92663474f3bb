"""``/files/...``: what people do with files."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import gatherResults

from sandboxd.files import walk as walk_module
from sandboxd.files.edit import Edit, NoMatch, _apply, _replaced
from sandboxd.files.permissions import parse_mode
from sandboxd.files.root import Root
from sandboxd.files.walk import walk
from tests.client import Api, Response
from tests.daemon import Daemon
from tests.waiting import until, within

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")


async def post(api: Api, route: str, **fields: Any) -> Response:
    body = {name.rstrip("_"): str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    return await within(20, api.post(f"/files/{route}", body))


async def done(api: Api, route: str, **fields: Any) -> Any:
    response = await post(api, route, **fields)
    assert response.status in (200, 201), response
    assert response.body.isascii()
    return response.json()


async def get(api: Api, route: str, path: Path, query: str = "") -> Response:
    return await within(20, api.get(f"/files/{route}?path={quote(os.fsencode(path))}{query}"))


async def told(api: Api, route: str, path: Path, query: str = "") -> Any:
    response = await get(api, route, path, query)
    assert response.status == 200, response
    return response.json()


def paths(page: Any) -> list[str]:
    return [entry["path"] for entry in page["entries"]]


def litter(top: Path) -> list[Path]:
    return list(top.rglob(".sandboxd-*"))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project."""
    top = tmp_path / "tree"
    for name in ("README.md", "src/a.py", "src/b.py", "src/lib/c.py", "src/lib/d.txt", ".git/config", "src/.hidden"):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}\n")
    (top / "link").symlink_to("src")
    return top


# stat


async def test_stat_tells_all_that_is_known(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("text")
    path.chmod(0o4640)
    os.utime(path, ns=(1_600_000_000_000_000_001, 1_700_000_000_123_456_789))
    found = await told(api, "stat", path)
    info = path.stat()
    assert found == {
        "path": str(path),
        "name": "f",
        "type": "file",
        "size": 4,
        "mode": "4640",
        "uid": info.st_uid,
        "gid": info.st_gid,
        "owner": path.owner(),
        "group": path.group(),
        "mtime": "2023-11-14T22:13:20.123456789Z",
        "atime": "2020-09-13T12:26:40.000000001Z",
        "ctime": found["ctime"],
        "inode": info.st_ino,
        "links": 1,
        "etag": found["etag"],
    }
    raw = await within(5, api.get(f"/files?path={path}"))
    assert raw.headers.getRawHeaders("ETag") == [found["etag"]]


async def test_stat_of_links_and_others(api: Api, tree: Path) -> None:
    link = await told(api, "stat", tree / "link")
    assert (link["type"], link["target"]) == ("link", "src")
    assert (await told(api, "stat", tree / "link", "&follow=true"))["type"] == "dir"
    os.mkfifo(tree / "fifo")
    assert (await told(api, "stat", tree / "fifo"))["type"] == "fifo"
    (tree / "dangling").symlink_to("nowhere")
    assert (await told(api, "stat", tree / "dangling"))["type"] == "link"
    for path, query in ((tree / "missing", ""), (tree / "dangling", "&follow=1")):
        response = await get(api, "stat", path, query)
        assert response.status == 404
        assert response.json() == {"error": f"stat {path}: no such file or directory"}


# list and glob


async def test_list_of_a_directory(api: Api, tree: Path) -> None:
    page = await told(api, "list", tree)
    assert paths(page) == [".git", "README.md", "link", "src"]
    assert page["next"] is None
    assert [entry["type"] for entry in page["entries"]] == ["dir", "file", "link", "dir"]
    assert page["entries"][1]["etag"] == (await told(api, "stat", tree / "README.md"))["etag"]
    assert page["entries"][2]["target"] == "src"


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("&depth=2&hidden=false", ["README.md", "link", "src", "src/a.py", "src/b.py", "src/lib"]),
        ("&depth=9&glob=*.py", ["src/a.py", "src/b.py", "src/lib/c.py"]),
        ("&depth=9&glob=src/*.py", ["src/a.py", "src/b.py"]),
        ("&depth=9&glob=src/**/[cd].*", ["src/lib/c.py", "src/lib/d.txt"]),
        ("&depth=9&type=dir", [".git", "src", "src/lib"]),
        ("&depth=9&type=link", ["link"]),
        ("&depth=9&exclude=src&exclude=.*", ["README.md", "link"]),
    ],
)
async def test_list_of_what_is_meant(api: Api, tree: Path, query: str, expected: list[str]) -> None:
    assert paths(await told(api, "list", tree, query)) == expected


@pytest.mark.parametrize("limit", [1, 2, 7, 1000])
async def test_pages_have_each_entry_once_though_others_come_and_go(api: Api, tmp_path: Path, limit: int) -> None:
    for n in range(9):
        (tmp_path / f"d{n}/e").mkdir(parents=True)
        (tmp_path / f"d{n}/e/f").touch()
    expected = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    seen: list[str] = []
    after = ""
    number = 0
    while True:
        page = await told(api, "list", tmp_path, f"&depth=9&limit={limit}&after={quote(after)}")
        assert len(page["entries"]) <= limit
        seen += paths(page)
        if page["next"] is None:
            break
        after = page["next"]
        number += 1
        (tmp_path / f"a{number}").touch()  # before all that is yet to come
        if number == 2:
            (tmp_path / f"a{number}").unlink()
    assert [path for path in seen if path in expected] == expected
    assert len(seen) == len(set(seen))


async def test_glob(api: Api, tree: Path) -> None:
    async def found(pattern: str, **fields: Any) -> list[str]:
        return paths(await done(api, "glob", path=tree, pattern=pattern, **fields))

    assert await found("*.md") == ["README.md"]
    assert await found("**/*.py") == ["src/a.py", "src/b.py", "src/lib/c.py"]
    assert await found("{README,src/*}.{md,py}") == ["README.md", "src/a.py", "src/b.py"]
    assert await found("**/config") == []
    assert await found("**/config", hidden=True) == [".git/config"]
    assert await found(".git/*") == [".git/config"]
    assert await found("**", type="dir") == ["src", "src/lib"]
    assert await found("src/**", exclude=["lib"]) == ["src", "src/a.py", "src/b.py"]
    page = await done(api, "glob", path=tree, pattern="**/*.py", limit=2)
    assert page["next"] == "src/b.py"
    assert await found("**/*.py", limit=2, after=page["next"]) == ["src/lib/c.py"]


async def test_a_directory_that_may_not_be_read_is_told(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        (tmp_path / "d").mkdir(mode=0)
    failures: list[str] = []

    def failed(path: str, error: OSError) -> None:
        failures.append(path)

    (tmp_path / "a").mkdir()
    for entry in walk(os.open(tmp_path, os.O_RDONLY), failed=failed):
        if entry.name == "a":
            (tmp_path / "a").rmdir()  # what is gone is no failure
    assert failures == ([] if os.geteuid() == 0 else ["d"])


@settings(deadline=None, max_examples=25)
@given(st.sets(st.text("ab/", min_size=1, max_size=7).filter(lambda t: all(t.split("/"))), max_size=12), st.integers())
def test_a_walk_goes_on_behind_any_path(tmp_path_factory: pytest.TempPathFactory, names: set[str], seed: int) -> None:
    top = tmp_path_factory.mktemp("walk")
    for name in sorted(names):
        (top / name).mkdir(parents=True, exist_ok=True)
    everything = [entry.path for entry in walk(os.open(top, os.O_RDONLY))]
    assert everything == sorted(everything, key=lambda path: path.split("/"))
    assert len(everything) == len(list(top.rglob("*")))
    for after in [*everything[:: 1 + seed % 3], "ab/b", "b"]:
        rest = [entry.path for entry in walk(os.open(top, os.O_RDONLY), after) if not entry.passed]
        assert rest == [path for path in everything if path.split("/") > after.split("/")]


async def test_trees_of_any_depth(api: Api, tmp_path: Path) -> None:
    deep = tmp_path / "top"
    deep.mkdir()
    fd = os.open(deep, os.O_RDONLY)
    for _ in range(300):
        os.mkdir("d", dir_fd=fd)
        inner = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
    os.close(fd)
    page = await told(api, "list", deep, "&depth=1000&type=file")
    assert paths(page) == ["d/" * 300 + "f"]
    assert (await done(api, "copy", from_=deep, to=tmp_path / "copy"))["entries"] == 302
    assert paths(await told(api, "list", tmp_path / "copy", "&depth=1000&type=file")) == ["d/" * 300 + "f"]


# move and copy


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


# chmod, append, touch, link


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


# edit


async def test_edit(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("one\ntwo\nthree\ntwo\n")
    path.chmod(0o640)
    before = (await told(api, "stat", path))["etag"]
    edits = [{"old": "one\ntwo", "new": "ONE"}, {"old": "t", "new": "T\nT", "replace_all": True}]
    reply = await done(api, "edit", path=path, edits=edits, if_match=before)
    assert path.read_text() == "ONE\nT\nThree\nT\nTwo\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert reply["edits"] == [{"replaced": 1, "lines": [1]}, {"replaced": 2, "lines": [2, 4]}]
    assert reply["etag"] == (await told(api, "stat", path))["etag"] != before
    stale = await post(api, "edit", path=path, edits=[{"old": "ONE", "new": "x"}], if_match=before)
    assert stale.status == 412
    assert stale.json()["etag"] == reply["etag"]


async def test_an_edit_that_does_not_fit_changes_nothing(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("a = 1\nb = 1\n\nc = aaa\n")
    info = path.stat()
    missing = await post(api, "edit", path=path, edits=[{"old": "a", "new": "b"}, {"old": "zzz", "new": ""}])
    assert (missing.status, missing.json()["edit"], missing.json()["count"]) == (409, 0, 4)
    missing = await post(api, "edit", path=path, edits=[{"old": "a = 1", "new": "b"}, {"old": "zzz", "new": ""}])
    assert missing.status == 409
    assert {**missing.json(), "error": ""} == {"error": "", "edit": 1, "count": 0, "lines": []}
    ambiguous = await post(api, "edit", path=path, edits=[{"old": " = 1", "new": ""}])
    assert {**ambiguous.json(), "error": ""} == {"error": "", "edit": 0, "count": 2, "lines": [1, 2]}
    overlapping = await post(api, "edit", path=path, edits=[{"old": "aa", "new": ""}])
    assert {**overlapping.json(), "error": ""} == {"error": "", "edit": 0, "count": 2, "lines": [4]}
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (info.st_ino, info.st_mtime_ns)
    for edits in ([], [{"old": "", "new": "x"}], [{"old": "x"}], None):
        assert (await post(api, "edit", path=path, edits=edits)).status == 400
    assert (await post(api, "edit", path=tmp_path / "missing", edits=[{"old": "a", "new": "b"}])).status == 404
    assert (await post(api, "edit", path=tmp_path, edits=[{"old": "a", "new": "b"}])).status == 409


async def test_edits_at_the_same_time_lose_none(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("".join(f"<{n}>\n" for n in range(12)))

    async def one(n: int) -> None:
        while (await post(api, "edit", path=path, edits=[{"old": f"<{n}>", "new": f"[{n}]"}])).status == 409:
            pass  # another was faster

    await gatherResults([within(20, one(n)) for n in range(12)])
    assert path.read_text() == "".join(f"[{n}]\n" for n in range(12))
    assert litter(tmp_path) == []


@settings(deadline=None)
@given(
    st.text("ab", max_size=40).map(str.encode),
    st.text("ab", min_size=1, max_size=5).map(str.encode),
    st.text("abc", max_size=3).map(str.encode),
    st.integers(1, 9),
)
def test_replacing_in_pieces_is_replacing(data: bytes, old: bytes, new: bytes, size: int) -> None:
    assert b"".join(_replaced(data, old, new, size)) == data.replace(old, new)


@given(st.text("ab\n", max_size=12), st.text("ab\n", min_size=1, max_size=2), st.text("abc\n", max_size=3))
def test_edit_against_the_plain_rule(text: str, old: str, new: str) -> None:
    places = [n for n in range(len(text)) if text.startswith(old, n)]
    if len(places) == 1:
        data, count, where = _apply(text.encode(), 0, Edit(old, new))
        assert (data.decode(), count) == (text.replace(old, new), 1)
        assert where == [text[: places[0]].count("\n") + 1]
    else:
        with pytest.raises(NoMatch) as raised:
            _apply(text.encode(), 0, Edit(old, new))
        assert (raised.value.count == 0) == (not places)
    if places:
        data, count, where = _apply(text.encode(), 0, Edit(old, new, True))
        assert (data.decode(), count) == (text.replace(old, new), text.count(old))
        assert where[0] == text[: places[0]].count("\n") + 1


# grep


def lines(found: Any) -> list[tuple[str, int, str]]:
    return [(match["path"], match["line"], match["text"]) for match in found["matches"]]


async def test_grep(api: Api, tree: Path) -> None:
    (tree / "src/a.py").write_text("import os\n\ndef f(x):\n    return x.y\r\n\ndef g(): pass")
    (tree / "binary").write_bytes(b"def \0 f")
    (tree / "large").write_text("def x\n" * 100)
    found = await done(api, "grep", path=tree, pattern=r"def\s+\w+", max_file_size=500)
    assert lines(found) == [("src/a.py", 3, "def f(x):"), ("src/a.py", 6, "def g(): pass")]
    assert (found["files"], found["binary"], found["too_large"], found["truncated"], found["timed_out"]) == (
        6,
        1,
        1,
        False,
        False,
    )
    found = await done(api, "grep", path=tree, pattern="X.Y", literal=True, ignore_case=True, context=1)
    assert found["matches"] == [
        {
            "path": "src/a.py",
            "line": 4,
            "column": 12,
            "text": "    return x.y",
            "before": ["def f(x):"],
            "after": [""],
        }
    ]
    assert lines(await done(api, "grep", path=tree, pattern="this", glob=["*.md", "src/lib/*.py"])) == [
        ("README.md", 1, "this is README.md"),
        ("src/lib/c.py", 1, "this is src/lib/c.py"),
    ]
    assert lines(await done(api, "grep", path=tree, pattern="this", exclude=["src"])) == [
        ("README.md", 1, "this is README.md")
    ]
    assert ".git/config" in {
        path for path, _, _ in lines(await done(api, "grep", path=tree, pattern="is", hidden=True))
    }
    assert lines(await done(api, "grep", path=tree / "README.md", pattern="^this.*md$")) == [
        ("README.md", 1, "this is README.md")
    ]
    cut = await done(api, "grep", path=tree, pattern="e", max_matches=2)
    assert (len(cut["matches"]), cut["truncated"]) == (2, True)


async def test_grep_of_lines_that_are_hard(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"\xff x\n" + b"y" * 5000 + b"NEEDLE" + b"z" * 5000 + b"\na\nb\n\n")
    (long,) = (await done(api, "grep", path=tmp_path, pattern="NEEDLE"))["matches"]
    assert (long["line"], long["column"], long["cut"], len(long["text"])) == (2, 5001, 4500, 1000)
    assert "NEEDLE" in long["text"]
    assert lines(await done(api, "grep", path=tmp_path, pattern="x$")) == [("f", 1, "\ufffd x")]
    assert lines(await done(api, "grep", path=tmp_path, pattern=r"a\sb")) == []  # a match is in one line
    assert lines(await done(api, "grep", path=tmp_path, pattern=r"a\s*")) == [("f", 3, "a")]
    assert [line for _, line, _ in lines(await done(api, "grep", path=tmp_path, pattern="^"))] == [1, 2, 3, 4, 5]


@pytest.mark.slow
async def test_a_pattern_that_never_ends_is_ended(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("found aab\n")
    (tmp_path / "f").write_text("a" * 60)
    children = Path(f"/proc/{daemon.pid}/task")

    def greps() -> int:
        found = 0
        for task in children.iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # a thread or a process that has just ended
                for pid in (task / "children").read_text().split():
                    found += b"sandboxd.files.grep" in Path(f"/proc/{pid}/cmdline").read_bytes()
        return found

    searching = [post(api, "grep", path=tmp_path, pattern="(a+)+b", timeout=2.5) for _ in range(3)]
    waiting = gatherResults([within(20, one) for one in searching])
    await until(greps)
    assert (await within(2, api.get("/health"))).status == 200
    for response in await waiting:
        assert response.status == 200, response
        found = response.json()
        assert (found["timed_out"], lines(found)) == (True, [("a", 1, "found aab")])
    await until(lambda: not greps())
    # A client that hangs up ends it, too.
    body = f'{{"path": "{tmp_path}", "pattern": "(a+)+b", "timeout": 60}}'
    head = f"POST /files/grep HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {daemon.secret}\r\n"
    with socket.create_connection(("127.0.0.1", daemon.port)) as sock:
        sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        await until(greps)
    await until(lambda: not greps())


async def test_bad_searches(api: Api, tmp_path: Path) -> None:
    for fields in (
        {"pattern": "("},
        {"pattern": "a{1"},
        {"pattern": "x", "glob": [".."]},
        {"pattern": "x", "exclude": "x"},
        {"pattern": "x", "timeout": 0},
        {"pattern": "x", "max_matches": 10**6},
        {},
    ):
        response = await post(api, "grep", path=tmp_path, **fields)
        assert response.status == (200 if fields == {"pattern": "a{1"} else 400), response
    assert (await post(api, "grep", path=tmp_path / "missing", pattern="x")).status == 404
    for query in ("&depth=0", "&type=x", "&limit=0", "&limit=10001", "&glob=..", "&hidden=x"):
        assert (await get(api, "list", tmp_path, query)).status == 400
    assert (await post(api, "glob", path=tmp_path, pattern="")).status == 400
    (tmp_path / "f").touch()
    assert (await get(api, "list", tmp_path / "f")).status == 409


# Names, and a root


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


class Rooted:
    """A daemon with a root, and a directory beside it with a file ``secret``."""

    def __init__(self, folder: Path) -> None:
        self.top, self.outside = folder / "top", folder / "outside"
        for path in (self.top, self.outside, folder / "daemon"):
            path.mkdir()
        (self.outside / "secret").write_text("secret")
        (self.top / "out").symlink_to(self.outside)
        (self.top / "up").symlink_to("..")
        (self.top / "f").write_text("text")
        self.daemon = Daemon(folder / "daemon", SANDBOX_ROOT=str(self.top))
        self.api = Api(self.daemon.url, self.daemon.secret)


@pytest.fixture(scope="module")
def rooted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooted]:
    rooted = Rooted(tmp_path_factory.mktemp("rooted"))
    yield rooted
    assert os.listdir(rooted.outside) == ["secret"]
    assert (rooted.outside / "secret").read_text() == "secret"
    assert (rooted.outside / "secret").stat().st_nlink == 1
    assert rooted.daemon.stop() == 0
    assert "Traceback" not in rooted.daemon.log.read_text()


@pytest.mark.parametrize("way", ["out", "up/outside", "../outside", "OUTSIDE"])
async def test_nothing_leads_out_of_a_root(rooted: Rooted, way: str) -> None:
    api = rooted.api
    out = Path(str(rooted.outside) if way == "OUTSIDE" else way)
    secret = out / "secret"
    for route, path in (("stat", secret), ("list", out)):
        assert (await get(api, route, path)).status == 403
    for url in (f"/archive?path={out}", f"/watch?path={out}", f"/watch?path={secret}"):
        assert (await within(5, api.get(url))).status == 403
    assert (await within(5, api.call("PUT", f"/archive?path={out}", b""))).status == 403
    for route, fields in (
        ("glob", {"path": out, "pattern": "**"}),
        ("grep", {"path": out, "pattern": "secret"}),
        ("grep", {"path": secret, "pattern": "secret"}),
        ("move", {"from_": secret, "to": "x"}),
        ("move", {"from_": "f", "to": out / "f"}),
        ("copy", {"from_": secret, "to": "x"}),
        ("copy", {"from_": "f", "to": out / "f"}),
        ("copy", {"from_": "f", "to": out / "a/f", "parents": True}),
        ("chmod", {"path": secret, "mode": "0777"}),
        ("append", {"path": secret, "content": "x"}),
        ("append", {"path": out / "new", "content": "x"}),
        ("touch", {"path": out / "new"}),
        ("link", {"path": out / "new", "target": "x"}),
        ("link", {"path": "new", "target": secret, "kind": "hard"}),
        ("edit", {"path": secret, "edits": [{"old": "secret", "new": "x"}]}),
    ):
        response = await post(api, route, **fields)
        assert response.status == 403, (route, response)
        assert "outside of the root" in response.json()["error"]


async def test_links_in_a_root_are_not_followed_by_searches(rooted: Rooted) -> None:
    assert paths(await told(rooted.api, "list", Path(), "&depth=9")) == ["f", "out", "up"]
    found = await done(rooted.api, "grep", path=".", pattern="e")
    assert lines(found) == [("f", 1, "text")]
    await done(rooted.api, "chmod", path=rooted.top, mode="go-w", recursive=True)
    await done(rooted.api, "copy", from_="out", to="out2")
    assert os.readlink(rooted.top / "out2") == str(rooted.outside)
    (rooted.top / "out2").unlink()


@pytest.mark.slow
async def test_links_that_are_swapped_in_a_race_never_lead_out(rooted: Rooted) -> None:
    over = threading.Event()
    d = rooted.top / "d"

    def swap() -> None:
        while not over.is_set():
            d.mkdir(exist_ok=True)
            (d / "secret").write_text("inside")
            d.rename(rooted.top / "away")
            d.symlink_to(rooted.outside)
            d.unlink()
            while (rooted.top / "away").exists():  # a copy may come into it meanwhile
                shutil.rmtree(rooted.top / "away", ignore_errors=True)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(60):
            for route, fields in (
                ("append", {"path": "d/secret", "content": "x"}),
                ("chmod", {"path": "d", "mode": "0777", "recursive": True}),
                ("copy", {"from_": "f", "to": "d/new"}),
                ("edit", {"path": "d/secret", "edits": [{"old": "s", "new": "x"}]}),
            ):
                await post(rooted.api, route, **fields)
    finally:
        over.set()
        thread.join()
        subprocess.run(["rm", "-rf", d, rooted.top / "away"], check=True)
    assert stat.S_IMODE((rooted.outside / "secret").stat().st_mode) == 0o644


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


def test_a_root_that_is_none_is_everything() -> None:
    assert not Root().confined


# Line ends, growth, and files that are none


@pytest.mark.parametrize(
    ("text", "old", "new", "expected"),
    [
        (b"a\r\nb\r\nc\r\n", "a\nb", "x\ny\nz", b"x\r\ny\r\nz\r\nc\r\n"),
        (b"a\r\nb\r\n", "a\r\nb", "x\r\ny", b"x\r\ny\r\n"),
        (b"a\r\nb\r\n", "b", "b\nc", b"a\r\nb\r\nc\r\n"),
        (b"a\r\nb\nc\n", "b\nc", "x\ny", b"a\r\nx\ny\n"),
        (b"a\nb\n", "a\nb", "x\ny", b"x\ny\n"),
    ],
)
async def test_an_edit_keeps_the_line_ends_of_the_file(
    api: Api, tmp_path: Path, text: bytes, old: str, new: str, expected: bytes
) -> None:
    path = tmp_path / "f"
    path.write_bytes(text)
    await done(api, "edit", path=path, edits=[{"old": old, "new": new}])
    assert path.read_bytes() == expected


@pytest.mark.slow
async def test_edits_that_double_a_file_end_at_its_limit(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"a" * 1024)
    daemon.reset_peak()
    before = daemon.memory()
    edits = [{"old": "a", "new": "aa", "replace_all": True}] * 27
    response = await post(api, "edit", path=path, edits=edits)
    assert response.status != 200
    assert "file too large" in response.json()["error"]
    assert daemon.peak_memory() - before < 300_000_000
    assert path.read_bytes() == b"a" * 1024


@pytest.mark.parametrize("kind", ["fifo", "/dev/zero"])
async def test_only_files_are_edited(api: Api, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    response = await post(api, "edit", path=path if kind == "fifo" else kind, edits=[{"old": "a", "new": "b"}])
    assert response.status == 409
    assert "not a regular file" in response.json()["error"]


async def test_a_file_without_a_size_is_copied_whole(api: Api, tmp_path: Path) -> None:
    copied = await done(api, "copy", from_="/proc/version", to=tmp_path / "version")
    assert (tmp_path / "version").read_text() == Path("/proc/version").read_text()
    assert copied["bytes"] == len(Path("/proc/version").read_text())


async def test_a_move_onto_another_link_to_the_same_file_leaves_one(api: Api, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("text")
    os.link(tmp_path / "a", tmp_path / "b")
    await done(api, "move", from_=tmp_path / "a", to=tmp_path / "b", overwrite=True)
    assert os.listdir(tmp_path) == ["b"]
    await done(api, "move", from_=tmp_path / "b", to=tmp_path / "b", overwrite=True)
    assert (tmp_path / "b").read_text() == "text"


async def test_the_end_of_a_line_is_before_its_carriage_return(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"one\r\ntwo\r\nthree")
    found = await done(api, "grep", path=tmp_path, pattern="(one|two|three)$")
    assert [match["text"] for match in found["matches"]] == ["one", "two", "three"]


async def test_context_around_matches_of_any_text(api: Api, tmp_path: Path) -> None:
    line = "\U0001f600" * 1000
    (tmp_path / "f").write_text(f"{line}\n" * 800 + "match\n" + f"{line}\n" * 800)
    found = await done(api, "grep", path=tmp_path, pattern="match", context=2)
    (match,) = found["matches"]
    assert match["before"] == match["after"] == [line, line]


async def test_context_at_both_ends_of_a_file(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("a\nb\n\nc")
    found = await done(api, "grep", path=tmp_path, pattern=".", context=2)
    around = [(match["text"], match["before"], match["after"]) for match in found["matches"]]
    assert around == [("a", [], ["b", ""]), ("b", ["a"], ["", "c"]), ("c", ["b", ""], [])]


@pytest.mark.slow
async def test_a_tree_of_1500_levels(api: Api, tmp_path: Path) -> None:
    deep, depth = tmp_path / "deep", 1500
    deep.mkdir()
    fd = os.open(deep, os.O_DIRECTORY)
    for _ in range(depth):
        os.mkdir("d", dir_fd=fd)
        os.close(os.open("f", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        inner = os.open("d", os.O_DIRECTORY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.close(fd)
    listed = await done(api, "copy", from_=deep, to=tmp_path / "copy")
    assert listed["entries"] == 2 * depth + 1
    opened = 0

    def count(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        nonlocal opened
        opened += 1
        return os_open(path, flags, mode, dir_fd=dir_fd)

    os_open, walk_module.os.open = os.open, count
    try:
        assert sum(1 for _ in walk(os_open(deep, os.O_RDONLY | os.O_DIRECTORY))) == 2 * depth
    finally:
        walk_module.os.open = os_open
    assert opened < 40 * depth  # not proportional to its square
    for name in ("deep", "copy"):
        assert await within(20, api.post("/delete_dir", {"path": str(tmp_path / name)}))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("route", "fields"),
    [
        ("glob", {"pattern": "{" * 2000 + "," * 2000}),
        ("glob", {"pattern": ",".join(f"[\u0100-\uffff]{number}" for number in range(100))}),
        ("grep", {"pattern": "|".join(f"[\x00-\uffff]{number}" for number in range(300)), "ignore_case": True}),
    ],
)
async def test_patterns_that_take_long_keep_nobody_waiting(
    start_daemon: Callable[..., Daemon], tmp_path: Path, route: str, fields: dict[str, Any]
) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    (tmp_path / "tree").mkdir()
    before = (await api.get("/status")).json()["longest_stall"]
    await post(api, route, path=tmp_path / "tree", **fields)
    assert (await api.get("/status")).json()["longest_stall"] < max(0.25, 2 * before)


@pytest.mark.parametrize(
    ("text", "after"),
    [("match", []), ("match\n", []), ("match\n\n", [""]), ("match\n\nx\n", ["", "x"]), ("match\nx", ["x"])],
    ids=repr,
)
async def test_behind_the_last_line_end_there_is_no_line(api: Api, tmp_path: Path, text: str, after: list[str]) -> None:
    (tmp_path / "f").write_text(text)
    found = await done(api, "grep", path=tmp_path, pattern="match", context=3)
    assert found["matches"][0]["after"] == after
