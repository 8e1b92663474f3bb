"""Some thousands of requests while faults are injected; `make soak` does it for longer."""

from __future__ import annotations

import subprocess
import sys

from tests.system.lab import ROOT


def test_faults_are_answered_for_and_leave_nothing_behind() -> None:
    soak = [sys.executable, "-m", "tests.soak", "--faults=1", "--concurrency=16"]
    ended = subprocess.run(soak, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
