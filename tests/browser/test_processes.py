"""The console's view of processes, against the real daemon."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.browser.page import Console
from tests.daemon import Daemon, alive

playwright = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
expect = playwright.expect


def test_start_and_kill_by_keyboard_on_a_phone(open_console: Callable[..., Console], daemon: Daemon) -> None:
    console = open_console(daemon, viewport={"width": 400, "height": 800})
    console.log_in()
    page = console.page
    page.get_by_label("Command", exact=True).focus()
    page.keyboard.type("sleep 300 & echo 1; wait")
    page.keyboard.press("Enter")
    row = page.locator("#rows tr[data-id]").first
    expect(row).to_contain_text("running")
    kill = row.get_by_role("button", name="Kill process")
    for _ in range(40):  # from the field, forwards
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.getAttribute('aria-label') ?? ''").startswith("Kill process"):
            break
    expect(kill).to_be_focused()
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    assert not console.scrolls_sideways
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_contain_text("Kill “sleep 300 & echo 1; wait”")
    page.keyboard.press("Enter")
    expect(row).to_contain_text("killed")
    expect(kill).to_have_count(0)
    expect(row.get_by_role("button", name="Details")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator(".facts").first).to_contain_text("SIGKILL")
    assert not console.scrolls_sideways


def test_what_is_left_behind_is_shown_and_ended(console: Console) -> None:
    page = console.page
    left = console.call("start_process", {"cmd": "sleep 300 & echo left"})
    row = page.locator(f"tr[data-id='{left['id']}']")
    expect(row).to_contain_text("1 left behind")
    [survivor] = console.call(f"processes/{left['id']}")["survivors"]
    row.get_by_role("button", name="Kill what process").click()
    page.get_by_role("button", name="Kill", exact=True).click()
    expect(row).not_to_contain_text("left behind")
    expect(row).to_contain_text("completed")
    assert not alive(survivor)


def test_the_options_of_a_start_and_a_signal(console: Console) -> None:
    page = console.page
    page.get_by_label("Command", exact=True).fill(
        'trap "echo got it; exit 7" USR1; echo "$A in $PWD"; while :; do sleep 0.05; done'
    )
    page.get_by_text("Options").click()
    page.get_by_label("Working directory").fill("/usr")
    page.get_by_label("Environment").fill("A=b c")
    page.get_by_role("button", name="Start", exact=True).click()
    row = page.locator("#rows tr[data-id]").first
    expect(row).to_contain_text("trap")
    id = row.get_attribute("data-id")
    reached = console.call(f"processes/{id}/wait", {"output": "b c in /usr", "timeout": 10})
    assert reached["reason"] == "output"
    row.get_by_role("button", name="Send a signal").click()
    expect(page.get_by_role("menuitem", name="SIGTERM")).to_be_focused()
    for _ in range(4):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(row).to_contain_text("failed (7)")


def test_a_command_that_cannot_be_started_says_why(console: Console) -> None:
    page = console.page
    page.get_by_label("Command", exact=True).fill("true")
    page.get_by_text("Options").click()
    page.get_by_label("Working directory").fill("/nowhere")
    page.keyboard.press("Enter")
    expect(page.locator(".toast.error")).to_contain_text("Invalid working directory: /nowhere")
