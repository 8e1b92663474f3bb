"""
The use of the machine's processors and memory: of the container, if the daemon runs in one, else of the whole machine.

A container is recognised by the files that a control group (version 2) has unless it is the root of all: runtimes give
each container a namespace in which its own control group is at the root.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
CGROUP = Path("/sys/fs/cgroup")


class MachineUsage(NamedTuple):
    """
    What is there, and what is used of it.

    :ivar processors: how many; a fraction if a quota says so.
    :ivar processor_seconds: time that they have worked, in all.
    :ivar memory: bytes that there are, or may be used.
    :ivar memory_used: bytes that are used, without what is merely cached.
    """

    processors: float
    processor_seconds: float
    memory: int
    memory_used: int


def machine_usage(proc: Path = PROC, cgroup: Path = CGROUP) -> MachineUsage:
    """
    Return the use of the machine, or of the container. Blocks, for as long as it takes to read files of the kernel's.

    :param proc: where the kernel's file system of processes is mounted.
    :param cgroup: where that of control groups is.
    :raise OSError: if one cannot be read.
    :raise ValueError: if one is not as the kernel writes it.
    """
    processors = float(len(os.sched_getaffinity(0)))
    memory = _table(proc / "meminfo")
    total = memory["MemTotal"] * 1024
    if not (cgroup / "memory.current").exists():
        times = (proc / "stat").read_text().split("\n", 1)[0].split()[1:]
        user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, times[:8])
        ticks = user + nice + system + irq + softirq + steal
        used = total - memory["MemAvailable"] * 1024
        return MachineUsage(processors, ticks / os.sysconf("SC_CLK_TCK"), total, used)
    quota, period = (cgroup / "cpu.max").read_text().split()
    if quota != "max":
        processors = min(processors, int(quota) / int(period))
    limit = (cgroup / "memory.max").read_text().strip()
    used = int((cgroup / "memory.current").read_text()) - _table(cgroup / "memory.stat")["inactive_file"]
    return MachineUsage(
        processors,
        _table(cgroup / "cpu.stat")["usage_usec"] / 1e6,
        total if limit == "max" else min(total, int(limit)),
        max(0, used),
    )


def _table(path: Path) -> dict[str, int]:
    """Return the numbers of a file with a name and a number in each line."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines}
