"""The routes that agent-sandbox's client speaks, by hand; tests/agent_sandbox/ has the client itself."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.client import Api, Response
from tests.daemon import Daemon


@pytest.fixture
def base(daemon: Daemon, tmp_path: Path) -> str:
    """The path of an empty directory, as seen from the base directory, which is the daemon's working directory."""
    folder = daemon.log.parent / tmp_path.name
    folder.mkdir()
    return folder.name


async def upload(api: Api, *names: str | bytes, content: bytes = b"content") -> Response:
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\n'
    parts = [head % os.fsencode(name) + content + b"\r\n" for name in names]
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    return await api.call("POST", "/upload", b"".join(parts) + b"--b--\r\n", headers)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("echo out; echo err >&2", {"stdout": "out\n", "stderr": "err\n", "exit_code": 0}),
        ("exit 3", {"stdout": "", "stderr": "", "exit_code": 3}),
        ("kill -9 $$", {"stdout": "", "stderr": "", "exit_code": 137}),
        ("printf '\\377é'", {"stdout": "\ufffdé", "stderr": "", "exit_code": 0}),
    ],
)
async def test_execute(api: Api, command: str, expected: dict[str, Any]) -> None:
    response = await api.post("/execute", {"command": command})
    assert (response.status, response.json()) == (200, {**expected, "timed_out": False})


async def test_execute_ends_a_command_whose_time_is_up(api: Api) -> None:
    result = (await api.post("/execute", {"command": "echo first; sleep 300", "timeout_seconds": 0.2})).json()
    assert result == {"stdout": "first\n", "stderr": "", "exit_code": 124, "timed_out": True}


async def test_execute_answers_with_much_output(api: Api) -> None:
    result = (await api.post("/execute", {"command": "head -c 3000000 /dev/zero | tr '\\0' x; echo ä >&2"})).json()
    assert (len(result["stdout"]), result["stderr"], result["exit_code"]) == (3_000_000, "ä\n", 0)


@pytest.mark.parametrize(
    ("body", "field"),
    [({}, "command"), ({"command": 1}, "command"), ({"command": "x", "timeout_seconds": -1}, "timeout_seconds")],
)
async def test_execute_names_what_is_wrong(api: Api, body: Any, field: str) -> None:
    response = await api.post("/execute", body)
    assert response.status == 400
    assert field in response.json()["error"]


async def test_commands_and_files_are_in_the_base_directory(api: Api, daemon: Daemon, base: str) -> None:
    assert (await upload(api, f"{base}/a/b c.txt", f"/{base}/ä")).status == 200
    result = (await api.post("/execute", {"command": f"cat '{base}/a/b c.txt' {base}/ä; pwd"})).json()
    assert result["stdout"] == f"contentcontent{daemon.log.parent}\n"
    for name in (f"{base}/a/b c.txt", f"/{base}/ä"):
        for path in (quote(name, safe=""), quote(name, safe="/")):
            response = await api.get(f"/koyeb-sandbox/download/{path}")
            assert (response.status, response.body) == (200, b"content")
            assert (await api.get(f"/exists/{path}")).json() == {"path": name, "exists": True}
    assert (await api.get(f"/exists/{base}%2Fnone")).json()["exists"] is False
    assert (await api.get(f"/exists/{base}%2F%C3%A4%2Fbelow")).json()["exists"] is False
    assert (await api.get(f"/download/{base}%2Fnone")).status == 404
    assert (await api.get(f"/download/{base}")).status == 409


async def test_list(api: Api, daemon: Daemon, base: str) -> None:
    folder = daemon.log.parent / base
    (folder / "sub").mkdir()
    (folder / "file").write_bytes(b"12345")
    os.utime(folder / "file", (1, 1234567890.5))
    (folder / "to-sub").symlink_to("sub")
    (folder / "to-nothing").symlink_to("none")
    entries = (await api.get(f"/list/{base}")).json()
    assert [(entry["name"], entry["type"]) for entry in entries] == [
        ("file", "file"),
        ("sub", "directory"),
        ("to-nothing", "file"),
        ("to-sub", "directory"),
    ]
    assert entries[0] == {"name": "file", "size": 5, "type": "file", "mod_time": 1234567890.5}
    assert (await api.get(f"/list/{base}%2Fsub")).json() == []
    assert base in {entry["name"] for entry in (await api.get("/list/")).json()}
    assert (await api.get(f"/list/{base}%2Fnone")).status == 404
    assert (await api.get(f"/list/{base}%2Ffile")).status == 409
    head = await api.call("HEAD", f"/list/{base}")
    assert (head.status, head.body) == (200, b"")


async def test_list_many_entries_and_names_that_are_not_utf8(api: Api, daemon: Daemon, base: str) -> None:
    folder = os.fsencode(daemon.log.parent / base)
    for number in range(1200):
        Path(os.fsdecode(folder), f"{number:04}").touch()
    Path(os.fsdecode(folder + b"/\xff")).write_bytes(b"odd")
    entries = (await api.get(f"/list/{base}")).json()
    assert [entry["name"] for entry in entries] == [*(f"{number:04}" for number in range(1200)), "\udcff"]
    assert (await api.get(f"/download/{base}%2F%FF")).body == b"odd"


@pytest.mark.parametrize("path", ["..%2Fx", "a%2F..%2F..%2Fx", "%2F..%2F..%2Fetc%2Fpasswd"])
async def test_no_dots_lead_out(api: Api, path: str) -> None:
    for route in ("download", "list", "exists"):
        response = await api.get(f"/{route}/{path}")
        assert response.status == 403, response
        assert "base directory" in response.json()["error"]
    assert (await upload(api, path.replace("%2F", "/"))).status == 403


async def test_what_is_malformed_is_refused(api: Api) -> None:
    for response in (
        await api.get("/exists/a%00b"),
        await upload(api),
        await upload(api, ""),
        await upload(api, "."),
        await api.call("POST", "/upload", b"x", {"Content-Type": "text/plain"}),
    ):
        assert response.status == 400, response
    response = await api.call("DELETE", "/download/a")
    assert (response.status, response.headers.getRawHeaders("Allow")) == (405, ["GET"])
    assert (await api.get("/exists/a?x=1", {"Prefer": "handling=strict"})).status == 400
    assert (await Api(api.url, None).get("/exists/a%2Fb")).status == 401


async def test_the_root_is_the_base_directory(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "out").symlink_to("/etc")
    daemon = start_daemon(f"--root={root}")
    api = Api(daemon.url, daemon.secret)
    assert (await upload(api, "a/b")).status == 200
    assert (root / "a" / "b").read_bytes() == b"content"
    assert (await api.post("/execute", {"command": "pwd"})).json()["stdout"] == f"{root}\n"
    assert [(e["name"], e["type"]) for e in (await api.get("/list/")).json()] == [("a", "directory"), ("out", "file")]
    for path in ("/download/out%2Fpasswd", "/list/out", "/exists/out%2Fpasswd"):
        assert (await api.get(path)).status == 403
    assert (await upload(api, "out/x")).status == 403
    assert not Path("/etc/x").exists()


async def test_the_token_may_come_in_a_header_of_its_own(api: Api) -> None:
    own = "X-Sandboxd-Authorization"
    token = api.headers["Authorization"]
    for path in ("/exists/x", "/status"):
        for headers, status in [
            ({own: token}, 200),
            ({own: token, "Authorization": "Bearer the-routers"}, 200),
            ({own: "Bearer wrong", "Authorization": token}, 401),
            ({own: token.removeprefix("Bearer ")}, 401),
        ]:
            assert (await Api(api.url, None).get(path, headers)).status == status
