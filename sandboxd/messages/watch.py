"""Query and events of ``/watch``."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from sandboxd.messages.archive import Name, Recursive, TreeQuery
from sandboxd.messages.decoding import After, Struct


class WatchQuery(TreeQuery, kw_only=True):
    """Query of ``/watch``."""

    recursive: Recursive = False
    after: After = None


ChangedType = Annotated[Literal["file", "dir"], Meta(description="What it is; a link, too, is a file here.")]


class Ready(Struct):
    """The start of a watch: each change from now on is an event."""

    path: Name
    recursive: bool
    directories: Annotated[int, Meta(description="How many are watched.")]
    unreadable: Annotated[int, Meta(description="How many are not, because they may not be read.")]


class Changed(Struct):
    """A file or directory was created, modified (its contents, owner, mode or times) or deleted."""

    path: Name
    type: ChangedType


class Moved(Struct, rename={"from_": "from"}):
    """A file or directory was renamed, with all that is in it; a file that had the new name is gone."""

    from_: Name
    to: Name
    type: ChangedType


class Overflow(Struct):
    """Changes below this path may have been lost: read it again. The watch goes on."""

    path: Name
    reason: str


class MissedChanges(Struct):
    """The number of changes that can no longer be had, if it is known: read everything again. The watch goes on."""

    dropped: int | None


class WatchEnded(Struct):
    """The end of a watch: no more events follow."""

    reason: Literal["deleted", "moved", "unmounted", "failed", "stopped"]
