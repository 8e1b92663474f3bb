"""The description of an MCP tool: its name and text for a model, its argument and result types, and its function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

import msgspec

from sandboxd.web.ascii_json import dumps

#: Sends some output of a call that runs; fires when the client has taken it.
Progress = Callable[[str], Awaitable[None]]


class ToolError(Exception):
    """A failed call that the model can correct; the text says how."""


class Arguments(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The base of a tool's arguments. Unknown ones are errors: a model that invents one would go on to rely on it."""


class Tool(NamedTuple):
    """
    An MCP tool.

    :ivar arguments: the type of its arguments, from which its input schema is made.
    :ivar result: the type of its structured result.
    :ivar call: called with the arguments, and what takes the progress of a long call, or None.
    :ivar text: makes the text of a result, for models whose client shows no structured ones.
    :ivar read_only: whether it changes nothing.
    :ivar destructive: whether it may remove or overwrite something.
    """

    name: str
    title: str
    description: str
    arguments: type[Arguments]
    result: type[msgspec.Struct]
    call: Callable[[Any, Progress | None], Awaitable[msgspec.Struct]]
    text: Callable[[Any], str]
    read_only: bool = False
    destructive: bool = False

    def listed(self) -> dict[str, object]:
        """Return the tool's entry in the reply to ``tools/list``."""
        return {
            "name": self.name,
            "title": self.title,
            "description": self.description,
            "inputSchema": schema(self.arguments),
            "outputSchema": schema(self.result),
            "annotations": {
                "title": self.title,
                "readOnlyHint": self.read_only,
                "destructiveHint": self.destructive,
                "openWorldHint": False,
            },
        }


def schema(type: type[msgspec.Struct]) -> dict[str, Any]:
    """Return the JSON Schema of a type, with an object at its top, as the protocol demands."""
    found = msgspec.json.schema(type)
    definitions = found["$defs"]
    top: dict[str, Any] = definitions.pop(found["$ref"].rpartition("/")[2])
    top.pop("title", None)
    top.pop("description", None)
    return {**top, **({"$defs": definitions} if definitions else {})}


def as_json(result: msgspec.Struct) -> str:
    """Return a result as JSON text."""
    return dumps(result).decode("ascii")
