"""
The adapter to Harbor: whole trials by its oracle, which knows a task's solution, and each method of an environment.

Harbor's own tests of environments are not in its package; they are of single vendors' clients.
"""

from __future__ import annotations

import ast
import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from harbor.models.task.config import EnvironmentConfig as TaskEnvironmentConfig
from harbor.models.trial.config import AgentConfig, EnvironmentConfig, TaskConfig, TrialConfig
from harbor.models.trial.paths import TrialPaths
from harbor.trial.trial import Trial

from sandboxd.integrations.harbor import SandboxdEnvironment
from tests.daemon import SECRET, Daemon

IMPORT_PATH = "sandboxd.integrations.harbor:SandboxdEnvironment"

#: A file system of its own: that of this machine, but for its top, where Harbor has its directories.
ROOT = """
chmod 755 "$0"
for name in /*; do
  if [ -L "$name" ]; then cp -P "$name" "$0$name"
  elif [ -d "$name" ]; then mkdir "$0$name" && mount --rbind "$name" "$0$name"
  fi
done
exec chroot "$0" "$@"
"""


@pytest.fixture(scope="session")
def own_root(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """What to start a program by, so that it has a top directory of its own."""
    via = ("unshare", "--mount", "sh", "-euc", ROOT)
    tried = subprocess.run(
        [*via, str(tmp_path_factory.mktemp("root")), "true"], capture_output=True, text=True, check=False, timeout=30
    )
    if tried.returncode != 0:
        pytest.skip(f"NOT TESTED: cannot make a file system for Harbor's directories: {tried.stderr.strip()}")
    return via


@pytest.fixture(scope="session")
def start(own_root: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[], Daemon]]:
    """Starts daemons, each with a top directory of its own."""
    started: list[Daemon] = []

    def begin() -> Daemon:
        folder = tmp_path_factory.mktemp("daemon")
        started.append(Daemon(folder, via=(*own_root, str(tmp_path_factory.mktemp("root")))))
        return started[-1]

    yield begin
    for daemon in started:
        assert daemon.stop() == 0
        assert "Traceback" not in daemon.log.read_text()


@pytest.fixture(scope="session")
def daemon(start: Callable[[], Daemon]) -> Daemon:
    return start()


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HARBOR_TELEMETRY", "off")
    Path("sandboxd.secret").write_text(f"{SECRET}\n")


