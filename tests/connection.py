"""A connection to the daemon, for requests that no client would send."""

from __future__ import annotations

import json
import socket
from http.client import HTTPResponse
from typing import Any, cast

from tests.daemon import Daemon

MIB = 1024 * 1024


class Connection:
    """A connection to the daemon on which a test writes what it likes."""

    def __init__(self, daemon: Daemon) -> None:
        self.auth = f"Authorization: Bearer {daemon.secret}\r\n".encode()
        self.sock = socket.create_connection(("127.0.0.1", daemon.port), timeout=10)

    def send(self, request_line: str, headers: bytes = b"", body: bytes = b"") -> None:
        """Send a request, its headers as given."""
        self.sock.sendall(request_line.encode() + b" HTTP/1.1\r\nHost: test\r\n" + headers + b"\r\n" + body)

    def response(self, method: str = "GET") -> tuple[int, dict[str, str], Any]:
        """The next response: its status, its headers, its JSON."""
        response = HTTPResponse(self.sock, method=method)
        cast(Any, response).fp = _Unbuffered(response.fp, self.sock)  # or it would swallow a response behind this one
        try:
            response.begin()
            headers = {name.lower(): value for name, value in response.getheaders()}
            body = response.read()
        finally:
            response.close()
        assert headers["content-type"] == "application/json", (response.status, body)
        assert body.isascii()
        return response.status, headers, json.loads(body) if body else None

    def is_over(self) -> bool:
        """Waits for the end of the connection; whether it came without another byte."""
        return self.sock.recv(1) == b""


class _Unbuffered:
    """Reads a socket byte by byte where a buffer could read too much."""

    def __init__(self, buffered: Any, sock: socket.socket) -> None:
        buffered.close()
        self._file = sock.makefile("rb", 0)

    def readline(self, limit: int = -1) -> bytes:
        return self._file.readline(limit)

    def read(self, size: int = -1) -> bytes:
        data = b""
        while size < 0 or len(data) < size:
            chunk = self._file.read(MIB if size < 0 else size - len(data))
            if not chunk:
                break
            data += chunk
        return data

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._file.close()
