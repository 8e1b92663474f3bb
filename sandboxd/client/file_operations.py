"""The operations on files, described as :mod:`sandboxd.client.operations` does."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, Literal

from sandboxd.client.errors import NotFound, refusal
from sandboxd.client.flow import Flow, HttpRequest, call, exchange, target
from sandboxd.client.operations import operation, post
from sandboxd.client.replies import (
    Deleted,
    Done,
    EditedFile,
    FileInfo,
    FileList,
    Found,
    FoundList,
    Lines,
    Linked,
    Matches,
    PermissionsChanged,
    Stored,
    Touched,
    Transferred,
    decode,
    fields,
)

FileType = Literal["file", "dir", "link", "fifo", "socket", "char", "block"]


@operation("GET /files")
def read(path: str, *, start: int = 0, size: int | None = None) -> Flow[bytes]:
    """
    Return the bytes of a file, or of a part of it.

    :param start: where to begin.
    :param size: how many bytes at most.
    """
    if size == 0:
        return b""
    headers = {}
    if start or size is not None:
        headers["Range"] = f"bytes={start}-{'' if size is None else start + size - 1}"
    response = yield from exchange(HttpRequest("GET", target("/files", path=path), headers, timeout=60.0))
    return response.body if response.status == 206 or not headers else response.body[start:][:size]


def read_text(path: str) -> Flow[str]:
    """Return the text of a file; what is not UTF-8 becomes U+FFFD."""
    content = yield from read(path)
    return content.decode("utf-8", "replace")


@operation("POST /read_file", Lines)
def read_lines(path: str, offset: int = 1, limit: int | None = None) -> Flow[Lines]:
    """
    Return some lines of a text file, of any size.

    :param offset: the number of the first one, from 1.
    """
    response = yield from exchange(post("/read_file", {"path": path, "offset": offset, "limit": limit}))
    return decode(accepted(response.body), Lines)


def write(
    path: str,
    content: str | bytes,
    *,
    mode: str | None = None,
    owner: str | None = None,
    parents: bool = False,
    if_match: str | None = None,
    exclusive: bool = False,
) -> Flow[Stored]:
    """
    Create a file, or replace one atomically.

    :param mode: permissions in octal, as ``"0644"``.
    :param parents: make the directories above.
    :param if_match: the entity tag that the file must have; else PreconditionFailed.
    :param exclusive: only if there is none; else PreconditionFailed.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    headers = {"Content-Type": "application/octet-stream"}
    if if_match is not None:
        headers["If-Match"] = if_match
    if exclusive:
        headers["If-None-Match"] = "*"
    where = target("/files", path=path, mode=mode, owner=owner, parents=parents)
    # A conditional request that is sent again would meet what it has written itself.
    plain = if_match is None and not exclusive
    return call(HttpRequest("PUT", where, headers, data, timeout=300.0, repeatable=plain), Stored)


@operation("DELETE /files", Deleted)
def delete(path: str, *, if_match: str | None = None) -> Flow[None]:
    """Remove a file, a link or an empty directory."""
    headers = {} if if_match is None else {"If-Match": if_match}
    yield from call(HttpRequest("DELETE", target("/files", path=path), headers, repeatable=False), Deleted)


@operation("POST /delete_dir", Done)
def delete_tree(path: str) -> Flow[None]:
    """Remove a file or a directory tree, as ``rm -rf`` does; it is no error if there is none."""
    response = yield from exchange(post("/delete_dir", {"path": path}, timeout=None))
    decode(accepted(response.body), Done)


@operation("POST /make_dir", Done)
def make_dir(path: str) -> Flow[None]:
    """Make a directory and those above it, as ``mkdir -p`` does."""
    response = yield from exchange(post("/make_dir", {"path": path}))
    decode(accepted(response.body), Done)


@operation("GET /files/stat", FileInfo)
def stat(path: str, *, follow: bool = False) -> Flow[FileInfo]:
    """
    Return the description of a file, a directory or a link.

    :param follow: about what a link leads to, instead of itself.
    """
    return call(HttpRequest("GET", target("/files/stat", path=path, follow=follow)), FileInfo)


def exists(path: str) -> Flow[bool]:
    """Return whether a path exists, also if it is a broken link."""
    try:
        yield from stat(path)
    except NotFound:
        return False
    return True


@operation("GET /files/list", FileList)
def list_page(
    path: str,
    *,
    depth: int = 1,
    glob: str | None = None,
    exclude: Sequence[str] = (),
    type: FileType | None = None,
    hidden: bool = True,
    limit: int | None = None,
    after: str | None = None,
) -> Flow[FileList]:
    """
    Return a page of the list of a directory.

    :param depth: how deep to go; 1 is the directory itself.
    :param after: the ``next`` of the page before.
    """
    where = target(
        "/files/list",
        path=path,
        depth=depth,
        glob=glob,
        exclude=list(exclude),
        type=type,
        hidden="true" if hidden else "false",
        limit=limit,
        after=after or None,
    )
    return call(HttpRequest("GET", where), FileList)


def list_files(
    path: str,
    *,
    depth: int = 1,
    glob: str | None = None,
    exclude: Sequence[str] = (),
    type: FileType | None = None,
    hidden: bool = True,
) -> Flow[list[FileInfo]]:
    """
    Return the entries of a directory, and of those below it, each directory before its own entries.

    :param depth: how deep to go; 1 is the directory itself.
    :param glob: what names match, or with a slash what paths from the directory do.
    :param exclude: patterns of what is left out, with all that is in it.
    """
    found: list[FileInfo] = []
    after: str | None = None
    while True:
        page = yield from list_page(
            path, depth=depth, glob=glob, exclude=exclude, type=type, hidden=hidden, limit=10_000, after=after
        )
        found += page.entries
        if page.next is None:
            return found
        after = page.next


