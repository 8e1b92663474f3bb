"""Bodies, queries and replies of the routes that start, follow and end commands."""

from __future__ import annotations

import os
import signal as signals
from base64 import b64decode
from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sandboxd.messages.decoding import NO_NUL, After, BadRequest, Count, Done, Seconds, Struct, Time, Yes, _no_nul
from sandboxd.messages.listeners import HttpPath, PortNumber
from sandboxd.processes.command import Command, Terminal, User
from sandboxd.processes.limits import check_limits
from sandboxd.processes.program import POSIX_SHELLS, script_is_long

Signal = Annotated[
    str | int,
    Meta(
        description="Its name, with SIG or without, or its number.",
        extra_json_schema={
            "enum": [
                *(signal.name for signal in signals.Signals),
                *(signal.name.removeprefix("SIG") for signal in signals.Signals),
                *map(int, signals.Signals),
            ]
        },
    ),
]


#: Characters of stdin from which on they are encoded, or decoded, in a thread.
LONG_INPUT = 1024 * 1024

#: Characters of base64 that are decoded at a time: a single call holds the interpreter.
_BASE64_PIECE = 256 * 1024

#: Seconds after which an unfinished line of a terminal becomes a record.
TTY_FLUSH = 0.02


class LimitsRequest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, rename={"as_": "as"}):
    """
    Limits of each process, by their names in getrlimit(2): seconds for ``cpu``, counts for ``nofile`` and ``nproc``,
    else bytes. Of the tree as a whole: ``memory`` in bytes, ``pids``, and ``cpus`` as a number of processors.
    """

    as_: Count | None = None
    core: Count | None = None
    cpu: Count | None = None
    data: Count | None = None
    fsize: Count | None = None
    nofile: Count | None = None
    nproc: Count | None = None
    stack: Count | None = None
    memory: Annotated[int, Meta(ge=1, le=(1 << 62))] | None = None
    pids: Annotated[int, Meta(ge=1, le=(1 << 22))] | None = None
    cpus: Annotated[float, Meta(gt=0, le=4096)] | None = None

    def of_tree(self) -> dict[str, float]:
        """Return the limits of the whole tree, which need a cgroup."""
        found = {"memory": self.memory, "pids": self.pids, "cpus": self.cpus}
        return {name: value for name, value in found.items() if value is not None}

    def of_process(self) -> dict[str, int]:
        """Return the limits of each process, which are rlimits."""
        given: dict[str, int] = msgspec.to_builtins(self)
        return {name: value for name, value in given.items() if name not in self.of_tree()}


Size = Annotated[int, Meta(ge=1, le=65535)]


class TerminalRequest(msgspec.Struct):
    """A pseudo-terminal: its size, and the value of ``TERM``."""

    cols: Size = 80
    rows: Size = 24
    term: Annotated[str, Meta(min_length=1, pattern=r"^[^\x00]+$")] = "xterm-256color"


class ResizeRequest(msgspec.Struct):
    """Body of ``/processes/<id>/resize``."""

    cols: Size
    rows: Size


