"""What the routes of ``/files`` have in common: conditions, and threads that are let go."""

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
    What a request's headers ask.

    :raise BadRequest: if one is malformed.
    """
    try:
        return Conditions(request.joined_header)
    except MalformedHeader as error:
        raise BadRequest(str(error)) from None


def failed(tag: str | None) -> ApiError:
    """
    The answer to a request whose conditions do not hold.

    :param tag: the file's entity tag, or None if there is no file.
    """
    what = "there is no such file" if tag is None else f"the file is another: {tag}"
    return ApiError(412, f"the condition in If-Match, If-None-Match or If-Unmodified-Since fails: {what}", etag=tag)


def require(asked: Conditions) -> Callable[[os.stat_result | None], None]:
    """A function that raises :class:`ApiError` if a file, or that there is none, is not as it is asked for."""

    def check(info: os.stat_result | None) -> None:
        tag = None if info is None else entity_tag(info)
        if asked.status(tag, 0 if info is None else info.st_mtime, safe=False) is not None:
            raise failed(tag)

    return check


def close_in_thread(pool: ThreadPool, close: Callable[[], None]) -> None:
    """End in a thread what may still be at work in another, without waiting for it."""
    pool(close).addErrback(lambda failure: _log.failure("not ended", failure))
