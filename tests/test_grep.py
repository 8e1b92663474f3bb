"""``/files/grep``: lines that match a pattern."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import gatherResults

from tests.client import Api
from tests.daemon import Daemon
from tests.file_routes import done, lines, post
from tests.waiting import until, within


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


async def test_the_end_of_a_line_is_before_its_carriage_return(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"one\r\ntwo\r\nthree")
    found = await done(api, "grep", path=tmp_path, pattern="(one|two|three)$")
    assert [match["text"] for match in found["matches"]] == ["one", "two", "three"]


@pytest.mark.parametrize(
    ("text", "after"),
    [("match", []), ("match\n", []), ("match\n\n", [""]), ("match\n\nx\n", ["", "x"]), ("match\nx", ["x"])],
    ids=repr,
)
async def test_behind_the_last_line_end_there_is_no_line(api: Api, tmp_path: Path, text: str, after: list[str]) -> None:
    (tmp_path / "f").write_text(text)
    found = await done(api, "grep", path=tmp_path, pattern="match", context=3)
    assert found["matches"][0]["after"] == after


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


async def test_special_files_are_neither_opened_nor_an_error(api: Api, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "file").write_text("text")
    writer = threading.Thread(target=(tmp_path / "fifo").write_text, args=("for another reader",))
    writer.start()  # it waits until somebody opens the FIFO to read
    try:
        assert lines(await done(api, "grep", path=tmp_path, pattern="text")) == [("file", 1, "text")]
    finally:
        reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
        writer.join(10)
        received = os.read(reader, 100)
        os.close(reader)
    assert received == b"for another reader"


async def test_files_that_cannot_be_read_do_not_end_a_search(api: Api) -> None:
    found = await done(api, "grep", path="/proc/self", pattern="^Name:", glob=["status", "mem"], exclude=["task"])
    assert [match["path"] for match in found["matches"]] == ["status"]
    assert found["unreadable"] >= 1
