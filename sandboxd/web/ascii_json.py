"""
JSON in ASCII only.

Python's httpx splits lines at U+0085 and U+2028, and the JavaScript SDK breaks multi-byte characters at chunk
borders, so every reply is ASCII with ``\\u`` escapes.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii

import msgspec

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
