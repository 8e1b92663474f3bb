"""As much of Kubernetes' API as agent-sandbox's client asks of it; each claim is bound at once, to the same sandbox."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

SANDBOX = "sandboxd-x7k2p"


class Cluster(ThreadingHTTPServer):
    """
    :ivar claims: the claims that there are, by name.
    :ivar claimed: every claim that there was.
    :ivar pod_ips: the addresses of the sandbox's pod.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.claims: dict[str, Any] = {}
        self.claimed: list[Any] = []
        self.pod_ips = ["127.0.0.1"]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def write_config(self, path: Path) -> None:
        """Write what ``KUBECONFIG`` is to name."""
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "test",
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "clusters": [{"name": "test", "cluster": {"server": self.url}}],
            "users": [{"name": "test", "user": {}}],
        }
        path.write_text(json.dumps(config))  # JSON is YAML


@contextmanager
def cluster() -> Iterator[Cluster]:
    with Cluster() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def bound(claim: Any, pod_ips: list[str]) -> Any:
    """A claim as the controller leaves it."""
    ready = {"type": "Ready", "status": "True", "reason": "DependenciesReady", "message": ""}
    return {**claim, "status": {"conditions": [ready], "sandbox": {"name": SANDBOX, "podIPs": pod_ips}}}


class _Handler(BaseHTTPRequestHandler):
    server: Cluster

    def log_message(self, *args: object) -> None:
        pass

    def _answer(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode() + b"\n"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        claim = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        claim["metadata"] |= {"uid": f"uid-{len(self.server.claimed)}", "resourceVersion": "1"}
        self.server.claims[claim["metadata"]["name"]] = claim
        self.server.claimed.append(claim)
        self._answer(claim, 201)

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        *_, plural, name = url.path.split("/")
        if plural == "sandboxes":
            self._answer({"metadata": {"name": name}, "status": {"podIPs": self.server.pod_ips}})
            return
        name = parse_qs(url.query)["fieldSelector"][0].removeprefix("metadata.name=")
        self._answer({"type": "MODIFIED", "object": bound(self.server.claims[name], self.server.pod_ips)})

    def do_DELETE(self) -> None:
        self.server.claims.pop(self.path.partition("?")[0].rpartition("/")[2])
        self._answer({"kind": "Status", "status": "Success"})
