"""A name for each request, by which its caller and the log can find it."""

from __future__ import annotations

import re
import secrets
from itertools import count

_ACCEPTED = re.compile(rb"[A-Za-z0-9._~+/=:@-]{1,128}")

_prefix = secrets.token_hex(4).encode("ascii")
_numbers = count(1)


def request_id(given: bytes | None) -> bytes:
    """
    The id that a request came with, or a new one if that is none: up to 128 letters, digits and ``._~+/=:@-``.

    :param given: the header ``X-Request-Id``, or None.
    """
    if given is not None and _ACCEPTED.fullmatch(given):
        return given
    return b"%s-%x" % (_prefix, next(_numbers))
