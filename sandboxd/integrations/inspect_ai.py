"""
A sandbox for the samples of an evaluation with Inspect AI.

It needs the extra ``inspect``, and Python 3.11. Inspect finds it by its name, ``sandboxd``. Five lines::

    from inspect_ai import Task, eval
    from inspect_ai.util import SandboxEnvironmentSpec
    from sandboxd.integrations.inspect_ai import SandboxdConfig

    config = SandboxdConfig(url="http://localhost:3030", secret_file="sandboxd.secret")
    logs = eval(Task(samples, solver=solver, sandbox=SandboxEnvironmentSpec("sandboxd", config)), model=model)

Each sample gets a directory of its own, which is removed after it. A configuration may also be the name of a JSON file:
``inspect eval --sandbox sandboxd:sandbox.json``. Without one, a daemon is started for each sample, on this machine and
as its user: that is no boundary, no more than Inspect's ``local`` is.
"""

from __future__ import annotations

import asyncio
import errno
import os
import posixpath
import uuid
from pathlib import Path
from typing import Any, Literal, overload

from inspect_ai.util import (
    ExecResult,
    OutputLimitExceededError,
    SandboxEnvironment,
    SandboxEnvironmentLimits,
    SandboxUnavailableError,
    SandboxUserUnsupportedError,
    sandboxenv,
)
from pydantic import BaseModel

from sandboxd.client import (
    AsyncSandbox,
    BadRequest,
    CommandTimeout,
    Conflict,
    Forbidden,
    NoSpace,
    NotFound,
    SandboxError,
    SandboxGone,
    Unavailable,
)
from sandboxd.client.operations import CommandOptions
from sandboxd.integrations.exit_code import exit_code
from sandboxd.integrations.local_daemon import LocalDaemon

#: What a shell exits with if a program is not there, or cannot be executed.
NOT_FOUND = 127
NOT_EXECUTABLE = 126


class SandboxdConfig(BaseModel, frozen=True):
    """
    The daemon that the samples share. This is written to the log of the evaluation, so the token is not in it.

    :ivar url: where its API is; None to start a daemon for each sample.
    :ivar secret_file: a file with its token.
    :ivar directory: the directory on the sandbox below which each sample gets one.
    """

    url: str | None = None
    secret_file: str | None = None
    directory: str = "/tmp"


