"""Queries and replies of ``/archive``."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType, field

from sandboxd.files.patterns import Excludes, PatternError
from sandboxd.messages.decoding import BadRequest, Count, PathRequest, Struct

Recursive = Annotated[bool, Meta(description="Whether what is in the directories below is meant too.")]

Exclude = Annotated[
    list[str],
    Meta(
        max_length=100,
        description="Patterns of what is left out, with all that is in it: a name, or with a slash a path from the top;"
        " may be given several times.",
    ),
]


class TreeQuery(PathRequest, kw_only=True):
    """A path of a directory, and patterns of what to leave out below it."""

    exclude: Exclude = field(default_factory=list)

    def excluded(self) -> Excludes:
        """
        Return the patterns of what to leave out.

        :raise BadRequest: if a pattern is malformed.
        """
        try:
            return Excludes(self.exclude)
        except PatternError as error:
            raise BadRequest(f"exclude: {error}") from None


class ArchiveQuery(TreeQuery, kw_only=True):
    """Query of ``GET /archive``."""

    format: (
        Annotated[
            Literal["tar", "tar.gz", "tar.zst"],
            Meta(description="What is sent, whatever Accept-Encoding says; by default a tar, compressed by that."),
        ]
        | None
    ) = None
    unreadable: Annotated[
        Literal["fail", "skip"],
        Meta(description="What becomes of the whole if something may not be read: it breaks off, or leaves it out."),
    ] = "fail"


class UnpackQuery(PathRequest, kw_only=True):
    """Query of ``PUT /archive``."""

    parents: Annotated[bool, Meta(description="Whether to make the directory, and those above it.")] = False
    owner: Annotated[
        Literal["keep"] | None,
        Meta(description="keep: files get the owners that the archive names, by number. For root."),
    ] = None
    max_size: Annotated[Count, Meta(description="Bytes that the files may have together.")] | None = None
    max_entries: Annotated[int, Meta(ge=1, le=1_000_000, description="Members that the archive may have.")] = 1_000_000


Name = Annotated[str, Meta(description="Bytes that are not UTF-8 are lone surrogates, U+DC80 to U+DCFF.")]


class Unpacked(Struct):
    """The result of unpacking an archive."""

    path: Name
    entries: Annotated[int, Meta(description="Members that are there now.")]
    bytes: Annotated[int, Meta(description="Bytes of their contents.")]
    skipped: (
        Annotated[list[Name], Meta(description="Members that were left out, devices and FIFOs: the first 100.")]
        | UnsetType
    ) = UNSET
    skips: Annotated[int, Meta(description="How many those are in all.")] | UnsetType = UNSET
