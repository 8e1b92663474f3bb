"""The console's shell in Chromium, against the real daemon: login and navigation."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.browser.page import Console
from tests.daemon import SECRET, Daemon

playwright = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
expect = playwright.expect


@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
def test_log_in_with_a_wrong_and_the_right_token(
    open_console: Callable[..., Console], daemon: Daemon, prefix: str
) -> None:
    console = open_console(daemon, prefix=prefix, viewport={"width": 400, "height": 800})
    page = console.page
    page.goto(console.url)
    page.get_by_label("Token").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_have_text("The daemon does not accept this token.")
    page.get_by_label("Token").fill(SECRET)
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Processes")).to_be_visible()
    assert not console.scrolls_sideways
    page.get_by_label("Command", exact=True).fill("echo $((40 + 2))")
    page.keyboard.press("Enter")
    page.get_by_role("link", name="echo $((40 + 2))").first.click()
    expect(page.locator(".row .text")).to_have_text("42")
    page.go_back()
    page.reload()
    expect(page.get_by_role("heading", name="Processes")).to_be_visible()
    page.get_by_role("button", name="Log out").click()
    expect(page.get_by_label("Token")).to_be_focused()
    assert page.evaluate("Object.keys(sessionStorage)") == []
