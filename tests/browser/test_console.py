"""The console in Chromium, against the real daemon."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.daemon import SECRET, Daemon

playwright = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
CHROMIUM = shutil.which("chromium")


@pytest.mark.skipif(CHROMIUM is None, reason="the tests in a browser need chromium")
@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
def test_log_in_start_and_kill_by_keyboard(tmp_path: Path, prefix: str) -> None:
    daemon = Daemon(tmp_path)
    foreign, problems = [], []
    try:
        with playwright.sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-quic"])
            page = browser.new_page(viewport={"width": 400, "height": 800})
            page.set_default_timeout(15000)
            page.on("request", lambda request: request.url.startswith(daemon.url) or foreign.append(request.url))
            page.on("pageerror", lambda error: problems.append(str(error)))
            page.goto(f"{daemon.url}{prefix}/console/")
            page.get_by_label("Token").fill("wrong")
            page.keyboard.press("Enter")
            playwright.expect(page.get_by_role("status")).not_to_be_empty()
            page.get_by_label("Token").fill(SECRET)
            page.keyboard.press("Enter")
            page.get_by_label("Command").fill("sleep 300")
            page.keyboard.press("Enter")
            kill = page.get_by_role("button", name="Kill")
            kill.focus()
            page.keyboard.press("Enter")
            playwright.expect(page.locator("#rows")).to_contain_text("killed")
            playwright.expect(kill).to_have_count(0)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            browser.close()
    finally:
        daemon.stop()
    assert (foreign, problems) == ([], [])
