"""A root: no path, no link and no race of file requests leads out of it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.files import operations
from sandboxd.files.download import Download
from sandboxd.files.errors import FileError
from sandboxd.files.root import Root
from sandboxd.files.upload import Patch
from tests.client import Api
from tests.daemon import Daemon
from tests.rooted import Rooted
from tests.waiting import within


@pytest.fixture(scope="module")
def rooted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooted]:
    rooted = Rooted(tmp_path_factory.mktemp("rooted"))
    yield rooted
    rooted.stop()


ROUTES = {
    "/read_file": "open",
    "/write_file": "open",
    "/delete_file": "remove",
    "/delete_dir": "remove",
    "/make_dir": "mkdir",
    "/list_dir": "open",
    "/stat_file": "stat",
}


@pytest.mark.slow
async def test_absolute_and_relative_paths_lead_into_the_root(rooted: Rooted) -> None:
    assert await rooted.done("/make_dir", rooted.top / "a/b") == {"success": True}
    assert await rooted.done("/write_file", rooted.top / "a/b/f", content="text") == {"success": True}
    assert (rooted.top / "a/b/f").read_text() == "text"
    assert await rooted.done("/read_file", "a/b/../b/./f") == {"content": "text"}
    assert await rooted.done("/list_dir", ".") == {"entries": ["a"]}
    assert (await rooted.done("/stat_file", "."))["entry"]["name"] == "top"
    assert await rooted.done("/delete_dir", "a") == {"success": True}
    assert os.listdir(rooted.top) == []


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "path", ["{out}/secret", "{out}", "../outside/secret", "{top}/../outside/secret", "{top}x", "/"]
)
async def test_a_path_out_of_the_root_is_refused(rooted: Rooted, route: str, path: str) -> None:
    full = path.format(top=rooted.top, out=rooted.outside)
    reply = await rooted.done(route, full, content="")
    assert reply["error"] == f"{ROUTES[route]} {full}: is outside of the root {rooted.top}"
    assert rooted.untouched()


@pytest.mark.parametrize("route", ["/delete_file", "/delete_dir", "/make_dir"])
@pytest.mark.parametrize("path", [".", "{top}", "{top}/", "{top}/."])
async def test_the_root_itself_is_not_removed(rooted: Rooted, route: str, path: str) -> None:
    full = path.format(top=rooted.top)
    reply = await rooted.done(route, full)
    why = {"/delete_file": "is the root directory", "/delete_dir": "the root directory is never removed"}
    expected = {"success": False, "error": f"remove {full}: {why[route]}"} if route in why else {"success": True}
    assert reply == expected
    assert rooted.top.is_dir()


@pytest.mark.parametrize("target", ["{out}", "../outside", "inner/../../outside"])
async def test_links_that_lead_out_are_not_followed_but_can_be_removed(rooted: Rooted, target: str) -> None:
    link = rooted.top / "link"
    link.symlink_to(target.format(out=rooted.outside))
    (rooted.top / "inner").mkdir(exist_ok=True)
    for route, op in ROUTES.items():
        reply = await rooted.done(route, f"{link}/secret", content="new")
        assert reply["error"] == f"{op} {link}/secret: is outside of the root {rooted.top}"
    for route in ("/list_dir", "/read_file", "/write_file"):
        assert (await rooted.done(route, link, content=""))["error"].endswith(
            "is outside of the root " + str(rooted.top)
        )
    assert await rooted.done("/delete_dir", link) == {"success": True}
    assert not link.is_symlink()
    assert rooted.untouched()


async def test_the_bytes_of_files_outside_are_out_of_reach(rooted: Rooted) -> None:
    (rooted.top / "out").symlink_to(rooted.outside)
    form = b'--x\r\nContent-Disposition: form-data; name="f"; filename="secret"\r\n\r\nnew\r\n--x--\r\n'
    for path in ("out/secret", f"{rooted.outside}/secret", "../outside/secret"):
        for method, query, body in (
            ("GET", "", None),
            ("PUT", "", b"new"),
            ("PUT", "&offset=0", b"n"),
            ("DELETE", "", None),
        ):
            response = await within(5, rooted.api.call(method, f"/files?path={path}{query}", body))
            assert response.status == 403
            assert response.json()["error"].endswith(f"is outside of the root {rooted.top}")
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    response = await within(5, rooted.api.call("POST", "/files?path=out", form, headers))
    assert (response.status, response.json()["files"]) == (403, [])
    assert (await within(5, rooted.api.call("PUT", "/files?path=in/f&parents=true", b"new"))).status == 201
    assert (await within(5, rooted.api.call("GET", f"/files?path={rooted.top}/in/f"))).body == b"new"
    await rooted.done("/delete_dir", "in")
    assert (await within(5, rooted.api.call("DELETE", "/files?path=out"))).status == 200


async def test_absolute_links_into_the_root_are_followed(rooted: Rooted) -> None:
    (rooted.top / "real").mkdir()
    (rooted.top / "link").symlink_to(rooted.top / "real")
    (rooted.top / "chain").symlink_to("link/f")
    assert await rooted.done("/write_file", "chain", content="text") == {"success": True}
    assert await rooted.done("/read_file", "link/f") == {"content": "text"}
    assert (rooted.top / "real/f").read_text() == "text"
    assert await rooted.done("/list_dir", "link/") == {"entries": ["f"]}
    (rooted.top / "loop").symlink_to(rooted.top / "loop")
    assert await rooted.done("/read_file", "loop") == {"error": "open loop: too many levels of symbolic links"}
    for name in ("chain", "link", "loop", "real"):
        await rooted.done("/delete_dir", name)


def test_links_of_the_kernel_do_not_lead_anywhere() -> None:
    with pytest.raises(FileError, match="too many levels of symbolic links"):
        operations.read(Root("/proc"), f"/proc/{os.getpid()}/root/etc/hostname")


async def test_commands_start_in_the_root(rooted: Rooted) -> None:
    (rooted.top / "work").mkdir()
    (rooted.top / "out").symlink_to(rooted.outside)
    assert (await rooted.api.run("pwd"))["stdout"] == f"{rooted.top}\n"
    assert (await rooted.api.run("pwd", cwd="work"))["stdout"] == f"{rooted.top}/work\n"
    assert (await rooted.api.run("pwd", cwd=f"{rooted.top}/work"))["stdout"] == f"{rooted.top}/work\n"
    for cwd in ("/", "..", str(rooted.outside), "out", "missing"):
        response = await rooted.api.post("/run", {"cmd": "pwd", "cwd": cwd})
        assert response.status == 400
        assert response.json() == {"error": f"Invalid working directory: {cwd} (it has to be in {rooted.top})"}
    (rooted.top / "work").rmdir()
    (rooted.top / "out").unlink()


def opened(root: Root, path: str) -> str:
    """What a download sends."""
    file = Download(root, path)
    try:
        file.open()
        return file.known(0, 100).decode()
    finally:
        file.close()


def patch(root: Root, path: str) -> None:
    """What an upload of a part does."""
    upload = Patch(root, path, lambda old: None, offset=0, durable=False)
    try:
        upload.open(4)
        upload.write(b"text")
        upload.commit()
    finally:
        upload.close()


#: Gives two files each other's names, again and again: renameat2(2) with RENAME_EXCHANGE.
SWAP = "import ctypes, sys; libc = ctypes.CDLL(None); a, b = (name.encode() for name in sys.argv[1:])\n"
SWAP += "print(flush=True)\nwhile libc.renameat2(-100, a, -100, b, 2) == 0: pass"


@pytest.mark.parametrize("kind", ["directory", "link"])
@pytest.mark.slow
def test_no_race_leads_out(tmp_path: Path, kind: str) -> None:
    """A process swaps a directory, or a link to one, for a link to one outside, and back, as fast as it can."""
    top, outside = tmp_path / "top", tmp_path / "outside"
    for folder in (top / "real/inner", outside / "inner"):
        folder.mkdir(parents=True)
    (outside / "inner/f").write_text("secret")
    (top / "real/inner/f").write_text("text")
    if kind == "link":
        (top / "link").symlink_to("real")
    else:
        (top / "real").rename(top / "link")
    (top / "other").symlink_to(outside)

    swap = [sys.executable, "-c", SWAP, str(top / "link"), str(top / "other")]
    root = Root(str(top))
    seen: set[str] = set()
    with subprocess.Popen(swap, stdout=subprocess.PIPE) as swapper:
        assert swapper.stdout is not None
        swapper.stdout.readline()
        for turn in range(250):
            for work in (
                lambda: seen.add(operations.read(root, "link/inner/f").decode()),
                lambda: seen.update(operations.names(root, "link/inner")),
                lambda turn=turn: operations.write(root, "link/inner/f", f"text {turn}"),
                lambda: operations.write(root, "link/new", "text"),
                lambda: operations.make_directories(root, "link/new/deep"),
                lambda: operations.delete(root, "link/new"),
                lambda: operations.delete_tree(root, "link/new"),
                lambda: operations.delete_tree(root, "link/inner/sub"),
                lambda: operations.stat(root, "link/inner/f"),
                lambda: seen.add(opened(root, "link/inner/f")),
                lambda: patch(root, "link/inner/f"),
            ):
                try:
                    work()
                except FileError:
                    seen.add("refused")
        assert swapper.poll() is None
        swapper.kill()
    assert "refused" in seen
    assert any(name.startswith("text") for name in seen)
    assert "secret" not in seen
    assert sorted(os.listdir(outside)) == ["inner"]
    assert os.listdir(outside / "inner") == ["f"]
    assert (outside / "inner/f").read_text() == "secret"


def test_trees_of_any_depth_are_removed(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    operations.delete_tree(Root(), str(tmp_path / "d"))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("path", "why"), [("missing", "No such file or directory"), ("file", "Not a directory")])
def test_a_root_that_is_none_is_told_at_the_start(tmp_path: Path, path: str, why: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AssertionError, match=rf"SANDBOX_ROOT \(--root\): '{tmp_path}/{path}': {why}"):
        Daemon(tmp_path, "--root", str(tmp_path / path))


# Names that are not UTF-8


async def test_names_that_are_not_utf8_come_as_lone_surrogates(api: Api, tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/n\xff\xe2\x82"
    body = b'{"path": "%s/n\\udcff\\udce2\\udc82", "content": "a\\udcfe"}' % os.fsencode(tmp_path)
    assert (await api.post("/write_file", body)).json() == {"success": True}
    with open(path, "rb") as file:
        assert file.read() == b"a\xfe"
    assert (await api.post("/stat_file", body)).json()["entry"]["name"] == "n\udcff\udce2\udc82"
    assert (await api.run(f"cat '{os.fsdecode(path)}'"))["stdout"] == "a\ufffd"


@pytest.mark.parametrize("half", ["\\ud800", "\\udc7f", "\\udd00", "\\uDBFFx"])
async def test_other_halves_of_pairs_are_refused(api: Api, half: str) -> None:
    response = await api.post("/read_file", b'{"path": "/%s"}' % half.encode())
    assert response.status == 400
    assert "surrogate" in response.json()["error"]


def test_a_root_that_is_none_is_everything() -> None:
    assert not Root().confined
