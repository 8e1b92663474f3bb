"""What the README has people type, typed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.daemon import Daemon

ROOT = Path(__file__).parent.parent

README = (ROOT / "README.md").read_text()

SERVER = """
print("serving on 8080")
import time
time.sleep(300)
"""


def blocks(section: str, language: str) -> list[str]:
    """The code of a section, by its heading."""
    text = README.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.skipif(not shutil.which("curl") or not shutil.which("jq"), reason="NOT TESTED: needs curl and jq")
def test_the_example_workflow(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(SANDBOX_SECRET="your-secret")
    (daemon.log.parent / "server.py").write_text(SERVER)
    script = "\n".join(blocks("Example workflow", "bash"))
    assert script.count("http://localhost:3030/") == 4
    script = script.replace("http://localhost:3030/", daemon.url + "/")
    # The one thing that nobody types: a stream that goes on is broken off, as its reader would.
    script = script.replace("  -N\n", "  -N --max-time 2 || test $? = 28\n")
    done = subprocess.run(["bash", "-e", "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done
    assert 'event: log\nid: 1\ndata: {"timestamp":' in done.stdout
    assert '"data":"serving on 8080"}' in done.stdout
    assert '"status": "running"' in done.stdout
    assert done.stdout.endswith('{"success":true,"message":"Process killed successfully"}')


def test_the_example_for_the_sdk(start_daemon: Callable[..., Daemon], capsys: pytest.CaptureFixture[str]) -> None:
    daemon = start_daemon(SANDBOX_SECRET="your-secret")
    (code,) = blocks("Example workflow", "python")
    exec(code.replace("http://localhost:3030", daemon.url))
    printed = capsys.readouterr().out
    assert printed in README
    assert printed.count("\n") == 3


@pytest.mark.skipif(not shutil.which("make"), reason="NOT TESTED: needs make")
def test_the_line_that_make_run_prints_has_the_secret(tmp_path: Path) -> None:
    for name in ("tox", "twistd"):  # what is set up already, and ends at once
        (tmp_path / name).symlink_to("/bin/true")
    made = ["make", "--silent", "run", f"BIN={tmp_path}", "PYTHON=true", "--old-file", str(tmp_path / "twistd")]
    environ = {"PATH": os.environ["PATH"], "SANDBOX_SECRET": "your-secret", "PORT": "3040"}
    printed = subprocess.check_output(made, cwd=ROOT, env=environ, text=True, timeout=30)
    (line,) = re.findall(r"^ +(curl .*)$", printed, re.MULTILINE)
    pasted = f"curl() {{ printf '%s\\n' \"$@\"; }}; {line}"
    arguments = subprocess.check_output(["sh", "-c", pasted], env=environ, text=True, timeout=30).splitlines()
    assert arguments == [
        "-H",
        "Authorization: Bearer your-secret",
        "-d",
        '{"cmd":"echo hello"}',
        "http://127.0.0.1:3040/run",
    ]
