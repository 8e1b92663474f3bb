"""
Bodies, queries and replies of the routes below ``/files/``: stat, list, glob, grep, move, copy, chmod and the like.
"""

from __future__ import annotations

import base64
import binascii
from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType, field

from sandboxd.files.edit import Edit
from sandboxd.files.grep import Search
from sandboxd.files.listing import ListFilter
from sandboxd.files.patterns import Excludes, Pattern, PatternError
from sandboxd.files.permissions import ModeChange, Owner, owner, parse_mode
from sandboxd.messages.archive import Name, TreeQuery
from sandboxd.messages.decoding import BadRequest, PathRequest, Struct, Time, check_path

Type = Literal["file", "dir", "link", "fifo", "socket", "char", "block"]
Limit = Annotated[int, Meta(ge=1, le=10_000, description="How many at most.")]
After = Annotated[str, Meta(description="What the page before has as `next`.")]
Overwrite = Annotated[bool, Meta(description="Whether a file, a link or an empty directory there may be replaced.")]
Parents = Annotated[bool, Meta(description="Whether to make the directories above that are missing.")]
Hidden = Annotated[bool, Meta(description="Whether names that begin with a dot are meant.")]
Globs = Annotated[list[str], Meta(max_length=100)]


def pattern(name: str, text: str, hidden: bool = True) -> Pattern:
    """
    Return a compiled pattern.

    :param name: the field that it is in.
    :raise BadRequest: if it is malformed.
    """
    try:
        return Pattern(text, hidden)
    except PatternError as error:
        raise BadRequest(f"{name}: {error}") from None


class StatQuery(PathRequest, kw_only=True):
    """Query of ``/files/stat``."""

    follow: Annotated[bool, Meta(description="Whether to describe what a link leads to, instead of the link.")] = False


class ListQuery(TreeQuery, kw_only=True):
    """Query of ``/files/list``."""

    depth: Annotated[int, Meta(ge=1, le=10_000, description="How deep to go; 1 is the directory itself.")] = 1
    glob: (
        Annotated[str, Meta(description="What names match, or with a slash what paths from the directory do.")] | None
    ) = None
    type: Type | None = None
    hidden: Hidden = True
    limit: Limit = 1000
    after: After = ""

    def choice(self) -> ListFilter:
        """
        Return the filter of the list.

        :raise BadRequest: if a pattern is malformed.
        """
        return ListFilter(
            self.depth,
            None if self.glob is None else pattern("glob", self.glob, self.hidden),
            self.glob is not None and "/" not in self.glob,
            self.hidden,
            None if self.type is None else (self.type,),
            self.excluded(),
        )


class GlobRequest(PathRequest, kw_only=True):
    """Body of ``/files/glob``."""

    pattern: Annotated[str, Meta(description="`*`, `?`, `[...]` within a name, `**` for directories, `{a,b}`.")]
    type: Type | None = None
    hidden: Hidden = False
    exclude: Globs = field(default_factory=list)
    limit: Limit = 1000
    after: After = ""

    def choice(self) -> ListFilter:
        """
        Return the filter of the list.

        :raise BadRequest: if a pattern is malformed.
        """
        return ListFilter(
            None,
            pattern("pattern", self.pattern, self.hidden),
            hidden=self.hidden,
            types=None if self.type is None else (self.type,),
            excluded=_excludes(self.exclude),
        )


class GrepRequest(PathRequest, kw_only=True):
    """Body of ``/files/grep``."""

    pattern: Annotated[str, Meta(max_length=10_000, description="A regular expression of Python, found in one line.")]
    literal: Annotated[bool, Meta(description="Whether it is a text instead.")] = False
    ignore_case: bool = False
    glob: Annotated[Globs, Meta(description="Files to search, as in `/files/list`; none for all.")] = field(
        default_factory=list
    )
    exclude: Globs = field(default_factory=list)
    hidden: Hidden = False
    context: Annotated[int, Meta(ge=0, le=20, description="Lines before and after each match.")] = 0
    max_matches: Limit = 1000
    max_file_size: Annotated[int, Meta(ge=1, le=1 << 28, description="Bytes; larger files are left out.")] = 10_000_000
    timeout: Annotated[float, Meta(gt=0, le=60, description="Seconds after which it ends with what it has.")] = 10.0

    def search(self) -> Search:
        """Return the parameters of the search."""
        return Search(**{name: getattr(self, name) for name in Search._fields})

    def check_patterns(self) -> None:
        """
        Check the patterns of files. May take long: call it in a thread.

        :raise BadRequest: if one is malformed.
        """
        for glob in self.glob:
            pattern("glob", glob)
        _excludes(self.exclude)


class TransferRequest(msgspec.Struct, kw_only=True, rename={"from_": "from"}):
    """Body of ``/files/move`` and ``/files/copy``."""

    from_: str
    to: Annotated[str, Meta(description="Its new name; not a directory to put it into.")]
    overwrite: Overwrite = False
    parents: Parents = False

    def __post_init__(self) -> None:
        check_path("from", self.from_)
        check_path("to", self.to)


