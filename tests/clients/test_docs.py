"""What docs/client.md has people write, run."""

from __future__ import annotations

import re
import shutil
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.client import Sandbox
from tests.daemon import Daemon

TEXT = (Path(__file__).parents[2] / "docs/client.md").read_text()


@pytest.fixture
def clean() -> Iterator[None]:
    """Remove what the examples leave."""
    yield
    Path("/tmp/example-sh").unlink(missing_ok=True)
    for name in ("/tmp/example", "/tmp/example-copy"):
        shutil.rmtree(name, ignore_errors=True)


@pytest.mark.usefixtures("clean")
def test_the_examples(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 7
    with Sandbox(daemon.url, daemon.secret) as sandbox:
        for block in blocks:
            code = block.replace("http://localhost:3030", daemon.url).replace("your-secret", daemon.secret)
            exec(code, {"sandbox": sandbox, "threading": threading, "urllib": urllib, "__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "hello" in printed
    assert "killed" in printed
    assert "other text" in printed
    assert printed.endswith("ready\n")
