"""The command ``cp``: copies of files and directories to, from and within the sandbox."""

from __future__ import annotations

import os
import posixpath
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sandboxd.ctl.output import printable
from sandboxd.ctl.progress import bar
from sandboxd.ctl.session import Session, fail

if TYPE_CHECKING:
    from sandboxd.client import Sandbox


@click.command()
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option("-x", "--exclude", multiple=True, metavar="PATTERN", help="Leave out what matches, of a directory.")
@click.option("-z", "--compress", is_flag=True, help="Compress a directory on its way here.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
@click.pass_obj
def cp(session: Session, source: str, destination: str, exclude: tuple[str, ...], compress: bool, quiet: bool) -> None:
    """
    Copy a file or a directory. A path of the sandbox begins with a colon; - is standard input or output.

    As with cp -r, what goes to a directory that is there is put into it. A large file that was broken off is continued
    by the same command; a directory travels as one archive, however many files it has.
    """
    if source.startswith(":") and destination.startswith(":"):
        where = _into(session.sandbox, source[1:], destination[1:])
        session.sandbox.copy(source[1:], where, overwrite=True)
    elif destination.startswith(":"):
        _upload(session.sandbox, source, destination[1:] or ".", exclude, quiet)
    elif source.startswith(":"):
        _download(session.sandbox, source[1:] or ".", destination, exclude, compress, quiet)
    else:
        raise click.UsageError("one of the two has to be of the sandbox: put a colon before its path")


def _into(sandbox: Sandbox, source: str, destination: str) -> str:
    """Return the path of a copy: below ``destination`` if that is a directory."""
    from sandboxd.client import NotFound

    destination = destination or "."
    try:
        is_directory = sandbox.stat(destination, follow=True).type == "dir"
    except NotFound:
        is_directory = destination.endswith("/")
    name = posixpath.basename(posixpath.normpath(source))
    return posixpath.join(destination, name) if is_directory and name not in ("", ".", "..") else destination


def _upload(sandbox: Sandbox, source: str, destination: str, exclude: tuple[str, ...], quiet: bool) -> None:
    with bar(printable(source), quiet) as progress:
        if source == "-":
            sandbox.upload(sys.stdin.buffer, destination, progress=progress)
            return
        local = Path(source)
        where = _into(sandbox, os.path.abspath(source), destination)
        if local.is_dir():
            done = sandbox.upload_tree(local, where, exclude=exclude, progress=progress)
            _report_skipped(done.skipped)
        else:
            sandbox.upload(local, where, parents=destination.endswith("/"), progress=progress)


def _download(
    sandbox: Sandbox, source: str, destination: str, exclude: tuple[str, ...], compress: bool, quiet: bool
) -> None:
    with bar(printable(source), quiet) as progress:
        if destination == "-":
            sandbox.download(source, sys.stdout.buffer, progress=progress)
            sys.stdout.buffer.flush()
            return
        local = Path(destination)
        name = posixpath.basename(posixpath.normpath(source))
        if (local.is_dir() or destination.endswith("/")) and name not in ("", ".", ".."):
            local = local / name
        if sandbox.stat(source, follow=True).type == "dir":
            done = sandbox.download_tree(source, local, exclude=exclude, compress=compress, progress=progress)
            _report_skipped(done.skipped)
        else:
            local.parent.mkdir(parents=True, exist_ok=True)
            sandbox.download(source, local, progress=progress)


def _report_skipped(names: list[str]) -> None:
    for name in names:
        fail(f"left out: {printable(name)}")