class ChmodRequest(PathRequest, kw_only=True):
    """Body of ``/files/chmod``."""

    mode: Annotated[str, Meta(description="Octal, as 0644, or symbolic, as u+x,go-w.")] | None = None
    owner: Annotated[str, Meta(description="user, user:group or :group, by name or number.")] | None = None
    group: Annotated[str, Meta(description="By name or number.")] | None = None
    recursive: Annotated[bool, Meta(description="Whether what is in a directory is meant too.")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode is None and self.owner is None and self.group is None:
            raise ValueError("mode, owner or group is needed")

    def change(self) -> tuple[ModeChange | None, Owner | None]:
        """
        Return the new mode and the new owner. Blocks.

        :raise BadRequest: if there is no such mode, user or group.
        """
        try:
            mode = None if self.mode is None else parse_mode(self.mode)
            whose = None if self.owner is None and self.group is None else owner(self.owner or "")
            if whose is not None and self.group is not None:
                whose = Owner(whose.uid, owner(f":{self.group}").gid)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        return mode, whose


class AppendRequest(PathRequest, kw_only=True):
    """Body of ``/files/append``."""

    content: Annotated[str, Meta(description="Text.")] | None = None
    base64: Annotated[str, Meta(description="Or bytes.")] | None = None
    parents: Parents = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.content is None) == (self.base64 is None):
            raise ValueError("content or base64 is needed, one of them")

    def data(self) -> bytes:
        """
        Return the bytes to append.

        :raise BadRequest: if it is not valid base64.
        """
        if self.content is not None:
            return self.content.encode("utf-8", "surrogateescape")
        try:
            return base64.b64decode(self.base64 or "", validate=True)
        except (binascii.Error, ValueError) as error:
            raise BadRequest(f"base64: {error}") from None


class LinkRequest(PathRequest, kw_only=True):
    """Body of ``/files/link``."""

    target: Annotated[str, Meta(description="What it leads to: of a symbolic link the text, of a hard one a path.")]
    kind: Literal["symbolic", "hard"] = "symbolic"
    overwrite: Annotated[bool, Meta(description="Whether what is there may be replaced, if no directory.")] = False
    parents: Parents = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_path("target", self.target)


class TouchRequest(PathRequest, kw_only=True):
    """Body of ``/files/touch``."""

    mtime: Annotated[datetime, Meta(tz=True, description="RFC 3339; now if it is not given.")] | None = None
    parents: Parents = False


class EditItem(msgspec.Struct):
    """An edit: the old text must be in the file, and only once unless ``replace_all`` is true."""

    old: Annotated[str, Meta(min_length=1)]
    new: str
    replace_all: bool = False


class EditRequest(PathRequest, kw_only=True):
    """Body of ``/files/edit``."""

    edits: Annotated[list[EditItem], Meta(min_length=1, max_length=1000)]
    if_match: (
        Annotated[str, Meta(description="The `etag` that the file must have; as the header `If-Match`.")] | None
    ) = None

    def items(self) -> list[Edit]:
        """Return the edits."""
        return [Edit(item.old, item.new, item.replace_all) for item in self.edits]


def _excludes(patterns: list[str]) -> Excludes:
    try:
        return Excludes(patterns)
    except PatternError as error:
        raise BadRequest(f"exclude: {error}") from None


FileType = Literal["file", "dir", "link", "fifo", "socket", "char", "block", "other"]


class FileInfo(Struct):
    """The description of a file."""

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
    """A page of a list: each directory before its own entries, by name."""

    path: Name
    entries: list[FileInfo]
    next: Annotated[Name | None, Meta(description="Give it as `after` for what comes next; null at the end.")]
    unreadable: Annotated[list[Name], Meta(description="Directories that may not be read.")] | UnsetType = UNSET


class Found(Struct):
    """A path that matches a pattern."""

    path: Name
    type: Literal["file", "dir"]


class FoundList(Struct):
    """A page of paths that match a pattern."""

    path: Name
    entries: list[Found]
    next: Annotated[Name | None, Meta(description="Give it as `after` for what comes next; null at the end.")]
    unreadable: Annotated[list[Name], Meta(description="Directories that may not be read.")] | UnsetType = UNSET


class Match(Struct):
    """A line that matches a search."""

    path: Name
    line: Annotated[int, Meta(ge=1)]
    column: Annotated[int, Meta(ge=1)]
    text: Annotated[str, Meta(description="The line; of a very long one what is around the match.")]
    cut: Annotated[int, Meta(description="How many characters of it come before the text.")] | UnsetType = UNSET
    before: list[str] | UnsetType = UNSET
    after: list[str] | UnsetType = UNSET


class Matches(Struct):
    """The matches of a search, and what was not searched."""

    path: Name
    matches: list[Match]
    truncated: Annotated[bool, Meta(description="Whether there are more than were wanted.")]
    timed_out: Annotated[bool, Meta(description="Whether the time was over before the end.")]
    files: Annotated[int, Meta(description="Files that were looked into.")] | UnsetType = UNSET
    binary: Annotated[int, Meta(description="Of those, no text.")] | UnsetType = UNSET
    too_large: int | UnsetType = UNSET
    unreadable: int | UnsetType = UNSET


class Transferred(Struct, rename={"from_": "from"}):
    """The result of a move or a copy."""

    from_: Name
    to: Name
    copied: Annotated[bool, Meta(description="Whether it was copied, as it is between file systems.")]
    entries: Annotated[int, Meta(description="Files, directories and links that were copied.")] | UnsetType = UNSET
    bytes: int | UnsetType = UNSET
    skipped: Annotated[list[Name], Meta(description="Sockets and devices.")] | UnsetType = UNSET


class PermissionsChanged(Struct):
    """The number of files whose owner or mode was changed."""

    path: Name
    changed: Annotated[int, Meta(description="How many.")]


class Touched(Struct):
    """A file after the operation."""

    path: Name
    size: int
    etag: str


class Linked(Struct):
    """A link that was made."""

    path: Name
    target: Name
    kind: Literal["symbolic", "hard"]


class EditedPlace(Struct):
    """The result of one edit."""

    replaced: int
    lines: Annotated[list[int], Meta(description="The lines where the new text begins, the first 20.")]


class EditedFile(Touched):
    """A file that was edited."""

    edits: list[EditedPlace]
