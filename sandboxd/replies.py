"""
The replies of the API as types, for its OpenAPI document. Tests hold the daemon's answers against them.

Replies are built as plain dictionaries, where a key that has nothing to say can be left out.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import msgspec
from msgspec import UNSET, Meta, UnsetType

Yes = Annotated[bool, Meta(extra_json_schema={"const": True})]
No = Annotated[bool, Meta(extra_json_schema={"const": False})]
Text = Annotated[str, Meta(description="For people.")]
Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"}, description="RFC 3339, in UTC.")]
Id = Annotated[str, Meta(description="The execution's id, a UUID.")]
Port = Annotated[str, Meta(pattern="^[0-9]{0,5}$")]
Status: TypeAlias = Literal["running", "completed", "failed", "killed"]
StreamName: TypeAlias = Literal["stdout", "stderr"]


class Struct(msgspec.Struct, forbid_unknown_fields=True):
    """A reply with these fields and no others."""


class Error(msgspec.Struct):
    """What is wrong, which field, what to do. Some errors have more fields."""

    error: str


class Failure(msgspec.Struct):
    """An error of a route whose reply has ``success``."""

    success: No
    error: str


class Done(Struct):
    """It was done."""

    success: Yes


class Told(Done):
    """It was done, with a word about it."""

    message: Text


class Health(Struct):
    """The daemon answers."""

    status: Literal["ok"]
    version: str
    uptime: Annotated[int, Meta(ge=0, description="Seconds.")]
    proxy_port: Port


class Ran(Struct):
    """What a command has written, and how it ended."""

    stdout: str
    stderr: str
    code: Annotated[int, Meta(description="Its exit code; -1 if a signal ended it.")]
    error: Annotated[str, Meta(description="There if the code is not 0.")] | UnsetType = UNSET
    signal: Annotated[str, Meta(description="The signal that ended it, such as SIGKILL.")] | UnsetType = UNSET
    timed_out: Yes | UnsetType = UNSET
    idle_timed_out: Yes | UnsetType = UNSET
    oom_killed: Yes | UnsetType = UNSET
    stdout_dropped: Annotated[int, Meta(description="Bytes that max_output left out.")] | UnsetType = UNSET
    stderr_dropped: Annotated[int, Meta(description="Bytes that max_output left out.")] | UnsetType = UNSET


class Output(Struct):
    """A line of output, or a piece of one."""

    stream: StreamName
    data: Annotated[str, Meta(description="The line without its end.")]
    partial: Annotated[Yes, Meta(description="The line goes on in the next event of the stream.")] | UnsetType = UNSET


class LogLine(Output, kw_only=True):
    """A line of output, and when it came."""

    timestamp: Time


class Record(LogLine, kw_only=True):
    """A line of output with its number."""

    seq: Annotated[int, Meta(ge=1)]


class Gap(Struct):
    """Lines that can no longer be had."""

    dropped: int


class Complete(Struct):
    """The command has ended."""

    code: int
    error: bool
    signal: str | UnsetType = UNSET
    timed_out: Yes | UnsetType = UNSET
    idle_timed_out: Yes | UnsetType = UNSET
    oom_killed: Yes | UnsetType = UNSET


class StreamEnded(Struct):
    """There is no more to come."""

    message: Literal["stream ended"]


class Started(Struct):
    """A process that was started."""

    id: Id
    pid: int
    status: Status


class Process(Started):
    """A background process."""

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


class Described(Struct):
    """All that is known of an execution."""

    id: Id
    pid: int
    status: Status
    background: bool
    command: str
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
    output: OutputState


class Logs(Struct):
    """Records of an execution's log."""

    records: list[Record]
    dropped: Annotated[int, Meta(description="Records that were asked for and are gone.")]
    last: Annotated[int, Meta(description="Ask for what is after this number next.")]
    ended: Annotated[bool, Meta(description="Whether there will be no more.")]


class Fed(Done):
    """Its stdin has taken the bytes."""

    bytes: int


class Content(Struct):
    """A file's text; what is not UTF-8 becomes U+FFFD."""

    content: str


class Entries(Struct):
    """The names in a directory, sorted."""

    entries: list[str]


class FileEntry(Struct):
    """What is known of a file."""

    name: str
    is_dir: bool
    size: Annotated[int, Meta(description="Bytes.")]
    mod_time: Time
    mode: Annotated[str, Meta(description="As ls shows it.")]


class Stat(Struct):
    """What is known of a file."""

    entry: FileEntry


class Bound(Told):
    """New connections to the proxy go to this port."""

    port: Port


class PortStatus(Struct):
    """The proxy's target."""

    success: Yes
    port: Annotated[Port, Meta(description="Empty if none is bound.")]
    proxy_port: Port


class Readiness(Struct):
    """The daemon would take a command now."""

    ready: Yes


class Sample(Struct):
    """A value of a metric."""

    name: str
    labels: dict[str, str]
    value: float


class Metric(Struct):
    """A metric, as Prometheus has it."""

    name: str
    type: Literal["counter", "gauge", "histogram"]
    help: str
    samples: list[Sample]


class MetricsReply(Struct):
    """The daemon in numbers."""

    metrics: list[Metric]


class DaemonStatus(Struct):
    """How the daemon is doing."""

    version: str
    uptime: Annotated[float, Meta(description="Seconds.")]
    executions: Annotated[int, Meta(description="Commands that run.")]
    streams: Annotated[int, Meta(description="Event streams that are open.")]
    proxy_connections: int
    longest_stall: Annotated[float, Meta(description="Seconds by which the daemon was late, at most.")]
    idle: Annotated[float, Meta(description="Seconds since it was last used; 0 while anything runs.")]
