"""What the tests of the views have in common: the API past the page, and something to look at."""

from __future__ import annotations

import base64
import json
import urllib.request
from collections.abc import Callable
from typing import Any, TypeAlias
from urllib.parse import quote

from tests.daemon import Daemon

#: The fixture that opens a view.
Visit: TypeAlias = Callable[..., Any]


def ask(daemon: Daemon, path: str, body: object = None) -> Any:
    """Call the API: POST if there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{daemon.url}/{path}", data, {"Authorization": f"Bearer {daemon.secret}"})
    with urllib.request.urlopen(request, timeout=20) as response:
        return json.load(response)


def start(daemon: Daemon, cmd: str, **more: object) -> str:
    """Start a process; return its id."""
    return str(ask(daemon, "start_process", {"cmd": cmd, **more})["id"])


def wait(daemon: Daemon, id: str, **reason: object) -> None:
    """Wait for what ``reason`` names."""
    found = ask(daemon, f"processes/{id}/wait", {"timeout": 15, **reason})
    assert found["reason"] in reason, found


def address(path: object) -> str:
    """The address of the view of a path."""
    return f"files{quote(bytes(path) if isinstance(path, bytes) else str(path))}"


#: A picture of one red pixel.
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)
