"""Preconditions of requests for files: ``If-Match`` and its like, as errors of the API."""

from __future__ import annotations

import os
from collections.abc import Callable

from sandboxd.api.routing import ApiError
from sandboxd.files.etag import entity_tag
from sandboxd.messages.decoding import BadRequest
from sandboxd.web.conditions import Conditions, MalformedHeader
from sandboxd.web.request import Request

#: The headers that the routes of ``/files`` evaluate.
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
