"""Chromium, and the console's page in it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.browser.page import Console
from tests.clients.cutting import CuttingProxy
from tests.daemon import Daemon

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """A browser of Playwright's; skips the test if there is none."""
    driver = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
    if CHROMIUM is None:
        pytest.skip("the tests in a browser need chromium")
    driver.expect.set_options(timeout=15_000)
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
def visit(open_console: Callable[..., Console], daemon: Daemon) -> Callable[..., Any]:
    """Open a view, and return the page; the view, and the options of the console."""

    def visit(view: str, **options: Any) -> Any:
        console = open_console(daemon, **options)
        console.context.grant_permissions(["clipboard-read", "clipboard-write"])
        console.log_in(view)
        return console.page

    return visit


@pytest.fixture
def proxy(daemon: Daemon) -> Iterator[CuttingProxy]:
    """What cuts the connections of a console."""
    proxy = CuttingProxy(daemon.port)
    yield proxy
    proxy.close()


@pytest.fixture
def console(open_console: Callable[..., Console], daemon: Daemon) -> Console:
    """A console of the tests' daemon, logged in, at the processes."""
    console = open_console(daemon)
    console.log_in()
    return console
