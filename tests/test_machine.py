"""The use of processors, memory and disk, as the metrics have it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandboxd.processes.machine import MachineUsage, machine_usage
from tests.client import Api

MEMINFO = "MemTotal:       4000 kB\nMemFree:         100 kB\nMemAvailable:   1000 kB\nHugePages_Total:   0\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """``/proc``, as far as it is read."""
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "meminfo").write_text(MEMINFO)
    (proc / "stat").write_text("cpu  100 20 30 9999 888 1 2 3 40 50\ncpu0 1 2 3 4 5 6 7 8 9 10\n")
    return proc


def test_the_use_of_a_machine(proc: Path, tmp_path: Path) -> None:
    seconds = 156 / os.sysconf("SC_CLK_TCK")
    processors = len(os.sched_getaffinity(0))
    assert machine_usage(proc, tmp_path) == MachineUsage(processors, seconds, 4096000, 3072000)


@pytest.mark.parametrize(("limit", "memory"), [("2000000", 2000000), ("max", 4096000), ("9000000000", 4096000)])
def test_the_use_of_a_container(proc: Path, tmp_path: Path, limit: str, memory: int) -> None:
    for name, text in {
        "cpu.max": "50000 100000",
        "cpu.stat": "usage_usec 2500000\nuser_usec 2000000",
        "memory.current": "900000",
        "memory.max": limit,
        "memory.stat": "anon 500000\ninactive_file 300000",
    }.items():
        (tmp_path / name).write_text(text + "\n")
    assert machine_usage(proc, tmp_path) == MachineUsage(0.5, 2.5, memory, 600000)


async def test_the_metrics_have_it(api: Api) -> None:
    async def sampled() -> dict[str, float]:
        metrics = (await api.get("/metrics.json")).json()["metrics"]
        return {sample["name"]: sample["value"] for metric in metrics for sample in metric["samples"]}

    found = await sampled()
    while "sandboxd_machine_disk_bytes" not in found:  # it is looked at when it was asked for
        found = await sampled()
    assert 0 < found["sandboxd_machine_disk_used_bytes"] < found["sandboxd_machine_disk_bytes"]
    assert 0 < found["sandboxd_machine_memory_used_bytes"] < found["sandboxd_machine_memory_bytes"]
    assert found["sandboxd_machine_processors"] > 0
    assert found["sandboxd_machine_processor_seconds_total"] >= 0
