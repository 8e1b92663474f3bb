"""Preconditions (``If-Match`` and its like) of the routes of ``/files``, and the end of their unfinished work."""

from __future__ import annotations

import os
from collections.abc import Callable

from twisted.logger import Logger

from sandboxd.api.routing import ApiError
from sandboxd.files.etag import entity_tag
from sandboxd.messages.decoding import BadRequest
from sandboxd.reactor.threads import ThreadPool
from sandboxd.web.conditions import Conditions, MalformedHeader
from sandboxd.web.request import Request

_log = Logger()

#: The headers that any of them heeds.
CONDITIONS = ("If-Match", "If-None-Match", "If-Unmodified-Since")


def conditions(request: Request) -> Conditions:
    """
    Return the preconditions in a request's headers.

    :raise BadRequest: if one is malformed.
    """
    try:
        return Conditions(request.joined_header)
    except MalformedHeader as error:
        raise BadRequest(str(error)) from None


def failed(tag: str | None) -> ApiError:
    """
    Return the error 412 of a request whose preconditions do not hold.

    :param tag: the file's entity tag, or None if there is no file.
    """
    what = "there is no such file" if tag is None else f"the file is another: {tag}"
    return ApiError(412, f"the condition in If-Match, If-None-Match or If-Unmodified-Since fails: {what}", etag=tag)


def require(asked: Conditions) -> Callable[[os.stat_result | None], None]:
    """Return a function that raises 412 unless a file's stat (None if it does not exist) meets the preconditions."""

    def check(info: os.stat_result | None) -> None:
        tag = None if info is None else entity_tag(info)
        if asked.status(tag, 0 if info is None else info.st_mtime, safe=False) is not None:
            raise failed(tag)

    return check


def close_in_thread(pool: ThreadPool, close: Callable[[], None]) -> None:
    """Close a transfer in a thread, without waiting: a step of it may still run in another."""
    pool(close).addErrback(lambda failure: _log.failure("not ended", failure))
