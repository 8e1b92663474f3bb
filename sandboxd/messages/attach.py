"""The query and the messages of ``/processes/<id>/attach``: those of Kubernetes' remote command protocol."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from sandboxd.messages.decoding import Count

StreamSize = Annotated[int, Meta(ge=1, le=65535)]


class AttachQuery(msgspec.Struct):
    """Query of ``/processes/<id>/attach``."""

    after: Annotated[Count, Meta(description="Output behind this record; all that is kept by default.")] | None = None
    tail: Annotated[Count, Meta(description="The output of the last records; 0 for what is new.")] | None = None
    offset: (
        Annotated[
            Count,
            Meta(
                description="The output of a terminal behind so many bytes, for a client that has these. `started` then"
                " has `bytes`, those that were written until now, and a `gap` has the `offset` at which it ends."
            ),
        ]
        | None
    ) = None
    events: Annotated[bool, Meta(description="Whether text messages report the start, and gaps.")] = False

    def __post_init__(self) -> None:
        if self.tail is not None and self.after is not None:
            raise ValueError("tail: give it or after, not both")
        if self.offset is not None and (self.tail is not None or self.after is not None):
            raise ValueError("offset: give it alone, without after and tail")


class TerminalSizeMessage(msgspec.Struct):
    """Channel 4: the size of the client's terminal."""

    Width: StreamSize
    Height: StreamSize


class Cause(msgspec.Struct):
    """One cause of a command's failure."""

    reason: Literal["ExitCode"]
    message: str


class Causes(msgspec.Struct):
    """The causes of a command's failure, in Kubernetes' form."""

    causes: list[Cause]


class ExitStatus(msgspec.Struct):
    """Channel 3: how a command has ended, in Kubernetes' form."""

    status: Literal["Success", "Failure"]
    metadata: dict[str, str] = msgspec.field(default_factory=dict)
    message: str | UnsetType = UNSET
    reason: Literal["NonZeroExitCode"] | UnsetType = UNSET
    details: Causes | UnsetType = UNSET
