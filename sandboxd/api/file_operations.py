"""Routes below ``/files/``: stat, list, glob, grep, move, copy, chmod, append, touch, link and edit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from msgspec import UNSET
from twisted.internet.defer import CancelledError

from sandboxd.api.preconditions import conditions, require
from sandboxd.api.routing import LARGE, ApiError, LongFields, Reply, Routes, send_json_parts
from sandboxd.files.access import Files
from sandboxd.files.copying import Copied, copy, move
from sandboxd.files.edit import NoMatch, edit
from sandboxd.files.etag import entity_tag
from sandboxd.files.grep_process import GrepProcess
from sandboxd.files.listing import Page, listing, stat
from sandboxd.files.operations import append, touch
from sandboxd.files.patterns import PatternError
from sandboxd.files.permissions import change
from sandboxd.files.renames import link
from sandboxd.messages.decoding import BadRequest
from sandboxd.messages.file_operations import (
    AppendRequest,
    ChmodRequest,
    EditedFile,
    EditedPlace,
    EditRequest,
    FileInfo,
    FileList,
    FoundList,
    GlobRequest,
    GrepRequest,
    Linked,
    LinkRequest,
    ListQuery,
    Matches,
    PermissionsChanged,
    StatQuery,
    Touched,
    TouchRequest,
    Transferred,
    TransferRequest,
)
from sandboxd.reactor.threads import ThreadPool
from sandboxd.web.ascii_json import dumps
from sandboxd.web.conditions import Conditions, MalformedHeader
from sandboxd.web.request import Request

_ERRORS = (403, 404, 409, 507)


def add_file_operation_routes(routes: Routes, files: Files, searches: ThreadPool) -> None:
    """
    Add the routes below ``/files/`` to the API.

    :param files: the files that requests reach.
    :param searches: threads that wait for the processes of searches.
    """

    async def send(request: Request, threads: Callable[..., Any], work: Callable[[], dict[str, object]]) -> None:
        """Send a reply that may be long: it is made and encoded in a thread."""
        await send_json_parts(request, (await threads(lambda: dumps(work())),))

    @routes.get("/files/stat", query=StatQuery, reply=FileInfo, errors=_ERRORS)
    async def stat_route(request: Request, query: StatQuery) -> Reply:
        """Describe a file, a directory or a link."""
        return Reply(await files.call(stat, query.path, query.follow))

    @routes.get("/files/list", query=ListQuery, reply=FileList, errors=_ERRORS)
    async def list_route(request: Request, query: ListQuery) -> None:
        """
        List a directory, and those below it, with type, size, mode, owner and times of each entry.

        A page ends after `limit` entries, or some seconds; `next` is then where to go on. The order is by name, each
        directory before what is in it.
        """
        await send(
            request,
            await files.threads.find_pool(query.path),
            lambda: _page(query.path, listing(files.root, query.path, query.choice(), query.limit, query.after)),
        )

    @routes.post("/files/glob", GlobRequest, reply=FoundList, errors=_ERRORS)
    async def glob_route(request: Request, body: GlobRequest) -> None:
        """
        Find the paths below a directory that match a pattern, in pages like those of `/files/list`.

        Wildcards do not match names that begin with a dot, unless `hidden` is true. Links are not followed.
        """
        await send(
            request,
            await files.threads.find_pool(body.path),
            lambda: _page(body.path, listing(files.root, body.path, body.choice(), body.limit, body.after, brief=True)),
        )

    @routes.post("/files/grep", GrepRequest, reply=Matches, errors=_ERRORS)
    async def grep_route(request: Request, body: GrepRequest) -> None:
        """
        Search a file, or all files below a directory, for lines that match a pattern.

        Binary files are left out, and names that begin with a dot unless `hidden` is true. It ends after `timeout`
        seconds whatever the pattern, with what it has found until then.
        """
        searching = GrepProcess(files.root, body.path, body.search())

        def work() -> dict[str, object]:
            body.check_patterns()
            try:
                return {"path": body.path, **searching.run()}
            except PatternError as error:
                raise BadRequest(f"pattern: {error}") from None

        try:
            await send(request, searches, work)
        except CancelledError:
            searching.stop()
            raise

    def transfer(name: str, work: Callable[..., Copied | None], text: str) -> None:
        async def route(request: Request, body: TransferRequest) -> Transferred:
            paths = body.from_, body.to
            copied = await files.threads(
                paths, work, files.root, body.from_, body.to, overwrite=body.overwrite, parents=body.parents
            )
            if copied is None:
                return Transferred(body.from_, body.to, copied=False)
            skipped = copied.skipped or UNSET
            return Transferred(body.from_, body.to, True, copied.entries, copied.size, skipped)

        route.__doc__ = text
        routes.post(name, TransferRequest, reply=Transferred, errors=_ERRORS)(route)

    transfer(
        "/files/move",
        move,
        "Give a file or a directory another name, in one step; to another file system it is copied, then removed.",
    )
    transfer(
        "/files/copy",
        copy,
        "Copy a file, a link, or a directory with all that is in it, as `cp -a` does; it gets its name in the end.",
    )

    @routes.post("/files/chmod", ChmodRequest, reply=PermissionsChanged, errors=_ERRORS)
    async def chmod_route(request: Request, body: ChmodRequest) -> PermissionsChanged:
        """Change the mode, the owner or the group of a file, or of a whole directory tree."""

        def work() -> int:
            return change(files.root, body.path, *body.change(), body.recursive)

        return PermissionsChanged(body.path, await files.threads(body.path, work))

    @routes.post(
        "/files/append",
        AppendRequest,
        reply=Touched,
        errors=_ERRORS,
        long=LongFields(files.decode, ("content", "base64")),
    )
    async def append_route(request: Request, body: AppendRequest) -> Touched:
        """Append to a file with one write; create it if it does not exist."""
        info = await files.threads(body.path, lambda: append(files.root, body.path, body.data(), body.parents))
        return Touched(body.path, info.st_size, entity_tag(info))

    @routes.post("/files/touch", TouchRequest, reply=Touched, errors=_ERRORS)
    async def touch_route(request: Request, body: TouchRequest) -> Touched:
        """Set a file's time to now, or to another time; create it if it does not exist."""
        info = await files.call(touch, body.path, body.mtime, body.parents)
        return Touched(body.path, info.st_size, entity_tag(info))

    @routes.post("/files/link", LinkRequest, reply=Linked, status=201, errors=_ERRORS)
    async def link_route(request: Request, body: LinkRequest) -> Linked:
        """Make a symbolic or a hard link."""
        hard = body.kind == "hard"
        paths = (body.path, body.target) if hard else body.path
        await files.threads(
            paths, link, files.root, body.path, body.target, hard=hard, overwrite=body.overwrite, parents=body.parents
        )
        return Linked(body.path, body.target, body.kind)

    @routes.post(
        "/files/edit",
        EditRequest,
        reply=EditedFile,
        errors=(*_ERRORS, 412, 413),
        headers=("If-Match",),
        max_body=LARGE,
    )
    async def edit_route(request: Request, body: EditRequest) -> EditedFile:
        """
        Replace texts in a file by a list of edits, all or none.

        The old text must be there exactly, and only once unless `replace_all`; else nothing is changed, and the 409 has
        `edit`, the number of the edit, `count`, how often its text is there, and `lines`, where.
        """
        check = require(conditions(request) if body.if_match is None else _matching(body.if_match))
        try:
            edited = await files.call(edit, body.path, body.items(), check)
        except NoMatch as error:
            raise ApiError(409, str(error), edit=error.index, count=error.count, lines=error.lines) from None
        info = edited.info
        places = [EditedPlace(count, lines) for count, lines in zip(edited.replaced, edited.lines, strict=True)]
        return EditedFile(body.path, info.st_size, entity_tag(info), places)


def _page(path: str, page: Page) -> dict[str, object]:
    unreadable = {"unreadable": page.unreadable} if page.unreadable else {}
    return {"path": path, "entries": page.entries, "next": page.next, **unreadable}


def _matching(tag: str) -> Conditions:
    """
    Return the condition that a body's ``if_match`` stands for.

    :raise BadRequest: if it is no entity tag.
    """
    try:
        return Conditions({"If-Match": tag}.get)
    except MalformedHeader as error:
        raise BadRequest(f"if_match: {error}") from None
