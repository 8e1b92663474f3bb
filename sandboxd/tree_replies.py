"""Replies about trees of files, for the OpenAPI document; see :mod:`sandboxd.replies`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from sandboxd.replies import Struct

Name = Annotated[str, Meta(description="Bytes that are not UTF-8 are lone surrogates, U+DC80 to U+DCFF.")]
ChangedType = Annotated[Literal["file", "dir"], Meta(description="What it is; a link, too, is a file here.")]


class Ready(Struct):
    """The watch stands: all that changes from now on is told."""

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
    """Nothing more will be told."""

    reason: Literal["deleted", "moved", "unmounted", "failed", "stopped"]


class Unpacked(Struct):
    """An archive that was unpacked."""

    path: Name
    entries: Annotated[int, Meta(description="Members that are there now.")]
    bytes: Annotated[int, Meta(description="Bytes of their contents.")]
    skipped: (
        Annotated[list[Name], Meta(description="Members that were left out, devices and FIFOs: the first 100.")]
        | UnsetType
    ) = UNSET
    skips: Annotated[int, Meta(description="How many those are in all.")] | UnsetType = UNSET
