"""The replies of the API as values. Fields that a newer daemon adds are ignored."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

import msgspec

from sandboxd.client.errors import ProtocolError

T = TypeVar("T")

StreamName = Literal["stdout", "stderr"]
Status = Literal["running", "completed", "failed", "killed"]


class Reply(msgspec.Struct, kw_only=True):
    """The base of all replies."""


class RunResult(Reply):
    """
    The output of a command, and how it ended.

    :ivar code: its exit code; -1 if a signal ended it.
    :ivar signal: the signal that ended it, such as ``SIGKILL``.
    :ivar stdout_dropped: bytes that ``max_output`` left out of the middle.
    """

    stdout: str
    stderr: str
    code: int
    error: str | None = None
    signal: str | None = None
    timed_out: bool = False
    idle_timed_out: bool = False
    oom_killed: bool = False
    stdout_dropped: int = 0
    stderr_dropped: int = 0
    survivors: list[int] | None = None


class Complete(Reply):
    """How a command ended whose output was streamed."""

    code: int
    error: bool
    signal: str | None = None
    timed_out: bool = False
    idle_timed_out: bool = False
    oom_killed: bool = False
    survivors: list[int] | None = None


class Output(Reply):
    """
    A line of output, or a piece of a long line.

    :ivar data: the line without its end.
    :ivar partial: whether the line goes on in the next record of the stream.
    :ivar seq: its number; 0 if the reply has none.
    """

    stream: StreamName
    data: str
    partial: bool = False
    seq: int = 0

    @property
    def text(self) -> str:
        """The line with its end."""
        return self.data if self.partial else f"{self.data}\n"


class Record(Output, kw_only=True):
    """
    A line of a log, with its number and the time of its arrival.

    :ivar timestamp: RFC 3339, in UTC.
    """

    timestamp: str


class Gap(Reply):
    """
    The number of lines that were dropped from the log.

    A command that is streamed waits for its reader as long as the connection lasts; while it is broken, the daemon
    keeps the last 10,000 lines.
    """

    dropped: int


class Started(Reply):
    """A process that was started."""

    id: str
    pid: int
    status: Status


class Process(Started, kw_only=True):
    """A background process, as the list shows it."""

    command: str
    started_at: str
    exit_code: int | None = None
    completed_at: str | None = None


class Processes(Reply):
    """The background processes."""

    processes: list[Process]


class OutputState(Reply):
    """An execution's output, in numbers."""

    bytes: int
    records: int
    first: int
    truncated: bool
    last_at: str | None
    followers: int


class TerminalSize(Reply):
    """The size of a pseudo-terminal, in characters."""

    cols: int
    rows: int


class Execution(Reply):
    """The details of an execution, in the foreground or in the background."""

    id: str
    pid: int
    status: Status
    background: bool
    command: str
    cwd: str | None
    user: str | int | None
    timeout: float | None
    idle_timeout: float | None
    limits: dict[str, float]
    survive: bool
    started_at: str
    ended_at: str | None
    exit_code: int | None
    signal: str | None
    timed_out: bool
    idle_timed_out: bool
    oom_killed: bool
    output: OutputState
    argv: list[str] | None = None
    tty: TerminalSize | None = None
    survivors: list[int] = []


class Awaited(Execution, kw_only=True):
    """
    The details of an execution when a wait is over, and why it is over.

    :ivar seq: the number of the record that has the text waited for.
    :ivar line: the line that has it.
    """

    reason: Literal["output", "port", "http", "exit", "timeout"] = "exit"
    seq: int | None = None
    line: str | None = None


class Logs(Reply):
    """Records of an execution's log."""

    records: list[Record]
    dropped: int
    last: int
    ended: bool


class Done(Reply):
    """The reply to an operation that has succeeded."""

    success: bool = True
    message: str = ""


class StdinWritten(Reply):
    """The number of bytes that stdin has taken."""

    success: bool
    bytes: int


class FileInfo(Reply):
    """
    The description of a file, a directory or a link.

    :ivar path: as it was asked for; in a list, relative to the directory that is listed.
    :ivar mode: permissions in octal, four digits.
    :ivar mtime: RFC 3339, in UTC, to the nanosecond.
    """

    path: str
    name: str
    type: Literal["file", "dir", "link", "fifo", "socket", "char", "block", "other"]
    size: int
    mode: str
    uid: int
    gid: int
    owner: str | None
    group: str | None
    mtime: str
    ctime: str
    atime: str
    inode: int
    links: int
    target: str | None = None
    etag: str | None = None


class FileList(Reply):
    """A page of a list."""

    path: str
    entries: list[FileInfo]
    next: str | None
    unreadable: list[str] = []


class Found(Reply):
    """A path that matches a pattern."""

    path: str
    type: Literal["file", "dir"]


class FoundList(Reply):
    """A page of paths that match."""

    path: str
    entries: list[Found]
    next: str | None
    unreadable: list[str] = []


