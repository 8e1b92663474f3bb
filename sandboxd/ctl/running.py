"""The commands ``run`` and ``start``."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import click

from sandboxd.ctl.config import variable
from sandboxd.ctl.output import as_json, print_json, write_text
from sandboxd.ctl.session import Session, fail

if TYPE_CHECKING:
    from sandboxd.client import Sandbox
    from sandboxd.client.operations import CommandOptions
    from sandboxd.client.replies import Complete

F = TypeVar("F", bound=Callable[..., object])

#: Seconds that a command has to end after Ctrl-C, before it is killed.
GRACE = 3.0

#: Seconds until an unfinished line is shown, such as a prompt.
FLUSH = 0.05

#: Exit code of a command that its time limit has ended: that of timeout(1).
TIMED_OUT = 124


def command_options(function: F) -> F:
    """Add the options of a command that is to be run."""
    decorators = (
        click.argument("cmd", nargs=-1, required=True, type=click.UNPROCESSED),
        click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Set a variable; NAME alone: as here."),
        click.option("-C", "--cwd", metavar="DIR", help="Working directory."),
        click.option("-t", "--timeout", type=float, metavar="SECONDS", help="Kill it after so long."),
        click.option("-u", "--user", metavar="USER", help="Run it as this user."),
    )
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def line(words: Sequence[str]) -> str:
    """Return the shell's line for a command: one word is a line already; several are a program and its arguments."""
    return words[0] if len(words) == 1 else shlex.join(words)


def options(env: Sequence[str], cwd: str | None, timeout: float | None, user: str | None) -> CommandOptions:
    """
    Return the options of a command as the client takes them.

    :raise UsageError: if a variable is malformed.
    """
    found: CommandOptions = {}
    variables: dict[str, str | None] = {}
    for each in env:
        name, given, value = each.partition("=")
        if not name:
            raise click.UsageError(f"-e {each}: give NAME=VALUE, or NAME")
        variables[name] = value if given else variable(name)
    if variables:
        found["env"] = variables
    if cwd is not None:
        found["cwd"] = cwd
    if timeout is not None:
        found["timeout"] = timeout
    if user is not None:
        found["user"] = user
    return found


def exit_code(result: Complete) -> int:
    """Return the exit code of ``sandboxctl`` for the end of a command."""
    if result.timed_out or result.idle_timed_out:
        return TIMED_OUT
    if result.signal is not None:
        return 128 + getattr(signal, result.signal, 0)
    return result.code if result.code >= 0 else 255


class Interrupts:
    """
    The handling of Ctrl-C and its like: the signal is passed on to the command, which is killed if it does not end in
    time.

    A second one raises KeyboardInterrupt, as does one before the command runs.
    """

    def __init__(self, sandbox: Sandbox) -> None:
        self._sandbox = sandbox
        self._id: str | None = None
        self._killing: threading.Thread | None = None
        self._before: dict[int, Any] = {}

    def started(self, id: str) -> None:
        """Take the id of the command, as it runs."""
        self._id = id

    def __enter__(self) -> None:
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            self._before[signum] = signal.signal(signum, self._interrupt)

    def __exit__(self, *exception: object) -> None:
        if self._killing is not None:  # what it has started may take longer than the command itself
            self._killing.join(GRACE + 5.0)
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _interrupt(self, signum: int, frame: object) -> None:
        if self._killing is not None or self._id is None:
            raise KeyboardInterrupt
        name = signal.Signals(signum).name
        # Not here: the interrupted thread may hold a lock of the connection pool.
        self._killing = threading.Thread(target=self.kill, args=(self._id, name), daemon=True)
        self._killing.start()

    def kill(self, id: str, name: str) -> None:
        """Send a signal to the command and all that it has started, and SIGKILL to what does not end in time."""
        from sandboxd.client import SandboxError

        with suppress(SandboxError):  # it has ended, or the stream reports what is wrong
            self._sandbox.kill(id, name, grace=GRACE)


def feed(
    sandbox: Sandbox, id: str, ended: threading.Event, failed: Callable[[Exception], object], close: bool = True
) -> None:
    """
    Copy standard input to that of a process, until either ends.

    :param ended: is set when the process has ended.
    :param failed: called with the error if not all of it could be sent, unless the process reads no more.
    :param close: whether the end of standard input ends that of the process.
    """
    from sandboxd.client import Conflict, NotFound

    try:
        while data := os.read(0, 65536):
            sandbox.write_stdin(id, data)
        if close:
            sandbox.write_stdin(id, close=True)
    except Exception as error:
        no_reader = isinstance(error, (Conflict, NotFound)) and "without stdin" not in str(error)
        if not (no_reader or ended.is_set()):  # once it has ended, the client is closed under this thread
            failed(click.ClickException(f"standard input was not sent to its end: {error}"))


@click.command(context_settings={"allow_interspersed_args": False})
@click.option("-i", "--stdin", "interactive", is_flag=True, help="Pipe standard input to it.")
@command_options
@click.pass_obj
def run(
    session: Session,
    cmd: tuple[str, ...],
    env: tuple[str, ...],
    cwd: str | None,
    timeout: float | None,
    user: str | None,
    interactive: bool,
) -> None:
    """
    Run a command: its output is printed as it comes, its exit code is that of sandboxctl.

    One argument is a line for the shell; several are a program and its arguments. Ctrl-C ends the command and all that
    it has started; a second one at once. The exit code is that of the command, 128 and the number of the signal that
    ended it, 124 if its time was over, or 125 if it could not be run.
    """
    from sandboxd.client.replies import Gap

    sandbox = session.sandbox
    interrupts = Interrupts(sandbox)
    ended = threading.Event()
    failures: list[Exception] = []

    def started(id: str) -> None:
        def failed(error: Exception) -> None:
            failures.append(error)
            interrupts.kill(id, "SIGTERM")

        interrupts.started(id)
        if interactive:
            threading.Thread(target=feed, args=(sandbox, id, ended, failed), daemon=True).start()

    given = options(env, cwd, timeout, user)
    given["flush_after"] = FLUSH
    given["stdin"] = interactive
    with interrupts, sandbox.stream(line(cmd), on_start=started, **given) as stream:
        for output in stream:
            if isinstance(output, Gap):
                fail(f"{output.dropped} lines were lost while the connection was broken")
            else:
                write_text(output.text, error=output.stream == "stderr")
        ended.set()
    if failures:
        raise failures[0]
    assert stream.result is not None
    raise click.exceptions.Exit(exit_code(stream.result))


@click.command(context_settings={"allow_interspersed_args": False})
@as_json
@command_options
@click.pass_obj
def start(
    session: Session,
    cmd: tuple[str, ...],
    env: tuple[str, ...],
    cwd: str | None,
    timeout: float | None,
    user: str | None,
    as_json: bool,
) -> None:
    """
    Start a background process, and print its id.

    One argument is a line for the shell; several are a program and its arguments.
    """
    started = session.sandbox.start(line(cmd), **options(env, cwd, timeout, user))
    if as_json:
        print_json(started)
    else:
        click.echo(started.id)
