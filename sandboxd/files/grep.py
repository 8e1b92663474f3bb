"""
The program that searches files for a pattern, run as a process of its own by :mod:`sandboxd.files.grep_process`.

A process can be killed whatever its pattern: a regular expression may take exponential time, and holds the interpreter
meanwhile.

Reads a :class:`Search` as JSON from stdin, and writes matches as lines of JSON to stdout; the last line has ``done``.
If the pattern is no regular expression, there is one line only, which has ``malformed``.
Knows nothing of the daemon, and imports little, so that it starts quickly.
"""

from __future__ import annotations

import json
import os
import re
import resource
import stat as modes
import sys
from collections.abc import Iterator
from typing import NamedTuple

from sandboxd.files.patterns import Excludes, Pattern
from sandboxd.files.walk import TreeEntry, walk

#: Bytes at the beginning of a file in which a NUL means that it is no text.
_LOOK = 8192

#: Most characters of a line that a match has.
MAX_TEXT = 1000

#: Bytes of memory that this process may have.
_MEMORY = 2 << 30


class Search(NamedTuple):
    """
    The parameters of a search.

    :ivar glob: patterns of files: of names, or with a slash of paths. None at all: all files.
    :ivar context: lines before and after each match.
    :ivar max_file_size: bytes; larger files are left out.
    :ivar timeout: seconds.
    """

    pattern: str
    literal: bool
    ignore_case: bool
    glob: list[str]
    exclude: list[str]
    hidden: bool
    context: int
    max_matches: int
    max_file_size: int
    timeout: float


def expression(pattern: str, literal: bool, ignore_case: bool) -> re.Pattern[str]:
    """
    Compile a search pattern.

    :raise re.error: if it is no regular expression.
    """
    flags = re.MULTILINE | (re.IGNORECASE if ignore_case else 0)
    return re.compile(re.escape(pattern) if literal else pattern, flags)


class Grep:
    """
    One run of a search.

    :raise re.error: if the pattern is no regular expression.
    """

    def __init__(self, search: Search) -> None:
        self._search = search
        self._regex = expression(search.pattern, search.literal, search.ignore_case)
        self._names = [Pattern(glob) for glob in search.glob if "/" not in glob]
        self._paths = [Pattern(glob) for glob in search.glob if "/" in glob]
        self._excluded = Excludes(search.exclude)
        self._left = search.max_matches
        self.files = 0
        self.binary = 0
        self.too_large = 0
        self.unreadable = 0
        self.truncated = False

    def tree(self, top: int) -> Iterator[dict[str, object]]:
        """Yield all matches below a directory."""
        for entry in walk(top, failed=self._failed):
            if self._is_meant(entry):
                yield from self._open(entry)
            if self.truncated:
                return

    def file(self, name: str, fd: int) -> Iterator[dict[str, object]]:
        """Yield all matches in a file, and close it."""
        with open(fd, "rb") as file:
            info = os.fstat(fd)
            if not modes.S_ISREG(info.st_mode):
                return
            if info.st_size > self._search.max_file_size:
                self.too_large += 1
                return
            try:
                data = file.read(self._search.max_file_size) or b""
            except OSError:  # as many files of /proc and /sys
                self.unreadable += 1
                return
        self.files += 1
        if b"\0" in data[:_LOOK]:
            self.binary += 1
            return
        # Without the CR of CRLF, "$" matches at the end of such a line as of any other.
        yield from self._matches(name, data.decode("utf-8", "replace").replace("\r\n", "\n"))

    def _failed(self, path: str, error: OSError) -> None:
        self.unreadable += 1

    def _is_meant(self, entry: TreeEntry) -> bool:
        if (not self._search.hidden and entry.name.startswith(".")) or self._excluded(entry.path):
            entry.enter = False
            return False
        if entry.is_dir:
            return False
        if not self._names and not self._paths:
            return True
        return any(glob.matches_path(entry.name) for glob in self._names) or any(
            glob.matches_path(entry.path) for glob in self._paths
        )

    def _open(self, entry: TreeEntry) -> Iterator[dict[str, object]]:
        try:
            if not (entry.is_file or modes.S_ISREG(entry.lstat().st_mode)):
                return  # to open a FIFO or a device can have an effect
            fd = entry.open(os.O_RDONLY | os.O_NONBLOCK)
        except PermissionError:
            self.unreadable += 1
        except OSError:
            pass  # it is gone, or it is a link or a socket
        else:
            yield from self.file(entry.path, fd)

    def _matches(self, name: str, text: str) -> Iterator[dict[str, object]]:
        position = number = 0
        counted = 0
        while (found := self._regex.search(text, position)) is not None:
            begin = text.rfind("\n", 0, found.start()) + 1
            end = text.find("\n", found.start())
            end = len(text) if end < 0 else end
            if begin == len(text) and begin:
                return  # behind the last line
            line = text[begin:end]
            # What matches must be in one line, as with grep.
            within = found if found.end() <= end else self._regex.search(line)
            if within is not None:
                if not self._left:
                    self.truncated = True
                    return
                self._left -= 1
                number += text.count("\n", counted, begin)
                counted = begin
                column = within.start() - (begin if within is found else 0)
                yield self._match(name, text, begin, end, number + 1, column)
            position = end + 1
            if position > len(text):
                return

    def _match(self, name: str, text: str, begin: int, end: int, number: int, column: int) -> dict[str, object]:
        line = text[begin:end].removesuffix("\r")
        match: dict[str, object] = {"path": name, "line": number, "column": column + 1}
        if len(line) > MAX_TEXT:
            from_ = max(0, column - MAX_TEXT // 2)
            match |= {"text": line[from_ : from_ + MAX_TEXT], "cut": from_}
        else:
            match["text"] = line
        if self._search.context:
            match["before"] = _lines_before(text, begin, self._search.context)
            match["after"] = _lines_after(text, end, self._search.context)
        return match


def _lines_before(text: str, begin: int, count: int) -> list[str]:
    """Return the last lines before the line that begins at ``begin``, without copying all text before it."""
    lines: list[str] = []
    while begin > 0 and len(lines) < count:
        start = text.rfind("\n", 0, begin - 1) + 1
        lines.append(text[start : min(begin - 1, start + MAX_TEXT)].removesuffix("\r"))
        begin = start
    return lines[::-1]


def _lines_after(text: str, end: int, count: int) -> list[str]:
    """Return the first lines after the line that ends at ``end``."""
    lines: list[str] = []
    while end + 1 < len(text) and len(lines) < count:
        start = end + 1
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        lines.append(text[start : min(end, start + MAX_TEXT)].removesuffix("\r"))
    return lines


def main() -> None:
    """Run the search that stdin describes."""
    asked = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    search = Search(**asked["search"])
    seconds = int(search.timeout) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    try:
        grep = Grep(search)
    except (re.error, RecursionError, OverflowError) as error:
        sys.stdout.write(json.dumps({"malformed": str(error)}) + "\n")
        return
    matches = grep.tree(asked["fd"]) if asked["is_dir"] else grep.file(asked["name"], asked["fd"])
    out = sys.stdout.buffer
    for match in matches:
        out.write(json.dumps(match).encode("ascii") + b"\n")
        out.flush()
    done = {"files": grep.files, "binary": grep.binary, "too_large": grep.too_large, "unreadable": grep.unreadable}
    out.write(json.dumps({"done": done, "truncated": grep.truncated}).encode("ascii") + b"\n")
    out.flush()
