"""The output of commands: tables, JSON, sizes and times."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import click

from sandboxd.ctl.config import use_colours

#: Colours of a process's states.
STATES = {"running": "green", "completed": "blue", "failed": "red", "killed": "yellow"}

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def colour(text: str, name: str | None, bold: bool = False) -> str:
    """Return text in a colour, if standard output takes colours."""
    if not use_colours(sys.stdout.isatty()):
        return text
    return click.style(text, fg=name, bold=bold or None)


def print_json(value: Any) -> None:
    """Print a reply, or a list of them, as JSON."""
    import json

    import msgspec

    click.echo(json.dumps(msgspec.to_builtins(value), indent=2))


def table(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """
    Return a text table. The last column is not padded.

    :param right: the columns that are aligned to the right.
    """
    if not rows:
        return ""
    lines = [[colour(head, None, bold=True) for head in heads], *rows] if heads else list(rows)
    widths = [max(len(click.unstyle(line[column])) for line in lines) for column in range(len(lines[0]))]

    def cell(line: Sequence[str], column: int) -> str:
        text = line[column]
        fill = " " * (widths[column] - len(click.unstyle(text)))
        if column in right:
            return fill + text
        return text if column == len(line) - 1 else text + fill

    return "\n".join("  ".join(cell(line, column) for column in range(len(line))).rstrip() for line in lines)


def age(since: str, until: str | None = None) -> str:
    """Return the time since a timestamp (RFC 3339), or between two of them: ``3m12s``."""
    seconds = int((parse_time(until) if until else time.time()) - parse_time(since))
    for size, name, below, small in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if seconds >= size:
            return f"{seconds // size}{name}{seconds % size // below}{small}"
    return f"{max(seconds, 0)}s"


def parse_time(text: str) -> float:
    """Return a timestamp (RFC 3339, UTC) in seconds since the epoch."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    seconds = datetime.fromisoformat(whole).replace(tzinfo=timezone.utc).timestamp()
    return seconds + float(f"0.{fraction or 0}")


def size(count: float) -> str:
    """Format a number of bytes for people: ``1.5M``."""
    for unit in ("", "K", "M", "G", "T"):
        if count < 1024 or unit == "T":
            return f"{count:.0f}{unit}" if unit == "" or count >= 100 else f"{count:.1f}{unit}"
        count /= 1024
    raise AssertionError


def printable(text: str) -> str:
    """Return text that cannot control the terminal: control characters and bytes that are not UTF-8 are escaped."""
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape", "surrogatepass").decode("ascii") for each in text
    )


def write_text(text: str, error: bool = False) -> None:
    """Write the output of a command unchanged, and flush."""
    stream = (sys.stderr if error else sys.stdout).buffer
    stream.write(text.encode("utf-8", "surrogateescape"))
    stream.flush()
