"""The end of a command, as a value or as an exception."""

from __future__ import annotations

from sandboxd.client.errors import SandboxError
from sandboxd.client.replies import Complete, RunResult


class CommandTimeout(SandboxError):
    """
    A command was killed because its ``timeout`` or ``idle_timeout`` had passed.

    :ivar result: its output until then.
    """

    def __init__(self, result: RunResult) -> None:
        super().__init__("the command was idle too long" if result.idle_timed_out else "the command timed out")
        self.result = result


class CommandFailed(SandboxError):
    """
    A command that was run with ``check=True`` has ended with a code other than 0.

    :ivar result: its output and code.
    """

    def __init__(self, result: RunResult) -> None:
        how = f"was ended by {result.signal}" if result.signal else f"ended with code {result.code}"
        lines = result.stderr.strip().splitlines()
        super().__init__(f"the command {how}" + (f": {lines[-1]}" if lines else ""))
        self.result = result


def ended(complete: Complete | None) -> RunResult:
    """Return how a command ended whose output was streamed."""
    assert complete is not None
    return RunResult(
        stdout="",
        stderr="",
        code=complete.code,
        signal=complete.signal,
        timed_out=complete.timed_out,
        idle_timed_out=complete.idle_timed_out,
        oom_killed=complete.oom_killed,
        survivors=complete.survivors,
    )


def checked(result: RunResult, check: bool) -> RunResult:
    """
    Return a result, or raise the exception that it stands for.

    :raise CommandTimeout: if the command was killed because of its ``timeout`` or ``idle_timeout``.
    :raise CommandFailed: if ``check`` and its code is not 0.
    """
    if result.timed_out or result.idle_timed_out:
        raise CommandTimeout(result)
    if check and result.code != 0:
        raise CommandFailed(result)
    return result
