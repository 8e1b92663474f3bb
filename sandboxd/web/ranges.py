"""Byte ranges of a file: ``Range``, ``Content-Range`` and multipart/byteranges; RFC 9110 section 14."""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

#: Ranges of one request, at most.
MAX_RANGES = 64

_SPEC = re.compile(r"(\d{1,19})-(\d{0,19})|-(\d{1,19})", re.ASCII)
_CONTENT_RANGE = re.compile(r"bytes[ \t]+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", re.ASCII)


class Span(NamedTuple):
    """The bytes of a file from ``start`` to before ``end``."""

    start: int
    end: int

    def of(self, size: int) -> str:
        """Return the value of ``Content-Range`` for this part."""
        return f"bytes {self.start}-{self.end - 1}/{size}"


class Unsatisfiable(Exception):
    """No range overlaps the file, or there are too many: the answer is 416. The text says which."""


def parse_range(text: str | None, size: int) -> list[Span] | None:
    """
    Return the ranges that a ``Range`` header asks for, in its order.

    Where ranges overlap or touch, those that do are sent as one, so that a file is never sent more than once.

    :param text: the value of ``Range``, or None.
    :param size: bytes of the file.
    :return: None for the whole file: without the header, in another unit than bytes, or if it is malformed.
    :raise Unsatisfiable: if no range overlaps the file, or there are more than :data:`MAX_RANGES`.
    """
    unit, separator, rest = (text or "").partition("=")
    if not separator or unit.strip().lower() != "bytes":
        return None
    spans = []
    specs = [spec.strip(" \t") for spec in rest.split(",")]
    specs = [spec for spec in specs if spec]
    if not specs:
        return None
    for spec in specs:
        found = _SPEC.fullmatch(spec)
        if found is None:
            return None
        if found[3] is not None:
            span = Span(max(0, size - int(found[3])), size)
        else:
            first = int(found[1])
            last = int(found[2]) if found[2] else size
            if last < first and found[2]:
                return None
            span = Span(first, min(last + 1, size))
        if span.start < span.end:
            spans.append(span)
    if len(specs) > MAX_RANGES:
        raise Unsatisfiable(f"more than {MAX_RANGES} ranges")
    if not spans:
        raise Unsatisfiable("none of it is in the file")
    return _merged(spans)


def _merged(spans: list[Span]) -> list[Span]:
    """Return spans of the same bytes that do not overlap."""
    ordered = sorted(spans)
    if all(one.end < other.start for one, other in itertools.pairwise(ordered)):
        return spans
    merged = ordered[:1]
    for span in ordered[1:]:
        if span.start <= merged[-1].end:
            merged[-1] = Span(merged[-1].start, max(merged[-1].end, span.end))
        else:
            merged.append(span)
    return merged


def part_heads(spans: list[Span], size: int, media_type: str, boundary: str) -> tuple[list[bytes], bytes]:
    """
    Return the headers before each part of a multipart/byteranges body, and the end after the last part.

    :param size: bytes of the file.
    :param boundary: the delimiter; must not occur in the file, so it has to be random.
    """
    heads = [
        f"\r\n--{boundary}\r\nContent-Type: {media_type}\r\nContent-Range: {span.of(size)}\r\n\r\n".encode("ascii")
        for span in spans
    ]
    return heads, f"\r\n--{boundary}--\r\n".encode("ascii")


class ContentRange(NamedTuple):
    """The position of a partial body: bytes ``start`` to before ``end`` of ``size``, which is None if unknown."""

    start: int
    end: int
    size: int | None


def parse_content_range(text: str) -> ContentRange | None:
    """Parse the value of ``Content-Range``; return None if it is malformed."""
    found = _CONTENT_RANGE.fullmatch(text.strip())
    if found is None:
        return None
    size = None if found[3] == "*" else int(found[3])
    part = ContentRange(int(found[1]), int(found[2]) + 1, size)
    return part if part.start < part.end and (size is None or part.end <= size) else None
