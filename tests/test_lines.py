"""LineSplitter: what a pipe delivers, cut into lines."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.execution.lines import BATCH_LINES, PIECE, LineSplitter, SplitLines

#: What is hard to cut: characters of every length, line ends of both kinds, bytes that are not UTF-8.
FRAGMENTS = [b"a", b"\n", b"\r", b"\r\n", b"\\", "é€😀".encode(), b"\x80", b"\xc3", b"\xe2\x82", b"\xf0\x9f\x98"]

#: A long run puts what follows it at the border of a piece.
RUNS = st.builds(
    lambda unit, size: (unit * size)[:size],
    st.sampled_from([b"a", b"\r", b"\x80", b"a\n", "€".encode(), "😀".encode()]),
    st.integers(PIECE - 8, PIECE + 8),
)
OUTPUT = st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=20) | RUNS, max_size=30).map(b"".join)


@st.composite
def chunked(draw: st.DrawFn) -> list[bytes]:
    """Output, cut anywhere."""
    whole = draw(OUTPUT)
    cuts = sorted(draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, len(whole)])]  # noqa: B905


def split(chunks: list[bytes]) -> list[SplitLines]:
    """All that comes out for these chunks."""
    splitter = LineSplitter()
    fed = [lines for chunk in chunks for lines in splitter.feed(chunk)]
    return fed + splitter.flush()


def records(lines: SplitLines) -> list[bytes]:
    """The records of a batch, with their newlines."""
    if lines.ends:
        return lines.records()
    parts = lines.data.split(b"\n")
    return [part + b"\n" for part in parts[:-1]] + [part for part in parts[-1:] if part]


@settings(deadline=None)
@given(chunked())
def test_joined_the_records_are_the_input(chunks: list[bytes]) -> None:
    assert b"".join(lines.data for lines in split(chunks)) == b"".join(chunks)


@settings(deadline=None)
@given(chunked())
def test_no_record_is_longer_than_a_piece_and_the_counts_are_right(chunks: list[bytes]) -> None:
    for lines in split(chunks):
        found = records(lines)
        assert lines.count == len(found) > 0
        assert max(map(len, found)) <= PIECE


@settings(deadline=None)
@given(chunked())
def test_only_pieces_and_the_last_line_end_without_a_newline(chunks: list[bytes]) -> None:
    found = split(chunks)
    for index, lines in enumerate(found):
        if lines.partial:
            assert lines.count == len(lines.ends)
            assert b"\n" not in lines.data
            assert index + 1 < len(found), "a partial piece is followed by the rest of its line"
        elif index + 1 < len(found):
            assert lines.data.endswith(b"\n")


@settings(deadline=None)
@given(chunked())
def test_records_decode_one_by_one_to_the_text_of_the_whole(chunks: list[bytes]) -> None:
    decoded = (record.decode("utf-8", "replace") for lines in split(chunks) for record in records(lines))
    assert "".join(decoded) == b"".join(chunks).decode("utf-8", "replace")


@settings(deadline=None)
@given(chunked())
def test_no_piece_ends_inside_a_line_end(chunks: list[bytes]) -> None:
    found = split(chunks)
    for piece, rest in pairwise(found):
        if piece.partial and rest.data.startswith(b"\n"):
            assert not piece.data.endswith(b"\r")


@settings(deadline=None)
@given(chunked())
def test_whole_lines_come_out_at_once(chunks: list[bytes]) -> None:
    splitter = LineSplitter()
    given_bytes = taken = b""
    for chunk in chunks:
        given_bytes += chunk
        taken += b"".join(lines.data for lines in splitter.feed(chunk))
        assert b"\n" not in given_bytes[len(taken) :]
        assert len(given_bytes) - len(taken) <= PIECE


def test_a_line_of_exactly_one_piece_is_not_cut() -> None:
    line = b"a" * (PIECE - 1) + b"\n"
    assert split([line]) == [SplitLines(line, 1)]


def test_many_short_lines_leave_in_batches() -> None:
    found = split([b"\n" * 100_000])
    assert sum(lines.count for lines in found) == 100_000
    assert all(BATCH_LINES <= lines.count <= BATCH_LINES + PIECE for lines in found[:-1])


def test_a_stream_without_newlines_leaves_in_pieces() -> None:
    found = split([b"x" * 65536] * 512)
    assert sum(len(lines.data) for lines in found) == 512 * 65536
    assert [lines.partial for lines in found] == [True] * (len(found) - 1) + [False]


def test_single_bytes_without_a_newline_leave_in_pieces() -> None:
    found = split([b"x"] * (20 * PIECE))
    assert [len(record) for lines in found for record in records(lines)] == [PIECE] * 20


def test_a_flushed_splitter_starts_anew() -> None:
    splitter = LineSplitter()
    splitter.feed(b"unfinished")
    assert splitter.flush() == [SplitLines(b"unfinished", 1)]
    assert splitter.flush() == []
    assert splitter.feed(b"next\n") == [SplitLines(b"next\n", 1)]
