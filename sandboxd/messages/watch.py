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
    """The watch has begun: each change from now on is an event."""

    path: Name
    recursive: bool
    directories: Annotated[int, Meta(description="How many are watched.")]
    unreadable: Annotated[int, Meta(description="How many are not, because they may not be read.")]


class Changed(Struct):
    """Something was created, modified (its contents, its owner, its mode or its times) or deleted."""

    path: Name
    type: ChangedType


class Moved(Struct, rename={"from_": "from"}):
    """Something has another name now, with all that is in it; what was there before is gone."""

    from_: Name
    to: Name
    type: ChangedType


class Overflow(Struct):
    """Changes below this path may have been lost: look at it anew. The watch goes on."""

    path: Name
    reason: str


class MissedChanges(Struct):
    """This many changes can no longer be had, or nobody knows how many: look at all anew. The watch goes on."""

    dropped: int | None


class WatchEnded(Struct):
    """No more events follow."""

    reason: Literal["deleted", "moved", "unmounted", "failed", "stopped"]
