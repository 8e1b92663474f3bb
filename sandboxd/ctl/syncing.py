"""The command ``sync``: upload the files that differ."""

from __future__ import annotations

import os
import stat as modes
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sandboxd.ctl.output import printable
from sandboxd.ctl.progress import bar
from sandboxd.ctl.session import Session

if TYPE_CHECKING:
    from sandboxd.client import Sandbox
    from sandboxd.client.replies import FileInfo

#: Seconds between two looks at the local directory.
INTERVAL = 0.5


@click.command()
@click.argument("source", metavar="DIR", type=click.Path(exists=True, file_okay=False))
@click.argument("destination", metavar=":DIR")
@click.option("-w", "--watch", is_flag=True, help="Go on with what changes, until Ctrl-C.")
@click.option("-d", "--delete", is_flag=True, help="Remove what is not in DIR.")
@click.option("-x", "--exclude", multiple=True, metavar="PATTERN", help="Leave out what matches; it is not removed.")
@click.option("-q", "--quiet", is_flag=True, help="Do not print what is sent.")
@click.pass_obj
def sync(
    session: Session, source: str, destination: str, watch: bool, delete: bool, exclude: tuple[str, ...], quiet: bool
) -> None:
    """
    Make a directory of the sandbox like a local one.

    What differs in type, size, mode or time of change is uploaded, in one archive.
    """
    if not destination.startswith(":"):
        raise click.UsageError("the second directory is of the sandbox: put a colon before its path")
    top, path = Path(source), destination[1:] or "."
    seen = _send(session.sandbox, top, path, exclude, delete, quiet)
    while watch:
        time.sleep(INTERVAL)
        if _look(top, exclude) != seen:
            seen = _send(session.sandbox, top, path, exclude, delete, quiet)


def _look(top: Path, exclude: tuple[str, ...]) -> dict[str, tuple[int, int, int]]:
    """Return mode, size and time of each local file, directory and link, by name; a change of any changes them."""
    from sandboxd.client.trees import walk

    return {name: _version(info) for name, info in walk(top, exclude)}


def _version(info: os.stat_result) -> tuple[int, int, int]:
    if modes.S_ISDIR(info.st_mode):
        return info.st_mode, 0, 0
    return info.st_mode, info.st_size, info.st_mtime_ns


def _send(
    sandbox: Sandbox, top: Path, path: str, exclude: tuple[str, ...], delete: bool, quiet: bool
) -> dict[str, tuple[int, int, int]]:
    """Upload the entries that differ, and return what :func:`_look` returns, as of now."""
    from sandboxd.client import NotFound
    from sandboxd.client.trees import is_gone, walk

    local = dict(walk(top, exclude))
    try:
        remote = {each.path: each for each in sandbox.list_files(path, depth=10_000, exclude=exclude)}
    except NotFound:
        remote = {}
    for name in sorted(set(remote) - set(local), reverse=True) if delete else []:
        if not quiet:
            click.echo(f"- {printable(name)}")
        sandbox.delete_tree(f"{path}/{name}")
    changed = []
    for name, info in local.items():
        there = remote.get(name)
        try:
            if _same(top / name, info, there):
                continue
        except OSError as error:
            if not is_gone(error, top):
                raise
            continue  # the next look finds what has become of it
        if there is not None and (there.type == "dir") != modes.S_ISDIR(info.st_mode):
            sandbox.delete_tree(f"{path}/{name}")  # an archive replaces no directory with a file
        changed.append((name, info))
        if not quiet:
            click.echo(f"+ {printable(name)}")
    if changed:
        with bar(printable(str(top)), quiet) as progress:
            sandbox.upload_entries(top, changed, path, progress)
    return {name: _version(info) for name, info in local.items()}


def _same(place: Path, info: os.stat_result, there: FileInfo | None) -> bool:
    """Return whether a local file and a remote one seem to be the same, without reading them."""
    if there is None:
        return False
    mode = modes.S_IMODE(info.st_mode) & 0o777
    if modes.S_ISDIR(info.st_mode):
        return there.type == "dir" and int(there.mode, 8) & 0o777 == mode
    if modes.S_ISLNK(info.st_mode):
        return there.type == "link" and there.target == os.readlink(place)
    if not modes.S_ISREG(info.st_mode):
        return True  # it is not sent
    return (there.type, there.size, int(there.mode, 8) & 0o777, nanoseconds(there.mtime)) == (
        "file",
        info.st_size,
        mode,
        info.st_mtime_ns,
    )


def nanoseconds(text: str) -> int:
    """Return a timestamp (RFC 3339, UTC) in nanoseconds since the epoch."""
    from datetime import datetime, timezone

    whole, _, fraction = text.removesuffix("Z").partition(".")
    seconds = int(datetime.fromisoformat(whole).replace(tzinfo=timezone.utc).timestamp())
    return seconds * 10**9 + int(f"{fraction:0<9}"[:9])