@sandboxenv(name="sandboxd")
class SandboxdEnvironment(SandboxEnvironment):
    """
    The sandbox of a sample.

    :param sandbox: a client of its daemon, to be closed with it.
    :param directory: what relative paths start from.
    :param daemon: the daemon, if it is this sample's own.
    """

    def __init__(self, sandbox: AsyncSandbox, directory: str, daemon: LocalDaemon | None = None) -> None:
        super().__init__()
        self.sandbox = sandbox
        self.directory = directory
        self._daemon = daemon

    @classmethod
    async def sample_init(
        cls, task_name: str, config: BaseModel | str | None, metadata: dict[str, str]
    ) -> dict[str, SandboxEnvironment]:
        """Connect to the daemon, or start one."""
        chosen = _config(config)
        if chosen.url is None:
            daemon = await asyncio.to_thread(LocalDaemon)
            return {"default": cls(AsyncSandbox(daemon.url, daemon.secret), daemon.directory, daemon)}
        secret = None if chosen.secret_file is None else Path(chosen.secret_file).read_text("utf-8").strip()
        sandbox = AsyncSandbox(chosen.url, secret)
        directory = posixpath.join(chosen.directory, f"inspect-{uuid.uuid4().hex}")
        try:
            await sandbox.make_dir(directory)
        except BaseException:
            await sandbox.close()
            raise
        return {"default": cls(sandbox, directory)}

    @classmethod
    async def sample_cleanup(
        cls,
        task_name: str,
        config: BaseModel | str | None,
        environments: dict[str, SandboxEnvironment],
        interrupted: bool,
    ) -> None:
        """Remove the sample's directory, or stop its daemon."""
        for environment in environments.values():
            await environment.as_type(cls).close()

    @classmethod
    def config_deserialize(cls, config: dict[str, Any]) -> BaseModel:
        """Return a configuration from the log of an evaluation."""
        return SandboxdConfig(**config)

    async def close(self) -> None:
        """Remove the directory, or stop the daemon; close the client."""
        try:
            if self._daemon is not None:
                await asyncio.to_thread(self._daemon.stop)
            else:
                await self.sandbox.delete_tree(self.directory)
        finally:
            await self.sandbox.close()

    async def exec(
        self,
        cmd: list[str],
        input: str | bytes | None = None,
        cwd: str | None = None,
        env: dict[str, str] | None = None,
        user: str | None = None,
        timeout: int | None = None,
        timeout_retry: bool = True,
        concurrency: bool = True,
    ) -> ExecResult[str]:
        """
        Run a program. A timeout kills it and all that it has started; it is never run again.

        :raise TimeoutError: if the timeout has passed.
        :raise PermissionError: if the program may not be executed.
        :raise SandboxUserUnsupportedError: if there is no such user, or the daemon is not root.
        :raise SandboxUnavailableError: if the daemon cannot be reached.
        :raise OutputLimitExceededError: if the output is larger than Inspect allows.
        """
        options: CommandOptions = {"cwd": self._path(cwd or ".")}
        if input is not None:
            options["input"] = input
        if env is not None:
            options["env"] = env
        if user is not None:
            options["user"] = int(user) if user.isdecimal() else user
        if timeout is not None:
            options["timeout"] = timeout
        limit = SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE
        try:
            result = await self.sandbox.run(cmd, max_output=limit, **options)
        except CommandTimeout:
            raise TimeoutError(f"the command was killed after {timeout} seconds") from None
        except BadRequest as error:
            return _not_started(error)
        except (SandboxGone, Unavailable) as error:
            raise SandboxUnavailableError(str(error)) from error
        if result.stdout_dropped or result.stderr_dropped:
            text = result.stdout if result.stdout_dropped else result.stderr
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_EXEC_OUTPUT_SIZE_STR, text)
        code = exit_code(result)
        return ExecResult(code == 0, code, result.stdout, result.stderr)

    async def write_file(self, file: str, contents: str | bytes) -> None:
        """
        Make a file, or replace one, and make the directories above it.

        :raise OSError: if it cannot be written.
        """
        try:
            await self.sandbox.write(self._path(file), contents, parents=True)
        except SandboxError as error:
            raise _os_error(error, file) from None

    @overload
    async def read_file(self, file: str, text: Literal[True] = True) -> str: ...

    @overload
    async def read_file(self, file: str, text: Literal[False]) -> bytes: ...

    async def read_file(self, file: str, text: bool = True) -> str | bytes:
        """
        Return what is in a file.

        :raise OSError: if it cannot be read.
        :raise UnicodeDecodeError: if it is to be text, and is not UTF-8.
        :raise OutputLimitExceededError: if it is larger than Inspect allows.
        """
        limit, path = SandboxEnvironmentLimits.MAX_READ_FILE_SIZE, self._path(file)
        try:
            size = (await self.sandbox.stat(path, follow=True)).size
            data = await self.sandbox.read(path) if size <= limit else b""
        except SandboxError as error:
            raise _os_error(error, file) from None
        if max(size, len(data)) > limit:
            raise OutputLimitExceededError(SandboxEnvironmentLimits.MAX_READ_FILE_SIZE_STR, None)
        return data.decode("utf-8") if text else data

    def default_polling_interval(self) -> float:
        """Return how often Inspect looks for requests from the sandbox, in seconds."""
        return 0.2

    def _path(self, file: str) -> str:
        return posixpath.join(self.directory, file)


def _config(config: BaseModel | str | None) -> SandboxdConfig:
    """
    Return the configuration of a task or a sample.

    :raise TypeError: if it is that of another sandbox.
    """
    if config is None:
        return SandboxdConfig()
    if isinstance(config, str):
        return SandboxdConfig.model_validate_json(Path(config).read_text("utf-8"))
    if isinstance(config, SandboxdConfig):
        return config
    raise TypeError(f"the sandbox's configuration is a {type(config).__name__}, not a SandboxdConfig")


def _not_started(error: BadRequest) -> ExecResult[str]:
    """
    Return the result of a command that could not be started, as a shell would have it.

    :raise PermissionError: if the program may not be executed.
    :raise SandboxUserUnsupportedError: if it cannot run as its user.
    """
    message = str(error)
    if message.startswith("user:"):
        raise SandboxUserUnsupportedError(message)
    if message.startswith("argv:") and message.endswith("permission denied"):
        raise PermissionError(message)
    code = NOT_FOUND if message.endswith("no such file or directory") else NOT_EXECUTABLE
    return ExecResult(False, code, "", f"{message}\n")


def _os_error(error: SandboxError, file: str) -> Exception:
    """Return the exception of the operating system for an error of the client; or itself, if there is none."""
    for kind, end, number in (
        (NotFound, "", errno.ENOENT),
        (Forbidden, "", errno.EACCES),
        (NoSpace, "", errno.ENOSPC),
        (Conflict, "is a directory", errno.EISDIR),
        (Conflict, "not a directory", errno.ENOTDIR),
    ):
        if isinstance(error, kind) and str(error).endswith(end):
            # OSError makes itself the subclass of the number: FileNotFoundError, PermissionError, IsADirectoryError.
            return OSError(number, os.strerror(number), file)
    return error
