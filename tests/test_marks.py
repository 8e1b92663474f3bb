"""The walk over all processes, in a process of its own that has few descriptors."""

from __future__ import annotations

import subprocess
import sys

WALK = """
import os, resource, signal, subprocess
from sandboxd.processes.marks import Marks, sweep

mark = Marks().new()
soft, hard = resource.getrlimit(resource.RLIMIT_RTTIME)
resource.setrlimit(resource.RLIMIT_RTTIME, (mark, hard))
children = [subprocess.Popen(["sleep", "300"]) for _ in range(30)]
resource.setrlimit(resource.RLIMIT_RTTIME, (soft, hard))
choose = {mark: signal.SIGKILL}.get
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 10, hard))
walks = 0
while sweep(choose, 5.0):
    walks += 1
assert walks
assert [child.wait(10) for child in children] == [-signal.SIGKILL] * 30
"""


def test_a_tree_is_gone_even_if_its_processes_are_more_than_the_descriptors() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", WALK], check=True, timeout=30)
