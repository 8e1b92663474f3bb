"""
Sandboxes for the trials of Harbor.

It needs the extra ``harbor``, and Python 3.12. On the command line::

    harbor run -p task -a oracle -e sandboxd.integrations.harbor:SandboxdEnvironment \\
        --ek url=http://localhost:3030 --ek secret_file=sandboxd.secret

In Python, where there may be an ``await``::

    from harbor.models.trial.config import EnvironmentConfig, TaskConfig, TrialConfig
    from harbor.trial.trial import Trial

    options = {"url": "http://localhost:3030", "secret_file": "sandboxd.secret"}
    environment = EnvironmentConfig(import_path="sandboxd.integrations.harbor:SandboxdEnvironment", kwargs=options)
    trial = await Trial.create(TrialConfig(task=TaskConfig(path="task"), environment=environment))
    result = await trial.run()

A daemon is one sandbox, which has one trial at a time: ``--ek url=URL,URL`` names as many as trials are to run at once.
Images are not built: a daemon has to run in the one that the task is for. What trials leave behind in Harbor's own
directories is removed when the next one starts, and nothing else; where that is not enough, renew the sandbox.
"""

from __future__ import annotations

import asyncio
import shlex
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from harbor.environments.base import BaseEnvironment, ExecResult, OutputCallback
from harbor.environments.capabilities import EnvironmentCapabilities
from harbor.environments.options import EnvironmentOptions
from harbor.models.trial.paths import EnvironmentPaths

from sandboxd.client import AsyncSandbox, BadRequest, CommandTimeout, Conflict, Forbidden, NotFound
from sandboxd.client.operations import CommandOptions
from sandboxd.client.outcome import checked, ended
from sandboxd.client.replies import Gap
from sandboxd.integrations.exit_code import exit_code


class _Pool:
    """
    The sandboxes that the trials of an event loop have.

    :ivar busy: their URLs.
    :ivar freed: notified when one is free again.
    """

    def __init__(self) -> None:
        self.busy: set[str] = set()
        self.freed = asyncio.Condition()

    async def take(self, urls: list[str]) -> str:
        """Return a URL of those given once it is free."""
        async with self.freed:
            await self.freed.wait_for(lambda: not self.busy.issuperset(urls))
            url = next(url for url in urls if url not in self.busy)
            self.busy.add(url)
            return url

    async def give_back(self, url: str) -> None:
        """Let another trial have a sandbox."""
        async with self.freed:
            self.busy.discard(url)
            self.freed.notify_all()


_POOLS: WeakKeyDictionary[asyncio.AbstractEventLoop, _Pool] = WeakKeyDictionary()


class SandboxdOptions(EnvironmentOptions):
    """
    What ``--ek`` takes.

    :ivar url: where a daemon is; several, with commas between them, for as many trials at a time.
    :ivar secret_file: a file with the token of all of them.
    """

    url: str
    secret_file: str | None = None


