"""``/files/edit``: text is replaced, in one step."""

from __future__ import annotations

import os
import stat
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.defer import gatherResults

from sandboxd.files import edit as edit_module
from sandboxd.files import operations, renames
from sandboxd.files.archive.unpack import Unpacking
from sandboxd.files.copying import copy, move
from sandboxd.files.edit import Edit, NoMatch, _apply, _replaced, edit
from sandboxd.files.errors import FileError
from sandboxd.files.root import Root
from sandboxd.files.upload import Patch
from tests.archives import member, tar
from tests.client import Api
from tests.daemon import Daemon
from tests.file_routes import done, litter, post, told
from tests.waiting import wait_for, within


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


@pytest.mark.parametrize("name", ["f", "link"])
def test_an_append_waits_until_an_edit_has_replaced_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "f").write_text("old")
    (tmp_path / "link").symlink_to("f")
    during_an_edit(tmp_path, lambda: operations.append(Root(), str(tmp_path / name), b" and more"))
    assert (tmp_path / "f").read_text() == "edited and more"


@pytest.mark.parametrize("way", ["move", "copy", "hard", "symbolic", "unpack", "unpack a link"])
def test_what_replaces_a_file_waits_until_an_edit_has_done_so(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    target, other = folder / "f", tmp_path / "other"
    target.write_text("old")
    other.write_text("mine")

    def unpack(*members: tuple[tarfile.TarInfo, bytes]) -> None:
        unpacking = Unpacking(Root(), str(folder))
        unpacking.open()
        try:
            unpacking.feed(tar(*members))
            unpacking.finish()
        finally:
            unpacking.close()

    def put() -> None:
        if way == "unpack":
            unpack(member("f", b"mine"))
        elif way == "unpack a link":
            unpack(member("f", type=tarfile.SYMTYPE, linkname="../other"))
        elif way in ("hard", "symbolic"):
            renames.link(Root(), str(target), str(other), hard=way == "hard", overwrite=True)
        else:
            (copy if way == "copy" else move)(Root(), str(other), str(target), overwrite=True)

    during_an_edit(folder, put)
    assert target.read_text() == "mine"
    assert os.listdir(folder) == ["f"]


def during_an_edit(directory: Path, work: Callable[[], object]) -> None:
    """Call ``work`` in a thread while an edit is about to replace the file ``f``; return once both have ended."""
    (directory / "edited").write_text("edited")
    fd = os.open(directory, os.O_RDONLY)
    thread = threading.Thread(target=work)
    try:
        with renames.name_lock(fd, b"f"):
            thread.start()
            wait_for(lambda: [users for _, users in renames._swapping.values()] == [2] or not thread.is_alive())
            os.replace(directory / "edited", directory / "f")
        thread.join(10)
        assert not thread.is_alive()
    finally:
        os.close(fd)


def _patch(path: Path) -> Patch:
    return Patch(Root(), str(path), lambda old: None, offset=0, durable=False)


@pytest.mark.parametrize("change", ["edit", "remove", "remove its directory"])
def test_a_part_that_is_in_no_file_any_more_is_not_acknowledged(tmp_path: Path, change: str) -> None:
    path = tmp_path / "d" / "f"
    path.parent.mkdir()
    path.write_text("one")
    patch = _patch(path)
    patch.open(3)
    try:
        if change == "edit":
            edit(Root(), str(path), [Edit("one", "two")], lambda info: None)
        else:
            path.unlink()
        if change == "remove its directory":
            path.parent.rmdir()
        patch.write(b"ONE")
        with pytest.raises(FileError, match="send it again") as raised:
            patch.commit()
        assert raised.value.status == 409
    finally:
        patch.close()


@pytest.mark.parametrize("coarse", [False, True], ids=["the stat differs", "within one tick of a coarse clock"])
def test_an_edit_notices_a_part_that_was_written_after_it_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, coarse: bool
) -> None:
    if coarse:
        monkeypatch.setattr(edit_module, "entity_tag", lambda info: info.st_size)
    path = tmp_path / "f"
    path.write_text("one two")
    calls = 0

    def check(info: os.stat_result | None) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:  # the file was read
            patch = _patch(path)
            patch.open(3)
            patch.write(b"ONE")
            patch.commit()

    with pytest.raises(FileError, match="changed by another writer"):
        edit(Root(), str(path), [Edit("two", "TWO")], check)
    assert path.read_text() == "ONE two"
    assert litter(tmp_path) == []


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
