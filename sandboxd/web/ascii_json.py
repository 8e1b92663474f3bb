"""
JSON encoded in ASCII only.

Python's httpx splits lines at U+0085 and U+2028, and the JavaScript SDK breaks multi-byte characters at chunk
borders, so every reply is ASCII with ``\\u`` escapes.
"""

from __future__ import annotations

import json
from json.encoder import encode_basestring_ascii

import msgspec

_encode_ascii = json.JSONEncoder(separators=(",", ":")).encode  # json.dumps would make an encoder for each call

#: Several times as fast as the standard library's, but it leaves what is not ASCII as it is.
_encode_utf8 = msgspec.json.Encoder().encode


def dumps(value: object) -> bytes:
    """
    Encode a value as compact ASCII JSON.

    :param value: of the types of JSON, or a :class:`msgspec.Struct`, whose unset fields are left out.
    """
    try:
        encoded = _encode_utf8(value)
    except UnicodeEncodeError:  # a lone surrogate: a byte of a file name that is not UTF-8
        pass
    else:
        if encoded.isascii():
            return encoded
    return _encode_ascii(msgspec.to_builtins(value)).encode("ascii")


def escaped(data: bytes) -> bytes:
    """Encode text as the inside of a JSON string, without the quotes; what is not UTF-8 becomes U+FFFD."""
    if data.isascii():
        return _encode_utf8(data.decode("ascii"))[1:-1]
    return encode_basestring_ascii(data.decode("utf-8", "replace"))[1:-1].encode("ascii")
