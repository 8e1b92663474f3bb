"""The exceptions of the client, and which of them an error reply becomes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


class SandboxError(Exception):
    """
    The base of all errors of the client.

    :ivar status: the HTTP status of the reply, or None if there was none.
    :ivar fields: the fields of the reply besides ``error`` and ``success``, such as ``etag`` or ``survivors``.
    """

    def __init__(self, message: str, status: int | None = None, fields: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.fields = dict(fields or {})


class BadRequest(SandboxError):
    """400: the request is malformed; the message names the field."""


class Unauthorized(SandboxError):
    """401: the token is missing or wrong."""


class Forbidden(SandboxError):
    """403: not permitted, read-only, or outside of the sandbox's root."""


class NotFound(SandboxError):
    """404: there is no such file, execution or route."""


class Conflict(SandboxError):
    """409: the request does not fit the state: a directory in place of a file, a taken port, an ended process."""


class PreconditionFailed(Conflict):
    """412: another version of the file is there; ``fields["etag"]`` is its entity tag, or None."""


class TooLarge(SandboxError):
    """413: the body, or what it unpacks to, is too large."""


class NoSpace(SandboxError):
    """507: the disk is full."""


class ServerFault(SandboxError):
    """5xx: a fault of the daemon."""


class Unavailable(ServerFault):
    """503: no command was executed; the daemon is at a limit, starting or stopping."""


class ProtocolError(SandboxError):
    """The reply is not one of the API's; perhaps another server than sandboxd has answered."""


class SandboxGone(SandboxError):
    """The sandbox cannot be reached, or the connection was lost and the operation cannot be resumed."""


_BY_STATUS: Mapping[int, type[SandboxError]] = {
    400: BadRequest,
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    412: PreconditionFailed,
    413: TooLarge,
    503: Unavailable,
    507: NoSpace,
}

#: Texts of errors of the operating system in replies of the original file routes, whose status is 200.
_BY_TEXT: tuple[tuple[str, type[SandboxError]], ...] = (
    ("no such file", NotFound),
    ("permission denied", Forbidden),
    ("not permitted", Forbidden),
    ("read-only", Forbidden),
    ("no space left", NoSpace),
)


def error_of(status: int, body: bytes) -> SandboxError:
    """Return the exception for an error reply."""
    try:
        fields = json.loads(body)
        message = fields.pop("error")
        assert isinstance(message, str)
    except (ValueError, KeyError, AttributeError, TypeError, AssertionError):
        kind = _BY_STATUS.get(status, ServerFault if status >= 500 else ProtocolError)
        return kind(f"HTTP status {status}, without an explanation", status)
    fields.pop("success", None)
    kind = _BY_STATUS.get(status, ServerFault if status >= 500 else SandboxError)
    return kind(message, status, fields)


def refusal(message: str) -> SandboxError:
    """Return the exception for an error that a route of the original API has answered with status 200."""
    lower = message.lower()
    return next((kind for text, kind in _BY_TEXT if text in lower), Conflict)(message, 200)
