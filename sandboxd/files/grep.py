"""
Searches files for a pattern. Runs as a process of its own, which can be ended whatever a pattern makes of it: a regular
expression may take longer than the universe lasts, and holds the interpreter all the while.

Reads a :class:`Search` as JSON from stdin, and writes matches as lines of JSON to stdout; the last line has ``done``.
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
from typing import Any

from sandboxd.files.patterns import Excludes, Pattern
from sandboxd.files.walk import TreeEntry, walk

#: Bytes at the beginning of a file in which a NUL means that it is no text.
_LOOK = 8192

#: Most characters of a line that a match has.
MAX_TEXT = 1000

#: Bytes of memory that this process may have.
_MEMORY = 2 << 30


def expression(pattern: str, literal: bool, ignore_case: bool) -> re.Pattern[str]:
    """
    What is searched for.

    :raise re.error: if it is no regular expression.
    """
    flags = re.MULTILINE | (re.IGNORECASE if ignore_case else 0)
    return re.compile(re.escape(pattern) if literal else pattern, flags)


class Grep:
    """
    One search.

    :param asked: ``pattern``, ``literal``, ``ignore_case``, ``glob``, ``exclude``, ``hidden``, ``context``,
        ``max_matches``, ``max_file_size``.
    """

    def __init__(self, asked: dict[str, Any]) -> None:
        self._regex = expression(asked["pattern"], asked["literal"], asked["ignore_case"])
        globs = asked["glob"]
        self._names = [Pattern(glob) for glob in globs if "/" not in glob]
        self._paths = [Pattern(glob) for glob in globs if "/" in glob]
        self._excluded = Excludes(asked["exclude"])
        self._hidden = asked["hidden"]
        self._context = asked["context"]
        self._left = asked["max_matches"]
        self._max_size = asked["max_file_size"]
        self.files = 0
        self.binary = 0
        self.too_large = 0
        self.unreadable = 0
        self.truncated = False

    def tree(self, top: int) -> Iterator[dict[str, object]]:
        """All matches below a directory."""
        for entry in walk(top, failed=self._failed):
            if self._is_meant(entry):
                yield from self._open(entry)
            if self.truncated:
                return

    def file(self, name: str, fd: int) -> Iterator[dict[str, object]]:
        """All matches in a file, which is closed then."""
        with open(fd, "rb") as file:
            info = os.fstat(fd)
            if not modes.S_ISREG(info.st_mode):
                return
            if info.st_size > self._max_size:
                self.too_large += 1
                return
            data = file.read(self._max_size)
        self.files += 1
        if b"\0" in data[:_LOOK]:
            self.binary += 1
            return
        yield from self._matches(name, data.decode("utf-8", "replace"))

    def _failed(self, path: str, error: OSError) -> None:
        self.unreadable += 1

    def _is_meant(self, entry: TreeEntry) -> bool:
        if (not self._hidden and entry.name.startswith(".")) or self._excluded(entry.path):
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
        if self._context:
            match["before"] = _lines(text[:begin].rsplit("\n", self._context + 1)[-self._context - 1 : -1])
            match["after"] = (
                _lines(text[end + 1 :].split("\n", self._context)[: self._context]) if end < len(text) else []
            )
        return match


def _lines(lines: list[str]) -> list[str]:
    return [line.removesuffix("\r")[:MAX_TEXT] for line in lines]


def main() -> None:
    """Search as stdin says."""
    asked = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    seconds = int(asked["timeout"]) + 2
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    grep = Grep(asked)
    matches = grep.tree(asked["fd"]) if asked["is_dir"] else grep.file(asked["name"], asked["fd"])
    out = sys.stdout.buffer
    for match in matches:
        out.write(json.dumps(match).encode("ascii") + b"\n")
        out.flush()
    done = {"files": grep.files, "binary": grep.binary, "too_large": grep.too_large, "unreadable": grep.unreadable}
    out.write(json.dumps({"done": done, "truncated": grep.truncated}).encode("ascii") + b"\n")
    out.flush()
