"""The view of terminals, in Chromium, against the real daemon."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import sandboxd
from tests.browser.visits import Visit, ask, start, wait
from tests.clients.cutting import CuttingProxy
from tests.daemon import Daemon

playwright = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
expect = playwright.expect


@pytest.fixture(autouse=True, scope="module")
def xterm() -> None:
    """What the terminal is made of; where it cannot be had, the tests are skipped, but not in CI."""
    if not (Path(sandboxd.__file__).parent / "console/vendor/xterm.mjs").exists():
        (pytest.fail if os.environ.get("CI") else pytest.skip)("NOT TESTED, needs: make console")


@pytest.fixture(autouse=True)
def end_terminals(daemon: Daemon) -> Iterator[None]:
    yield
    for each in ask(daemon, "list_processes")["processes"]:
        if each["status"] == "running":
            ask(daemon, "kill_process", {"id": each["id"]})


def screen(page: Any) -> Any:
    return page.locator(".terminal-panel:not([hidden]) .xterm-rows")


def lines(page: Any) -> list[str]:
    return [each.replace("\xa0", " ").rstrip() for each in screen(page).locator("> div").all_inner_texts()]


def new_terminal(page: Any) -> None:
    page.get_by_role("button", name="New terminal").click()
    expect(screen(page)).to_contain_text(re.compile(r"[$#] "))


def run(page: Any, command: str) -> None:
    page.keyboard.type(f"{command}\n")


def test_vim_resize_reload_and_reattach(visit: Visit, daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "file"
    page = visit("terminal")
    new_terminal(page)
    run(page, f"PS1='> '; vim -u NONE -N {file}")
    expect(screen(page)).to_contain_text("[New")
    page.keyboard.type("ihello")
    page.keyboard.press("Escape")
    page.keyboard.type(":w\n")
    expect(screen(page)).to_contain_text("written")
    assert file.read_text() == "hello\n"
    size = page.locator(".terminal-size")
    before = size.text_content()
    page.set_viewport_size({"width": 800, "height": 500})
    expect(size).not_to_have_text(before)
    expect(size).to_be_visible()
    page.reload()
    expect(screen(page)).to_contain_text("hello")
    expect(screen(page)).to_contain_text("~")
    cols, rows = map(int, re.findall(r"\d+", size.text_content()))
    page.keyboard.type(":q\n")
    expect(screen(page)).not_to_contain_text("~")
    run(page, "stty size")
    expect(screen(page)).to_contain_text(f"{rows} {cols}")
    run(page, "exit 3")
    expect(page.get_by_text("Ended with exit code 3.")).to_be_visible()
    page.get_by_role("button", name="Close the tab", exact=True).click()
    expect(page.get_by_role("button", name="New terminal")).to_be_visible()


def test_a_broken_connection_loses_nothing_and_leaves_a_divider(
    visit: Visit, proxy: CuttingProxy, tmp_path: Path
) -> None:
    page = visit("terminal", through=proxy.url)
    new_terminal(page)
    count = "for i in $(seq {} {}); do echo line $i; done"
    run(page, f"PS1=; clear; {count.format(1, 8)}; until [ -e {tmp_path}/go ]; do :; done; {count.format(9, 16)}")
    expect(screen(page)).to_contain_text("line 8")
    proxy.cut()
    expect(page.locator(".terminal-divider")).to_contain_text("connection lost")
    (tmp_path / "go").touch()
    expect(screen(page)).to_contain_text("line 16")
    expect(page.locator(".terminal-divider")).to_contain_text("reconnected")
    expect(page.locator(".terminal-state")).to_be_hidden()
    assert [each for each in lines(page) if each.startswith("line")] == [f"line {number}" for number in range(1, 17)]
    run(page, "echo on$((1+1))")
    expect(screen(page)).to_contain_text("on2")


def test_a_terminal_of_another_device_is_taken_over(visit: Visit, daemon: Daemon) -> None:
    id = start(daemon, "stty -echo; echo ready; cat", tty={"cols": 200, "rows": 50})
    start(daemon, "sleep 60")
    page = visit("terminal")
    expect(page.get_by_role("button", name="Attach")).to_have_count(1)
    page.get_by_role("button", name="Attach").click()
    expect(screen(page)).to_contain_text("ready")
    run(page, "from the first")
    expect(screen(page)).to_contain_text("from the first")
    first = ask(daemon, f"processes/{id}")["tty"]
    assert first["cols"] < 200
    other = visit(f"terminal/{id}", viewport={"width": 400, "height": 800})
    expect(screen(other)).to_contain_text("from the first")
    run(other, "from the second")
    expect(screen(page)).to_contain_text("from the second")
    assert ask(daemon, f"processes/{id}")["tty"]["cols"] < first["cols"]
    assert other.evaluate("document.documentElement.scrollWidth <= innerWidth")
    other.get_by_role("group", name="Keys").get_by_role("button", name="Ctrl").click()
    other.keyboard.type("c")
    expect(other.get_by_text("Ended with exit code 130.")).to_be_visible()
    expect(page.get_by_text("Ended with exit code 130.")).to_be_visible()


def test_copy_paste_and_search(visit: Visit, daemon: Daemon) -> None:
    page = visit("terminal")
    new_terminal(page)
    run(page, "PS1='> '; clear; echo alphabeta")
    line = screen(page).locator("> div", has_text=re.compile("^alphabeta"))
    box = line.bounding_box()
    page.mouse.dblclick(box["x"] + 20, box["y"] + box["height"] / 2)
    page.keyboard.press("Control+C")
    assert page.evaluate("navigator.clipboard.readText()") == "alphabeta"
    page.keyboard.type("echo got-")
    page.keyboard.press("Control+Shift+V")
    page.keyboard.press("Enter")
    expect(screen(page)).to_contain_text("got-alphabeta")
    run(page, "echo st''arted; sleep 60")
    expect(screen(page)).to_contain_text("started")
    page.keyboard.press("Control+C")  # nothing is selected: it interrupts
    expect(screen(page)).to_contain_text("^C")
    run(page, "echo interrupted $?")
    expect(screen(page)).to_contain_text("interrupted 130")
    page.keyboard.press("Control+Shift+F")
    page.keyboard.type("alphabeta")
    expect(page.locator(".terminal-search output")).to_have_text(re.compile(r"^\d/\d$"))
    page.keyboard.press("Escape")
    run(page, "echo typed")
    expect(screen(page)).to_contain_text("typed")


def test_much_output_is_drawn_to_its_end(visit: Visit, daemon: Daemon) -> None:
    page = visit("terminal")
    new_terminal(page)
    run(page, "seq 2000000; echo d''one")
    expect(screen(page)).to_contain_text("done", timeout=60_000)
    assert "2000000" in lines(page)
    run(page, "echo on$((1+1))")
    expect(screen(page)).to_contain_text("on2")


def test_questions_of_before_are_not_answered_again(visit: Visit, daemon: Daemon) -> None:
    id = start(daemon, "stty -echo raw; printf '\\033[cready'; exec cat -v", tty=True)
    wait(daemon, id, output="ready")
    page = visit(f"terminal/{id}")
    expect(page.locator(".terminal-panel:not([hidden]) textarea")).to_be_focused()
    page.keyboard.type("early")  # perhaps before there is a connection
    expect(screen(page)).to_contain_text("readyearly")
    page.keyboard.type("typed")
    expect(screen(page)).to_contain_text("typed")
    assert "^[" not in "".join(lines(page))


def test_by_keyboard_alone_with_several_tabs(visit: Visit, daemon: Daemon) -> None:
    page = visit("terminal", prefix="/koyeb-sandbox")
    create = page.get_by_role("button", name="New terminal")
    expect(create).to_be_focused()
    page.keyboard.press("Enter")
    expect(screen(page)).to_contain_text(re.compile(r"[$#] "))
    run(page, "PS1='first> '; clear")
    expect(screen(page)).to_contain_text("first>")
    page.keyboard.press("Control+Shift+ArrowUp")
    expect(page.get_by_role("tab", selected=True)).to_be_focused()
    page.get_by_role("button", name="New", exact=True).focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("tab")).to_have_count(2)
    expect(screen(page)).to_contain_text(re.compile(r"[$#] "))
    page.keyboard.press("Control+Shift+ArrowUp")
    page.keyboard.press("ArrowLeft")
    expect(screen(page)).to_contain_text("first>")
    page.keyboard.press("ArrowDown")
    run(page, "echo typed into the fir''st")
    expect(screen(page)).to_contain_text("typed into the first")


def test_without_xterm_it_says_how_to_get_it(visit: Visit, daemon: Daemon) -> None:
    page = visit("ports")
    page.route("**/vendor/*", lambda route: route.fulfill(status=401))
    page.goto(f"{daemon.url}/console/#/terminal")
    expect(page.get_by_text("make console")).to_be_visible()
    page.goto(f"{daemon.url}/console/#/files/etc")
    expect(page.get_by_role("link", name="passwd", exact=True)).to_be_visible()