class CommandRequest(msgspec.Struct):
    """Body of ``/run``, ``/run_streaming`` and ``/start_process``: ``cmd`` or ``argv``, and how it is run."""

    cmd: Annotated[str, Meta(description="What sh -c is given.", extra_json_schema={"pattern": NO_NUL})] | None = None
    argv: (
        Annotated[
            list[Annotated[str, Meta(extra_json_schema={"pattern": NO_NUL})]],
            Meta(min_length=1, description="In place of cmd: a program, looked for in PATH, and its arguments."),
        ]
        | None
    ) = None
    shell: (
        Annotated[str, Meta(description="In place of /bin/sh.", extra_json_schema={"pattern": r"^/[^\x00]*$"})] | None
    ) = None
    login: Annotated[bool, Meta(description="Whether the shell is a login shell.")] = False
    cwd: Annotated[str, Meta(description="Working directory; the daemon's own if it is empty or left out.")] | None = (
        None
    )
    env: (
        Annotated[
            dict[str, str | None],
            Meta(
                description="Variables over the daemon's own; null takes one away.",
                extra_json_schema={"propertyNames": {"pattern": r"^[^\x00=]+$"}},
            ),
        ]
        | None
    ) = None
    input: Annotated[str, Meta(description="What its stdin begins with, and ends, unless stdin is set.")] | None = None
    input_base64: Annotated[str, Meta(description="The same in base64.")] | None = None
    merge_stderr: Annotated[bool, Meta(description="Whether its stderr goes into its stdout, in order.")] = False
    flush_after: (
        Annotated[
            float,
            Meta(gt=0, le=366 * 86400, description="Seconds after which an unfinished line is sent; 0.02 with tty."),
        ]
        | None
    ) = None
    tty: Annotated[bool | TerminalRequest, Meta(description="Whether it gets a terminal, or which.")] | None = None
    timeout: (
        Annotated[Seconds, Meta(description="Seconds that it may live, counted from the request; 0 for ever.")] | None
    ) = None
    idle_timeout: (
        Annotated[Seconds, Meta(description="Seconds without output, counted from its start; 0 for ever.")] | None
    ) = None
    max_output: (
        Annotated[
            Count, Meta(description="/run only: bytes of each stream to keep, half from the start, half from the end.")
        ]
        | None
    ) = None
    stdin: Annotated[bool, Meta(description="Whether its stdin is a pipe, for /processes/{id}/stdin.")] = False
    detach: Annotated[bool, Meta(description="/run_streaming only: whether it outlives the connection.")] = False
    survive: Annotated[bool, Meta(description="Whether its processes may outlive a daemon that was killed.")] = False
    limits: LimitsRequest | None = None
    user: (
        Annotated[
            str | int,
            Meta(
                description="Whom to run as, if the daemon is root: a name or a uid, perhaps with :group.",
                extra_json_schema={"minimum": 0, "maximum": (1 << 32) - 2},
            ),
        ]
        | None
    ) = None

    @property
    def names_program(self) -> bool:
        """Whether the request says what to execute."""
        return self.cmd is not None or self.argv is not None

    def terminal(self) -> Terminal | None:
        """Return the requested terminal, or None."""
        if isinstance(self.tty, TerminalRequest):
            return Terminal(self.tty.cols, self.tty.rows, self.tty.term)
        return Terminal() if self.tty else None

    def check(self) -> None:
        """
        Check that the fields fit together, and that the operating system can take them.

        :raise BadRequest: naming the field.
        """
        if self.cmd is not None and self.argv is not None:
            raise BadRequest("argv: give it or cmd, not both")
        if self.argv is not None and not self.argv[0]:
            raise BadRequest("argv: its first item is the program, and must not be empty")
        if self.argv is not None and (self.shell is not None or self.login):
            raise BadRequest(f"{'login' if self.login else 'shell'}: argv is executed without a shell; give cmd")
        if self.input is not None and self.input_base64 is not None:
            raise BadRequest("input: give it or input_base64, not both")
        if self.shell is not None and not self.shell.startswith("/"):
            raise BadRequest("shell: must be an absolute path")
        _no_nul("cmd", self.cmd or "")
        _no_nul("shell", self.shell or "")
        for argument in self.argv or ():
            _no_nul("argv", argument)
        posix = self.shell is None or os.path.basename(self.shell) in POSIX_SHELLS
        if self.cmd is not None and not posix and script_is_long(self.cmd):
            raise BadRequest(f"cmd: too long for {self.shell}")

    def stdin_bytes(self) -> bytes | None:
        """
        Return the bytes that stdin begins with, or None. Takes long if they are many.

        :raise BadRequest: if it is not base64.
        """
        if self.input_base64 is not None:
            try:
                return _from_base64(self.input_base64)
            except ValueError as error:
                raise BadRequest(f"input_base64: {error}") from None
        return None if self.input is None else self.input.encode("utf-8", "surrogateescape")

    @property
    def has_long_input(self) -> bool:
        """Whether :meth:`stdin_bytes` takes long."""
        return max(len(self.input or ""), len(self.input_base64 or "")) > LONG_INPUT

    def command(self, user: User | None = None, shell: str | None = None, input: bytes | None = None) -> Command:
        """
        Return the command that the request describes.

        :param user: the entry of its ``user`` in passwd.
        :param shell: what to execute if it names no program.
        :param input: what :meth:`stdin_bytes` has returned; None to call it.
        :raise BadRequest: if the operating system could not take it.
        """
        self.check()
        if not self.names_program and shell is None:
            raise BadRequest("cmd: Command is required; give it or argv")
        env = self.env or {}
        tty = self.terminal()
        limits = {} if self.limits is None else self.limits.of_process()
        try:
            check_limits(limits)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        for name, value in env.items():
            if not name or "=" in name or "\0" in name:
                raise BadRequest(f"env: {name!r} is not a variable name; it must not be empty or have '=' or NUL in it")
            _no_nul(f"env.{name}", value or "")
        if self.cwd:
            _no_nul("cwd", self.cwd)
        return Command(
            self.cmd,
            self.cwd or None,
            env,
            timeout=self.timeout or None,
            idle_timeout=self.idle_timeout or None,
            stdin=self.stdin,
            survive=self.survive,
            limits=limits,
            tree_limits={} if self.limits is None else self.limits.of_tree(),
            user=user,
            argv=None if self.argv is None else tuple(self.argv),
            shell=self.shell or shell,
            login=self.login,
            input=self.stdin_bytes() if input is None else input,
            merge_stderr=self.merge_stderr,
            flush_after=TTY_FLUSH if self.flush_after is None and tty is not None else self.flush_after,
            tty=tty,
        )


