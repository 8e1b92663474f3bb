"""``POST /mcp``: the protocol as its specification has it, and what the tools do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from sandboxd.mcp.route import is_own_origin
from tests.client import Api, Events, Response
from tests.waiting import gone, pids_in, until, within

VERSION = {"MCP-Protocol-Version": "2025-11-25"}


def message(method: str, id: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": id, "method": method, "params": params}


async def send(api: Api, body: Any, headers: dict[str, str] | None = None) -> Response:
    return await within(20, api.post("/mcp", body, {**VERSION, **(headers or {})}))


async def ask(api: Api, method: str, **params: Any) -> Any:
    response = await send(api, message(method, **params))
    assert response.status == 200, response
    assert response.json()["id"] == 1
    return response.json()


async def call(api: Api, name: str, **arguments: Any) -> Any:
    """The structured result of a call that succeeds, held against the tool's schema."""
    answer = (await ask(api, "tools/call", name=name, arguments=arguments))["result"]
    assert not answer["isError"], answer
    tools = (await ask(api, "tools/list"))["result"]["tools"]
    (tool,) = [tool for tool in tools if tool["name"] == name]
    jsonschema.validate(arguments, tool["inputSchema"])
    jsonschema.validate(answer["structuredContent"], tool["outputSchema"])
    assert answer["content"][0]["type"] == "text"
    return answer["structuredContent"]


async def text(api: Api, name: str, **arguments: Any) -> str:
    answer = (await ask(api, "tools/call", name=name, arguments=arguments))["result"]
    return answer["content"][0]["text"]


async def failure(api: Api, name: str, **arguments: Any) -> str:
    answer = (await ask(api, "tools/call", name=name, arguments=arguments))["result"]
    assert answer["isError"]
    assert "structuredContent" not in answer
    return answer["content"][0]["text"]


# The protocol


@pytest.mark.parametrize(
    ("asked", "spoken"),
    [
        ("2025-11-25", "2025-11-25"),
        ("2025-06-18", "2025-06-18"),
        ("2025-03-26", "2025-03-26"),
        ("2026-07-28", "2025-11-25"),
        ("1999-01-01", "2025-11-25"),
    ],
)
async def test_the_revision_is_negotiated(api: Api, asked: str, spoken: str) -> None:
    found = (await ask(api, "initialize", protocolVersion=asked, capabilities={}, clientInfo={}))["result"]
    assert found["protocolVersion"] == spoken
    assert found["serverInfo"]["name"] == "sandboxd"
    assert found["capabilities"] == {"tools": {"listChanged": False}}


async def test_tools_are_listed_with_schemas_and_annotations(api: Api) -> None:
    tools = (await ask(api, "tools/list"))["result"]["tools"]
    assert len({tool["name"] for tool in tools}) == len(tools) == 14
    for tool in tools:
        for schema in (tool["inputSchema"], tool["outputSchema"]):
            jsonschema.Draft202012Validator.check_schema(schema)
            assert schema["type"] == "object"
        assert tool["inputSchema"]["additionalProperties"] is False
        assert set(tool["annotations"]) == {"title", "readOnlyHint", "destructiveHint", "openWorldHint"}
    read_only = {tool["name"] for tool in tools if tool["annotations"]["readOnlyHint"]}
    assert {"read_file", "list_directory", "search_files"} <= read_only
    assert read_only.isdisjoint({"run_command", "write_file", "edit_file", "stop_process"})


async def test_ping(api: Api) -> None:
    assert (await ask(api, "ping"))["result"] == {}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, -32700),
        (b"[]", 400, -32600),
        ({"id": 1, "method": "ping"}, 400, -32600),
        ({"jsonrpc": "2.0", "id": 1}, 400, -32600),
        ({"jsonrpc": "2.0", "id": None, "method": "ping"}, 400, -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": 5}, 400, -32600),
        ({"jsonrpc": "2.0", "id": 1, "method": "ping", "params": []}, 400, -32602),
        (message("server/discover"), 200, -32601),
        (message("resources/list"), 200, -32601),
        (message("tools/call", name="no_such_tool"), 200, -32602),
        (message("tools/call"), 200, -32602),
        (message("initialize"), 200, -32602),
    ],
)
async def test_malformed_messages(api: Api, body: Any, status: int, code: int) -> None:
    response = await send(api, body)
    assert (response.status, response.json()["error"]["code"]) == (status, code)