class SandboxdEnvironment(BaseEnvironment):
    """The environment of a trial: a sandbox that it has to itself until its end."""

    options_model = SandboxdOptions
    options: SandboxdOptions

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._urls = self.options.url.split(",")
        self._pool: _Pool | None = None
        self._url: str | None = None
        self._sandbox: AsyncSandbox | None = None

    @staticmethod
    def type() -> str:
        """Return its name in the results."""
        return "sandboxd"

    @property
    def capabilities(self) -> EnvironmentCapabilities:
        """None of those that containers have."""
        return EnvironmentCapabilities()

    def _validate_definition(self) -> None:
        """
        Refuse tasks that need several containers.

        :raise ValueError: if this one does.
        """
        if (self.environment_dir / "docker-compose.yaml").exists():
            raise ValueError("a sandbox is one container; the task has a docker-compose.yaml")

    @property
    def sandbox(self) -> AsyncSandbox:
        """
        The client.

        :raise RuntimeError: before the start and after the end.
        """
        if self._sandbox is None:
            raise RuntimeError("the environment is not started")
        return self._sandbox

    async def start(self, force_build: bool) -> None:
        """
        Wait for a sandbox that has no trial, and make Harbor's directories in it.

        :raise SandboxError: if it cannot be reached.
        :raise RuntimeError: if the directories cannot be made.
        """
        secret = None
        if self.options.secret_file is not None:
            secret = Path(self.options.secret_file).read_text("utf-8").strip()
        self._pool = _POOLS.setdefault(asyncio.get_running_loop(), _Pool())
        self._url = await self._pool.take(self._urls)
        try:
            self._sandbox = AsyncSandbox(self._url, secret)
            paths = EnvironmentPaths.for_os(self.os)
            for path in (paths.logs_dir, paths.tests_dir, paths.solution_dir):
                await self.sandbox.delete_tree(str(path))
            if self.task_env_config.workdir:
                await self.sandbox.make_dir(self.task_env_config.workdir)
            made = await self.ensure_dirs(self._mount_targets(writable_only=True))
            if made is not None and made.return_code != 0:
                raise RuntimeError(f"Harbor's directories cannot be made: {made.stderr}")
            await self._upload_environment_dir_after_start()
        except BaseException:
            await self.stop(True)
            raise

    async def stop(self, delete: bool) -> None:
        """Let another trial have the sandbox. It is not ended."""
        sandbox, self._sandbox = self._sandbox, None
        url, self._url = self._url, None
        if sandbox is not None:
            await sandbox.close()
        if self._pool is not None and url is not None:
            await self._pool.give_back(url)

    async def exec(
        self,
        command: str,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        timeout_sec: int | None = None,
        user: str | int | None = None,
    ) -> ExecResult:
        """
        Run a command of bash, as agents expect it.

        :param user: whom to run as, if the daemon is root.
        :raise RuntimeError: if the timeout has passed; it is killed then, with all that it has started.
        """
        options: CommandOptions = {"cwd": cwd or self.task_env_config.workdir, "env": self._merge_env(env) or {}}
        resolved = self._resolve_user(user)
        if resolved is not None:
            options["user"] = resolved
        if timeout_sec is not None:
            options["timeout"] = timeout_sec
        argv, callback = ["bash", "-c", command], self._output_callback()
        try:
            if callback is not None:
                return await self._stream_command(argv, options, callback)
            result = await self.sandbox.run(argv, **options)
        except CommandTimeout:
            raise RuntimeError(f"Command timed out after {timeout_sec} seconds") from None
        except BadRequest as error:  # as a shell reports what it cannot start
            return ExecResult(stdout="", stderr=f"{error}\n", return_code=127)
        return ExecResult(stdout=result.stdout, stderr=result.stderr, return_code=exit_code(result))

    async def _stream_command(self, argv: list[str], options: CommandOptions, callback: OutputCallback) -> ExecResult:
        """Run a command, and pass its output on line by line."""
        kept: dict[str, list[str]] = {"stdout": [], "stderr": []}
        async with self.sandbox.stream(argv, **options) as stream:
            async for output in stream:
                if isinstance(output, Gap):
                    raise RuntimeError(f"{output.dropped} lines of output were lost")
                kept[output.stream].append(output.text)
                await callback(output.text, output.stream)
        result = checked(ended(stream.result), check=False)
        return ExecResult(stdout="".join(kept["stdout"]), stderr="".join(kept["stderr"]), return_code=exit_code(result))

    # Files

    async def upload_file(self, source_path: Path | str, target_path: str) -> None:
        """Copy a file into the sandbox."""
        await self.sandbox.upload(source_path, target_path, parents=True)

    async def upload_dir(self, source_dir: Path | str, target_dir: str) -> None:
        """Copy what is in a directory into one of the sandbox."""
        await self.sandbox.upload_tree(source_dir, target_dir)

    async def download_file(self, source_path: str, target_path: Path | str) -> None:
        """Copy a file from the sandbox."""
        await asyncio.to_thread(Path(target_path).parent.mkdir, parents=True, exist_ok=True)
        await self.sandbox.download(source_path, target_path)

    async def download_dir(self, source_dir: str, target_dir: Path | str) -> None:
        """Copy what is in a directory from the sandbox. Links that lead out of it are left out."""
        await self._download(source_dir, target_dir, [])

    async def download_dir_with_exclusions(
        self, *, source_dir: str, target_dir: Path | str, exclude: list[str]
    ) -> None:
        """
        Copy what is in a directory from the sandbox, less some of it.

        :param exclude: as tar(1) has it: patterns of names and of paths, which may begin anywhere.
        """
        patterns = [pattern.removeprefix("./").rstrip("/") for pattern in exclude]
        anywhere = [f"**/{pattern}" for pattern in patterns if "/" in pattern]
        await self._download(source_dir, target_dir, [*patterns, *anywhere])

    async def _download(self, source: str, to: Path | str, exclude: list[str]) -> None:
        done = await self.sandbox.download_tree(source, to, exclude=exclude)
        if done.skipped:
            self.logger.warning("left out of %s: %s", source, shlex.join(done.skipped))

    async def is_dir(self, path: str, user: str | int | None = None) -> bool:
        """Return whether it is a directory, or leads to one; and a user, if one is named, may know it."""
        return await self._is(path, "dir", user)

    async def is_file(self, path: str, user: str | int | None = None) -> bool:
        """Return whether it is a regular file, or leads to one; and a user, if one is named, may know it."""
        return await self._is(path, "file", user)

    async def _is(self, path: str, kind: str, user: str | int | None) -> bool:
        if self._resolve_user(user) is not None:
            ask = super().is_dir if kind == "dir" else super().is_file
            return bool(await ask(path, user))
        try:
            return (await self.sandbox.stat(path, follow=True)).type == kind
        except (NotFound, Conflict, Forbidden):  # it is not there, or what is above it is a file, or closed
            return False
