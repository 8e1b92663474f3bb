"""The views of files and of ports, in Chromium, against the real daemon."""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from pathlib import Path
from typing import Any

import pytest

from tests.browser.visits import PNG, Visit, address, ask, start
from tests.clients.cutting import CuttingProxy
from tests.daemon import Daemon

playwright = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
expect = playwright.expect


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        checksum = hashlib.sha256()
        while data := opened.read(1 << 20):
            checksum.update(data)
    return checksum.hexdigest()


def test_the_tree_pictures_and_texts_by_keyboard(visit: Visit, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner/red.png").write_bytes(PNG)
    (tmp_path / "inner/text.txt").write_text("some text\n")
    (tmp_path / "inner/binary").write_bytes(b"\0\1\2")
    (tmp_path / "link").symlink_to("inner")
    page = visit(address(tmp_path))
    item = page.get_by_role("treeitem", name=tmp_path.name, exact=True)
    expect(item).to_have_attribute("aria-selected", "true")
    item.focus()
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        if key == "Enter":
            expect(page.get_by_role("treeitem", name="inner", exact=True)).to_be_focused()
        page.keyboard.press(key)
        expect(item).to_have_attribute("aria-expanded", "true")
    page.get_by_role("link", name="red.png").focus()
    page.keyboard.press("Enter")
    picture = page.get_by_role("img", name="red.png")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 1
    page.get_by_role("navigation", name="Path").get_by_role("link", name="inner").click()
    page.get_by_role("link", name="text.txt").click()
    expect(page.get_by_label("Text of")).to_have_value("some text\n")
    page.goto(f"{daemon.url}/console/#/{address(tmp_path / 'link/binary')}")
    expect(page.get_by_text("This is no text.")).to_be_visible()


def test_an_edit_never_overwrites_what_somebody_else_has_saved(visit: Visit, daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_bytes(b"one\r\ntwo\r\n")
    page = visit(address(file))
    text = page.get_by_label("Text of")
    expect(text).to_have_value("one\ntwo\n")
    expect(page.get_by_role("button", name="Save", exact=True)).to_be_disabled()
    text.fill("mine\ntwo\n")
    page.keyboard.press("Control+s")
    expect(page.get_by_text(re.compile(r"^Saved \d"))).to_be_visible()
    assert file.read_bytes() == b"mine\r\ntwo\r\n", "its lines end as before"
    file.write_bytes(b"theirs\r\n")
    text.fill("mine again\n")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.get_by_label("The file as it is now")).to_have_value("theirs\n")
    assert file.read_bytes() == b"theirs\r\n"
    page.goto(f"{daemon.url}/console/#/ports")  # what was not saved is there when one comes back
    expect(page.get_by_label("Port", exact=True)).to_be_visible()
    page.goto(f"{daemon.url}/console/#/{address(file)}")
    expect(text).to_have_value("mine again\n")
    page.get_by_role("button", name="Save", exact=True).click()
    page.get_by_role("button", name="Overwrite with mine").click()
    expect(page.get_by_text(re.compile(r"^Saved \d"))).to_be_visible()
    assert file.read_bytes() == b"mine again\r\n"
    file.unlink()
    text.fill("once more\n")
    page.keyboard.press("Control+s")
    page.get_by_role("button", name="Save it all the same").click()
    expect(page.get_by_text(re.compile(r"^Saved \d"))).to_be_visible()
    assert file.read_bytes() == b"once more\r\n"


def test_names_of_all_kinds_are_renamed_and_deleted(visit: Visit, daemon: Daemon, tmp_path: Path) -> None:
    odd = os.fsencode(tmp_path) + b"/50% a+b?&#\xff.txt"
    with open(odd, "w") as file:
        file.write("odd")
    page = visit(address(tmp_path))
    page.get_by_role("link", name="50% a+b").click()
    expect(page.get_by_label("Text of")).to_have_value("odd")
    page.get_by_role("button", name="Rename").click()
    page.get_by_role("textbox", name="New name").fill("plain.txt")
    page.keyboard.press("Enter")
    expect(page.get_by_role("navigation", name="Path")).to_contain_text("plain.txt")
    assert (tmp_path / "plain.txt").read_text() == "odd"
    page.get_by_role("button", name="Delete").click()
    confirm(page)
    expect(page.get_by_text("This directory is empty")).to_be_visible()
    assert os.listdir(tmp_path) == []
    page.get_by_role("button", name="New folder").click()
    page.get_by_role("textbox", name="Name of the new folder").fill("folder")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="folder/").click()
    page.get_by_role("button", name="New file").click()
    page.get_by_role("textbox", name="Name of the new file").fill("new.txt")
    page.keyboard.press("Enter")
    page.get_by_label("Text of").fill("new")
    page.keyboard.press("Control+s")
    expect(page.get_by_text(re.compile(r"^Saved \d"))).to_be_visible()
    page.goto(f"{daemon.url}/console/#/{address(tmp_path)}")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download folder").click()
    download.value.save_as(tmp_path / "got.tar.gz")
    with tarfile.open(tmp_path / "got.tar.gz") as tar:
        assert "new.txt" in tar.getnames()
    page.get_by_role("button", name="Delete folder").click()
    confirm(page)
    expect(page.get_by_role("link", name="folder/")).to_have_count(0)
    assert not (tmp_path / "folder").exists()


def confirm(page: Any) -> None:
    """Say yes."""
    page.get_by_role("dialog").get_by_role("button").last.click()


