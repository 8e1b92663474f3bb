"""``ports``, ``bind`` and ``port-forward``."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.client import Sandbox
from sandboxd.client.replies import Gap
from tests.ctl.conftest import PROGRAM, Ctl
from tests.daemon import Daemon


@pytest.fixture
def server(daemon: Daemon, tmp_path: Path) -> Iterator[tuple[str, int]]:
    """A web server in the sandbox: its id, its port."""
    with Sandbox(daemon.url, daemon.secret) as sandbox:
        (tmp_path / "file").write_text("served\n")
        id = sandbox.start("exec python3 -u -m http.server 0 --bind 127.0.0.1", cwd=str(tmp_path)).id
        for record in sandbox.logs(id):
            assert not isinstance(record, Gap)
            if found := re.search(r"port (\d+)", record.data):
                break
        assert found is not None
        yield id, int(found[1])
        sandbox.kill(id)


def test_ports(ctl: Ctl, server: tuple[str, int]) -> None:
    id, port = server
    lines = ctl("ports").stdout.splitlines()
    assert any(re.match(rf"\s*{port}  127\.0\.0\.1  +\d+  {id[:8]}$", line) for line in lines), lines
    (found,) = [each for each in json.loads(ctl("ports", "--json").stdout) if each["port"] == port]
    assert found["execution"] == id


def test_bind(ctl: Ctl) -> None:
    ctl("bind", "--none")  # other tests share the daemon
    assert "forwards nothing" in ctl("bind").stdout
    assert "forwards to 8123" in ctl("bind", "8123").stdout
    assert "forwards to 8123" in ctl("bind", "8123").stdout
    assert "--replace" in ctl("bind", "8124", code=125).stderr
    assert json.loads(ctl("bind", "--replace", "8124", "--json").stdout)["port"] == "8124"
    assert "forwards nothing" in ctl("bind", "--none").stdout
    assert "range" in ctl("bind", "70000", code=2).stderr


def test_port_forward(environ: dict[str, str], server: tuple[str, int], ctl: Ctl) -> None:
    command = [*PROGRAM, "port-forward", f":{server[1]}", ":1"]
    pipe = subprocess.PIPE
    with (
        subprocess.Popen(command, env=environ, stdout=pipe, stderr=pipe, text=True) as process,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(process.kill)
        assert process.stdout is not None
        found = re.fullmatch(r"127\.0\.0\.1:(\d+) -> (\d+)\n", process.stdout.readline())
        other = re.fullmatch(r"127\.0\.0\.1:(\d+) -> 1\n", process.stdout.readline())
        assert found is not None
        assert other is not None
        assert int(found[2]) == server[1]
        for _ in range(3):
            with urllib.request.urlopen(f"http://127.0.0.1:{found[1]}/file", timeout=10) as response:
                assert response.read() == b"served\n"
        with pytest.raises(OSError):  # noqa: PT011  # however the connection ends
            urllib.request.urlopen(f"http://127.0.0.1:{other[1]}/", timeout=10)
        process.send_signal(2)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "port 1 is not reachable" in errors
    assert "LOCAL[:REMOTE]" in ctl("port-forward", "x", code=2).stderr
    assert "[OPTIONS] LOCAL[:REMOTE]...\n" in ctl("port-forward", "--help").stdout
    assert "secret" in ctl("port-forward", ":80", env={"SANDBOX_SECRET": "wrong"}, code=125).stderr
