"""How it starts, finds its sandbox, and fails."""

from __future__ import annotations

import json
import re
import resource
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandboxd.ctl.main import COMMANDS
from tests.ctl.conftest import PROGRAM, Ctl
from tests.daemon import Daemon

#: What ``run`` and its like have no use for, and what takes long to import.
NOT_FOR_RUN = ("rich", "pygments", "asyncio", "twisted", "klein", "prometheus_client", "websockets")


def test_run_imports_little(ctl: Ctl, environ: dict[str, str]) -> None:
    command = [PROGRAM[0], "-X", "importtime", *PROGRAM[1:], "run", "true"]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "sandboxd.client.blocking" in imported
    assert {name for name in imported if name.partition(".")[0] in NOT_FOR_RUN} == set()


@pytest.mark.slow
def test_it_starts_fast(ctl: Ctl) -> None:
    def measure() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        ctl("run", "true")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # Of processor time, which a busy machine does not stretch much; it waits for nothing but the daemon's answer.
    assert min(measure() for _ in range(5)) < 0.3


@pytest.mark.slow
def test_help_and_version(ctl: Ctl) -> None:
    text = ctl("--help").stdout
    assert all(re.search(rf"^  {name} ", text, re.M) for name in COMMANDS)
    for name in COMMANDS:
        assert "Usage: sandboxctl" in ctl(name, "--help").stdout
    assert "version" in ctl("--version").stdout
    assert "No such command 'rum'" in ctl("rum", code=2).stderr


def test_the_document_names_every_command() -> None:
    text = (Path(__file__).parents[2] / "docs/sandboxctl.md").read_text()
    assert {name for name in COMMANDS if not re.search(rf"`(sandboxctl )?{name}\b|sandboxctl {name} ", text)} == set()


def test_errors_say_what_to_do(ctl: Ctl, tmp_path: Path) -> None:
    nowhere = {"SANDBOX_URL": "", "SANDBOX_SECRET": ""}
    assert "sandboxctl context add" in ctl("ps", env=nowhere, code=125).stderr
    assert "SANDBOX_SECRET" in ctl("ps", env={"SANDBOX_SECRET": "wrong"}, code=125).stderr
    gone = ctl("--patience", "0", "ps", env={"SANDBOX_URL": "http://127.0.0.1:9"}, code=125)
    assert "cannot be reached" in gone.stderr
    assert "from SANDBOX_URL" in gone.stderr
    assert "is not the URL" in ctl("--url", "nonsense", "ps", code=125).stderr
    assert "no such file" in ctl("cat", f"{tmp_path}/none", code=125).stderr.lower()
    secret = ctl("--secret-file", str(tmp_path / "none"), "ps", code=125)
    assert "cannot be read" in secret.stderr


@pytest.mark.parametrize("setting", [{"NO_PROXY": "[::1]"}, {"ALL_PROXY": "socks5://127.0.0.1:9"}])
def test_a_proxy_setting_that_cannot_be_used(ctl: Ctl, setting: dict[str, str]) -> None:
    (line,) = ctl("ps", env=setting, code=125).stderr.splitlines()
    assert "proxy setting" in line


def test_the_secret_may_be_in_a_file(ctl: Ctl, daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{daemon.secret}\n")
    ctl("--url", daemon.url, "--secret-file", str(tmp_path / "secret"), "ps", env={"SANDBOX_SECRET": ""})


def test_contexts(ctl: Ctl, daemon: Daemon, tmp_path: Path) -> None:
    nowhere = {"SANDBOX_URL": "", "SANDBOX_SECRET": ""}
    (tmp_path / "secret").write_text(daemon.secret)
    ctl("context", "add", "one", "--url", daemon.url, "--secret-file", str(tmp_path / "secret"), env=nowhere)
    ctl("context", "add", "two", "--url", f"{daemon.url}/", "--secret-stdin", env=nowhere, input=f"{daemon.secret}\n")
    assert ctl("run", "echo hi", env=nowhere).stdout == "hi\n"
    ctl("context", "use", "two", env=nowhere)
    assert ctl("run", "echo hi", env=nowhere).stdout == "hi\n"
    found = json.loads(ctl("context", "list", "--json", env=nowhere).stdout)
    assert found == [
        {"name": "one", "url": daemon.url, "current": False},
        {"name": "two", "url": daemon.url, "current": True},
    ]
    listed = ctl("context", "list", env=nowhere).stdout
    assert daemon.secret not in listed
    file = tmp_path / "config/sandboxctl/contexts.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert ctl("--context", "one", "run", "echo hi", env={"SANDBOX_URL": "http://127.0.0.1:9"}).stdout == "hi\n"
    assert "there are: one, two" in ctl("context", "use", "three", env=nowhere, code=125).stderr
    ctl("context", "remove", "two", env=nowhere)
    assert "which sandbox?" in ctl("ps", env=nowhere, code=125).stderr
    file.write_text("{")
    assert "mend it" in ctl("ps", env=nowhere, code=125).stderr


def test_the_secret_of_the_environment_is_not_sent_to_a_context(ctl: Ctl, daemon: Daemon) -> None:
    ctl("context", "add", "other", "--url", daemon.url)
    assert "secret" in ctl("--context", "other", "ps", code=125).stderr.lower()


def test_health(ctl: Ctl, daemon: Daemon) -> None:
    assert "ready" in ctl("health", env={"SANDBOX_SECRET": ""}).stdout
    assert json.loads(ctl("health", "--json").stdout)["ready"] is True
    assert "cannot be reached" in ctl("health", env={"SANDBOX_URL": "http://127.0.0.1:9"}, code=1).stderr


def test_top(ctl: Ctl) -> None:
    text = ctl("top", "--once").stdout
    assert "sandboxd" in text
    assert "memory" in text
    assert json.loads(ctl("top", "--json").stdout)["metrics"]["sandboxd_ready"] == 1


@pytest.mark.slow
def test_top_on_a_terminal(terminal: Callable[..., Any]) -> None:
    child = terminal("top")
    for _ in range(2):  # it is drawn anew
        child.expect("requests/s")
    child.sendintr()
    child.wait()
    assert child.exitstatus == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(ctl: Ctl, shell: str) -> None:
    assert "_SANDBOXCTL_COMPLETE" in ctl("completion", shell).stdout


def test_completion_of_ids_and_commands(ctl: Ctl) -> None:
    id = ctl("start", "true").stdout.strip()

    def complete(*words: str) -> list[str]:
        env = {
            "_SANDBOXCTL_COMPLETE": "bash_complete",
            "COMP_WORDS": " ".join(words),
            "COMP_CWORD": str(len(words) - 1),
        }
        return [line.partition(",")[2] for line in ctl(env=env).stdout.splitlines()]

    assert "port-forward" in complete("sandboxctl", "port")
    assert complete("sandboxctl", "logs", id[:6]) == [id]