async def test_notifications_and_answers_are_accepted(api: Api) -> None:
    for body in (
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        {"jsonrpc": "2.0", "id": 1, "result": {}},
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": {}}},
        {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": True}},
    ):
        response = await send(api, body)
        assert (response.status, response.body) == (202, b"")


async def test_batches_are_of_one_revision_only(api: Api) -> None:
    batch = [message("ping", 1), {"jsonrpc": "2.0", "method": "notifications/initialized"}, message("ping", "two")]
    response = await send(api, batch, {"MCP-Protocol-Version": "2025-03-26"})
    assert response.status == 200
    assert response.json() == [{"jsonrpc": "2.0", "id": id, "result": {}} for id in (1, "two")]
    assert (await send(api, batch)).status == 400
    assert (await within(10, api.post("/mcp", batch))).status == 200  # without the header it is that revision


async def test_a_revision_that_is_not_spoken_is_refused(api: Api) -> None:
    response = await send(api, message("ping"), {"MCP-Protocol-Version": "2026-07-28"})
    assert response.status == 400
    assert "2025-11-25" in response.json()["error"]["message"]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
async def test_there_are_no_sessions_and_no_stream_of_the_servers_own(api: Api, method: str) -> None:
    response = await within(10, api.call(method, "/mcp"))
    assert response.status == 405
    assert response.headers.getRawHeaders("Allow") == ["POST"]


async def test_the_token_is_needed(api: Api) -> None:
    assert (await within(10, Api(api.url, None).post("/mcp", message("ping")))).status == 401


async def test_pages_of_others_are_refused(api: Api) -> None:
    assert (await send(api, message("ping"), {"Origin": "http://evil.example.com"})).status == 403
    assert (await send(api, message("ping"), {"Origin": api.url})).status == 200


@pytest.mark.parametrize(
    ("origin", "host", "expected"),
    [
        ("http://127.0.0.1:3030", "127.0.0.1:3030", True),
        ("http://localhost:3030", "localhost:3030", True),
        ("http://[::1]:3030", "[::1]:3030", True),
        ("http://evil.example.com", "evil.example.com", False),
        ("http://127.0.0.1:3031", "127.0.0.1:3030", False),
        ("null", "127.0.0.1", False),
        ("http://localhost.evil.com", "localhost.evil.com", False),
    ],
)
def test_a_name_that_is_rebound_is_not_ours(origin: str, host: str, expected: bool) -> None:
    assert is_own_origin(origin, host) is expected


async def test_a_message_that_is_too_large(api: Api) -> None:
    assert (await send(api, b" " * (16 * 1024 * 1024 + 1))).status == 413


# Commands


async def test_a_command(api: Api, tmp_path: Path) -> None:
    found = await call(
        api, "run_command", command="pwd; echo $A; cat; exit 3", cwd=str(tmp_path), env={"A": "b"}, input="in"
    )
    assert found == {"exit_code": 3, "stdout": f"{tmp_path}\nb\nin", "stderr": ""}
    assert await text(api, "run_command", command="echo out; echo err >&2") == "out\n[stderr]\nerr\n[exit code 0]"


async def test_long_output_is_cut_in_the_middle_and_says_so(api: Api) -> None:
    found = await call(api, "run_command", command="seq 100000")
    assert found["stdout"].startswith("1\n2\n")
    assert found["stdout"].endswith("\n100000\n")
    assert f"[... {found['stdout_bytes_left_out']} bytes left out ...]" in found["stdout"]
    assert len(found["stdout"]) < 31_000


@pytest.mark.slow
async def test_a_timeout_kills_all_of_it(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    found = await call(api, "run_command", command=f"setsid sleep 300 & echo $! > {file}; sleep 300", timeout=0.5)
    assert found["timed_out"]
    await gone(await pids_in(file))


async def test_progress_is_streamed_before_the_result(api: Api, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    body = message("tools/call", name="run_command", arguments={"command": f"echo one; cat {gate}; echo two"})
    body["params"]["_meta"] = {"progressToken": "token"}
    response = await api.request("POST", "/mcp", body, VERSION)
    events: list[Any] = []
    finished: Deferred[None] = Deferred.fromCoroutine(_collect(Events(response), events))
    await until(lambda: events)
    assert events[0]["method"] == "notifications/progress"
    assert events[0]["params"] == {"progressToken": "token", "progress": 1, "message": "one"}
    gate.write_text("")
    await finished.addTimeout(10, reactor)
    assert events[-1]["id"] == 1
    assert events[-1]["result"]["structuredContent"]["stdout"] == "one\ntwo\n"


async def _collect(stream: Events, found: list[Any]) -> None:
    pending = b""
    async for chunk in stream.chunks():
        *blocks, pending = (pending + chunk).split(b"\n\n")
        found += [json.loads(block.partition(b"data: ")[2]) for block in blocks if b"data: " in block]


async def test_a_hang_up_ends_the_command(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    running = api.request(
        "POST", "/mcp", message("tools/call", name="run_command", arguments={"command": f"echo $$ > {file}; sleep 300"})
    )
    pids = await pids_in(file)
    running.addErrback(lambda _: None)
    running.cancel()
    await gone(pids)


async def test_a_cancelled_call_ends(api: Api, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    body = message("tools/call", "only", name="run_command", arguments={"command": f"echo $$ > {file}; sleep 300"})
    running = api.request("POST", "/mcp", body, VERSION)
    pids = await pids_in(file)
    cancel = {"jsonrpc": "2.0", "method": "notifications/cancelled", "params": {"requestId": "only"}}
    assert (await send(api, cancel)).status == 202
    await gone(pids)
    response = await running.addTimeout(10, reactor)  # the request does not stay open
    assert "cancelled" in (await response.json())["error"]["message"]


async def test_a_background_process_from_start_to_end(api: Api) -> None:
    started = await call(api, "start_process", command="while read line; do echo got $line; done", stdin=True)
    id = started["id"]
    assert started["status"] == "running"
    await call(api, "write_to_process", id=id, text="hello\n")
    found = await call(api, "wait_for_process", id=id, output="got hello", timeout=10)
    assert (found["reason"], found["line"]) == ("output", "got hello")
    output = await call(api, "read_process_output", id=id)
    assert (output["output"], output["last"]) == ("got hello\n", 1)
    assert (await call(api, "read_process_output", id=id, after=1))["output"] == ""
    assert id in {process["id"] for process in (await call(api, "list_processes"))["processes"]}
    assert (await call(api, "stop_process", id=id))["status"] == "killed"
    assert "stdin" in await failure(api, "write_to_process", id=id, text="x")


async def test_the_last_lines_of_a_process(api: Api) -> None:
    started = await call(api, "start_process", command="seq 100")
    await call(api, "wait_for_process", id=started["id"], timeout=10)
    assert (await call(api, "read_process_output", id=started["id"], tail=2))["output"] == "99\n100\n"


async def test_a_server_is_waited_for(api: Api, tmp_path: Path) -> None:
    serve = "python3 -m http.server 0 --bind 127.0.0.1 2>&1"
    started = await call(
        api, "start_process", command=f"exec {serve}", cwd=str(tmp_path), env={"PYTHONUNBUFFERED": "1"}
    )
    line = (await call(api, "wait_for_process", id=started["id"], output="port ", timeout=15))["line"]
    port = int(line.partition("port ")[2].split()[0])
    assert (await call(api, "wait_for_port", port=port, path="/", timeout=10))["ready"]
    await call(api, "stop_process", id=started["id"], signal="KILL")
    assert not (await call(api, "wait_for_port", port=port, timeout=0.1))["ready"]


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("run_command", {}, "command"),
        ("run_command", {"command": "true", "cmd": "true"}, "cmd"),
        ("run_command", {"command": "true", "cwd": "/nowhere"}, "/nowhere"),
        ("run_command", {"command": "true", "timeout": -1}, "timeout"),
        ("read_process_output", {"id": "none"}, "list_processes"),
        ("read_file", {"path": "/nowhere"}, "no such file"),
        ("edit_file", {"path": "/etc/hostname", "old_text": "\x01", "new_text": ""}, "is not in the file"),
        ("search_files", {"pattern": "("}, "pattern"),
        ("find_files", {"pattern": "../x"}, "pattern"),
        ("wait_for_port", {"port": 1, "path": "/\u00e4"}, "path"),
        ("wait_for_port", {"port": 1, "path": "/\r\nX: y"}, "path"),
        ("wait_for_process", {"id": "x", "output": "a line\n"}, "output"),
    ],
)
async def test_what_the_model_can_mend_is_said(api: Api, name: str, arguments: dict[str, Any], words: str) -> None:
    assert words in await failure(api, name, **arguments)


# Files


async def test_files_are_written_read_and_edited(api: Api, tmp_path: Path) -> None:
    path = str(tmp_path / "new" / "f.py")
    assert (await call(api, "write_file", path=path, content="one\ntwo\nthree\n"))["bytes"] == 14
    assert await text(api, "read_file", path=path) == "one\ntwo\nthree\n"
    found = await call(api, "read_file", path=path, offset=2, limit=1)
    assert found == {"content": "two\n", "offset": 2, "lines": 1, "total_lines": 3}
    assert await call(api, "edit_file", path=path, old_text="two", new_text="2") == {"replaced": 1, "lines": [2]}
    assert Path(path).read_text() == "one\n2\nthree\n"
    assert "2 times" in await failure(api, "edit_file", path=path, old_text="e\n", new_text="")


async def test_files_are_listed_found_and_searched(api: Api, tmp_path: Path) -> None:
    for name in ("a.py", "sub/b.py", "sub/c.txt", ".git/d.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"first\nneedle in {name}\nlast\n")
    top = str(tmp_path)
    assert await text(api, "list_directory", path=top) == ".git/\na.py\nsub/"
    assert await text(api, "find_files", path=top, pattern="**/*.py") == "a.py\nsub/b.py"
    found = await call(api, "search_files", path=top, pattern="need.e", glob=["*.py"], context=1)
    assert [(match["path"], match["line"]) for match in found["matches"]] == [("a.py", 2), ("sub/b.py", 2)]
    assert found["matches"][0]["before"] == ["first"]
    assert (await call(api, "search_files", path=top, pattern="needle", limit=1))["more"]
