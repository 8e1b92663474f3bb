"""The console's page, as the tests use it."""

from __future__ import annotations

import json
import re
import urllib.request
from typing import Any

from tests.daemon import SECRET, Daemon

#: What Chromium writes to its console for each reply of 4xx; what the page makes of them is tested where they occur.
_REFUSED = re.compile(r"Failed to load resource: the server responded with a status of 4\d\d")

#: What it writes when a connection is cut.
_CUT = re.compile(r"Failed to load resource: net::ERR_|WebSocket connection to .* failed")


class Console:
    """
    The console of a daemon, in a browser context of its own.

    :param chromium: a browser of Playwright's.
    :param prefix: the path that the page is served below.
    :param through: the URL of a proxy that cuts connections, through which the daemon is reached.
    :param options: those of the browser context, such as ``viewport``.
    :ivar page: Playwright's page.
    :ivar problems: errors that were thrown or logged.
    :ivar foreign: URLs that were asked for of another host.
    """

    def __init__(self, chromium: Any, daemon: Daemon, *, prefix: str = "", through: str = "", **options: Any) -> None:
        self.daemon = daemon
        self._through = through
        self._origin = through or daemon.url
        self.url = f"{self._origin}{prefix}/console/"
        self.problems: list[str] = []
        self.foreign: list[str] = []
        self.context = chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.page.on("request", lambda request: self._asked(request.url))
        self.page.on("websocket", lambda socket: self._asked(socket.url.replace("ws:", "http:", 1)))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("console", self._logged)

    def _asked(self, url: str) -> None:
        if not url.startswith((self._origin, "blob:", "data:")):
            self.foreign.append(url)

    def _logged(self, message: Any) -> None:
        expected = _REFUSED.match(message.text) or (self._through and _CUT.match(message.text))
        if message.type == "error" and not expected:
            self.problems.append(message.text)

    def log_in(self, view: str = "processes") -> None:
        """Log in, and show a view, such as ``files/tmp``."""
        self.page.goto(f"{self.url}#/{view}")
        self.page.get_by_label("Token").fill(SECRET)
        self.page.keyboard.press("Enter")
        self.page.locator("main .root > *").first.wait_for()

    def show(self, view: str) -> None:
        """Show another view."""
        self.page.evaluate("hash => { location.hash = hash }", f"#/{view}")
        self.page.locator("main .root > *").first.wait_for()

    def call(self, path: str, body: Any = None) -> Any:
        """Call the API past the page; return the JSON reply."""
        request = urllib.request.Request(
            f"{self.daemon.url}/{path}",
            None if body is None else json.dumps(body).encode(),
            {"Authorization": f"Bearer {SECRET}"},
        )
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)

    @property
    def scrolls_sideways(self) -> bool:
        """Whether the page is wider than the window."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))

    def close(self) -> None:
        """Close the page. Raises if it has logged an error or asked another host."""
        self.context.close()
        assert (self.problems, self.foreign) == ([], [])
