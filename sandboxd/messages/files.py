"""Bodies and replies of the contract's file routes."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from sandboxd.messages.decoding import PathRequest, Struct, Time


class WriteFileRequest(PathRequest):
    """Body of ``/write_file``; ``koyeb-cli`` leaves an empty ``content`` out."""

    content: str = ""


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
