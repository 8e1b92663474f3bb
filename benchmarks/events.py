"""What an event stream carried: checked as a whole, with a few C-speed passes over its bytes."""

from __future__ import annotations

import re

from benchmarks.client import Failed

# The texts that the rows stream need no escapes in JSON.
_DATA = re.compile(rb'"data":"([^"\\]*)"([^\n]*)\n\n')
_LAST = re.compile(rb"event: complete\n(?:id: \d+\n)?data: ([^\n]*)\n\n\Z")


def text_of(body: bytes) -> bytes:
    """
    The text that the events of a stream carry: their ``data``, with a line end behind each that is not partial.

    :raise Failed: if the stream does not end with one ``complete``.
    """
    last = _LAST.search(body, max(0, len(body) - 300))
    if last is None or body.count(b"event: complete\n") != 1:
        raise Failed(f"the stream does not end with one complete event: {body[-200:]!r}")
    if b'"error":true' in last[1]:
        raise Failed(f"the command failed: {last[1]!r}")
    return b"".join(
        [data if b'"partial":true' in rest else data + b"\n" for data, rest in _DATA.findall(body, 0, last.start())]
    )


def check(body: bytes, expected: bytes) -> None:
    """
    See that a stream carried exactly a text, in order.

    :raise Failed: if not.
    """
    text = text_of(body)
    if text != expected:
        raise Failed(f"output differs: {difference(text, expected)}")


def difference(text: bytes, expected: bytes) -> str:
    """In words, how a text differs from what it should be."""
    got, wanted = text.count(b"\n"), expected.count(b"\n")
    return f"{len(text)} bytes in {got} lines instead of {len(expected)} in {wanted}"


def lost_lines(body: bytes, expected: bytes) -> int:
    """
    How many lines of ``expected``, which are numbers that rise, a stream has left out.

    :raise Failed: if it has lines twice or out of order.
    """
    text = text_of(body)
    if text == expected:
        return 0
    numbers = list(map(int, text.split()))
    if any(map(int.__ge__, numbers, numbers[1:])):
        raise Failed(f"lines came twice or out of order: {difference(text, expected)}")
    return expected.count(b"\n") - len(numbers)
