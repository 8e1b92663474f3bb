"""Bodies and replies of the routes that the client of Kubernetes' agent-sandbox speaks, as it names their fields."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from sandboxd.messages.decoding import NO_NUL, Seconds, Struct, Text


class ExecuteRequest(msgspec.Struct):
    """Body of ``/execute``."""

    command: Annotated[str, Meta(description="What sh -c is given.", extra_json_schema={"pattern": NO_NUL})]
    timeout_seconds: Annotated[Seconds, Meta(description="Seconds that it may live; 0 for ever.")] | None = None


class ExecuteResult(Struct):
    """The output of a command, and how it ended."""

    stdout: str
    stderr: str
    exit_code: Annotated[int, Meta(description="124 if its time was up, else 128 and the number of a signal.")]
    timed_out: bool


class Uploaded(Struct):
    """The names of the files that were written."""

    message: Text


class DirectoryEntry(Struct):
    """An entry of a directory; of a link, what it leads to."""

    name: str
    size: Annotated[int, Meta(description="Bytes.")]
    type: Literal["file", "directory"]
    mod_time: Annotated[float, Meta(description="Seconds since 1970, in UTC.")]


class PathExists(Struct):
    """Whether a path exists."""

    path: str
    exists: bool
