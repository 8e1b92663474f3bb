"""The splitting of a pipe's output into lines, a batch at a time."""

from __future__ import annotations

import msgspec

#: Longest piece of a line, in bytes. An event has to stay under 64 KiB in ASCII JSON, which takes up to six characters
#: for one byte (a control character, or U+FFFD for a byte that is not UTF-8).
PIECE = 10_240

#: Lines of one batch, about: so many that the work per batch is small beside the work per line, and so few that an
#: encoded batch is a small write for a slow reader.
BATCH_LINES = 4096


#: Most pieces of a long line in one batch.
BATCH_PIECES = 32


class SplitLines(msgspec.Struct, frozen=True):
    """
    Consecutive lines of one stream, or consecutive pieces of one long line.

    :ivar data: the bytes as they came. Whole lines end with a newline; a piece, and the last line of a stream
        that ended without one, do not.
    :ivar count: how many lines, or pieces.
    :ivar ends: where each piece ends in the data; empty if these are whole lines.
    """

    data: bytes
    count: int
    ends: tuple[int, ...] = ()

    @property
    def partial(self) -> bool:
        """Whether these are pieces of a line that continues after them."""
        return bool(self.ends)

    def since(self, skip: int) -> SplitLines:
        """Return the lines without the first ``skip``, which must be less than :attr:`count`."""
        if skip == 0:
            return self
        if not self.ends:
            return SplitLines(self.data.split(b"\n", skip)[skip], self.count - skip)
        start = self.ends[skip - 1]
        return SplitLines(self.data[start:], self.count - skip, tuple(end - start for end in self.ends[skip:]))

    def records(self) -> list[bytes]:
        """Return each line or piece, without its line end."""
        if self.ends:
            return [self.data[start:end] for start, end in zip((0, *self.ends), self.ends)]  # noqa: B905
        if not self.data.endswith(b"\n"):
            return [self.data]
        # The "\r" before the last newline belongs to the line end, as before any other.
        data = self.data.replace(b"\r\n", b"\n") if b"\r" in self.data else self.data
        return data[:-1].split(b"\n")


class LineSplitter:
    """
    A splitter of one stream's chunks into :class:`SplitLines`.

    The cost is linear in the bytes, whatever their shape: an unfinished line is kept as a list of chunks and
    joined once, and a line over :data:`PIECE` bytes leaves in pieces as it arrives. Pieces are cut between
    UTF-8 characters and never inside ``\\r\\n``, so that each can be decoded by itself and, joined, they are
    the line.
    """

    def __init__(self) -> None:
        self._tail: list[bytes] = []
        self._tail_size = 0
        self.begins = False
        self._cut = False  # whether what is in the tail has waited already

    @property
    def unfinished(self) -> bytes:
        """The beginning of a line whose end has not arrived, without the pieces that were already returned."""
        return b"".join(self._tail)

    def take_unfinished(self) -> list[SplitLines]:
        """Return the unfinished line as a piece, up to the last border between characters, or a ``\\r`` before it."""
        data = self.unfinished
        end = _last_border(data)
        if end and data[end - 1] == 0x0D:
            end -= 1  # the line end may follow it
        if end == 0:
            return []
        self._cut = True
        self._tail = [data[end:]] if end < len(data) else []
        self._tail_size = len(data) - end
        return [SplitLines(data[:end], 1, (end,))]

    def feed(self, chunk: bytes) -> list[SplitLines]:
        """
        Add a chunk from the pipe; return the lines and pieces that are complete.

        :attr:`begins` says whether the unfinished line, or its next piece, begins with this chunk.
        """
        self.begins = self._cut or not self._tail
        self._cut = False
        if self._tail_size + len(chunk) <= PIECE and b"\n" not in chunk:
            self._tail.append(chunk)
            self._tail_size += len(chunk)
            return []
        data = b"".join((*self._tail, chunk)) if self._tail else chunk
        found: list[SplitLines] = []
        position = _take_lines(data, found)
        if len(data) - position > PIECE:
            position = _take_pieces(data, position, len(data) - PIECE, found)
        self.begins = True
        tail = data[position:]
        self._tail = [tail] if tail else []
        self._tail_size = len(tail)
        return found

    def flush(self) -> list[SplitLines]:
        """Return the last line, if the stream ended without a newline."""
        data = b"".join(self._tail)
        self._tail = []
        self._tail_size = 0
        return [SplitLines(data, 1)] if data else []


def _take_lines(data: bytes, found: list[SplitLines]) -> int:
    """Append the lines of ``data`` to ``found``; return the position after the last newline."""
    end = data.rfind(b"\n") + 1
    start = position = count = 0
    while position < end:
        # With a newline within PIECE bytes, no line before it is too long: one search in C for each PIECE bytes, not
        # one for each line.
        newline = data.rfind(b"\n", position, position + PIECE)
        if newline < 0:
            if count:
                found.append(SplitLines(data[start:position], count))
            start = position = _take_pieces(data, position, data.find(b"\n", position) + 1 - PIECE, found)
            count = 0
            continue
        count += data.count(b"\n", position, newline + 1)
        position = newline + 1
        if count >= BATCH_LINES:
            found.append(SplitLines(data[start:position], count))
            start = position
            count = 0
    if count:
        found.append(SplitLines(data[start:position], count))
    return end


def _take_pieces(data: bytes, position: int, until: int, found: list[SplitLines]) -> int:
    """Append pieces of a long line to ``found`` until ``until`` is reached; return where the rest starts."""
    while position < until:
        start = position
        ends: list[int] = []
        while position < until and len(ends) < BATCH_PIECES:
            position = character_border(data, position + PIECE)
            if data[position - 1] == 0x0D:
                position -= 1
            ends.append(position - start)
        found.append(SplitLines(data[start:position], len(ends), tuple(ends)))
    return position


def character_border(data: bytes, cut: int) -> int:
    """Return the last border between UTF-8 characters at or before ``cut``: both sides can be decoded alone."""
    # A character has at most three continuation bytes (0b10xxxxxx); after more, this is not UTF-8 and any border does.
    for back in range(min(4, cut + 1)):
        if cut - back == len(data) or data[cut - back] & 0xC0 != 0x80:
            return cut - back
    return cut


def _last_border(data: bytes) -> int:
    """Return the end of the last whole UTF-8 character; bytes that cannot become one count as characters."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 == 0x80:
            continue
        size = 2 if byte & 0xE0 == 0xC0 else 3 if byte & 0xF0 == 0xE0 else 4 if byte & 0xF8 == 0xF0 else 1
        return len(data) - back if size > back else len(data)
    return len(data)
