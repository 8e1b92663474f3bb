"""Replies of the routes that look at, search and change files, for the OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, UnsetType

from sandboxd.replies import Struct, Time
from sandboxd.tree_replies import Name

FileType = Literal["file", "dir", "link", "fifo", "socket", "char", "block", "other"]


class FileInfo(Struct):
    """What is known of a file."""

    path: Annotated[Name, Meta(description="As it was asked for; in a list, from the directory that is listed.")]
    name: Name
    type: FileType
    size: Annotated[int, Meta(description="Bytes.")]
    mode: Annotated[str, Meta(description="Permissions in octal, four digits.", pattern="^[0-7]{4}$")]
    uid: int
    gid: int
    owner: str | None
    group: str | None
    mtime: Time
    ctime: Time
    atime: Time
    inode: int
    links: int
    target: Annotated[Name, Meta(description="What a link says.")] | UnsetType = UNSET
    etag: Annotated[str, Meta(description="Of a file, the one that `/files` has.")] | UnsetType = UNSET


class FileList(Struct):
    """A page of a list: each directory before what is in it, by name."""

    path: Name
    entries: list[FileInfo]
    next: Annotated[Name | None, Meta(description="Give it as `after` for what comes next; null at the end.")]
    unreadable: Annotated[list[Name], Meta(description="Directories that may not be read.")] | UnsetType = UNSET


class Found(Struct):
    """A path that matches."""

    path: Name
    type: Literal["file", "dir"]


class FoundList(Struct):
    """A page of paths that match."""

    path: Name
    entries: list[Found]
    next: Annotated[Name | None, Meta(description="Give it as `after` for what comes next; null at the end.")]
    unreadable: Annotated[list[Name], Meta(description="Directories that may not be read.")] | UnsetType = UNSET


class Match(Struct):
    """A line that matches."""

    path: Name
    line: Annotated[int, Meta(ge=1)]
    column: Annotated[int, Meta(ge=1)]
    text: Annotated[str, Meta(description="The line; of a very long one what is around the match.")]
    cut: Annotated[int, Meta(description="How many characters of it come before the text.")] | UnsetType = UNSET
    before: list[str] | UnsetType = UNSET
    after: list[str] | UnsetType = UNSET


class Matches(Struct):
    """What was found, and what was not searched."""

    path: Name
    matches: list[Match]
    truncated: Annotated[bool, Meta(description="Whether there are more than were wanted.")]
    timed_out: Annotated[bool, Meta(description="Whether the time was over before the end.")]
    files: Annotated[int, Meta(description="Files that were looked into.")] | UnsetType = UNSET
    binary: Annotated[int, Meta(description="Of those, no text.")] | UnsetType = UNSET
    too_large: int | UnsetType = UNSET
    unreadable: int | UnsetType = UNSET


class Transferred(Struct, rename={"from_": "from"}):
    """Something that was moved or copied."""

    from_: Name
    to: Name
    copied: Annotated[bool, Meta(description="Whether it was copied, as it is between file systems.")]
    entries: Annotated[int, Meta(description="Files, directories and links that were copied.")] | UnsetType = UNSET
    bytes: int | UnsetType = UNSET
    skipped: Annotated[list[Name], Meta(description="Sockets and devices.")] | UnsetType = UNSET


class Permitted(Struct):
    """Files whose owner or mode was changed."""

    path: Name
    changed: Annotated[int, Meta(description="How many.")]


class Touched(Struct):
    """A file as it is now."""

    path: Name
    size: int
    etag: str


class Linked(Struct):
    """A link that was made."""

    path: Name
    target: Name
    kind: Literal["symbolic", "hard"]


class EditedPlace(Struct):
    """What became of one edit."""

    replaced: int
    lines: Annotated[list[int], Meta(description="The lines where the new text begins, the first 20.")]


class EditedFile(Touched):
    """A file that was edited."""

    edits: list[EditedPlace]
