"""``/files/stat``, ``/files/list`` and ``/files/glob``: what is there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.files import walk as walk_module
from sandboxd.files.walk import walk
from tests.client import Api
from tests.file_routes import done, get, paths, post, told
from tests.waiting import within


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


async def test_bad_queries(api: Api, tmp_path: Path) -> None:
    for query in ("&depth=0", "&type=x", "&limit=0", "&limit=10001", "&glob=..", "&hidden=x"):
        assert (await get(api, "list", tmp_path, query)).status == 400
    assert (await post(api, "glob", path=tmp_path, pattern="")).status == 400
    (tmp_path / "f").touch()
    assert (await get(api, "list", tmp_path / "f")).status == 409
