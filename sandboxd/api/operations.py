"""
The description of a route for the OpenAPI document: its body, query, replies and errors, as given where it is added.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True)
class RawBody:
    """
    The type of a body that is not JSON.

    :ivar media_type: its ``Content-Type``.
    """

    media_type: str = "application/octet-stream"


class Events:
    """
    The type of a reply that is a stream of Server-Sent Events.

    :param types: the type of each event's data, by the event's name.
    """

    def __init__(self, **types: Any) -> None:
        self.types: Mapping[str, Any] = types


class Operation(NamedTuple):
    """
    The description of a route.

    :ivar method: its HTTP method.
    :ivar path: its path, with parameters as ``<name>``.
    :ivar route: the function that answers; its docstring is the description, its module the tag.
    :ivar body: the type that the body is decoded to, :class:`RawBody`, or None.
    :ivar query: the type that the query is decoded to, or None.
    :ivar reply: the type of the reply, :class:`RawBody`, :class:`Events`, a tuple of such, or None for no body.
    :ivar status: the status of that answer.
    :ivar errors: the statuses that it answers errors with, beside those that any route may.
    :ivar headers: the names of headers that it evaluates, beside those that every route does.
    :ivar success: whether its errors have a ``success`` field.
    :ivar is_open: whether it needs no token.
    """

    method: str
    path: str
    route: Callable[..., Any]
    body: Any
    query: Any
    reply: Any
    status: int
    errors: tuple[int, ...]
    headers: tuple[str, ...]
    success: bool
    is_open: bool