class Match(Reply):
    """
    A line that matches a search.

    :ivar cut: how many of its characters come before ``text``.
    """

    path: str
    line: int
    column: int
    text: str
    cut: int = 0
    before: list[str] = []
    after: list[str] = []


class Matches(Reply):
    """The matches of a search, and what was not searched."""

    path: str
    matches: list[Match]
    truncated: bool
    timed_out: bool
    files: int = 0
    binary: int = 0
    too_large: int = 0
    unreadable: int = 0


class Lines(Reply):
    """
    A range of a text file's lines.

    :ivar offset: the number of the first one, from 1.
    :ivar lines: how many there are in ``content``.
    """

    content: str
    offset: int
    lines: int
    total_lines: int


class Stored(Reply):
    """A file that was written."""

    path: str
    size: int
    etag: str
    created: bool


class Touched(Reply):
    """A file after the operation."""

    path: str
    size: int
    etag: str


class EditedPlace(Reply):
    """The result of one edit."""

    replaced: int
    lines: list[int]


class EditedFile(Touched, kw_only=True):
    """A file that was edited."""

    edits: list[EditedPlace]


class Deleted(Reply):
    """A file that was removed."""

    path: str


class Transferred(Reply, rename={"from_": "from"}):
    """The result of a move or a copy."""

    from_: str
    to: str
    copied: bool
    entries: int = 0
    bytes: int = 0
    skipped: list[str] = []


class PermissionsChanged(Reply):
    """The number of files that were changed."""

    path: str
    changed: int


class Linked(Reply):
    """A link that was made."""

    path: str
    target: str
    kind: Literal["symbolic", "hard"]


class Unpacked(Reply):
    """The result of unpacking an archive in the sandbox."""

    path: str
    entries: int
    bytes: int
    skipped: list[str] = []
    skips: int = 0


class Change(Reply, rename={"from_": "from"}):
    """
    A change on the file system.

    :ivar event: ``ready`` (the watch stands), ``created``, ``modified``, ``deleted``, ``moved``, ``overflow`` (look at
        all below ``path`` anew), ``gap`` (``dropped`` changes are lost: look at all anew) or ``end``.
    :ivar from_: where it was, if it has ``moved`` to ``to``.
    """

    event: str
    path: str | None = None
    type: Literal["file", "dir"] | None = None
    from_: str | None = None
    to: str | None = None
    reason: str | None = None
    dropped: int | None = None
    recursive: bool | None = None
    directories: int | None = None
    unreadable: int | None = None


class Bound(Reply):
    """The port that the proxy forwards to."""

    success: bool
    message: str
    port: str


class PortStatus(Reply):
    """
    The port that the proxy forwards to, if any.

    :ivar port: empty if none is bound.
    """

    success: bool
    port: str
    proxy_port: str


class ListeningPort(Reply):
    """A TCP port that a process of the sandbox listens on."""

    port: int
    addresses: list[str]
    pid: int | None
    execution: str | None
    bound: bool


class Ports(Reply):
    """The TCP ports that processes listen on."""

    ports: list[ListeningPort]


class PortReadiness(Reply):
    """Whether a port was ready in time."""

    ready: bool
    reason: Literal["port", "http", "timeout"]


class Health(Reply):
    """The reply of a daemon that answers."""

    status: str
    version: str = ""
    uptime: int = 0
    proxy_port: str = ""


class Readiness(Reply):
    """Whether the daemon would run a command now."""

    ready: bool


class DaemonStatus(Reply):
    """
    The daemon's version, uptime and load.

    :ivar idle: seconds since it was last used; 0 while anything runs.
    :ivar longest_stall: seconds by which it was late, at most.
    :ivar marks: what the processes of a command are found by; None from a daemon that does not report it.
    :ivar root: the directory that file requests are confined to; None for none.
    """

    version: str
    uptime: float
    executions: int
    streams: int
    proxy_connections: int
    longest_stall: float
    idle: float
    marks: str | None = None
    root: str | None = None


class Sample(Reply):
    """One value of a metric."""

    name: str
    labels: dict[str, str]
    value: float


class Metric(Reply):
    """A metric, in Prometheus' data model."""

    name: str
    type: str
    help: str
    samples: list[Sample]


class MetricsReply(Reply):
    """The daemon's metrics."""

    metrics: list[Metric]


def decode(body: bytes | str, type: type[T], **more: object) -> T:
    """
    Decode a JSON text as a value.

    :param more: further fields of the value, which the text does not have.
    :raise ProtocolError: if it is not JSON, or not of that type.
    """
    try:
        # Not msgspec's own decoder: it refuses the lone surrogates by which names that are not UTF-8 come.
        data = json.loads(body)
        return msgspec.convert({**data, **more} if more else data, type)
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise ProtocolError(f"the reply is not a {type.__name__}: {error}") from None


def fields(body: bytes) -> dict[str, Any]:
    """
    Return the fields of a reply as they were sent.

    :raise ProtocolError: if it is not a JSON object.
    """
    return decode(body, dict[str, Any])