def _from_base64(text: str) -> bytes:
    """
    Decode base64.

    :raise ValueError: if it is malformed.
    """
    if len(text) % 4:
        raise ValueError("the length of base64 is a multiple of 4")  # Python 3.10 accepts a surplus "="
    if len(text) <= _BASE64_PIECE or "=" in text[:-2]:
        return b64decode(text, validate=True)
    pieces = range(0, len(text), _BASE64_PIECE)
    return b"".join([b64decode(text[start : start + _BASE64_PIECE], validate=True) for start in pieces])


class KillProcessRequest(msgspec.Struct):
    """Body of ``/kill_process``."""

    id: Annotated[str, Meta(extra_json_schema={"minLength": 1})]
    signal: Signal | None = None
    grace: Annotated[Seconds, Meta(description="Seconds until SIGKILL follows, if the signal was another.")] = 5.0

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("id: Process ID is required")

    def signum(self) -> int:
        """
        Return the signal to send first.

        :raise BadRequest: if there is no signal of that name or number.
        """
        return signals.SIGKILL if self.signal is None else _signum(self.signal)


class SignalRequest(msgspec.Struct):
    """Body of ``/processes/<id>/signal``."""

    signal: Signal

    def signum(self) -> int:
        """
        Return the signal to send.

        :raise BadRequest: if there is no signal of that name or number.
        """
        return _signum(self.signal)


Tail = Annotated[Count, Meta(description="The last so many records of those that are asked for.")] | None

OneStream = Annotated[Literal["stdout", "stderr"], Meta(description="Records of this stream only.")] | None


def _not_both(tail: int | None, after: int | None) -> None:
    if tail is not None and after is not None:
        raise ValueError("tail: give it or after, not both")


class LogsQuery(msgspec.Struct):
    """Query of ``/processes/<id>/logs``."""

    after: Annotated[Count, Meta(description="Records behind this sequence number.")] | None = None
    limit: Annotated[Count, Meta(description="How many at most; 10,000 by default, and no more.")] | None = None
    tail: Tail = None
    stream: OneStream = None

    def __post_init__(self) -> None:
        _not_both(self.tail, self.after)


class ProcessLogsQuery(msgspec.Struct):
    """Query of ``/process_logs_streaming``."""

    id: Annotated[str, Meta(min_length=1)]
    after: After = None
    follow: Annotated[bool, Meta(description="Whether to go on with new lines as they come.")] = True
    tail: Tail = None
    stream: OneStream = None

    def __post_init__(self) -> None:
        _not_both(self.tail, self.after)


class StreamQuery(msgspec.Struct):
    """Query of ``/run_streaming``."""

    after: After = None


class StdinQuery(msgspec.Struct):
    """Query of ``/processes/<id>/stdin``."""

    close: Annotated[bool, Meta(description="Whether this is the end of its stdin.")] = False


#: In Python, "$" alone would also match before a newline at the end.
LineText = Annotated[str, Meta(min_length=1, max_length=4096, pattern=r"^[^\n]*$(?!\n)")]


class WaitRequest(msgspec.Struct):
    """Body of ``/processes/<id>/wait``: the conditions to wait for, beside the end of the process."""

    timeout: Annotated[Seconds, Meta(description="Seconds to wait, at most; without it, for ever.")] | None = None
    output: Annotated[LineText, Meta(description="A text that a line of it contains.")] | None = None
    port: Annotated[PortNumber, Meta(description="A port that one of its processes listens on.")] | None = None
    http: HttpPath | None = None

    def __post_init__(self) -> None:
        if self.http is not None and self.port is None:
            raise ValueError("http: needs a port")


def _signum(value: str | int) -> int:
    try:
        if isinstance(value, int) or value.isdigit():
            return signals.Signals(int(value))
        name = value.upper()
        return signals.Signals[name if name.startswith("SIG") else f"SIG{name}"]
    except (KeyError, ValueError):
        raise BadRequest(f"signal: {value!r} is not a signal; give a name such as TERM, or a number") from None


Id = Annotated[str, Meta(description="The execution's id, a UUID.")]


Status: TypeAlias = Literal["running", "completed", "failed", "killed"]