def test_dropped_files_and_one_that_is_replaced(visit: Visit, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "there.txt").write_text("old")
    (tmp_path / "there.txt").chmod(0o640)
    page = visit(address(tmp_path), prefix="/koyeb-sandbox")
    expect(page.get_by_role("link", name="there.txt")).to_be_visible()
    data = page.evaluate_handle(
        "() => { const data = new DataTransfer();"
        " for (const name of ['there.txt', 'new.txt']) data.items.add(new File([`new ${name}`], name));"
        " return data; }"
    )
    for event in ("dragover", "drop"):
        page.dispatch_event(".files-pane", event, {"dataTransfer": data})
    expect(page.get_by_role("dialog")).to_contain_text("there.txt")
    confirm(page)
    expect(page.get_by_role("link", name="new.txt")).to_be_visible()
    expect(page.locator(".files-transfers [data-state=done]")).to_have_count(2)
    assert (tmp_path / "there.txt").read_text() == "new there.txt"
    assert (tmp_path / "there.txt").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "new.txt").read_text() == "new new.txt"


def test_100_megabytes_up_and_down_through_cuts(
    visit: Visit, daemon: Daemon, proxy: CuttingProxy, tmp_path: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    source = here / "large.bin"
    source.write_bytes(os.urandom(1 << 20) * 100)
    page = visit(address(there), through=proxy.url)
    expect(page.get_by_text("This directory is empty")).to_be_visible()
    proxy.cut()
    proxy.cuts = [20 << 20] * 4
    page.locator("input[type=file]").set_input_files(source)
    progress = page.locator(".files-transfers progress")
    expect(page.locator(".files-transfers [data-state=done]")).to_be_visible(timeout=60_000)
    assert progress.evaluate("each => each.value") == 1
    assert [each.name for each in there.iterdir()] == ["large.bin"]
    assert digest(there / "large.bin") == digest(source)
    assert proxy.forwarded < 150 << 20, "what had arrived was not sent again"
    proxy.cut()
    proxy.cuts = [30 << 20] * 2
    with page.expect_download(timeout=60_000) as download:
        page.get_by_role("button", name="Download large.bin").click()
    download.value.save_as(here / "got.bin")
    assert digest(here / "got.bin") == digest(source)


def test_an_upload_that_was_broken_off_goes_on_when_the_file_is_given_again(
    visit: Visit, daemon: Daemon, proxy: CuttingProxy, tmp_path: Path
) -> None:
    there, source = tmp_path / "there", tmp_path / "large.bin"
    there.mkdir()
    source.write_bytes(os.urandom(1 << 20) * 60)
    page = visit(address(there), through=proxy.url)
    page.on("dialog", lambda dialog: dialog.accept())  # of a page with an upload that is left
    expect(page.get_by_text("This directory is empty")).to_be_visible()
    proxy.cut()
    proxy.cuts = [10 << 20] * 3 + [1] * 1000
    page.locator("input[type=file]").set_input_files(source)
    expect(page.locator(".files-transfers")).to_contain_text("waiting for the connection")
    expect(page.locator(".files-transfers")).to_contain_text(re.compile(r"[1-9]\d? % of"))
    proxy.cuts = []
    page.reload()
    expect(page.get_by_role("link", name=".part")).to_be_visible()
    page.locator("input[type=file]").set_input_files(source)
    expect(page.locator(".files-transfers [data-state=done]")).to_be_visible(timeout=60_000)
    assert [each.name for each in there.iterdir()] == ["large.bin"]
    assert digest(there / "large.bin") == digest(source)
    assert proxy.forwarded < 75 << 20, "what had arrived was not sent again"


def test_ports_are_listed_bound_and_asked(visit: Visit, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<title>Hello there</title>")
    id = start(daemon, "exec python3 -u -m http.server 0 --bind 127.0.0.1", cwd=str(tmp_path))
    line = ask(daemon, f"processes/{id}/wait", {"timeout": 15, "output": "port "})["line"]
    port = line.partition("port ")[2].split()[0]
    try:
        page = visit("ports")
        row = page.locator(f"[data-port='{port}']")
        expect(row).to_contain_text("127.0.0.1")
        expect(row).to_contain_text("python3")
        page.get_by_role("button", name=f"Ask port {port}").click()
        expect(row).to_contain_text("200 OK, text/html, “Hello there”")
        page.get_by_role("button", name=f"Bind port {port}").click()
        expect(row).to_contain_text("bound")
        assert ask(daemon, "port_status")["port"] == port
        link = row.get_by_role("link", name="Open")
        assert link.get_attribute("href") == f"http://127.0.0.1:{daemon.proxy_port}/"
        page.get_by_role("button", name="Unbind").click()
        expect(row.get_by_role("button", name="Bind")).to_be_visible()
        assert ask(daemon, "port_status")["port"] == ""
        page.get_by_label("Port", exact=True).fill(port)
        page.keyboard.press("Enter")
        expect(row).to_contain_text("bound")
        page.get_by_role("button", name="Unbind").click()
        page.set_viewport_size({"width": 400, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    finally:
        ask(daemon, "kill_process", {"id": id})
        ask(daemon, "unbind_port", {})


def test_files_on_a_phone(visit: Visit, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / ("long-name-" * 12)).touch()
    (tmp_path / "folder").mkdir()
    page = visit(address(tmp_path), viewport={"width": 400, "height": 800})
    expect(page.get_by_role("link", name="folder/")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    expect(page.get_by_role("tree")).to_be_hidden()
    page.get_by_text("Directories").click()
    expect(page.get_by_role("treeitem", name="/", exact=True)).to_be_visible()
