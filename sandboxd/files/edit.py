"""Edits of a file's text by exact replacement; an edit whose old text is absent or ambiguous changes nothing."""

from __future__ import annotations

import errno
import os
import stat as modes
from collections.abc import Iterator
from time import time_ns
from typing import NamedTuple

from sandboxd.files.errors import FileError, os_errors
from sandboxd.files.etag import entity_tag
from sandboxd.files.operations import MAX_READ
from sandboxd.files.root import Root
from sandboxd.files.upload import Check, Replacement

#: Bytes in which a text is replaced at a time.
_PIECE = 64 * 1024

#: Age in ns below which a file's times do not prove that it is unchanged: its clock may not have advanced since. FAT
#: has 2 s, other file systems 1 s or the kernel's tick.
_COARSEST_CLOCK = 2 * 10**9

#: Most line numbers that a result lists.
MAX_LINES = 20


class Edit(NamedTuple):
    """
    A replacement of one text by another.

    :ivar everywhere: whether the old text may be there more than once, and is replaced wherever it is.
    """

    old: str
    new: str
    everywhere: bool = False


class NoMatch(Exception):
    """
    The old text of an edit is not in the file, or more than once.

    :ivar index: which edit, from 0.
    :ivar count: how often it is there.
    :ivar lines: in which lines, the first :data:`MAX_LINES` of them.
    """

    def __init__(self, index: int, count: int, lines: list[int]) -> None:
        where = f"edits[{index}].old"
        super().__init__(
            f"{where}: it is not in the file; give the text exactly as it is there, white space included"
            if not count
            else f"{where}: it is in the file {count} times; give more of what is around it, or replace_all"
        )
        self.index = index
        self.count = count
        self.lines = lines


class Edited(NamedTuple):
    """
    The result of an edit.

    :ivar replaced: for each edit, how often it has replaced its text.
    :ivar lines: for each edit, the lines where its new text begins, in the file as it is now unless a later edit has
        moved them.
    """

    info: os.stat_result
    replaced: list[int]
    lines: list[list[int]]


def edit(root: Root, path: str, edits: list[Edit], check: Check) -> Edited:
    """
    Apply edits, one after another, and replace the file atomically. It keeps its owner and its mode.

    :param check: called with the stat of the file; raises if it is not to be changed.
    :raise NoMatch: if one does not fit; then nothing is changed.
    :raise FileError: if it cannot be read or written, was changed by another writer, or has more than
        :data:`~sandboxd.files.operations.MAX_READ` bytes.
    """
    now = time_ns()
    data, before = _read(root, path, check)
    recent = data if now - before.st_ctime_ns < _COARSEST_CLOCK else None
    replaced: list[int] = []
    lines: list[list[int]] = []
    for index, one in enumerate(edits):
        with os_errors("edit", path):
            data, count, where = _apply(data, index, one)
        replaced.append(count)
        lines.append(where)

    def unchanged(info: os.stat_result | None) -> None:
        check(info)
        if (
            info is None
            or entity_tag(info) != entity_tag(before)
            or (recent is not None and not _has(root, path, recent))
        ):
            raise FileError("edit", path, "it was changed by another writer; read it again", errno.EBUSY)

    upload = Replacement(root, path, unchanged, durable=False)
    try:
        upload.open(len(data))
        upload.write(data)
        return Edited(upload.commit().info, replaced, lines)
    finally:
        upload.close()


def _read(root: Root, path: str, check: Check) -> tuple[bytes, os.stat_result]:
    with os_errors("open", path):
        fd = root.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os_errors("read", path), open(fd, "rb") as file:
        info = os.fstat(fd)
        if not modes.S_ISREG(info.st_mode):
            raise OSError(errno.EEXIST, "not a regular file")
        check(info)
        if info.st_size > MAX_READ:
            raise _too_large()
        return file.read(MAX_READ), info


def _has(root: Root, path: str, data: bytes) -> bool:
    """Return whether these are a file's contents, read anew."""
    with os_errors("read", path):
        fd = root.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(fd, "rb", buffering=0) as file:
            place = 0
            while piece := file.read(_PIECE):
                if piece != data[place : place + len(piece)]:
                    return False
                place += len(piece)
            return place == len(data)


def _too_large() -> OSError:
    return OSError(errno.EFBIG, f"file too large: the limit is {MAX_READ} bytes")


def _texts(data: bytes, one: Edit) -> tuple[bytes, bytes]:
    """
    Return the old and the new text as bytes, with the line ends of the file.

    Clients show lines without their ends, so ``\\n`` in an edit means the line end of a file that has ``\\r\\n``
    throughout, or of the place that it is to match.
    """
    old, new = (text.encode("utf-8", "surrogateescape") for text in (one.old, one.new))
    ends = data.count(b"\r\n")
    if ends and (ends == data.count(b"\n") or data.find(old) < 0):
        old, new = (text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") for text in (old, new))
    return old, new


def _apply(data: bytes, index: int, one: Edit) -> tuple[bytes, int, list[int]]:
    old, new = _texts(data, one)
    first = data.find(old)
    if first < 0:
        raise NoMatch(index, 0, [])
    if not one.everywhere:
        if data.find(old, first + 1) >= 0:
            places = _places(data, old, 1)
            raise NoMatch(index, max(2, data.count(old)), _lines(data, places))
        if len(data) + len(new) - len(old) > MAX_READ:
            raise _too_large()
        return data[:first] + new + data[first + len(old) :], 1, _lines(data, [first])
    count = data.count(old)
    if len(data) + count * (len(new) - len(old)) > MAX_READ:
        raise _too_large()
    places = [place + number * (len(new) - len(old)) for number, place in enumerate(_places(data, old, len(old)))]
    data = b"".join(_replaced(data, old, new))
    return data, count, _lines(data, places)


def _replaced(data: bytes, old: bytes, new: bytes, size: int = _PIECE) -> Iterator[bytes]:
    """
    Yield ``data.replace(old, new)`` in pieces.

    One call for 64 MiB would hold the interpreter, and so the reactor, for some 0.3 s.
    """
    size = max(size, 2 * len(old))
    start = 0
    while start < len(data):
        end = min(start + size, len(data))
        parts = data[start:end].split(old)
        piece = new.join(parts)
        across = data.find(old, end - min(len(parts[-1]), len(old) - 1), end + len(old) - 1)
        if across >= 0:  # one that begins here and ends in the next piece
            piece = piece[: len(piece) - (end - across)]
            end = across
        yield piece
        start = end


def _places(data: bytes, text: bytes, step: int) -> list[int]:
    """Return the offsets of a text, at most :data:`MAX_LINES` of them."""
    places: list[int] = []
    place = data.find(text)
    while place >= 0 and len(places) < MAX_LINES:
        places.append(place)
        place = data.find(text, place + step)
    return places


def _lines(data: bytes, places: list[int]) -> list[int]:
    """Return the numbers of the lines that these offsets are in, from 1."""
    numbers: list[int] = []
    line = 1
    position = 0
    for place in places:
        line += data.count(b"\n", position, place)
        position = place
        if not numbers or numbers[-1] != line:
            numbers.append(line)
    return numbers
