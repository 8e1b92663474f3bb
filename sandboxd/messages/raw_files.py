"""Queries and replies of the routes of ``/files`` that carry raw bytes."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sandboxd.messages.decoding import Count, Path, Struct, check_path

FilePath = Annotated[Path, Meta(description="The file; percent-encoded bytes, so that any name can be given.")]


class FileQuery(msgspec.Struct):
    """Query of the routes that take a path only."""

    path: FilePath

    def __post_init__(self) -> None:
        check_path("path", self.path)


class FormQuery(FileQuery):
    """Query of ``POST /files``."""

    mode: Annotated[str, Meta(description="Permissions in octal, as 0644.", pattern="^[0-7]{1,5}$")] | None = None
    owner: Annotated[str, Meta(description="user, user:group or :group, by name or number.")] | None = None
    parents: Annotated[bool, Meta(description="Whether to make the directories above that are missing.")] = False

    @property
    def permissions(self) -> int | None:
        """The mode as a number."""
        return None if self.mode is None else int(self.mode, 8) & 0o7777


class UploadQuery(FormQuery):
    """Query of ``PUT /files``."""

    offset: (
        Annotated[Count, Meta(description="Write here in the file that is there, instead of replacing it.")] | None
    ) = None
    size: Annotated[Count, Meta(description="With offset: how long the file is to be in the end.")] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None and self.offset is None:
            raise ValueError("size: has a meaning with offset only")
        if self.parents and self.offset is not None:
            raise ValueError("parents: has a meaning without offset only")


class Stored(Struct):
    """A file that was written."""

    path: str
    size: Annotated[int, Meta(description="Bytes that it has now.")]
    etag: str
    created: Annotated[bool, Meta(description="Whether there was none before.")]


class StoredFiles(Struct):
    """Files that were written."""

    files: list[Stored]
    error: Annotated[str, Meta(description="Why there are no more of them.")] | UnsetType = UNSET


class Deleted(Struct):
    """A file that was removed."""

    path: str
