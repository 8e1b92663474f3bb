"""Keeps what was measured of each version, and finds the rows that have become worse."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

#: A change that is never called more than noise, as a share: less is seldom seen twice on a machine that does more.
LEAST_NOISE = 0.1


def record(document: Mapping[str, Any], version: str, folder: Path) -> Iterator[str]:
    """
    Write what ``--json`` writes as a version's file, in place of an earlier one of that version.

    :return: a line for each row that is worse than that of the newest version before, by more than the noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    earlier = [path for path in folder.glob("*.json") if _parts(path.stem) < _parts(version)]
    (folder / f"{version}.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if earlier:
        before = max(earlier, key=lambda path: _parts(path.stem))
        yield from fallen(json.loads(before.read_text(encoding="utf-8")), document, before.stem)


def _parts(version: str) -> tuple[int, ...]:
    """Return a version's numbers, which can be compared."""
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def fallen(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> Iterator[str]:
    """
    Return a line for each row that is worse than before by more than the noise of the two.

    Ratios to the machine's limit are compared where there are any, as they stay the same on a quicker machine.

    :param name: what the lines call ``before``.
    """
    old = {row["name"]: row for row in before["rows"]}
    for row in after["rows"]:
        was, now = _marks(old.get(row["name"], {})), _marks(row)
        if not was or not now:
            continue
        change = statistics.median(now) / statistics.median(was)
        noise = max(LEAST_NOISE, _spread(was), _spread(now))
        if change < 1 - noise:
            yield f"WORSE: {row['name']} has {change:.2f} of what {name} had (noise {noise:.2f})"


def _marks(row: Mapping[str, Any]) -> list[float]:
    """Return how good each measurement of a row was: more is better. Empty if that is not known."""
    less = row.get("better") == "less"
    values = [value for value in row.get("values", ()) if value > 0]
    limits = row.get("limits") or [1.0] * len(values)
    return [limit / value if less else value / limit for value, limit in zip(values, limits, strict=False) if limit > 0]


def _spread(marks: Sequence[float]) -> float:
    """Return how far measurements lie apart, as a share of their median."""
    return (max(marks) - min(marks)) / statistics.median(marks)
