"""A daemon that runs out of descriptors or threads: every route says so, and works again right afterwards."""

from __future__ import annotations

import http.client
import io
import json
import os
import resource
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from tests.daemon import Daemon

#: What may be answered without a descriptor: the contract's file routes answer 200 with an error.
ALLOWED = (200, 201, 204, 503)

WEBSOCKET = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
}
FORM = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\nx\r\n--b--\r\n'


class Call(NamedTuple):
    """
    A request.

    :ivar ends: whether its response is read to the end.
    """

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = {}  # noqa: RUF012
    ends: bool = True


def post(path: str, /, **fields: Any) -> Call:
    return Call("POST", path, json.dumps(fields).encode())


def tool(name: str, /, **arguments: Any) -> Call:
    message = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": name, "arguments": arguments}}
    headers = {"Content-Type": "application/json", "Accept": "application/json, text/event-stream"}
    return Call("POST", "/mcp", json.dumps(message).encode(), headers)


def calls(folder: Path, id: str) -> list[Call]:
    """One request at least of every kind that needs a descriptor or a thread."""
    file, new = str(folder / "file"), str(folder / "new")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("empty"))
    return [
        *(post("/run", cmd="true", **fields) for fields in ({}, {"input": "x" * 200_000}, {"cwd": "/usr"})),
        *(post("/run", cmd="true", **fields) for fields in ({"tty": True}, {"user": "root"}, {"cwd": str(folder)})),
        post("/run", cmd=": " + "x" * 200_000),
        post("/run_streaming", cmd="true", merge_stderr=True),
        post("/start_process", cmd="true"),
        post("/read_file", path=file),
        post("/read_file", path=file, offset=1, limit=1),
        post("/write_file", path=new, content="x"),
        post("/list_dir", path=str(folder)),
        Call("GET", f"/files?path={file}"),
        Call("PUT", f"/files?path={new}", b"x" * 100_000),
        Call("GET", f"/archive?path={folder}"),
        Call("PUT", f"/archive?path={folder}", archive.getvalue()),
        Call("GET", f"/watch?path={folder}", ends=False),
        Call("GET", f"/files/stat?path={file}"),
        Call("GET", f"/files/list?path={folder}"),
        post("/files/grep", path=file, pattern="text"),
        post("/files/glob", path=str(folder), pattern="**/*"),
        post("/files/edit", path=file, edits=[{"old": "text", "new": "text"}]),
        post("/files/copy", **{"from": file, "to": new, "overwrite": True}),
        post("/files/touch", path=file),
        Call("POST", "/upload", FORM % new.encode(), {"Content-Type": "multipart/form-data; boundary=b"}),
        Call("GET", "/ports"),
        post("/ports/wait", port=1, timeout=0.01),
        post(f"/processes/{id}/wait", port=1, timeout=0.01),
        Call("GET", f"/processes/{id}"),
        Call("GET", f"/processes/{id}/attach", None, WEBSOCKET, ends=False),
        Call("GET", "/proxy/1/"),
        Call("GET", "/metrics"),
        Call("GET", "/status"),
        tool("run_command", command="true", cwd="/usr"),
        tool("write_file", path=new, content="x"),
        tool("search_files", path=file, pattern="text"),
        tool("wait_for_port", port=1, timeout=0.01),
    ]


class Client:
    """A client with a connection for each request, as the daemon can accept none meanwhile."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    @contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        """Open a connection that has been accepted."""
        connection = http.client.HTTPConnection("127.0.0.1", self._daemon.port, timeout=10)
        self.send(connection, Call("GET", "/health"))
        yield connection
        connection.close()

    def send(self, connection: http.client.HTTPConnection, call: Call) -> tuple[int, bytes]:
        """Return status and body of the response."""
        headers = {"Authorization": f"Bearer {self._daemon.secret}", **call.headers}
        connection.request(call.method, call.path, call.body, headers)
        response = connection.getresponse()
        return response.status, response.read() if call.ends or response.status >= 400 else b""


def limit_for(daemon: Daemon, spare: int) -> int:
    """Return the limit under which so many more descriptors can be opened."""
    used = {int(fd) for fd in os.listdir(f"/proc/{daemon.pid}/fd")}
    return [number for number in range(max(used) + spare + 2) if number not in used][spare]


def test_every_route_says_that_there_is_no_descriptor_and_works_again(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    client = Client(daemon)
    folder = tmp_path / "folder"
    (folder / "below").mkdir(parents=True)
    (folder / "file").write_text("some text\n")
    with client.connection() as connection:
        id = json.loads(client.send(connection, post("/start_process", cmd="cat", stdin=True))[1])["id"]
        client.send(connection, Call("GET", f"/processes/{id}"))  # imports what routes with parameters need
    before = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
    refused = set()
    for call in calls(folder, id):
        for spare in (0, 1, 3):
            what = f"{call.method} {call.path} {(call.body or b'')[:100]!r} with {spare} descriptors"
            with client.connection() as connection:
                resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit_for(daemon, spare), before[1]))
                status, body = client.send(connection, call)
                resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, before)
            assert status in (*ALLOWED, 101, 502), (what, status, body)
            assert b"internal error" not in body, (what, body)
            if status == 503:
                assert b"oo many" in body, (what, body)
                refused.add(call.path.partition("?")[0])
            with client.connection() as connection:
                status, body = client.send(connection, call)
                assert status in (200, 201, 204, 101, 502), (what, "afterwards", status, body)
                assert status != 200 or b"oo many" not in body, (what, "afterwards", body)
    assert {
        "/run",
        "/files",
        "/archive",
        "/watch",
        "/files/grep",
        "/ports",
        "/ports/wait",
        "/upload",
        "/proxy/1/",
    } <= refused
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


def test_a_request_for_which_no_thread_can_be_started_can_be_sent_again(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = start_daemon()
    client = Client(daemon)
    call = post("/files/grep", path=str(tmp_path), pattern="x")
    before = resource.prlimit(daemon.pid, resource.RLIMIT_AS)
    with client.connection() as connection:
        client.send(connection, post("/ports/wait", port=1, timeout=0.01))  # what routes need is imported
        resource.prlimit(daemon.pid, resource.RLIMIT_AS, (1 << 20, before[1]))  # a new thread has no room for its stack
        status, body = client.send(connection, call)
        resource.prlimit(daemon.pid, resource.RLIMIT_AS, before)
        assert (status, b"out of resources" in body) == (503, True), body
        assert client.send(connection, call)[0] == 200
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()
