"""The adapter to Inspect AI: Inspect's own checks of sandboxes, and evaluations without a model."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task, eval
from inspect_ai.dataset import Sample
from inspect_ai.log import EvalLog
from inspect_ai.solver import Generate, TaskState, solver
from inspect_ai.util import (
    OutputLimitExceededError,
    SandboxEnvironmentSpec,
    SandboxUnavailableError,
    SandboxUserUnsupportedError,
    sandbox,
)
from inspect_ai.util._sandbox.limits import override_max_exec_output_size
from inspect_ai.util._sandbox.self_check import *  # noqa: F403

from sandboxd.client import Sandbox, SandboxGone
from sandboxd.integrations.inspect_ai import SandboxdConfig, SandboxdEnvironment
from sandboxd.integrations.local_daemon import LocalDaemon
from tests.daemon import Daemon, alive


@pytest.fixture
def config(daemon: Daemon, tmp_path: Path) -> SandboxdConfig:
    (tmp_path / "secret").write_text(f"{daemon.secret}\n")
    return SandboxdConfig(url=daemon.url, secret_file=str(tmp_path / "secret"), directory=str(tmp_path))


@pytest.fixture
async def sandbox_env(request: pytest.FixtureRequest, config: SandboxdConfig) -> AsyncIterator[SandboxdEnvironment]:
    chosen: SandboxdConfig | None = config
    if request.node.originalname == "test_exec_as_user":
        if os.geteuid() != 0 or shutil.which("adduser") is None:
            pytest.skip("NOT TESTED: it needs adduser(8), and a daemon that is root")
        chosen = None  # adduser(8) needs all rights of root, which the shared daemon has not
    environments = await SandboxdEnvironment.sample_init("task", chosen, {})
    environment = environments["default"].as_type(SandboxdEnvironment)
    yield environment
    await SandboxdEnvironment.sample_cleanup("task", chosen, environments, False)
    assert not Path(environment.directory).exists()


async def test_what_cannot_be_started(sandbox_env: SandboxdEnvironment) -> None:
    result = await sandbox_env.exec(["no-such-program"])
    assert (result.returncode, "no-such-program" in result.stderr) == (127, True)
    assert not (await sandbox_env.exec(["true"], cwd="none")).success
    with pytest.raises(SandboxUserUnsupportedError):
        await sandbox_env.exec(["true"], user="nonexistent")


async def test_output_over_the_limit(sandbox_env: SandboxdEnvironment) -> None:
    with override_max_exec_output_size(1000):
        assert len((await sandbox_env.exec(["head", "-c", "1000", "/dev/zero"])).stdout) == 1000
        with pytest.raises(OutputLimitExceededError):
            await sandbox_env.exec(["head", "-c", "1001", "/dev/zero"])


async def test_a_command_ends_with_the_task_that_waits_for_it(sandbox_env: SandboxdEnvironment) -> None:
    task = asyncio.create_task(sandbox_env.exec(["sh", "-c", "echo $$ > pid; sleep 60"]))
    pid_file = Path(sandbox_env.directory) / "pid"
    async with asyncio.timeout(10):
        while not (pid_file.exists() and pid_file.read_text()):
            await asyncio.sleep(0.02)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        while alive(int(pid_file.read_text())):
            await asyncio.sleep(0.02)


async def test_a_daemon_that_is_gone(tmp_path: Path) -> None:
    environments = await SandboxdEnvironment.sample_init("task", None, {})
    environment = environments["default"].as_type(SandboxdEnvironment)
    environment.sandbox.patience = 0.1
    assert (await environment.exec(["pwd"])).stdout == f"{environment.directory}\n"
    assert environment._daemon is not None
    os.kill(environment._daemon.pid, signal.SIGKILL)
    with pytest.raises(SandboxUnavailableError):
        await environment.exec(["true"])
    await environment.close()
    assert not Path(environment.directory).exists()


def test_a_daemon_of_ones_own_knows_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-key")
    daemon = LocalDaemon()
    try:
        with Sandbox(daemon.url, daemon.secret) as client:
            assert "sk-key" not in client.run("env; cat /proc/$PPID/environ").stdout
    finally:
        daemon.stop()
    assert not alive(daemon.pid)


def test_a_daemon_of_ones_own_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/ls")
    with pytest.raises(SandboxGone, match="unrecognized option"):
        LocalDaemon()


PROGRAM = """
import os, signal
from sandboxd.integrations.local_daemon import LocalDaemon
print(LocalDaemon().pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_daemon_of_ones_own_ends_with_the_process_that_has_started_it() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=60)
    pid, deadline = int(done.stdout), time.monotonic() + 20
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@solver
def commands() -> Any:
    """Run commands in the sample's sandbox."""

    async def solve(state: TaskState, generate: Generate) -> TaskState:
        await sandbox().write_file("made/by.txt", state.input_text)
        state.output.completion = (await sandbox().exec(["sh", "-c", "cat made/by.txt given.txt; pwd"])).stdout
        return state

    return solve


def task(spec: Any) -> Task:
    samples = [Sample(input=text, files={"given.txt": " given\n"}) for text in ("one", "two")]
    return Task(dataset=samples, solver=commands(), sandbox=spec)


def directories(log: EvalLog) -> set[str]:
    """The directories of two samples, each of which saw what it was given."""
    assert log.status == "success", log.error
    outputs = [sample.output.completion.split() for sample in log.samples or []]
    assert [output[:2] for output in outputs] == [["one", "given"], ["two", "given"]]
    return {output[2] for output in outputs}


@pytest.mark.parametrize("how", ["a daemon for each sample", "a running daemon", "a JSON file"])
def test_an_evaluation(how: str, config: SandboxdConfig, tmp_path: Path) -> None:
    (tmp_path / "sandbox.json").write_text(config.model_dump_json())
    spec = {
        "a daemon for each sample": "sandboxd",
        "a running daemon": SandboxEnvironmentSpec("sandboxd", config),
        "a JSON file": ("sandboxd", str(tmp_path / "sandbox.json")),
    }[how]
    (log,) = eval(task(spec), model="mockllm/model", log_dir=str(tmp_path / "logs"), display="none")
    found = directories(log)
    assert len(found) == 2
    assert not any(Path(directory).exists() for directory in found)


def test_the_example(
    example: Callable[[str], str], daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sandboxd.secret").write_text(daemon.secret)
    samples = [Sample(input="one", files={"given.txt": " given\n"})]
    names: dict[str, Any] = {"samples": samples, "solver": commands(), "model": "mockllm/model"}
    exec(example("sandboxd.integrations.inspect_ai"), names)
    (log,) = names["logs"]
    assert log.samples[0].output.completion.startswith("one given\n/tmp/inspect-")
    assert daemon.secret not in log.model_dump_json()
