"""
JSON in ASCII only.

Python's httpx splits lines at U+0085 and U+2028, and the JavaScript SDK breaks multi-byte characters at chunk
borders, so every reply is ASCII with ``\\u`` escapes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from json.encoder import encode_basestring_ascii

import msgspec

from sandboxd.execution.lines import character_border

#: Bytes of text that are encoded at a time, so that no single call holds the interpreter for long.
CHUNK = 256 * 1024


_encode = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder for each call


def dumps(value: object) -> bytes:
    """``value`` as compact ASCII JSON."""
    return _encode(value).encode("ascii")


#: Several times as fast as the standard library's, but it leaves what is not ASCII as it is.
_encode_ascii = msgspec.json.Encoder().encode


def escaped(data: bytes) -> bytes:
    """Text as the inside of a JSON string, without the quotes; what is not UTF-8 becomes U+FFFD."""
    if data.isascii():
        return _encode_ascii(data.decode("ascii"))[1:-1]
    return encode_basestring_ascii(data.decode("utf-8", "replace"))[1:-1].encode("ascii")


def escaped_chunks(data: bytes) -> Iterator[bytes]:
    """:func:`escaped`, a chunk at a time, for text of any size."""
    position = 0
    while position < len(data):
        end = character_border(data, min(position + CHUNK, len(data)))
        yield escaped(data[position:end])
        position = end
