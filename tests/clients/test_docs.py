"""What docs/client.md and docs/terminals.md have people write, run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.client import Sandbox
from tests.daemon import Daemon

DOCS = Path(__file__).parents[2] / "docs"

TEXT = (DOCS / "client.md").read_text()

NODE = shutil.which("node")


@pytest.fixture
def clean() -> Iterator[None]:
    """Remove what the examples leave."""
    yield
    Path("/tmp/example-sh").unlink(missing_ok=True)
    for name in ("/tmp/example", "/tmp/example-copy"):
        shutil.rmtree(name, ignore_errors=True)


@pytest.mark.usefixtures("clean")
@pytest.mark.slow
def test_the_examples(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) >= 7
    with Sandbox(daemon.url, daemon.secret) as sandbox:
        for block in blocks:
            code = block.replace("http://localhost:3030", daemon.url).replace("your-secret", daemon.secret)
            exec(code, {"sandbox": sandbox, "__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "hello" in printed
    assert "killed" in printed
    assert "other text" in printed
    assert printed.endswith("ready\n")


def has_websocket() -> bool:
    """Whether there is a Node.js that can be given a browser's WebSocket."""
    test = "process.exit(typeof WebSocket === 'undefined' ? 1 : 0)"
    return NODE is not None and subprocess.run([NODE, *FLAGS, "-e", test], stderr=subprocess.DEVNULL).returncode == 0


#: Node.js 20 has it behind a flag; later ones take that, too.
FLAGS = ["--experimental-websocket", "--no-warnings"]


@pytest.mark.skipif(not has_websocket(), reason="NOT TESTED: needs Node.js 20.10 or later")
@pytest.mark.slow
def test_the_terminal_in_javascript(daemon: Daemon, tmp_path: Path) -> None:
    (code,) = re.findall(r"```js\n(.*?)```", (DOCS / "terminals.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 10
    script = tmp_path / "terminal.mjs"
    script.write_text(code.replace("http://localhost:3030", daemon.url).replace("your-secret", daemon.secret))
    ran = subprocess.run([str(NODE), *FLAGS, script], capture_output=True, text=True, timeout=30)
    assert ran.returncode == 0, ran.stderr
    assert re.search(r"^hello", ran.stdout, re.MULTILINE)
    assert '"reason":"NonZeroExitCode"' in ran.stdout
    assert '"message":"3"' in ran.stdout