StreamName: TypeAlias = Literal["stdout", "stderr"]


Survivors = Annotated[list[int], Meta(description="Pids that could not be killed when the timeout had passed.")]


class RunResult(Struct):
    """The output of a command, and how it ended."""

    stdout: str
    stderr: str
    code: Annotated[int, Meta(description="Its exit code; -1 if a signal ended it.")]
    error: Annotated[str, Meta(description="There if the code is not 0.")] | UnsetType = UNSET
    signal: Annotated[str, Meta(description="The signal that ended it, such as SIGKILL.")] | UnsetType = UNSET
    timed_out: Yes | UnsetType = UNSET
    idle_timed_out: Yes | UnsetType = UNSET
    oom_killed: Yes | UnsetType = UNSET
    survivors: Survivors | UnsetType = UNSET
    stdout_dropped: Annotated[int, Meta(description="Bytes that max_output left out.")] | UnsetType = UNSET
    stderr_dropped: Annotated[int, Meta(description="Bytes that max_output left out.")] | UnsetType = UNSET


class Output(Struct):
    """A line of output, or a piece of a long line."""

    stream: StreamName
    data: Annotated[str, Meta(description="The line without its end.")]
    partial: Annotated[Yes, Meta(description="The line goes on in the next event of the stream.")] | UnsetType = UNSET


class LogLine(Output, kw_only=True):
    """A line of output, and the time of its arrival."""

    timestamp: Time


class Record(LogLine, kw_only=True):
    """A line of output with its number."""

    seq: Annotated[int, Meta(ge=1)]


class Gap(Struct):
    """The number of lines that were dropped from the log."""

    dropped: int


class Complete(Struct):
    """How the command ended: the last event of its stream."""

    code: int
    error: bool
    signal: str | UnsetType = UNSET
    timed_out: Yes | UnsetType = UNSET
    idle_timed_out: Yes | UnsetType = UNSET
    oom_killed: Yes | UnsetType = UNSET
    survivors: Survivors | UnsetType = UNSET


class StreamEnded(Struct):
    """The end of a log's stream."""

    message: Literal["stream ended"]


class Started(Struct):
    """A process that was started."""

    id: Id
    pid: int
    status: Status


class Process(Started):
    """
    A background process.

    No field may be added: the Python SDK passes them all to ``ProcessInfo(**process)``.
    """

    command: str
    started_at: Time
    exit_code: int | UnsetType = UNSET
    completed_at: Time | UnsetType = UNSET


class Processes(Struct):
    """The background processes, in the order of their start."""

    processes: list[Process]


class OutputState(Struct):
    """An execution's output, in numbers."""

    bytes: Annotated[int, Meta(description="Written in all.")]
    records: Annotated[int, Meta(description="Records in all, those that were dropped included.")]
    first: Annotated[int, Meta(description="The number of the oldest record that is kept.")]
    truncated: bool
    last_at: Time | None
    followers: Annotated[int, Meta(description="Readers that are open.")]


class TerminalSize(Struct):
    """The size of a terminal, in characters."""

    cols: int
    rows: int


class ExecutionDetails(Struct):
    """The details of an execution."""

    id: Id
    pid: int
    status: Status
    background: bool
    command: str
    argv: Annotated[list[str] | None, Meta(description="Its arguments, if it was started with them.")]
    tty: Annotated[TerminalSize | None, Meta(description="Its terminal; null if it has none.")]
    cwd: str | None
    user: str | None
    timeout: float | None
    idle_timeout: float | None
    limits: dict[str, float]
    survive: bool
    started_at: Time
    ended_at: Time | None
    exit_code: int | None
    signal: str | None
    timed_out: bool
    idle_timed_out: bool
    oom_killed: bool
    survivors: Annotated[list[int], Meta(description="Pids of its tree that run although its shell has ended.")]
    output: OutputState


class Waited(ExecutionDetails):
    """The details of an execution when a wait is over, and why it is over."""

    reason: Literal["output", "port", "http", "exit", "timeout"]
    seq: Annotated[int, Meta(description="For output: the record in which the text ends.")] | UnsetType = UNSET
    line: Annotated[str, Meta(description="For output: the line, as far as it has come.")] | UnsetType = UNSET


class Logs(Struct):
    """Records of an execution's log."""

    records: list[Record]
    dropped: Annotated[int, Meta(description="Records after `after` that the log no longer has.")]
    last: Annotated[int, Meta(description="Ask for what is after this number next.")]
    ended: Annotated[bool, Meta(description="Whether there will be no more.")]


class StdinWritten(Done):
    """The number of bytes that stdin has taken."""

    bytes: int
