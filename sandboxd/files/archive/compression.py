"""
gzip and Zstandard as streams, with output in pieces of bounded size: a small input may expand to a very large output.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Iterator
from typing import Any, Protocol

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

#: Bytes that come out at a time.
PIECE = 1024 * 1024

#: Largest zstd window accepted, as log2 of its bytes (128 MiB).
_MAX_WINDOW_LOG = 27

_GZIP_LEVEL = 4
_ZSTD_LEVEL = 3

_GZIP = 16 + zlib.MAX_WBITS

_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}

#: The second to fourth byte of a skippable frame, with which a zstd stream may begin (RFC 8878, section 3.1.2).
_SKIPPABLE = b"\x2a\x4d\x18"

#: Bytes by which :func:`recognised` knows what it has.
MAGIC_SIZE = 4


class CompressionError(ValueError):
    """An error in compressed data: it is malformed or ends early."""


class Compressor(Protocol):
    """The interface of a streaming compressor."""

    def compress(self, data: bytes, /) -> bytes:
        """Compress more data; return the output that is ready, which may be empty."""

    def flush(self) -> bytes:
        """End the stream, and return the rest of the output."""


class _Identity:
    def compress(self, data: bytes) -> bytes:
        return data

    def flush(self) -> bytes:
        return b""


def compressor(coding: str) -> Compressor:
    """
    Return a compressor.

    :param coding: ``gzip``, ``zstd`` or ``identity``.
    """
    if coding == "gzip":
        return zlib.compressobj(_GZIP_LEVEL, zlib.DEFLATED, _GZIP)
    if coding == "zstd":
        compressor: Compressor = zstd.ZstdCompressor(level=_ZSTD_LEVEL)
        return compressor
    return _Identity()


def preferred(accepted: str | None) -> str:
    """
    Return the content coding that a request's ``Accept-Encoding`` prefers.

    :param accepted: the value of ``Accept-Encoding``, RFC 9110 section 12.5.3; None if the request has none.
    """
    quality: dict[str, float] = {}
    for item in (accepted or "").lower().split(","):
        name, _, parameter = (part.strip() for part in item.partition(";"))
        try:
            quality[name] = float(parameter.removeprefix("q=")) if parameter.startswith("q=") else 1.0
        except ValueError:
            quality[name] = 0.0
    rest = quality.get("*", 0.0)
    best, best_quality = "identity", 0.0
    for name in ("zstd", "gzip"):
        if quality.get(name, rest) > best_quality:
            best, best_quality = name, quality.get(name, rest)
    return best if best_quality >= quality.get("identity", 0.0) else "identity"


def recognised(data: bytes) -> str:
    """Return the coding of data, by its first bytes."""
    if data[1:4] == _SKIPPABLE and data[0] & 0xF0 == 0x50:
        return "zstd"
    return next((coding for magic, coding in _MAGIC.items() if data.startswith(magic)), "identity")


class Decompressor:
    """
    A streaming decompressor for one compressed stream, or several one after another.

    :param coding: ``gzip``, ``zstd`` or ``identity``.
    """

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._stream: Any = None
        self._ended = False  # one stream has, and another has not begun

    def feed(self, data: bytes) -> Iterator[bytes]:
        """
        Decompress more data.

        :return: what comes out, in pieces of at most :data:`PIECE`; all of them must be taken.
        :raise CompressionError: if it is damaged.
        """
        if self._coding == "identity":
            yield data
            return
        try:
            if self._ended:
                data = data.lstrip(b"\0")
            while data:
                stream = self._stream = self._stream or self._new()
                yield stream.decompress(data, PIECE)
                while not stream.eof and not self._is_hungry():
                    yield stream.decompress(getattr(stream, "unconsumed_tail", b""), PIECE)
                data = b""
                self._ended = stream.eof
                if self._ended:
                    self._stream = None
                    data = stream.unused_data.lstrip(b"\0")  # some pad the end with zeros
        except (zlib.error, zstd.ZstdError) as error:
            raise CompressionError(f"it is not valid {self._coding}: {error}") from None

    def finish(self) -> None:
        """
        Check that the data is complete.

        :raise CompressionError: if there should be.
        """
        if self._stream is not None:
            raise CompressionError(f"its {self._coding} breaks off")

    def _new(self) -> Any:
        if self._coding == "gzip":
            return zlib.decompressobj(_GZIP)
        return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG})

    def _is_hungry(self) -> bool:
        """Return whether the decompressor has no output left before it gets more input."""
        if self._coding == "gzip":
            return not self._stream.unconsumed_tail
        return bool(self._stream.needs_input)
