"""The file routes: what they do to the file system, and what they say of it."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandboxd.files import operations, renames
from sandboxd.files.root import Root
from sandboxd.files.temporary_names import temporary_for
from tests.client import Api
from tests.daemon import Daemon
from tests.waiting import within

MIB = 1024 * 1024
READ_LIMIT = 64 * MIB

#: Characters at which some client's line splitting or chunking breaks, unless they are escaped.
AWKWARD = 'nel\x85 ls\u2028 ps\u2029 vt\x0b ff\x0c cr\r\n nul\0 quote" slash\\ umlaut\u00fc euro\u20ac emoji\U0001f600'

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")


async def done(api: Api, route: str, path: Path | str, **fields: object) -> Any:
    """The JSON of a call that the route accepted: its status is 200, whatever the file system said."""
    response = await within(5, api.post(route, {"path": str(path), **fields}))
    assert response.status == 200, response
    assert response.body.isascii()
    return response.json()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


# write_file and read_file


TEXTS = {"empty": "", "line": "one line\n", "awkward": AWKWARD, "mark": "\ufeffmark", "long": "x\u20ac" * MIB}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
async def test_what_is_written_is_read_back(api: Api, tmp_path: Path, text: str) -> None:
    assert await done(api, "/write_file", tmp_path / "f", content=text) == {"success": True}
    assert (tmp_path / "f").read_bytes() == text.encode()
    assert await done(api, "/read_file", tmp_path / "f") == {"content": text}


async def test_what_is_not_utf8_is_read_as_the_replacement_character(api: Api, tmp_path: Path) -> None:
    data = b"a\xffb\xe2\x82" + b"\xf0\x9f\x98\x80" * MIB + b"\xc3"
    (tmp_path / "f").write_bytes(data)
    assert await done(api, "/read_file", tmp_path / "f") == {"content": data.decode("utf-8", "replace")}


async def test_base64_text_is_stored_as_that_text(api: Api, tmp_path: Path) -> None:
    await done(api, "/write_file", tmp_path / "f", content="aGVsbG8=", encoding="base64")
    assert (tmp_path / "f").read_text() == "aGVsbG8="


async def test_a_file_of_the_kernel_that_tells_no_size_is_read(api: Api) -> None:
    assert (await done(api, "/read_file", "/proc/self/stat"))["content"].count(" ") > 40


async def test_relative_paths_start_at_the_working_directory_of_the_daemon(api: Api, daemon: Daemon) -> None:
    await done(api, "/write_file", "relative.txt", content="here")
    assert (daemon.log.parent / "relative.txt").read_text() == "here"
    assert await done(api, "/read_file", "./relative.txt") == {"content": "here"}


async def test_a_new_file_has_mode_0644(api: Api, tmp_path: Path) -> None:
    await done(api, "/write_file", tmp_path / "f", content="")
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o644


@pytest.mark.parametrize("mode", [0o600, 0o755, 0o4711], ids=oct)
async def test_an_overwritten_file_keeps_its_mode(api: Api, tmp_path: Path, mode: int) -> None:
    (tmp_path / "f").write_text("old")
    (tmp_path / "f").chmod(mode)
    await done(api, "/write_file", tmp_path / "f", content="new")
    assert (tmp_path / "f").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == mode


@needs_root
async def test_an_overwritten_file_keeps_its_owner(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    os.chown(tmp_path / "f", 1234, 5678)
    await done(api, "/write_file", tmp_path / "f", content="new")
    info = (tmp_path / "f").stat()
    assert (info.st_uid, info.st_gid) == (1234, 5678)


@pytest.mark.parametrize("there", [True, False], ids=["target", "dangling"])
async def test_writing_to_a_link_writes_its_target(api: Api, tmp_path: Path, there: bool) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    if there:
        target.write_text("old")
    link.symlink_to("target")
    await done(api, "/write_file", link, content="new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert not target.is_symlink()


@pytest.mark.parametrize("name", ["n" * 255, "\u20ac" * 85, "\U0001f600" * 63], ids=["1-byte", "3-byte", "4-byte"])
async def test_the_longest_names_can_be_written(api: Api, tmp_path: Path, name: str) -> None:
    assert await done(api, "/write_file", tmp_path / name, content="text") == {"success": True}
    assert os.listdir(tmp_path) == [name]


@pytest.mark.slow
async def test_a_reader_sees_whole_versions_only(api: Api, tmp_path: Path) -> None:
    path, size, stop = tmp_path / "f", 2 * MIB, threading.Event()
    seen: set[bytes] = set()
    path.write_bytes(b"a" * size)

    def read() -> None:
        while not stop.is_set():
            data = path.read_bytes()
            seen.add(data[:1] if data == data[:1] * size else b"a torn file")

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(200):
            await done(api, "/write_file", path, content="abcdefgh"[turn % 8] * size)
    finally:
        stop.set()
        reader.join(5)
    assert len(seen) > 1
    assert seen <= {bytes([letter]) for letter in b"abcdefgh"}
    assert os.listdir(tmp_path) == ["f"]


async def test_writers_at_the_same_time_leave_one_whole_version(api: Api, tmp_path: Path) -> None:
    calls = [within(5, api.post("/write_file", {"path": str(tmp_path / "f"), "content": c * MIB})) for c in "abcdefgh"]
    for call in calls:
        assert (await call).json() == {"success": True}
    data = (tmp_path / "f").read_bytes()
    assert data == data[:1] * MIB
    assert os.listdir(tmp_path) == ["f"]


@needs_root
@pytest.mark.parametrize("old", ["old version", None], ids=["overwrite", "create"])
async def test_a_full_disk_leaves_the_old_file_and_no_litter(api: Api, small_disk: Path, old: str | None) -> None:
    path = small_disk / "f"
    if old is not None:
        path.write_text(old)
    reply = await done(api, "/write_file", path, content="x" * 3 * MIB)
    assert reply["success"] is False
    assert reply["error"] in (f"open {path}: no space left on device", f"write {path}: no space left on device")
    assert os.listdir(small_disk) == ([] if old is None else ["f"])
    if old is not None:
        assert path.read_text() == old


# Lines of a file


@pytest.mark.parametrize(
    ("fields", "content", "offset", "lines"),
    [
        ({"offset": 2}, "two\r\nthree \u20ac", 2, 2),
        ({"limit": 2}, "one\ntwo\r\n", 1, 2),
        ({"offset": 2, "limit": 1}, "two\r\n", 2, 1),
        ({"offset": 3, "limit": 10}, "three \u20ac", 3, 1),
        ({"offset": 4}, "", 4, 0),
        ({"offset": 1 << 62, "limit": 1 << 62}, "", 1 << 62, 0),
        ({"offset": 1, "limit": 0}, "", 1, 0),
    ],
    ids=str,
)
async def test_lines_of_a_file_are_read(
    api: Api, tmp_path: Path, fields: dict[str, int], content: str, offset: int, lines: int
) -> None:
    (tmp_path / "f").write_text("one\ntwo\r\nthree \u20ac", newline="")
    reply = await done(api, "/read_file", tmp_path / "f", **fields)
    assert reply == {"content": content, "offset": offset, "lines": lines, "total_lines": 3}


async def test_an_empty_file_has_no_lines(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    reply = await done(api, "/read_file", tmp_path / "f", offset=1)
    assert reply == {"content": "", "offset": 1, "lines": 0, "total_lines": 0}


@pytest.mark.parametrize(("offset", "limit"), [(1, 3), (70_000, 1), (69_999, 20_000), (1, None), (199_999, 5)])
async def test_lines_are_found_wherever_the_pieces_of_a_file_end(
    api: Api, tmp_path: Path, offset: int, limit: int | None
) -> None:
    lines = [f"{number} {'x' * (number % 17)}\n" for number in range(1, 200_001)]
    (tmp_path / "f").write_text("".join(lines))
    reply = await done(api, "/read_file", tmp_path / "f", offset=offset, **({} if limit is None else {"limit": limit}))
    wanted = lines[offset - 1 :][:limit]
    assert reply["content"] == "".join(wanted)
    assert (reply["offset"], reply["lines"], reply["total_lines"]) == (offset, len(wanted), 200_000)


@pytest.mark.slow
async def test_lines_of_a_file_of_any_size_are_read(api: Api, tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.write(b"first\n")
        file.truncate(READ_LIMIT * 2)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast")
    reply = await done(api, "/read_file", tmp_path / "f", offset=3)
    assert reply == {"content": "last", "offset": 3, "lines": 1, "total_lines": 3}
    assert "lines too large" in (await done(api, "/read_file", tmp_path / "f", offset=2, limit=1))["error"]


@pytest.mark.parametrize("field", ["offset", "limit"])
@pytest.mark.parametrize("value", [-1, "1", 1.5, 1 << 63])
async def test_a_malformed_range_of_lines_is_refused(api: Api, tmp_path: Path, field: str, value: object) -> None:
    response = await api.post("/read_file", {"path": str(tmp_path), field: value})
    assert response.status == 400
    assert response.json()["error"].startswith(field)


async def test_lines_of_a_directory_are_an_error(api: Api, tmp_path: Path) -> None:
    reply = await done(api, "/read_file", tmp_path, offset=1)
    assert reply == {"error": f"read {tmp_path}: is a directory"}


# What cannot be read or written


async def test_reading_a_fifo_is_an_error_at_once(api: Api, fifo: Path) -> None:
    assert await done(api, "/read_file", fifo) == {"error": f"read {fifo}: not a regular file"}


async def test_writing_to_a_fifo_is_an_error_at_once(api: Api, fifo: Path) -> None:
    reply = await done(api, "/write_file", fifo, content="text")
    assert reply == {"success": False, "error": f"open {fifo}: not a regular file"}
    assert stat.S_ISFIFO(fifo.stat().st_mode)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/random"])
async def test_a_device_is_not_read_but_written_to_in_place(api: Api, device: str) -> None:
    assert await done(api, "/read_file", device) == {"error": f"read {device}: not a regular file"}
    assert await done(api, "/write_file", device, content="text") == {"success": True}
    assert stat.S_ISCHR(os.stat(device).st_mode)


async def test_a_device_that_takes_nothing_says_so(api: Api) -> None:
    reply = await done(api, "/write_file", "/dev/full", content="text")
    assert reply == {"success": False, "error": "write /dev/full: no space left on device"}
    assert stat.S_ISCHR(os.stat("/dev/full").st_mode)


@pytest.mark.parametrize("path", ["/proc/sys/kernel/ostype", "/proc/sys/kernel/random/uuid", "/sys/kernel/mm/ksm/run"])
async def test_files_of_the_kernel_are_read(api: Api, path: str) -> None:
    if not os.path.exists(path):
        pytest.skip(f"NOT TESTED: this kernel has no {path}")
    assert (await done(api, "/read_file", path))["content"].endswith("\n")


async def test_a_file_of_the_kernel_is_written_in_place(api: Api, start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    path = f"/proc/{daemon.pid}/oom_score_adj"
    higher = str(int(Path(path).read_text()) + 7)
    assert await done(api, "/write_file", path, content=higher) == {"success": True}
    assert Path(path).read_text().strip() == higher
    reply = await done(api, "/write_file", path, content="many")
    assert reply == {"success": False, "error": f"write {path}: invalid argument"}


@pytest.mark.parametrize("above", [".", "..", "../.."])
async def test_the_daemons_directory_is_never_removed(start_daemon: Callable[..., Daemon], above: str) -> None:
    daemon = start_daemon()
    api = Api(daemon.url, daemon.secret)
    directory = daemon.log.parent
    for path in (above, str((directory / above).resolve())):
        reply = await done(api, "/delete_dir", path)
        assert reply["error"] == f"remove {path}: the daemon's working directory is in it, and is never removed"
    assert daemon.log.exists()


async def test_the_daemons_directory_is_removed_by_a_command(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    start = tmp_path / "start"
    start.mkdir()
    daemon = start_daemon(via=("sh", "-c", f'cd {start} && exec "$@"', "sh"))
    api = Api(daemon.url, daemon.secret)
    assert (await api.run("rmdir $PWD"))["code"] == 0
    path = tmp_path / "f"
    assert await done(api, "/write_file", path, content="text") == {"success": True}
    assert await done(api, "/read_file", path) == {"content": "text"}
    assert (await done(api, "/stat_file", path))["entry"]["name"] == "f"
    assert (await api.get(f"/files/stat?path={path}")).status == 200
    assert "f" in (await done(api, "/list_dir", tmp_path))["entries"]
    assert await done(api, "/delete_dir", tmp_path / "none") == {"success": True}
    assert (await api.run("pwd", cwd=str(tmp_path)))["stdout"] == f"{tmp_path}\n"


async def test_reading_a_socket_is_an_error(api: Api, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        assert await done(api, "/read_file", tmp_path / "s") == {
            "error": f"open {tmp_path}/s: no such device or address"
        }


async def test_a_directory_is_neither_read_nor_written(api: Api, tmp_path: Path) -> None:
    assert await done(api, "/read_file", tmp_path) == {"error": f"read {tmp_path}: is a directory"}
    for path in (f"{tmp_path}", f"{tmp_path}/", f"{tmp_path}/new/"):
        reply = await done(api, "/write_file", path, content="text")
        assert reply == {"success": False, "error": f"open {path}: is a directory"}
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("size", [READ_LIMIT + 1, 1 << 40], ids=["limit+1", "1 TiB"])
async def test_a_file_over_the_limit_is_refused_without_reading_it(
    api: Api, daemon: Daemon, tmp_path: Path, size: int
) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(size)
    before = daemon.memory()
    reply = await done(api, "/read_file", tmp_path / "sparse")
    assert reply == {"error": f"read {tmp_path}/sparse: file too large: the limit is {READ_LIMIT} bytes"}
    assert daemon.memory() - before < 10 * MIB


# The other routes


async def test_delete_file_removes_a_file_or_a_link_but_not_its_target(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    (tmp_path / "link").symlink_to("f")
    assert await done(api, "/delete_file", tmp_path / "link") == {"success": True}
    assert os.listdir(tmp_path) == ["f"]
    assert await done(api, "/delete_file", tmp_path / "f") == {"success": True}
    assert os.listdir(tmp_path) == []


async def test_delete_dir_removes_a_tree_and_follows_no_link(api: Api, tmp_path: Path) -> None:
    (tmp_path / "tree/a/b").mkdir(parents=True)
    (tmp_path / "tree/a/b/f").write_text("")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/f").write_text("")
    (tmp_path / "tree/link").symlink_to(tmp_path / "other")
    assert await done(api, "/delete_dir", tmp_path / "tree", recursive=True) == {"success": True}
    assert os.listdir(tmp_path) == ["other"]
    assert os.listdir(tmp_path / "other") == ["f"]


async def test_delete_dir_of_a_missing_one_is_success(api: Api, tmp_path: Path) -> None:
    assert await done(api, "/delete_dir", tmp_path / "missing") == {"success": True}
    assert await done(api, "/delete_dir", tmp_path / "missing/below") == {"success": True}


async def test_delete_dir_knows_no_patterns(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("")
    assert await done(api, "/delete_dir", tmp_path / "*") == {"success": True}
    assert os.listdir(tmp_path) == ["f"]


@needs_root
@pytest.mark.parametrize("path", ["/", "//", "/.", "/tmp/..", "/../..", "link/", "/tmp/../."])
def test_delete_dir_never_removes_the_root(tmp_path: Path, path: str) -> None:
    # In a root directory of its own, so that a failure of this test is no disaster.
    (tmp_path / "tmp").mkdir()
    (tmp_path / "link").symlink_to("/")
    (tmp_path / "precious").write_text("")
    code = (
        "import encodings.idna, os, sys; from sandboxd.files import errors, operations, root\n"
        "os.chroot(sys.argv[1]); os.chdir('/')\n"
        "try: operations.delete_tree(root.Root(), sys.argv[2])\n"
        "except errors.FileError as error: print(error)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path, path], capture_output=True, text=True, check=False, timeout=10
    )
    assert (ended.stdout, ended.stderr) == (f"remove {path}: the root directory is never removed\n", "")
    assert sorted(os.listdir(tmp_path)) == ["link", "precious", "tmp"]


async def test_make_dir_makes_parents_with_mode_0755_and_may_be_repeated(api: Api, tmp_path: Path) -> None:
    for _ in range(2):
        assert await done(api, "/make_dir", tmp_path / "a/b", recursive=True) == {"success": True}
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o755


async def test_list_dir_is_sorted_and_empty_for_an_empty_one(api: Api, tmp_path: Path) -> None:
    assert await done(api, "/list_dir", tmp_path) == {"entries": []}
    names = ["B", "a", ".hidden", "\u20ac", "line\nbreak"]
    for name in names:
        (tmp_path / name).write_text("")
    assert await done(api, "/list_dir", tmp_path) == {"entries": sorted(names)}


async def test_list_dir_replaces_what_is_not_utf8_in_names(api: Api, tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/n\xff")).write_text("")
    assert await done(api, "/list_dir", tmp_path) == {"entries": ["n\ufffd"]}


async def test_stat_file_tells_of_files_and_directories(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("12345")
    (tmp_path / "f").chmod(0o640)
    os.utime(tmp_path / "f", (0, 1.5))
    assert await done(api, "/stat_file", tmp_path / "f") == {
        "entry": {
            "name": "f",
            "is_dir": False,
            "size": 5,
            "mod_time": "1970-01-01T00:00:01.500000Z",
            "mode": "-rw-r-----",
        }
    }
    entry = (await done(api, "/stat_file", f"{tmp_path}/"))["entry"]
    assert (entry["name"], entry["is_dir"]) == (tmp_path.name, True)


@needs_root
@pytest.mark.parametrize("when", [-1, 4_000_000_000, 400_000_000_000], ids=["1969", "2096", "year 14645"])
async def test_stat_file_tells_of_any_time(api: Api, small_disk: Path, when: int) -> None:
    (small_disk / "f").write_text("")
    os.utime(small_disk / "f", (when, when))
    assert (small_disk / "f").stat().st_mtime == when
    assert isinstance((await done(api, "/stat_file", small_disk / "f"))["entry"]["mod_time"], str)


# Errors of the file system


@pytest.mark.parametrize(
    ("route", "path", "error"),
    [
        ("/read_file", "nope", "open {}: no such file or directory"),
        ("/write_file", "nope/f", "open {}: no such file or directory"),
        ("/delete_file", "nope", "remove {}: no such file or directory"),
        ("/list_dir", "nope", "open {}: no such file or directory"),
        ("/stat_file", "nope", "stat {}: no such file or directory"),
        ("/read_file", "f/x", "open {}: not a directory"),
        ("/write_file", "f/x", "open {}: not a directory"),
        ("/delete_file", "f/x", "remove {}: not a directory"),
        ("/make_dir", "f/x", "mkdir {}: not a directory"),
        ("/make_dir", "f", "mkdir {}: not a directory"),
        ("/list_dir", "f", "open {}: not a directory"),
        ("/delete_file", "full", "remove {}: directory not empty"),
        ("/read_file", "loop", "open {}: too many levels of symbolic links"),
        ("/write_file", "loop", "open {}: too many levels of symbolic links"),
        ("/read_file", "n" * 256, "open {}: file name too long"),
        ("/write_file", "n" * 256, "open {}: file name too long"),
        ("/make_dir", "n" * 256, "mkdir {}: file name too long"),
        ("/delete_dir", "n" * 256, "remove {}: file name too long"),
    ],
    ids=lambda value: value[:30],
)
async def test_errors_are_told_with_status_200_in_the_words_of_the_clients(
    api: Api, tmp_path: Path, route: str, path: str, error: str
) -> None:
    (tmp_path / "f").write_text("old")
    (tmp_path / "full/below").mkdir(parents=True)
    (tmp_path / "loop").symlink_to("loop")
    fields = {"content": "new"} if route == "/write_file" else {}
    success = {} if route in ("/read_file", "/list_dir", "/stat_file") else {"success": False}
    full_path = f"{tmp_path}/{path}"
    assert await done(api, route, full_path, **fields) == {**success, "error": error.format(full_path)}
    assert sorted(os.listdir(tmp_path)) == ["f", "full", "loop"]
    assert (tmp_path / "f").read_text() == "old"


# Malformed requests

ROUTES = ("/read_file", "/write_file", "/delete_file", "/delete_dir", "/make_dir", "/list_dir", "/stat_file")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("path", [None, 7, ["a"], "", "nul\0"], ids=repr)
async def test_a_bad_path_is_a_bad_request_that_names_it(api: Api, route: str, path: object) -> None:
    response = await within(5, api.post(route, {"path": path, "content": ""}))
    assert response.status == 400
    assert "path" in response.json()["error"]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_missing_path_is_a_bad_request_that_names_it(api: Api, route: str) -> None:
    response = await within(5, api.post(route, {"content": ""}))
    assert response.status == 400
    assert "path" in response.json()["error"]
    expected = None if route in ("/read_file", "/list_dir", "/stat_file") else False
    assert response.json().get("success") is expected


async def test_a_file_is_written_empty_when_content_is_left_out(api: Api, tmp_path: Path) -> None:
    """As koyeb-cli does for an empty file."""
    assert await done(api, "/write_file", tmp_path / "f") == {"success": True}
    assert (tmp_path / "f").read_bytes() == b""


@pytest.mark.parametrize("fields", [{"content": None}, {"content": 7}], ids=repr)
async def test_bad_content_is_a_bad_request_that_names_it(api: Api, tmp_path: Path, fields: dict[str, object]) -> None:
    response = await within(5, api.post("/write_file", {"path": str(tmp_path / "f"), **fields}))
    assert response.status == 400
    assert "content" in response.json()["error"]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("body", [b"{", b"[]", b'"text"', b"null", b"\xff", b'{"path": "a\xff"}', b"[" * 100_000])
async def test_what_is_no_json_object_is_a_bad_request(api: Api, body: bytes) -> None:
    response = await within(5, api.post("/read_file", body))
    assert response.status == 400
    assert response.json()["error"]


@pytest.mark.parametrize("route", ROUTES)
async def test_a_path_with_half_a_surrogate_pair_is_not_our_fault(api: Api, route: str) -> None:
    response = await within(5, api.post(route, b'{"path": "/nope/\\ud800", "content": ""}'))
    assert response.status in (200, 400)
    assert "error" in response.json() or response.json() == {"success": True}


async def test_unknown_fields_are_ignored(api: Api, tmp_path: Path) -> None:
    assert await done(api, "/write_file", tmp_path / "f", content="text", recursive=True, mode=7) == {"success": True}
    assert await done(api, "/read_file", tmp_path / "f", recursive=True) == {"content": "text"}


async def test_a_leftover_of_a_killed_daemon_is_no_hindrance(api: Api, tmp_path: Path) -> None:
    leftover = tmp_path / os.fsdecode(temporary_for(b"f"))
    leftover.write_text("half")
    for content in ("one", "two"):
        assert await done(api, "/write_file", tmp_path / "f", content=content) == {"success": True}
        assert (tmp_path / "f").read_text() == content
        assert os.listdir(tmp_path) == ["f"]


@pytest.mark.parametrize("size", [10, 100_000])
def test_what_another_request_has_changed_meanwhile_is_kept(tmp_path: Path, size: int) -> None:
    path = tmp_path / "f"
    path.write_text("old")
    path.chmod(0o644)
    directory = os.open(tmp_path, os.O_RDONLY)
    writer = threading.Thread(target=operations.write, args=(Root(), str(path), "x" * size))
    try:
        with renames.name_lock(directory, b"f"):
            writer.start()
            deadline = time.monotonic() + 10
            while [users for _, users in renames._swapping.values()] != [2]:  # the writer waits
                assert time.monotonic() < deadline
                time.sleep(0.001)
            path.chmod(0o600)
        writer.join(10)
    finally:
        os.close(directory)
    assert path.stat().st_size == size
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")
@pytest.mark.parametrize("size", [10, 100_000])
async def test_owner_group_and_mode_of_a_file_are_kept(api: Api, tmp_path: Path, size: int) -> None:
    tmp_path.chmod(0o2755)
    os.chown(tmp_path, 0, 1234)
    for name, uid, gid, mode in (("a", 0, 0, 0o600), ("b", 1000, 1000, 0o640), ("c", 0, 5, 0o755)):
        path = tmp_path / name
        path.touch()
        os.chown(path, uid, gid)
        path.chmod(mode)
        assert await done(api, "/write_file", path, content="x" * size) == {"success": True}
        info = path.stat()
        assert (info.st_uid, info.st_gid, stat.S_IMODE(info.st_mode), info.st_size) == (uid, gid, mode, size)


@pytest.mark.parametrize("seconds", [-(2**40), 2**40])
def test_a_file_whose_time_is_outside_of_the_calendar_can_be_looked_at(seconds: int) -> None:
    with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:  # which keeps any time
        os.utime(file.name, (seconds, seconds))
        assert operations.stat(Root(), file.name)["mod_time"][:4] in ("0001", "9999")
