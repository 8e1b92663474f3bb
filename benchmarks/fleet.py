"""
What many daemons on one machine cost: ``python -m benchmarks.fleet``, as root. docs/fleet.md has what it has printed.

Memory is PSS, proc_pid_smaps(5): pages that several processes share are counted for each by its share of them, so the
sum is what all of them take together.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks import processes
from benchmarks.client import Failed
from benchmarks.server import SANDBOXD, Started

SECRET = "a-secret-of-the-fleet"

#: Seconds after which a daemon that was started has no more to do for that.
SETTLED = 1.0

#: Commands that each daemon has run when its memory is measured again.
COMMANDS = 20


def memory(servers: Sequence[Started]) -> int:
    """Bytes that daemons take together, their spawn servers included."""
    return sum(processes.memory(pid, "Pss") for server in servers for pid in processes.descendants(server.pid or 0))


def measure(count: int, seconds: float) -> dict[str, tuple[float, str]]:
    """
    Start daemons, and measure them together.

    :param count: how many.
    :param seconds: for how long they are watched while nothing is asked of them.
    :return: values and their units, by what they are of.
    :raise Failed: if a daemon does not do what it should.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers: list[Started] = []
        alone = 0
        for _ in range(count):
            servers.append(Started(SANDBOXD, SECRET, folder))
            stack.callback(servers[-1].stop)
            if not alone:
                time.sleep(SETTLED)
                alone = memory(servers)
        time.sleep(SETTLED)
        fresh = memory(servers)
        pids = [pid for server in servers for pid in processes.descendants(server.pid or 0)]
        used = processes.cpu(pids)
        time.sleep(seconds)
        idle = processes.cpu(pids) - used
        latencies = []
        for server in servers:
            for number in range(COMMANDS):
                began = time.perf_counter()
                if server.post("/run", cmd="echo hello")["stdout"] != "hello\n":
                    raise Failed("wrong reply")
                if number == 0:
                    latencies.append(time.perf_counter() - began)
        worked = memory(servers)
        return {
            "daemons": (count, ""),
            "start to first answer, one after the other, p50": (
                statistics.median(server.seconds for server in servers) * 1000,
                "ms",
            ),
            "memory of the first alone": (alone / 1e6, "MB"),
            "memory of each, idle since its start": (fresh / count / 1e6, "MB"),
            f"memory of each after {COMMANDS} commands": (worked / count / 1e6, "MB"),
            "processor time of each while idle": (idle / seconds / count * 100, "% of a core"),
            "first command of each, p50": (statistics.median(latencies) * 1000, "ms"),
            "first command of each, worst": (max(latencies) * 1000, "ms"),
        }


def main() -> None:
    """Print what is measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fleet", description=__doc__)
    parser.add_argument("--daemons", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long they are watched while idle")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # with which the daemons are stopped
    others = processes.Others()
    found = measure(options.daemons, options.seconds)
    for name, (value, unit) in found.items():
        print(f"{name:50} {value:10.5g} {unit}".rstrip())
    print(f"{'what other programs used meanwhile':50} {others.cores():10.2g} cores")


if __name__ == "__main__":
    main()
