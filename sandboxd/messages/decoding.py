"""
Decode bodies and queries, or raise an error that names the field; and the types that all families of routes share.

The rules are those of the HTTP contract; unknown fields are ignored, because the official clients send some.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Hashable, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, cast
from urllib.parse import parse_qsl

import msgspec
from msgspec import Meta


class BadRequest(Exception):
    """A request is malformed; the text names the field and says what to do."""


#: A text without NUL, as a regular expression.
NO_NUL = r"^[^\x00]*$"


#: At most a year, lest a timer be set that the clock cannot count to.
Seconds = Annotated[float, Meta(ge=0, le=366 * 86400)]
Count = Annotated[int, Meta(ge=0, le=(1 << 62))]

After = Annotated[Count, Meta(description="Records behind this number; wins over Last-Event-ID.")] | None


#: The pattern is for the OpenAPI document; check_path raises errors that say more.
Path = Annotated[str, Meta(extra_json_schema={"minLength": 1, "pattern": NO_NUL})]


class PathRequest(msgspec.Struct):
    """Body of the file routes that take a path only."""

    path: Path

    def __post_init__(self) -> None:
        check_path("path", self.path)


T = TypeVar("T")

#: An escape for half a surrogate pair, perhaps.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_path(field: str, path: str) -> None:
    """
    Raise ValueError if a path is empty or contains NUL.
    """
    if not path:
        raise ValueError(f"{field}: must not be empty")
    if "\0" in path:
        raise ValueError(f"{field}: must not contain NUL")


def decode(body: bytes, type: type[T]) -> T:
    """
    Decode a request's body.

    :param body: JSON; empty means ``{}``. ``\\udc80`` to ``\\udcff`` alone are bytes 80 to ff that are not UTF-8.
    :raise BadRequest: if it is not JSON, or not of that type.
    """
    try:
        try:
            return msgspec.json.decode(body or b"{}", type=type)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            if not _SURROGATE.search(body):
                raise
        # msgspec takes pairs only.
        return msgspec.convert(_with_surrogates(body), type)
    except msgspec.ValidationError as error:
        raise BadRequest(_validation(str(error))) from None
    except UnicodeDecodeError:
        raise BadRequest("the body is not valid JSON: it is not UTF-8") from None
    except (msgspec.DecodeError, ValueError) as error:  # ValueError also for a number of thousands of digits
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None


def decode_query(query: bytes, type: type[T]) -> T:
    """
    Decode a request's query. If a parameter is given twice the first counts, unless its type is a list. Bytes that are
    not UTF-8 are decoded as in paths; see :mod:`sandboxd.files`.

    :param query: of the form ``application/x-www-form-urlencoded``; only ``&`` separates parameters (WHATWG URL
        standard, section 5.1).
    :raise BadRequest: if it is not of that type.
    """
    fields = fields_of(cast(Hashable, type))
    given: dict[str, Any] = {}
    pairs = parse_qsl(os.fsdecode(query), keep_blank_values=True, errors="surrogateescape")
    for name, text in pairs:
        if name not in fields:
            continue
        if fields[name]:
            given.setdefault(name, []).append(text)
        else:
            given.setdefault(name, text)
    try:
        found = msgspec.convert(given, type, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(_validation(str(error))) from None
    for parameter in given:
        if getattr(found, parameter) is None:  # msgspec makes None of the text "null"
            raise BadRequest(f"{parameter}: must not be null; leave it out")
    return found


@cache
def fields_of(type: Any) -> Mapping[str, bool]:
    """Return the names of a type's fields, and whether each is a list."""
    found = msgspec.inspect.type_info(type)
    assert isinstance(found, msgspec.inspect.StructType)
    return {field.encode_name: isinstance(_bare(field.type), msgspec.inspect.ListType) for field in found.fields}


def _bare(type: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """Return a type without its metadata."""
    return type.type if isinstance(type, msgspec.inspect.Metadata) else type


def _with_surrogates(body: bytes) -> object:
    """
    Decode a body with lone surrogates.

    :raise BadRequest: if one does not stand for a byte.
    """
    value: object = json.loads(body)
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise BadRequest("the body has half a surrogate pair in it; only \\udc80 to \\udcff may stand alone") from None
    return value


def _validation(text: str) -> str:
    """Return an error of msgspec with the field first: ``cmd: Expected `str`, got `int```."""
    text, _, path = text.partition(" - at `$")
    field = path.strip("`.")
    return f"{field}: {text}" if field else text


def _no_nul(field: str, value: str) -> None:
    if "\0" in value:
        raise BadRequest(f"{field}: must not contain NUL")


Yes = Annotated[bool, Meta(extra_json_schema={"const": True})]


No = Annotated[bool, Meta(extra_json_schema={"const": False})]


Text = Annotated[str, Meta(description="For people.")]


Time = Annotated[str, Meta(extra_json_schema={"format": "date-time"}, description="RFC 3339, in UTC.")]


class Struct(msgspec.Struct, forbid_unknown_fields=True):
    """The base of replies, which have these fields and no others."""


class Error(msgspec.Struct):
    """The body of an error: what is wrong, which field, what to do. Some errors have more fields."""

    error: str


class Failure(msgspec.Struct):
    """The body of an error of a route whose replies have ``success``."""

    success: No
    error: str


class Done(Struct):
    """The reply to a request that has succeeded."""

    success: Yes


class DoneWithMessage(Done):
    """The reply to a request that has succeeded, with a message for people."""

    message: Text
