"""
A long string in a JSON body, decoded in pieces.

One call that decodes, or encodes, some 10 MB holds the interpreter, and so the reactor, for as long as that takes,
whichever thread makes it. Here no call takes more than a piece.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator

from sandboxd.messages.decoding import decode

#: Bytes from which on a string is decoded in pieces.
LONG = 1024 * 1024

#: Bytes of a piece.
_PIECE = 256 * 1024

#: Strings of a body that are looked at: the long one is among the first, or the body is decoded as a whole.
_MAX_STRINGS = 100

#: A piece of a string's inside: whole characters and escapes; both halves of a surrogate pair.
_INSIDE = re.compile(
    rb'[^"\\]*(?:\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[0-9a-fA-F]{4}|u(?![dD][89abAB])[0-9a-fA-F]{4}|[^u])[^"\\]*)*',
    re.DOTALL,
)


class LongText:
    """
    The inside of a JSON string, as it is in the body.

    :param ends: offsets in the body: that of the first byte, then that behind each piece.
    :ivar mark: the text that stands for it in the shortened body.
    """

    def __init__(self, body: bytes, ends: list[int]) -> None:
        self.mark = secrets.token_hex(16)
        self._body = body
        self._ends = ends

    def pieces(self) -> Iterator[bytes]:
        """
        Yield the text in UTF-8, in pieces of some 100 kB. Can be called again.

        :raise BadRequest: if it is malformed.
        """
        return (text.encode("utf-8", "surrogateescape") for text in self._decoded())

    def whole(self) -> str:
        """
        Return the text. Takes long: to be called in a thread.

        :raise BadRequest: if it is malformed.
        """
        return "".join(self._decoded())

    def _decoded(self) -> Iterator[str]:
        start = self._ends[0]
        for end in self._ends[1:]:
            yield decode(b'"%b"' % self._body[start:end], str)
            start = end


def cut_out(body: bytes) -> tuple[bytes, LongText | None]:
    """
    Cut a long string out of a JSON body. May take long: call it in a thread.

    :return: the body with a mark in the string's place, and the string; the body as it is, and None, if it has none, or
        is malformed there.
    """
    position = 0
    for _ in range(_MAX_STRINGS):
        quote = body.find(b'"', position)
        ends = _ends(body, quote + 1) if quote >= 0 else None
        if ends is None:
            break
        position = ends[-1] + 1
        if ends[-1] - ends[0] >= LONG:
            text = LongText(body, ends)
            return b'%b"%b%b' % (body[:quote], text.mark.encode("ascii"), body[ends[-1] :]), text
    return body, None


def _ends(body: bytes, start: int) -> list[int] | None:
    """Return the ends of a string's pieces, after its start; None if the string has no end or a malformed escape."""
    ends = [start]
    while True:
        limit = min(ends[-1] + _PIECE, len(body))
        match = _INSIDE.match(body, ends[-1], limit)
        assert match is not None  # it matches nothing, too
        end = match.end()
        if body[end : end + 1] == b'"':
            return [*ends, end]
        while end == limit and end > ends[-1] and body[end : end + 1] and body[end] & 0xC0 == 0x80:
            end = limit = end - 1  # not within a character
        if end == ends[-1] or end == len(body):
            return None
        ends.append(end)
