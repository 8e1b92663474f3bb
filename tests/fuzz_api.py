"""
Schemathesis against the running daemon: requests made up from its OpenAPI document, its answers held against it.

Not part of the default suite; ``tox run -e api`` runs it. Whatever is made up, commands are ``true``
(:mod:`tests.fuzz_hooks`) and paths lead into a directory of the test.
"""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

from tests.daemon import SECRET, Daemon

SCHEMATHESIS = str(Path(sysconfig.get_path("scripts")) / "schemathesis")


def test_every_answer_is_as_the_document_says(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").write_text("text")
    outside = sorted(os.listdir("/"))
    daemon = Daemon(tmp_path, f"--root={root}", "--max-body=1000000")
    try:
        ended = subprocess.run(
            [
                SCHEMATHESIS, "--config-file=tests/schemathesis.toml", "run", f"{daemon.url}/openapi.json",
                f"--header=Authorization: Bearer {SECRET}",
                "--phases=examples,coverage,fuzzing", "--max-examples=20", "--seed=1", "--generation-database=none",
                "--exclude-path-regex=watch", "--request-timeout=20", "--no-color", "--continue-on-failure",
                "--warnings=off", "--suppress-health-check=all",
            ],
            env={**os.environ, "SCHEMATHESIS_HOOKS": "tests.fuzz_hooks", "NO_PROXY": "127.0.0.1"},
            cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
    finally:
        code = daemon.stop()
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert code == 0
    assert "Traceback" not in daemon.log.read_text()
    assert sorted(os.listdir("/")) == outside
