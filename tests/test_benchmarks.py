"""The benchmarks run, and say what they are to say. How fast anything is, is not asked here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.client import Failed
from benchmarks.events import check, lost_lines
from benchmarks.rows.streaming import numbers
from tests.daemon import Daemon

ROOT = Path(__file__).parent.parent


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_rows_are_measured_beside_their_limits_and_a_peer(daemon: Daemon, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = benchmarks(
        *("--quick", "--only", "run-p50", "logs-10", "memory-idle", "--json", str(file), "--secret", daemon.secret),
        *("--url", daemon.url, "--proxy-port", str(daemon.proxy_port), "--pid", str(daemon.pid)),
        *("--peer-url", daemon.url, "--peer-proxy-port", str(daemon.proxy_port), "--names", "one", "other"),
    )
    assert done.returncode == 0, done
    found = json.loads(file.read_text())
    assert found["servers"] == ["one", "other"]
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["run-p50", "run-p99", "logs-10", "logs-10-lost", "memory-idle"]
    run = rows["run-p50"]
    assert (run["unit"], run["better"], len(run["values"]), run["failed"]) == ("ms", "less", 1, None)
    assert run["value"] > 0
    assert run["limit"] > 0
    assert run["limit_ratio"] == pytest.approx(run["limit"] / run["value"])
    assert run["peer_ratio"] == pytest.approx(run["peer"]["value"] / run["value"])
    assert run["load_cpu"] >= 0
    assert run["server_cpu"] >= 0
    assert run["peak_memory"] >= rows["memory-idle"]["value"] > 0
    assert rows["logs-10-lost"]["value"] == 0
    assert "pid" in rows["memory-idle"]["peer"]["failed"]
    for text in ("/run, one at a time, p50", "FAILED: memory-idle, other: "):
        assert text in done.stdout


def test_a_row_that_fails_is_told(daemon: Daemon) -> None:
    secret = f"not-{daemon.secret}"
    done = benchmarks("--quick", "--only", "health", "run-8", "--url", daemon.url, "--secret", secret)
    assert done.returncode == 1
    assert "FAILED: run-8, sandboxd: wrong reply" in done.stdout
    assert "FAILED: health" not in done.stdout
    assert secret not in done.stdout + done.stderr


def test_a_server_that_does_not_start_is_told() -> None:
    done = benchmarks("--quick", "--only", "health", "--command", f"{sys.executable} -c 'raise SystemExit(chr(65))'")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "sandboxd: it does not start: A\n"


def test_an_unknown_row_is_refused() -> None:
    done = benchmarks("--only", "no-such-row")
    assert (done.returncode, done.stdout) == (2, "")
    assert "no-such-row" in done.stderr


def stream(*lines: bytes, end: bytes = b'event: complete\ndata: {"code":0,"error":false}\n\n') -> bytes:
    return b"".join([b'event: output\ndata: {"stream":"stdout","data":"%b"}\n\n' % line for line in lines]) + end


def test_output_that_is_whole_passes() -> None:
    check(stream(b"1", b"2", b"3"), numbers(3))
    partial = b'event: output\ndata: {"stream":"stdout","data":"1","partial":true}\n\n'
    check(partial + stream(b"2"), b"12\n")


@pytest.mark.parametrize(
    "body",
    [
        stream(b"1", b"3"),
        stream(b"1", b"3", b"2"),
        stream(b"1", b"2", b"3", end=b""),
        stream(b"1", b"2", b"3") + stream(),
        stream(b"1", b"2", b"3", end=b'event: complete\ndata: {"code":1,"error":true}\n\n'),
    ],
)
def test_output_that_is_not_whole_fails(body: bytes) -> None:
    with pytest.raises(Failed):
        check(body, numbers(3))


def test_lost_lines_are_counted() -> None:
    assert lost_lines(stream(b"1", b"2", b"3"), numbers(3)) == 0
    assert lost_lines(stream(b"1", b"3"), numbers(3)) == 1
    for wrong in (stream(b"1", b"3", b"2"), stream(b"1", b"2", b"2", b"3")):
        with pytest.raises(Failed):
            lost_lines(wrong, numbers(3))
