"""The chunked transfer coding of a request's body (RFC 9112 section 7.1)."""

from __future__ import annotations

import re
from collections.abc import Callable

from sandboxd.web.request_head import END, MalformedRequest, parse_fields

#: Bytes of the longest line with a chunk's size and extensions.
MAX_SIZE_LINE = 1024

_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,15})(?:;[\t\x20-\x7e\x80-\xff]*)?")


class ChunkedDecoder:
    """
    A decoder of one chunked body. Extensions and trailers are checked and dropped.

    :param deliver: called with each piece of the body.
    :param max_trailers: bytes of the longest trailer section.
    """

    def __init__(self, deliver: Callable[[bytes], None], max_trailers: int) -> None:
        self._deliver = deliver
        self._max_trailers = max_trailers
        self._left = 0  #: bytes of the current chunk's data that have not arrived
        self._in_data = False  #: whether a chunk's data, or the end of line behind it, comes next
        self._in_trailers = False
        self._pending = b""

    def feed(self, data: bytes) -> bytes | None:
        """
        Decode what has arrived.

        :return: what follows the body once that is complete; None until then.
        :raise MalformedRequest: if it is not chunked; the decoder cannot be used any more.
        """
        if self._pending:
            data = self._pending + data
        position = 0
        while not self._in_trailers:
            if self._in_data:
                if self._left:
                    piece = data[position : position + self._left]
                    if not piece:
                        break
                    position += len(piece)
                    self._left -= len(piece)
                    self._deliver(piece)
                    if self._left:
                        break
                ending = data[position : position + 2]
                if ending != b"\r\n":
                    if not b"\r\n".startswith(ending):
                        raise MalformedRequest
                    break
                position += 2
                self._in_data = False
            end = data.find(b"\r\n", position, position + MAX_SIZE_LINE)
            if end < 0:
                if len(data) - position >= MAX_SIZE_LINE:
                    raise MalformedRequest
                break
            line = _SIZE_LINE.fullmatch(data, position, end)
            if line is None:
                raise MalformedRequest
            position = end + 2
            self._left = int(line[1], 16)
            self._in_data = self._left > 0
            self._in_trailers = not self._in_data
        rest = data[position:]
        if self._in_trailers and (behind := self._end(rest)) is not None:
            return behind
        self._pending = rest
        return None

    def _end(self, data: bytes) -> bytes | None:
        """Return what follows the trailers, or None if they are incomplete."""
        if data.startswith(b"\r\n"):
            return data[2:]
        end = data.find(END)
        if max(end, len(data) if end < 0 else 0) > self._max_trailers:
            raise MalformedRequest
        if end < 0:
            return None
        parse_fields(data[: end + len(END)])
        return data[end + len(END) :]
