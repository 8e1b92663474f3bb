"""The benchmarks run, and say what they are to say. How fast anything is, is not asked here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import chart, fleet, history
from benchmarks.client import Failed
from benchmarks.events import check, lost_lines
from benchmarks.rows.streaming import numbers
from sandboxd import __version__
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
        *("--chart", str(tmp_path / "images"), "--history", str(tmp_path / "history")),
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
    assert [path.name for path in (tmp_path / "history").iterdir()] == [f"{__version__}.json"]
    assert json.loads((tmp_path / "history" / f"{__version__}.json").read_text())["rows"] == found["rows"]
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [
        "performance-dark.svg",
        "performance-light.svg",
    ]


@pytest.mark.slow
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


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: only root sees the memory of a daemon")
@pytest.mark.slow
def test_a_fleet_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet, "SETTLED", 0.05)
    found = fleet.measure(2, 0.1)
    assert found["daemons"] == (2, "")
    assert all(value > 0 for name, (value, _) in found.items() if "processor" not in name)


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


def measured(name: str, values: list[float], limits: list[float], *, less: bool = False, **more: Any) -> dict[str, Any]:
    """A row of a document."""
    better = "less" if less else "more"
    return {"name": name, "title": name, "values": values, "limits": limits, "better": better, **more}


def test_the_chart_has_a_mark_for_each_ratio_in_both_schemes() -> None:
    rows = [
        measured("a <b>", [], [], limit_ratio=0.5, peer_ratio=1000.0),
        measured("c", [], [], limit_ratio=2.0),
        measured("d", [], [], limit_ratio=None),
    ]
    document = {"servers": ["one", "other & more"], "rows": rows}
    pictures = [chart.svg(document, scheme) for scheme in ("light", "dark")]
    assert pictures[0] != pictures[1]
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
        circles = list(root.iter("{http://www.w3.org/2000/svg}circle"))
        assert {"a <b>", "c", "to other & more", "0.50", "1000", "2.0"} <= set(texts)
        assert "d" not in texts
        assert len(circles) == 2 + 3  # a key and the marks
        assert all(0 < float(circle.get("cx", "")) < float(root.get("width", "")) for circle in circles)


def test_a_row_that_is_worse_than_its_noise_is_named(tmp_path: Path) -> None:
    first = [
        measured("steady", [100, 101, 99], [200, 200, 200]),
        measured("fell", [100, 101, 99], [200, 200, 200]),
        measured("noisy", [100, 150, 50], [200, 200, 200]),
        measured("slower", [1.0, 1.0], [], less=True),
        measured("slower-machine", [100, 100], [200, 200]),
        measured("gone", [1], [1]),
    ]
    second = [
        measured("steady", [95, 96, 94], [200, 200, 200]),
        measured("fell", [80, 81, 79], [200, 200, 200]),
        measured("noisy", [60, 60, 60], [200, 200, 200]),
        measured("slower", [1.5, 1.5], [], less=True),
        measured("slower-machine", [50, 50], [100, 100]),
        measured("new", [1], [1]),
    ]
    for version, rows in (("0.9.0", first), ("0.8.0", [measured("fell", [1], [200])])):
        assert not list(history.record({"rows": rows}, version, tmp_path))
    assert list(history.record({"rows": second}, "0.10.0", tmp_path)) == [
        "WORSE: fell has 0.80 of what 0.9.0 had (noise 0.10)",
        "WORSE: slower has 0.67 of what 0.9.0 had (noise 0.10)",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.10.0.json", "0.8.0.json", "0.9.0.json"]
