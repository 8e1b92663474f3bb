"""The check for fields and parameters that a request's type does not have, which a client can ask for (RFC 7240)."""

from __future__ import annotations

import json
from functools import cache
from typing import Any
from urllib.parse import parse_qsl

from msgspec import inspect

from sandboxd.messages.decoding import BadRequest, fields_of


def check_fields(body: bytes, type: Any) -> None:
    """
    Raise an error if a body has an unknown field, at any depth.

    :param body: JSON that could be decoded to ``type``.
    :raise BadRequest: if it has; the text names it.
    """
    found = _unknown(json.loads(body or b"{}"), _type_info(type), "")
    if found is not None:
        raise BadRequest(f"{found}: unknown field; leave it out, or do not send 'Prefer: handling=strict'")


def check_parameters(query: str, type: Any) -> None:
    """
    Raise an error if a query has an unknown parameter.

    :param type: the type of the query; None for a route without one.
    :raise BadRequest: if it has; the text names it.
    """
    known = {} if type is None else fields_of(type)
    for name, _ in parse_qsl(query, keep_blank_values=True, errors="surrogateescape"):
        if name not in known:
            raise BadRequest(f"{name}: unknown parameter; leave it out, or do not send 'Prefer: handling=strict'")


@cache
def _type_info(type: Any) -> inspect.Type:
    return inspect.type_info(type)


def _unknown(value: object, type: inspect.Type, path: str) -> str | None:
    """Return the path of a field that a type does not have, or None."""
    if isinstance(type, inspect.Metadata):
        return _unknown(value, type.type, path)
    if isinstance(type, inspect.UnionType):
        # Of the types of JSON, a union has one of each at most.
        wanted = inspect.ListType if isinstance(value, list) else (inspect.StructType, inspect.DictType)
        bare = (each.type if isinstance(each, inspect.Metadata) else each for each in type.types)
        return next((_unknown(value, each, path) for each in bare if isinstance(each, wanted)), None)
    if isinstance(type, inspect.StructType) and isinstance(value, dict):
        fields = {field.encode_name: field.type for field in type.fields}
        for name, inner in value.items():
            where = f"{path}.{name}" if path else name
            found = where if name not in fields else _unknown(inner, fields[name], where)
            if found is not None:
                return found
    elif isinstance(type, inspect.DictType) and isinstance(value, dict):
        inside = (_unknown(inner, type.value_type, f"{path}.{name}") for name, inner in value.items())
        return next((found for found in inside if found is not None), None)
    elif isinstance(type, inspect.ListType) and isinstance(value, list):
        inside = (_unknown(inner, type.item_type, f"{path}[{index}]") for index, inner in enumerate(value))
        return next((found for found in inside if found is not None), None)
    return None
