"""Requests about trees of files: archives, watches, and what people do with files."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, field

from sandboxd.messages import After, PathRequest

Recursive = Annotated[bool, Meta(description="Whether what is in the directories below is meant too.")]

Exclude = Annotated[
    list[str],
    Meta(
        max_length=100,
        description="Patterns of what is left out, with all that is in it: a name, or with a slash a path from the top;"
        " may be given several times.",
    ),
]


class WatchQuery(PathRequest, kw_only=True):
    """Query of ``/watch``."""

    recursive: Recursive = False
    exclude: Exclude = field(default_factory=list)
    after: After = None
