"""
Glob patterns of paths: ``*``, ``?``, ``[...]`` in a name, ``**`` for any directories, ``{a,b}`` for alternatives.

A pattern is followed down a tree name by name, so that what cannot match is not walked, and the time is bounded
whatever the pattern: there is no backtracking over whole paths.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from fnmatch import translate
from functools import lru_cache
from typing import TypeAlias

#: Alternatives that the braces of one pattern may make.
MAX_ALTERNATIVES = 256

#: Characters of a pattern.
MAX_LENGTH = 4096

_ANY_DIRECTORIES = None

#: Positions in a pattern: an alternative, and the number of its segments that were matched.
State: TypeAlias = "frozenset[tuple[int, int]]"


class PatternError(ValueError):
    """The pattern is malformed."""


class Pattern:
    """
    A compiled pattern. It is matched name by name, so that a walk can leave out directories without a match.

    :param hidden: whether wildcards match names that begin with a dot.
    :ivar start: the state above the first name.
    :raise PatternError: if it is malformed.
    """

    def __init__(self, pattern: str, hidden: bool = True) -> None:
        if len(pattern) > MAX_LENGTH:
            raise PatternError(f"it is longer than {MAX_LENGTH} characters")
        self._hidden = hidden
        self._alternatives: list[list[Callable[[str], object] | None]] = []
        self._dotted: list[list[bool]] = []
        for text in _alternatives(pattern):
            segments = [segment for segment in text.split("/") if segment not in ("", ".")]
            if not segments:
                raise PatternError("it is empty")
            if ".." in segments:
                raise PatternError("'..' is in no path that is found")
            self._alternatives.append([_ANY_DIRECTORIES if s == "**" else _segment(s) for s in segments])
            self._dotted.append([segment.startswith(".") for segment in segments])
        self.start: State = self._closed({(index, 0) for index in range(len(self._alternatives))})

    def step(self, state: State, name: str) -> State:
        """
        Return the state below a name; empty if neither it nor anything below it can match.

        :param name: as :func:`os.fsdecode` makes it.
        """
        dotted = name.startswith(".") and not self._hidden
        found = set()
        for alternative, position in state:
            segments = self._alternatives[alternative]
            if position == len(segments):
                continue
            segment = segments[position]
            if segment is _ANY_DIRECTORIES:
                if not dotted:
                    found.add((alternative, position))
            elif (not dotted or self._dotted[alternative][position]) and segment(name):
                found.add((alternative, position + 1))
        return self._closed(found)

    def matches(self, state: State) -> bool:
        """Return whether the path that led to this state matches."""
        return any(position == len(self._alternatives[alternative]) for alternative, position in state)

    def matches_path(self, path: str) -> bool:
        """Return whether a relative path matches."""
        state = self.start
        for name in path.split("/"):
            state = self.step(state, name)
        return self.matches(state)

    def _closed(self, states: set[tuple[int, int]]) -> State:
        """
        Add the states in which a ``**`` stands for no directory; at the end of a pattern it stands for everything
        below.
        """
        left = list(states)
        while left:
            alternative, position = left.pop()
            segments = self._alternatives[alternative]
            if position < len(segments) and segments[position] is _ANY_DIRECTORIES:
                behind = (alternative, position + 1)
                if behind not in states:
                    states.add(behind)
                    left.append(behind)
        return frozenset(states)


class Excludes:
    """
    Patterns of files to leave out: one without a slash is matched with names, others with paths from the top.

    :raise PatternError: if one is malformed.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        patterns = [pattern.rstrip("/") for pattern in patterns]
        self._names = [Pattern(pattern) for pattern in patterns if "/" not in pattern]
        self._paths = [Pattern(pattern) for pattern in patterns if "/" in pattern]

    def __bool__(self) -> bool:
        return bool(self._names or self._paths)

    def __call__(self, path: str) -> bool:
        """Return whether a path from the top is left out. Callers do not ask for paths below one that is."""
        if not self:
            return False
        name = path.rpartition("/")[2]
        return any(pattern.matches_path(name) for pattern in self._names) or any(
            pattern.matches_path(path) for pattern in self._paths
        )


@lru_cache(1024)
def _segment(segment: str) -> Callable[[str], object]:
    """
    Return a function that matches one name. fnmatch's expressions do not backtrack over more than one star at a time.

    :raise PatternError: if it is malformed.
    """
    if "**" in segment:
        segment = re.sub(r"\*+", "*", segment)
    try:
        return re.compile(translate(segment)).match
    except re.error as error:
        raise PatternError(str(error)) from None


def _alternatives(pattern: str) -> list[str]:
    """
    Return the patterns without braces that a pattern stands for. Braces without a comma, or without an end, are
    literal.

    :raise PatternError: if there are too many.
    """
    done: list[str] = []
    left = [pattern]
    while left:
        text = left.pop()
        # Not with a comma in the expression: it would be matched in quadratic time where a brace is not closed.
        found = next((braces for braces in re.finditer(r"\{([^{}]*)\}", text) if "," in braces[1]), None)
        if found is None:
            done.append(text)
        else:
            left += [text[: found.start()] + choice + text[found.end() :] for choice in found[1].split(",")]
        if len(done) + len(left) > MAX_ALTERNATIVES:
            raise PatternError(f"its braces make more than {MAX_ALTERNATIVES} alternatives")
    return done
