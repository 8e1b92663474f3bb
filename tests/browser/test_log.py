"""The console's view of a log, against the real daemon."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.browser.page import Console
from tests.clients.cutting import CuttingProxy
from tests.daemon import Daemon

playwright = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
expect = playwright.expect

#: Elements of the page, at most, however long the log is.
MAX_ELEMENTS = 5000


#: Bytes of the page's objects, at most.
MAX_HEAP = 40_000_000


def heap(page: Any) -> float:
    """Bytes of the page's objects, garbage excepted."""
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    session.send("HeapProfiler.collectGarbage")
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(float(each["value"]) for each in metrics if each["name"] == "JSHeapUsedSize")


def follow(console: Console, cmd: str, **options: object) -> str:
    """Start a command and show its log; return its id."""
    started = console.call("start_process", {"cmd": cmd, **options})
    console.show(f"log/{started['id']}")
    return str(started["id"])


def test_a_hundred_thousand_lines_do_not_grow_the_page_past_a_bound(console: Console) -> None:
    page = console.page
    page.evaluate("""() => {
        window.most = 0;
        new MutationObserver(() => { most = Math.max(most, document.querySelectorAll("*").length); })
            .observe(document.body, { childList: true, subtree: true });
    }""")
    # The page has all lines only if they come no faster than it takes them: the daemon waits for no reader of a log.
    follow(console, "for i in $(seq 0 1000 99000); do seq $((i + 1)) $((i + 1000)); sleep 0.05; done")
    expect(page.locator(".row").last).to_contain_text("100000", timeout=60_000)
    expect(page.locator(".log-foot")).to_contain_text("Ended")
    expect(page.locator(".lines")).to_contain_text("Ended with exit code 0")
    assert page.evaluate("most") < MAX_ELEMENTS
    assert heap(page) < MAX_HEAP
    kept = page.locator(".log-foot .number").inner_text()
    assert 40_000 < int(re.sub(r"\D", "", kept)) <= 50_100
    page.locator(".lines").press("Home")
    expect(page.locator(".lines")).to_contain_text("older lines are no longer kept by this page")
    page.get_by_role("searchbox").fill("/^99[0-9]+7$/")
    expect(page.locator(".head + .card")).to_contain_text("100 of")
    rows = page.locator(".row .text").all_inner_texts()
    assert all(re.fullmatch("99[0-9]+7", text) for text in rows)
    expect(page.locator("mark").first).to_be_visible()


def test_streams_and_colours_are_marked_and_the_log_can_be_downloaded(console: Console, tmp_path: Path) -> None:
    page = console.page
    page.emulate_media(color_scheme="light")
    colours = r"printf 'a \033[31mred\033[0m \033[38;2;0;0;255mblue\033[0m\n'"
    follow(console, colours + r"; sleep 0.2; echo broken >&2; sleep 0.2; printf '1%%\r99%%\n'")
    row = page.locator(".row")
    expect(row).to_have_count(3)
    expect(row.nth(0).locator(".s")).to_have_text("out")
    expect(row.nth(0).locator(".text")).to_have_text("a red blue")
    expect(row.nth(0).locator(".fg-1")).to_have_css("color", "rgb(179, 38, 30)")
    assert row.nth(0).locator(".fg-rgb").evaluate("e => getComputedStyle(e).color") != row.nth(0).evaluate(
        "e => getComputedStyle(e).color"
    )
    expect(page.locator(".row.stderr .s")).to_have_text("err")
    expect(page.locator(".row.stderr .text")).to_have_text("broken")
    expect(page.locator(".lines")).to_contain_text("99%")
    expect(page.locator(".lines")).not_to_contain_text("1%")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download").click()
    download.value.save_as(tmp_path / "log")
    assert "\x1b[31mred" in (tmp_path / "log").read_text()


def test_pause_and_resume(console: Console, tmp_path: Path) -> None:
    page = console.page
    gate = tmp_path / "gate"
    follow(console, f"echo one; until [ -e {gate} ]; do sleep 0.05; done; echo two")
    expect(page.locator(".row")).to_have_count(1)
    page.get_by_role("button", name="Pause").click()
    gate.touch()
    resume = page.get_by_role("button", name="Resume (1 new)")
    expect(resume).to_be_visible()
    expect(page.locator(".row")).to_have_count(1)
    resume.click()
    expect(page.locator(".row").last).to_contain_text("two")


def test_a_log_goes_on_when_the_connection_was_broken_and_lines_that_are_gone_are_a_divider(
    open_console: Callable[..., Console], daemon: Daemon, proxy: CuttingProxy, tmp_path: Path
) -> None:
    console = open_console(daemon, through=proxy.url)
    console.log_in()
    page = console.page
    gate = tmp_path / "gate"
    id = follow(console, f"echo first; until [ -e {gate} ]; do sleep 0.05; done; seq 2 12000; sleep 300")
    expect(page.locator(".row")).to_have_count(1)
    proxy.cuts = [1] * 1000  # all further connections are cut, too
    proxy.cut()
    expect(page.locator(".log-state")).to_contain_text("Connection lost")
    gate.touch()
    assert console.call(f"processes/{id}/wait", {"output": "12000", "timeout": 15})["reason"] == "output"
    with page.expect_request(
        lambda request: "process_logs" in request.url and request.headers.get("last-event-id") == "1"
    ):
        proxy.cuts.clear()
    expect(page.locator(".row").last).to_contain_text("12000")
    page.get_by_role("searchbox").fill("first")
    expect(page.locator(".row .text")).to_have_text(["first"])
    expect(page.locator("div.log-divider")).to_have_text(["1,999 lines are no longer kept"])


def test_the_log_on_a_phone_and_its_end(open_console: Callable[..., Console], daemon: Daemon) -> None:
    console = open_console(daemon, viewport={"width": 400, "height": 800})
    console.log_in()
    follow(console, "echo " + json.dumps("word " * 400) + "; exit 3")
    expect(console.page.locator(".lines")).to_contain_text("Ended with exit code 3")
    assert not console.scrolls_sideways
    assert console.page.locator(".lines").evaluate("e => e.scrollWidth <= e.clientWidth")
    console.show("log/11111111-1111-4111-8111-111111111111")
    expect(console.page.locator(".log-state")).to_contain_text("process not found")


def test_lines_of_megabytes_are_kept_up_to_a_number_of_characters(console: Console) -> None:
    page = console.page
    id = follow(console, "echo start; head -c 24000000 /dev/zero | tr '\\0' a; echo; echo end; sleep 300")
    expect(page.locator(".row").last).to_contain_text("end")
    kept = int(re.sub(r"\D", "", page.locator(".log-foot .number").inner_text()))
    assert 200 < kept < 300  # of 64 KiB each
    assert heap(page) < MAX_HEAP
    assert page.locator(".row").last.bounding_box()["height"] < 40
    console.call("kill_process", {"id": id})
