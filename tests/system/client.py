"""A client of the API that needs nothing but a function that does a request."""

from __future__ import annotations

import json
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

from tests.system.lab import SECRET


class Client:
    """
    Calls the API.

    :param ask: does a request, given method, path and body; returns the whole text of the reply.
    """

    def __init__(self, ask: Callable[[str, str, str | None], str]) -> None:
        self.ask = ask

    def health(self) -> Any:
        return json.loads(self.ask("GET", "/health", None))

    def post(self, route: str, /, **fields: Any) -> Any:
        return json.loads(self.ask("POST", route, json.dumps(fields)))

    def run(self, cmd: str, **fields: Any) -> Any:
        """The reply of ``/run``."""
        return self.post("/run", cmd=cmd, **fields)

    def output(self, cmd: str) -> str:
        """What a command writes. It must not fail."""
        ran = self.run(cmd)
        assert ran["code"] == 0, ran
        return str(ran["stdout"])


def over_tcp(port: int) -> Client:
    """A client of a port on loopback."""

    def ask(method: str, path: str, body: str | None) -> str:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        try:
            connection.request(method, path, body, {"Authorization": f"Bearer {SECRET}"})
            return connection.getresponse().read().decode("utf-8")
        finally:
            connection.close()

    return Client(ask)