@operation("POST /files/glob", FoundList)
def glob(
    path: str,
    pattern: str,
    *,
    type: FileType | None = None,
    hidden: bool = False,
    exclude: Sequence[str] = (),
) -> Flow[list[Found]]:
    """
    Return the paths below a directory that match a pattern.

    :param pattern: ``*``, ``?``, ``[...]`` within a name, ``**`` for directories, ``{a,b}``.
    """
    found: list[Found] = []
    body: dict[str, Any] = {"path": path, "pattern": pattern, "type": type, "hidden": hidden, "exclude": list(exclude)}
    body["limit"] = 10_000
    while True:
        page = yield from call(post("/files/glob", body), FoundList)
        found += page.entries
        if page.next is None:
            return found
        body["after"] = page.next


@operation("POST /files/grep", Matches)
def grep(
    path: str,
    pattern: str,
    *,
    literal: bool = False,
    ignore_case: bool = False,
    glob: Sequence[str] = (),
    exclude: Sequence[str] = (),
    hidden: bool = False,
    context: int = 0,
    max_matches: int = 1000,
    max_file_size: int | None = None,
    timeout: float = 10.0,
) -> Flow[Matches]:
    """
    Search a file, or all files below a directory, for lines that match a regular expression of Python.

    :param literal: whether the pattern is a text instead.
    :param glob: which files to search.
    :param context: lines to return before and after each match.
    :param timeout: seconds after which it ends with what it has.
    """
    body = {
        "path": path,
        "pattern": pattern,
        "literal": literal,
        "ignore_case": ignore_case,
        "glob": list(glob),
        "exclude": list(exclude),
        "hidden": hidden,
        "context": context,
        "max_matches": max_matches,
        "max_file_size": max_file_size,
        "timeout": timeout,
    }
    return call(post("/files/grep", body, timeout=timeout + 60.0), Matches)


@operation("POST /files/edit", EditedFile)
def edit(
    path: str, *edits: tuple[str, str], replace_all: bool = False, if_match: str | None = None
) -> Flow[EditedFile]:
    """
    Replace texts in a file by a list of edits, all or none.

    :param edits: the old text and the new one. The old must be there exactly once, unless ``replace_all``.
    :param if_match: the entity tag that the file must have; else PreconditionFailed.
    """
    items = [{"old": old, "new": new, "replace_all": replace_all} for old, new in edits]
    body = {"path": path, "edits": items, "if_match": if_match}
    return call(post("/files/edit", body, repeatable=False), EditedFile)


@operation("POST /files/move", Transferred)
def move(source: str, to: str, *, overwrite: bool = False, parents: bool = False) -> Flow[Transferred]:
    """Rename a file or a directory. ``to`` is the new path, not a directory to move it into."""
    body = {"from": source, "to": to, "overwrite": overwrite, "parents": parents}
    return call(post("/files/move", body, timeout=None, repeatable=False), Transferred)


@operation("POST /files/copy", Transferred)
def copy(source: str, to: str, *, overwrite: bool = False, parents: bool = False) -> Flow[Transferred]:
    """Copy a file, a link, or a directory tree, within the sandbox."""
    body = {"from": source, "to": to, "overwrite": overwrite, "parents": parents}
    return call(post("/files/copy", body, timeout=None, repeatable=overwrite), Transferred)


@operation("POST /files/chmod", PermissionsChanged)
def chmod(
    path: str,
    mode: str | None = None,
    *,
    owner: str | None = None,
    group: str | None = None,
    recursive: bool = False,
) -> Flow[int]:
    """Change mode, owner or group; return the number of files that were changed."""
    body = {"path": path, "mode": mode, "owner": owner, "group": group, "recursive": recursive}
    reply = yield from call(post("/files/chmod", body, timeout=None), PermissionsChanged)
    return reply.changed


@operation("POST /files/append", Touched)
def append(path: str, content: str | bytes, *, parents: bool = False) -> Flow[Touched]:
    """Append to a file with one write; create it if it does not exist."""
    body: dict[str, Any] = {"path": path, "parents": parents}
    if isinstance(content, bytes):
        body["base64"] = base64.b64encode(content).decode("ascii")
    else:
        body["content"] = content
    return call(post("/files/append", body, repeatable=False), Touched)


@operation("POST /files/touch", Touched)
def touch(path: str, mtime: str | None = None, *, parents: bool = False) -> Flow[Touched]:
    """
    Set a file's time to now, or to another time; create it if it does not exist.

    :param mtime: RFC 3339.
    """
    return call(post("/files/touch", {"path": path, "mtime": mtime, "parents": parents}), Touched)


@operation("POST /files/link", Linked)
def link(
    path: str,
    target: str,
    *,
    kind: Literal["symbolic", "hard"] = "symbolic",
    overwrite: bool = False,
    parents: bool = False,
) -> Flow[Linked]:
    """Make a symbolic or hard link to ``target``."""
    body = {"path": path, "target": target, "kind": kind, "overwrite": overwrite, "parents": parents}
    return call(post("/files/link", body, repeatable=overwrite), Linked)


def accepted(body: bytes) -> bytes:
    """
    Return the body of a reply, or raise the error in it: file routes of the original API answer errors with 200.

    :raise SandboxError: if it did.
    """
    error = fields(body).get("error")
    if isinstance(error, str):
        raise refusal(error)
    return body
