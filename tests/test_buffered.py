"""Kept: the head and the tail of a stream that is too long for one reply."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from sandboxd.execution.buffered import HeadAndTail

PIECES = st.lists(st.binary(min_size=1, max_size=30), max_size=40)


def keep(pieces: list[bytes], limit: int) -> tuple[HeadAndTail, bytes]:
    """A stream's pieces, given to a new one; and what it kept of them."""
    kept = HeadAndTail(limit)
    for piece in pieces:
        kept.add(piece)
    return kept, b"".join(kept.pieces())


@given(PIECES, st.integers(1, 400))
def test_what_is_kept_is_the_beginning_and_the_end(pieces: list[bytes], limit: int) -> None:
    kept, found = keep(pieces, limit)
    output = b"".join(pieces)
    assert kept.size == len(output) == len(found) + kept.dropped
    assert any(found == output[:head] + output[head + kept.dropped :] for head in range(len(output) - kept.dropped + 1))


@given(PIECES, st.integers(1, 400))
def test_what_is_kept_is_within_the_limit_but_for_one_piece(pieces: list[bytes], limit: int) -> None:
    _, found = keep(pieces, limit)
    assert len(found) <= limit + max(map(len, pieces), default=0)


@given(PIECES, st.integers(1, 400))
@example([b"x" * 65, b"y" * 35], 100)
def test_output_within_the_limit_is_kept_whole(pieces: list[bytes], limit: int) -> None:
    output = b"".join(pieces)
    if len(output) <= limit:
        assert keep(pieces, limit)[1] == output
