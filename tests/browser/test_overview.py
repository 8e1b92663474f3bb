"""The console's overview, against the real daemon."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from tests.browser.page import Console
from tests.daemon import Daemon

playwright = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
expect = playwright.expect


def test_the_charts_show_what_the_daemon_does(open_console: Callable[..., Console], daemon: Daemon) -> None:
    console = open_console(daemon, viewport={"width": 400, "height": 800})
    started = console.call("start_process", {"cmd": "yes | head -c 3000000; sleep 300"})
    console.log_in("overview")
    page = console.page
    for name in ("Processor", "Memory", "Disk", "Processes", "Output", "Requests", "Streams", "Stalls"):
        expect(page.get_by_role("region", name=name)).to_be_visible()
    expect(page.get_by_role("img", name="Processor: ")).to_have_attribute("aria-label", re.compile(r"\d %"))
    expect(page.get_by_role("img", name="Disk: ")).to_have_attribute("aria-label", re.compile(r"GiB of .*GiB"))
    expect(page.get_by_role("region", name="Processes")).to_contain_text(re.compile(r"[1-9]\d* running"))
    expect(page.get_by_role("region", name="Memory").locator(".line")).to_have_attribute("d", re.compile("L"))
    assert not console.scrolls_sideways
    console.call("kill_process", {"id": started["id"]})
