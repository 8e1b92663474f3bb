"""The commands ``ls``, ``cat`` and ``edit``."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sandboxd.ctl.config import editor
from sandboxd.ctl.output import as_json, colour, print_json, printable, size, table
from sandboxd.ctl.session import Session, fail

if TYPE_CHECKING:
    from sandboxd.client.replies import FileInfo

#: Colours of what is no plain file.
TYPES = {"dir": "blue", "link": "cyan", "fifo": "yellow", "socket": "magenta", "char": "yellow", "block": "yellow"}
LETTERS = {"dir": "d", "link": "l", "fifo": "p", "socket": "s", "char": "c", "block": "b"}


def remote(path: str) -> str:
    """Return a path of the sandbox without its leading colon, if it has one."""
    return path.removeprefix(":") or "."


def shown(info: FileInfo) -> str:
    """Return a name as a list shows it."""
    return colour(printable(info.path), TYPES.get(info.type)) + ("/" if info.type == "dir" else "")


def permissions(info: FileInfo) -> str:
    """Return type and mode as ls(1) shows them."""
    mode = int(info.mode, 8)
    text = "".join(letter if mode >> 8 - place & 1 else "-" for place, letter in enumerate("rwxrwxrwx"))
    return LETTERS.get(info.type, "-") + text


@click.command()
@click.argument("paths", nargs=-1)
@click.option("-l", "--long", is_flag=True, help="Show mode, owner, size and time.")
@click.option("-a", "--all", "hidden", is_flag=True, help="Also names that begin with a dot.")
@click.option("-R", "--recursive", is_flag=True, help="Also what is in the directories below.")
@as_json
@click.pass_obj
def ls(session: Session, paths: tuple[str, ...], long: bool, hidden: bool, recursive: bool, as_json: bool) -> None:
    """List what is in a directory of the sandbox: in that where the daemon runs, if none is given."""
    found: list[FileInfo] = []
    for path in map(remote, paths or (".",)):
        info = session.sandbox.stat(path, follow=True)
        if info.type == "dir":
            depth = 10_000 if recursive else 1
            entries = session.sandbox.list_files(path, depth=depth, hidden=hidden)
        else:
            entries = [info]
        if as_json:
            found += entries
            continue
        if len(paths) > 1 and info.type == "dir":
            click.echo(f"{printable(path)}:")
        if long:
            rows = [
                [
                    permissions(each),
                    each.owner or str(each.uid),
                    each.group or str(each.gid),
                    size(each.size),
                    each.mtime[:19].replace("T", " "),
                    shown(each) + (f" -> {printable(each.target)}" if each.target is not None else ""),
                ]
                for each in entries
            ]
            if rows:
                click.echo(table([], rows, right=(3,)))
        else:
            for each in entries:
                click.echo(shown(each))
    if as_json:
        print_json(found)


@click.command()
@click.argument("paths", nargs=-1, required=True)
@click.pass_obj
def cat(session: Session, paths: tuple[str, ...]) -> None:
    """Print files of the sandbox as they are, of any size."""
    for path in paths:
        session.sandbox.download(remote(path), sys.stdout.buffer)
    sys.stdout.buffer.flush()


@click.command()
@click.argument("path")
@click.pass_obj
def edit(session: Session, path: str) -> None:
    """
    Edit a file of the sandbox with $VISUAL or $EDITOR.

    It is saved only if it is still the version that was opened. If it is not, your text is kept, and where is printed.
    """
    from sandboxd.client import NotFound, SandboxError

    path = remote(path)
    folder = Path(tempfile.mkdtemp(prefix="sandboxctl-"))
    local = folder / (os.path.basename(path) or "file")
    done = False
    try:
        etag: str | None = None
        try:
            etag = session.sandbox.stat(path, follow=True).etag
            session.sandbox.download(path, local)
        except NotFound:
            local.touch()
        before = local.read_bytes()
        code = subprocess.call([*shlex.split(editor()), os.fspath(local)])
        after = local.read_bytes()
        if code != 0:
            done = after == before
            raise click.ClickException(f"the editor ended with code {code}; nothing was saved")
        if after != before or etag is None:
            session.sandbox.write(path, after, if_match=etag, exclusive=etag is None)
        else:
            fail("nothing was changed")
        done = True
    except SandboxError as error:
        if error.status == 412:
            raise click.ClickException(f"{path} was changed by somebody else meanwhile; nothing was saved") from None
        raise
    finally:
        if done or not local.exists() or local.stat().st_size == 0:
            local.unlink(missing_ok=True)
            folder.rmdir()
        else:
            fail(f"your text is in {local}")
