"""Reads of a range of lines from a file of any size."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from twisted.internet.defer import CancelledError

from sandboxd.files.errors import FileError, os_errors
from sandboxd.files.operations import MAX_READ, open_regular
from sandboxd.files.root import Root

#: Bytes that are read at a time.
_PIECE = 256 * 1024


class LinesRead(NamedTuple):
    """
    The lines that were read.

    :ivar data: the lines, each with its end.
    :ivar number: how many they are.
    :ivar total: how many lines the file has; a last one without an end counts.
    """

    data: bytes
    number: int
    total: int


class LineRange:
    """
    A reader of a range of lines that counts all lines of the file. It keeps the range only, of at most
    :data:`~sandboxd.files.operations.MAX_READ` bytes.

    :param first: number of the first line, from 1.
    :param limit: how many lines, or None for all that follow.
    """

    def __init__(self, root: Root, path: str, first: int, limit: int | None) -> None:
        self._root = root
        self._path = path
        self._skip = first - 1
        self._end = None if limit is None else self._skip + limit
        self._stopped = False

    def stop(self) -> None:
        """End a :meth:`read` that runs in another thread, as its result is no longer wanted."""
        self._stopped = True

    def read(self) -> LinesRead:
        """
        Read the lines. Blocks.

        :raise FileError: if the file cannot be read, is not a regular file, or the lines have too many bytes.
        """
        kept: list[bytes] = []
        size = count = 0
        last = b"\n"
        for piece in self._pieces():
            ends = piece.count(b"\n")
            start = _behind(piece, self._skip - count, ends)
            stop = len(piece) if self._end is None else _behind(piece, self._end - count, ends)
            count += ends
            last = piece[-1:]
            if start < stop:
                kept.append(piece[start:stop])
                size += stop - start
                if size > MAX_READ:
                    raise FileError("read", self._path, f"lines too large: the limit is {MAX_READ} bytes")
        total = count + (last != b"\n")
        data = b"".join(kept)
        return LinesRead(data, data.count(b"\n") + (data != b"" and not data.endswith(b"\n")), total)

    def _pieces(self) -> Iterator[bytes]:
        fd = open_regular(self._root, self._path)
        with os_errors("read", self._path), open(fd, "rb", buffering=0) as file:
            while piece := file.read(_PIECE):
                if self._stopped:
                    raise CancelledError
                yield piece


def _behind(piece: bytes, lines: int, ends: int) -> int:
    """
    Return the offset after the given number of line ends; the piece's length if it has fewer.

    :param ends: how many the piece has.
    """
    if lines <= 0:
        return 0
    if lines > ends:
        return len(piece)
    return len(piece) - len(piece.split(b"\n", lines)[-1])
