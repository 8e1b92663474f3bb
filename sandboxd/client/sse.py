"""
A parser of Server-Sent Events (WHATWG HTML, section 9.2) that is fed bytes. Lines end with LF, as the daemon's do.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple


class Event(NamedTuple):
    """
    An event.

    :ivar id: the last event id as of this event; empty if there was none.
    """

    name: str
    data: str
    id: str


class EventParser:
    """
    A parser of the bytes of a stream, in pieces of any size.

    :ivar last_id: the id to resume behind.
    """

    def __init__(self) -> None:
        self.last_id = ""
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yield the events that are complete with ``data``."""
        *blocks, self._rest = (self._rest + data).split(b"\n\n")
        for block in blocks:
            name, texts = "message", []
            for line in block.decode("utf-8").split("\n"):
                field, _, value = line.partition(":")
                value = value.removeprefix(" ")
                if field == "data":
                    texts.append(value)
                elif field == "event":
                    name = value
                elif field == "id":
                    self.last_id = value
            if texts:
                yield Event(name, "\n".join(texts), self.last_id)

    def restart(self) -> None:
        """Forget an incomplete event, as the stream begins again after the last complete one."""
        self._rest = b""
