"""Conditional requests (RFC 9110 section 13): If-Match, If-None-Match, If-(Un)Modified-Since and If-Range."""

from __future__ import annotations

import re
from collections.abc import Callable
from email.utils import formatdate, parsedate_to_datetime

#: An entity tag, RFC 9110 section 8.8.3: whether it is weak, and what is between the quotes.
_TAG = re.compile(r'[ \t,]*(W/)?"([^\x00-\x20"\x7f]*)"[ \t]*(?=,|$)')


class MalformedHeader(ValueError):
    """A conditional header is malformed; the text names it."""


def http_date(seconds: float) -> str:
    """Return a time as an HTTP-date, RFC 9110 section 5.6.7."""
    return formatdate(max(0, min(seconds, 253_402_300_799)), usegmt=True)


def _seconds(text: str | None) -> int | None:
    """Return an HTTP-date in seconds since 1970; None for a malformed one, which the RFC says to ignore."""
    if text is None:
        return None
    try:
        return int(parsedate_to_datetime(text).timestamp())
    except (TypeError, ValueError, OverflowError):
        return None


class Tags:
    """
    The entity tags that a header lists.

    :param name: the header.
    :param text: its value.
    :raise MalformedHeader: if it is no list of entity tags.
    :ivar any: whether it is ``*``.
    """

    def __init__(self, name: str, text: str) -> None:
        self.any = text.strip() == "*"
        self._tags: list[tuple[bool, str]] = []
        end = 0
        while not self.any and text[end:].strip(" \t,"):
            found = _TAG.match(text, end)
            if found is None:
                raise MalformedHeader(f'{name}: {text!r} is no list of entity tags; give "...", with its quotes, or *')
            self._tags.append((bool(found[1]), f'"{found[2]}"'))
            end = found.end()
        if not (self.any or self._tags):
            raise MalformedHeader(f'{name}: must not be empty; give an entity tag as "...", or *')

    def has(self, tag: str | None, *, weakly: bool = False) -> bool:
        """
        Return whether a file's tag is in the list.

        :param tag: the tag; None if there is no file, ``""`` if it has none.
        :param weakly: whether weak ones count.
        """
        return tag is not None and (self.any or any(tag == own and (weakly or not weak) for weak, own in self._tags))


class Conditions:
    """
    The conditions in a request's headers.

    :param header: gives a header's value by its name, or None.
    :raise MalformedHeader: if one cannot be understood.
    """

    def __init__(self, header: Callable[[str], str | None]) -> None:
        def tags(name: str) -> Tags | None:
            text = header(name)
            return None if text is None else Tags(name, text)

        self._match = tags("If-Match")
        self._none_match = tags("If-None-Match")
        self._modified = _seconds(header("If-Modified-Since"))
        self._unmodified = _seconds(header("If-Unmodified-Since"))

    def status(self, tag: str | None, modified: float, *, safe: bool) -> int | None:
        """
        Return 412 or 304 if a condition fails, else None; in the order of RFC 9110 section 13.2.2.

        :param tag: the file's entity tag; None if there is no file, ``""`` if it has none.
        :param modified: when it was, in seconds since 1970.
        :param safe: whether the request only reads.
        """
        second = int(modified)
        if self._match is not None:
            if not self._match.has(tag):
                return 412
        elif self._unmodified is not None and (tag is None or second > self._unmodified):
            return 412
        if self._none_match is not None:
            if self._none_match.has(tag, weakly=True):
                return 304 if safe else 412
        elif safe and self._modified is not None and second <= self._modified:
            return 304
        return None


def if_range(text: str | None, tag: str, modified: float) -> bool:
    """
    Return whether ``If-Range`` lets a range of the file be sent; RFC 9110 section 13.1.5.

    :param text: the value of ``If-Range``, or None.
    """
    if text is None:
        return True
    if text.startswith(('"', "W/")):
        return text.strip() == tag != ""
    # A date is exact to a second, so that it says nothing of changes within that one; the tag is the better choice.
    return _seconds(text) == int(modified)
