"""
The JSON-RPC 2.0 messages of the Model Context Protocol, and the negotiation of its revision.

The rules are those of https://modelcontextprotocol.io/specification/2025-11-25/basic, and of the revisions before it.
"""

from __future__ import annotations

from typing import Any

import msgspec

#: The revisions that are spoken, newest first.
VERSIONS = ("2025-11-25", "2025-06-18", "2025-03-26")

#: The revision of a request that names none in ``MCP-Protocol-Version``; the only one that has batches.
UNNAMED_VERSION = "2025-03-26"

#: Error codes, JSON-RPC 2.0 section 5.1.
PARSE_ERROR = -32700
INVALID_REQUEST = -32600
METHOD_NOT_FOUND = -32601
INVALID_PARAMS = -32602
INTERNAL_ERROR = -32603

Id = str | int


class RpcReply(msgspec.Struct):
    """A JSON-RPC response: a result or an error. With a progress token it is the last of several events."""

    jsonrpc: str
    id: Id | None
    result: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET
    error: dict[str, Any] | msgspec.UnsetType = msgspec.UNSET


class RpcError(Exception):
    """
    An error that a JSON-RPC request is answered with.

    :param code: one of JSON-RPC's error codes.
    :param id: the id of the request, or None if it cannot be read.
    """

    def __init__(self, code: int, message: str, id: Id | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.id = id

    def reply(self, id: Id | None = None) -> dict[str, object]:
        """Return the response, to the request ``id`` if the error does not name another."""
        answered = id if self.id is None else self.id
        return {"jsonrpc": "2.0", "id": answered, "error": {"code": self.code, "message": str(self)}}


class RpcRequest(msgspec.Struct, frozen=True):
    """A JSON-RPC request."""

    id: Id
    method: str
    params: dict[str, Any]


class RpcNotification(msgspec.Struct, frozen=True):
    """A JSON-RPC notification, which gets no response."""

    method: str
    params: dict[str, Any]


class RpcResponse(msgspec.Struct, frozen=True):
    """A JSON-RPC response of a client. It is ignored, as this server sends no requests."""


Message = RpcRequest | RpcNotification | RpcResponse


def decode(body: bytes, version: str) -> tuple[list[Message], bool]:
    """
    Return the messages of a body, and whether it is a batch.

    :param version: the revision that the body is in.
    :raise RpcError: if it is not JSON, not JSON-RPC 2.0, or a batch in a revision without batches.
    """
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise RpcError(PARSE_ERROR, f"the body is not valid JSON: {error}") from None
    if not isinstance(value, list):
        return [_message(value)], False
    if version != UNNAMED_VERSION:
        raise RpcError(INVALID_REQUEST, f"batches are not part of {version}; send one message a request")
    if not value:
        raise RpcError(INVALID_REQUEST, "the batch is empty")
    return [_message(item) for item in value], True


def _message(value: object) -> Message:
    if not isinstance(value, dict):
        raise RpcError(INVALID_REQUEST, "a message is a JSON object")
    id = value.get("id")
    known = id if isinstance(id, (str, int)) and not isinstance(id, bool) else None
    if value.get("jsonrpc") != "2.0":
        raise RpcError(INVALID_REQUEST, 'jsonrpc: must be "2.0"', known)
    if "method" not in value:
        if known is None or ("result" in value) == ("error" in value):
            raise RpcError(INVALID_REQUEST, "method: is missing", known)
        return RpcResponse()
    method, params = value["method"], value.get("params", {})
    if not isinstance(method, str):
        raise RpcError(INVALID_REQUEST, "method: must be a string", known)
    if not isinstance(params, dict):
        raise RpcError(INVALID_PARAMS if known is not None else INVALID_REQUEST, "params: must be an object", known)
    if "id" not in value:
        return RpcNotification(method, params)
    if known is None:
        raise RpcError(INVALID_REQUEST, "id: must be a string or an integer")
    return RpcRequest(known, method, params)


def result(id: Id, value: object) -> dict[str, object]:
    """Return a response."""
    return {"jsonrpc": "2.0", "id": id, "result": value}


def notification(method: str, params: dict[str, object]) -> dict[str, object]:
    """Return a notification."""
    return {"jsonrpc": "2.0", "method": method, "params": params}


def negotiated(asked: object) -> str:
    """
    Return the revision to speak: the one that the client asks for if it is supported, else the newest.

    :raise RpcError: if it asks for none.
    """
    if not isinstance(asked, str):
        raise RpcError(INVALID_PARAMS, "protocolVersion: must be a string")
    return asked if asked in VERSIONS else VERSIONS[0]
