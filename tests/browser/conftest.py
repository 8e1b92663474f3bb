"""Chromium, and the console's page in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.browser.page import Console
from tests.daemon import Daemon

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser of Playwright's; skips the test if there is none."""
    driver = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
    if CHROMIUM is None:
        pytest.skip("the tests in a browser need chromium")
    with driver.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-quic"])
        yield browser
        browser.close()


@pytest.fixture
def open_console(chromium: Any) -> Iterator[Callable[..., Console]]:
    """Open consoles; at the end of the test each must have logged no error, and asked no other host."""
    opened: list[Console] = []

    def open_console(daemon: Daemon, **options: Any) -> Console:
        opened.append(Console(chromium, daemon, **options))
        return opened[-1]

    yield open_console
    for console in opened:
        console.close()


@pytest.fixture
def console(open_console: Callable[..., Console], daemon: Daemon) -> Console:
    """A console of the tests' daemon, logged in, at the processes."""
    console = open_console(daemon)
    console.log_in()
    return console
