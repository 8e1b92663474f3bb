"""Bodies and replies of the contract's file routes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from sandboxd.messages.decoding import PathRequest, Struct, Time


class WriteFileRequest(PathRequest):
    """Body of ``/write_file``; ``koyeb-cli`` leaves an empty ``content`` out."""

    content: str = ""


class ReadFileRequest(PathRequest):
    """Body of ``/read_file``. With ``offset`` or ``limit`` lines are read, and the reply is `Lines`."""

    offset: Annotated[int, Meta(ge=1, le=1 << 62, description="Number of the first line, from 1.")] | None = None
    limit: Annotated[int, Meta(ge=0, le=1 << 62, description="How many lines; all if it is not given.")] | None = None


class Content(Struct):
    """A file's text; bytes that are not UTF-8 become U+FFFD."""

    content: str


class Lines(Struct):
    """A range of a file's lines, with their ends; bytes that are not UTF-8 become U+FFFD."""

    content: str
    offset: Annotated[int, Meta(description="Number of the first line, from 1.")]
    lines: Annotated[int, Meta(description="How many lines the content has.")]
    total_lines: Annotated[int, Meta(description="How many the file has; a last one without an end counts.")]


class Entries(Struct):
    """The names in a directory, sorted."""

    entries: list[str]


class FileEntry(Struct):
    """The description of a file."""

    name: str
    is_dir: bool
    size: Annotated[int, Meta(description="Bytes.")]
    mod_time: Time
    mode: Annotated[str, Meta(description="As ls shows it.")]


class Stat(Struct):
    """The description of a file."""

    entry: FileEntry