@pytest.fixture
def task() -> Path:
    """A task whose test looks at what the oracle has made."""
    files = {
        "task.toml": '[environment]\ndocker_image = "any"\nworkdir = "/tmp/harbor-work"\nenv = {TOLD = "told"}\n',
        "instruction.md": "Write what you are told into answer.txt.\n",
        "environment/given.txt": "given\n",
        "solution/solve.sh": "set -o pipefail\necho $TOLD | cat > answer.txt\ncp answer.txt /logs/artifacts/\n",
        "tests/test.sh": "[ $(cat answer.txt) = told -a -e given.txt ] && echo 1 > /logs/verifier/reward.txt\n",
    }
    for name, text in files.items():
        path = Path("task", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/bin/bash\n{text}" if name.endswith(".sh") else text)
    return Path("task")


@pytest.fixture
async def environment(daemon: Daemon, task: Path, tmp_path: Path) -> AsyncIterator[SandboxdEnvironment]:
    environment = make(tmp_path, task, url=daemon.url)
    await environment.start(force_build=False)
    yield environment
    await environment.stop(delete=True)


def make(folder: Path, task: Path, session_id: str = "trial__env", **options: Any) -> SandboxdEnvironment:
    paths = TrialPaths(folder / session_id)
    paths.mkdir()
    return SandboxdEnvironment(
        task / "environment",
        "task",
        session_id,
        paths,
        TaskEnvironmentConfig(workdir="/tmp/harbor-work", env={"TOLD": "told"}),
        secret_file="sandboxd.secret",
        **options,
    )


def trial(daemon: Daemon, task: Path, name: str) -> TrialConfig:
    environment = EnvironmentConfig(
        import_path=IMPORT_PATH, kwargs={"url": daemon.url, "secret_file": "sandboxd.secret"}
    )
    return TrialConfig(
        task=TaskConfig(path=task),
        trial_name=name,
        agent=AgentConfig(name="oracle"),
        environment=environment,
    )


async def test_trials_at_once_have_a_sandbox_after_each_other(daemon: Daemon, task: Path) -> None:
    trials = [await Trial.create(trial(daemon, task, name)) for name in ("one", "two")]
    for result in await asyncio.gather(*(each.run() for each in trials)):
        assert result.exception_info is None
        assert result.verifier_result.rewards == {"reward": 1}
    assert list(Path("trials").rglob("artifacts/**/answer.txt"))


async def test_an_agent_does_not_find_the_solution_that_an_earlier_trial_has_left(daemon: Daemon, task: Path) -> None:
    result = await (await Trial.create(trial(daemon, task, "one"))).run()
    assert result.exception_info is None
    environment = make(Path.cwd(), task, url=daemon.url)
    await environment.start(False)
    assert (await environment.exec("find /solution /tests /logs -type f")).stdout == ""
    await environment.stop(True)


async def test_trials_at_once_take_one_sandbox_each(start: Callable[[], Daemon], daemon: Daemon, task: Path) -> None:
    urls = ",".join([daemon.url, start().url])
    first, second, third = (make(Path.cwd(), task, name, url=urls) for name in ("one", "two", "three"))
    await first.start(False)
    await second.start(False)
    assert {first.sandbox.url, second.sandbox.url} == set(urls.split(","))
    waiting = asyncio.create_task(third.start(False))
    assert not (await asyncio.wait([waiting], timeout=0.3))[0]
    url = first.sandbox.url
    await first.stop(True)
    await asyncio.wait_for(waiting, 20)
    assert third.sandbox.url == url
    await second.stop(True)
    await third.stop(True)


async def test_commands(environment: SandboxdEnvironment) -> None:
    result = await environment.exec("pwd; echo $TOLD $MORE $BASH_VERSION; echo err >&2; exit 3", env={"MORE": "more"})
    assert (result.stdout or "").startswith("/tmp/harbor-work\ntold more 5")
    assert (result.stderr, result.return_code) == ("err\n", 3)
    assert (await environment.exec("kill -TERM $$")).return_code == 143
    assert (await environment.exec("true", cwd="/none")).return_code == 127
    with pytest.raises(RuntimeError, match="timed out after 1 seconds"):
        await environment.exec("sleep 60", timeout_sec=1)
    if os.geteuid() == 0:
        with environment.with_default_user("nobody"):
            assert (await environment.exec("id -un")).stdout == "nobody\n"
            assert await environment.is_dir("/tmp")


async def test_output_is_passed_on_as_it_comes(environment: SandboxdEnvironment) -> None:
    heard: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    async def hear(text: str, stream: str) -> None:
        await heard.put((text, stream))

    with environment.scoped_output_callback(hear):
        running = asyncio.create_task(
            environment.exec("echo begun; echo err >&2; until [ -e go ]; do sleep 0.05; done")
        )
        first = {await asyncio.wait_for(heard.get(), 10) for _ in range(2)}
        assert first == {("begun\n", "stdout"), ("err\n", "stderr")}
    await environment.exec("touch go")
    result = await asyncio.wait_for(running, 10)
    assert (result.stdout, result.stderr, result.return_code) == ("begun\n", "err\n", 0)


async def test_files(environment: SandboxdEnvironment, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "empty").mkdir(parents=True)
    (source / "program").write_text("#!/bin/sh\necho ran\n")
    (source / "program").chmod(0o755)
    (source / "link").symlink_to("program")
    (source / "debug.log").write_text("log")
    await environment.upload_dir(source, "/tmp/harbor-work/tree")
    await environment.upload_file(source / "program", "/tmp/harbor-work/new/program")
    assert (await environment.exec("tree/program; tree/link; new/program; ls tree")).stdout == (
        "ran\nran\nran\ndebug.log\nempty\nlink\nprogram\n"
    )
    await environment.download_dir("/tmp/harbor-work/tree", tmp_path / "all")
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["debug.log", "empty", "link", "program"]
    assert os.access(tmp_path / "all/link", os.X_OK)
    await environment.download_file("/tmp/harbor-work/new/program", tmp_path / "some/where/program")
    assert (tmp_path / "some/where/program").read_text() == "#!/bin/sh\necho ran\n"
    for exclude in (["*.log", "./empty/"], ["tree/debug.log", "tree/empty"]):
        target = tmp_path / f"some-{exclude[0].count('/')}"
        await environment.download_dir_with_exclusions(
            source_dir="/tmp/harbor-work", target_dir=target, exclude=exclude
        )
        assert sorted(path.name for path in (target / "tree").iterdir()) == ["link", "program"]
    await environment.download_dir_filtered(
        source_dir="/tmp/harbor-work/tree", target_dir=tmp_path / "filtered", include=["*.log"]
    )
    assert [path.name for path in (tmp_path / "filtered").iterdir()] == ["debug.log"]
    assert await environment.is_file("/tmp/harbor-work/tree/link")
    assert not await environment.is_file("/tmp/harbor-work/tree")
    assert not await environment.is_file("/tmp/harbor-work/tree/program/below")
    assert await environment.is_dir("/tmp/harbor-work/tree")
    assert not await environment.is_dir("/tmp/harbor-work/none")


def test_what_is_refused(task: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="url"):
        make(tmp_path, task)
    (task / "environment/docker-compose.yaml").write_text("")
    with pytest.raises(ValueError, match="one container"):
        make(tmp_path, task, "other", url="http://127.0.0.1:9")


async def test_a_sandbox_that_cannot_be_started_is_free_again(daemon: Daemon, task: Path, tmp_path: Path) -> None:
    (tmp_path / "sandboxd.secret").write_text("wrong")
    environment = make(tmp_path, task, url=daemon.url)
    with pytest.raises(Exception, match="token"):
        await environment.start(False)
    (tmp_path / "sandboxd.secret").write_text(daemon.secret)
    await environment.start(False)
    await environment.stop(True)
    with pytest.raises(RuntimeError, match="not started"):
        await environment.exec("true")


async def test_the_example(example: Callable[..., str], task: Path) -> None:
    names: dict[str, Any] = {}
    code = compile(example("sandboxd.integrations.harbor"), "example", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    await eval(code, names)
    assert names["result"].verifier_result.rewards == {"reward": 1}


def test_the_command_line(example: Callable[..., str], task: Path) -> None:
    command = example("sandboxd.integrations.harbor", 0).replace("harbor run", "harbor run --yes --jobs-dir jobs", 1)
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(Path.cwd())}
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False, timeout=120, env=environ)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = Path("jobs").glob("*/*__*/result.json")
    assert json.loads(result.read_text())["verifier_result"]["rewards"] == {"reward": 1}
