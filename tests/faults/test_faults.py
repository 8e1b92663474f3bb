"""The daemon has none of the faults that users of such servers complain about."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemon import Daemon

ROOT = Path(__file__).parents[2]


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[list[str]]:
    """Options that name a small file system, if one can be mounted."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False, timeout=5).returncode != 0:
        yield []
        return
    yield ["--full-disk", str(path)]
    subprocess.run(["umount", path], check=True, timeout=5)


@pytest.mark.slow
def test_the_daemon_has_no_fault(daemon: Daemon, full_disk: list[str]) -> None:
    where = ["--url", daemon.url, "--secret", daemon.secret, "--proxy-port", str(daemon.proxy_port)]
    found = subprocess.run(
        [sys.executable, "-m", "tests.faults", *where, *full_disk],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert found.returncode == 0, found.stdout
    assert "FAIL" not in found.stdout.replace("0 FAIL", ""), found.stdout
