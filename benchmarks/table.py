"""Results as a table for readers and as JSON for programs."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from typing import Any

from benchmarks.runner import Result, Series

#: Cores' worth of processor time from which the load side may have been what held a row back.
BUSY = 0.9

HEAD = ("", "", "value", "limit", "of limit", "peer", "to peer", "cpu", "load cpu", "peak MB", "peer's")

NOTE = f"""\
Values are medians. Ratios are medians of neighbouring measurements; over 1.00 is better than what it is held against,
whatever the unit. "of limit" is held against what the machine does without a server, in the same run.
"cpu" is the processor time of the server while the clock ran, in cores; "load cpu" that of the busiest
process of the load side, the larger of the two servers'. Under {BUSY} of a core, it has waited for the
server; a row with ! may have been held back by it. "peak" is the server's resident memory. "none": it has no
such route. A value with * is that of the measurements before one that has failed."""


def short(value: float | None) -> str:
    """A value with three or more digits that count."""
    if value is None:
        return "-"
    if abs(value) >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) >= 1 else f"{value:.2f}"


def ratio(value: float | None) -> str:
    """A ratio."""
    return "-" if value is None else f"{value:.2f}"


def median(values: Sequence[float | None]) -> float | None:
    """The median of those that are known."""
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def lines(results: Sequence[Result], names: Sequence[str]) -> Iterator[str]:
    """The lines of the table, and under it why rows have failed."""
    head = ["row", "unit", names[0], *HEAD[3:]]
    if len(names) > 1:
        head[5] = names[1]
    table = [head, *map(_cells, results)]
    drop = () if len(names) > 1 else (5, 6, 10)
    table = [[cell for column, cell in enumerate(row) if column not in drop] for row in table]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row in table:
        aligned = [
            cell.ljust(width) if column < 2 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(aligned).rstrip()
    yield ""
    yield from NOTE.splitlines()
    for result in results:
        if result.index == 0:
            for name, series in zip(names, result.series, strict=True):
                if series.failed and not series.absent:
                    yield f"FAILED: {result.row.name}, {name}: {series.failed}"


def _cells(result: Result) -> list[str]:
    first = result.series[0]
    loads = [median([sample.load_cpu for sample in series.samples]) for series in result.series]
    load = max((value for value in loads if value is not None), default=None)
    peer = _value(result, 1) if len(result.series) > 1 else ""
    return [
        result.row.title,
        result.row.unit,
        _value(result, 0),
        short(median(result.limit_values())),
        ratio(result.limit_ratio()),
        peer,
        ratio(result.peer_ratio()),
        ratio(median([sample.server_cpu for sample in first.samples])),
        ratio(load) + ("!" if load and load >= BUSY else ""),
        _peak(first),
        _peak(result.series[1]) if len(result.series) > 1 else "",
    ]


def _value(result: Result, which: int) -> str:
    if not result.series[which].samples:
        return "none" if result.series[which].absent else "failed"
    return short(median(result.values(which))) + ("*" if result.series[which].failed else "")


def _peak(series: Series) -> str:
    peaks = [sample.peak for sample in series.samples if sample.peak]
    return f"{max(peaks) / 1e6:.0f}" if peaks else "-"


def document(results: Sequence[Result], names: Sequence[str]) -> dict[str, Any]:
    """All of it, for ``--json``."""
    return {
        "format": 1,
        "made": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(),
            "kernel": platform.release(),
            "architecture": platform.machine(),
            "python": platform.python_version(),
        },
        "servers": list(names),
        "rows": list(map(_row, results)),
    }


def _row(result: Result) -> dict[str, Any]:
    limits = result.limit_values()
    found: dict[str, Any] = {
        "name": result.row.name,
        "title": result.row.title.strip(),
        "unit": result.row.unit,
        "better": "less" if result.row.less else "more",
        "limit": median(limits),
        "limits": limits,
        "limit_ratio": result.limit_ratio(),
        **_measured(result, 0),
    }
    if len(result.series) > 1:
        found["peer"] = {**_measured(result, 1), "limit_ratio": result.limit_ratio(1)}
        found["peer_ratio"] = result.peer_ratio()
    return found


def _measured(result: Result, which: int) -> dict[str, Any]:
    series = result.series[which]
    values = result.values(which)
    return {
        "value": median(values),
        "values": values,
        "failed": series.failed,
        "server_cpu": median([sample.server_cpu for sample in series.samples]),
        "load_cpu": median([sample.load_cpu for sample in series.samples]),
        "peak_memory": max((sample.peak for sample in series.samples if sample.peak), default=None),
    }
