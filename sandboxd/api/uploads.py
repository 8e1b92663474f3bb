"""Routes ``PUT``, ``POST`` and ``DELETE /files``: files are written as they arrive, and replaced atomically."""

from __future__ import annotations

import os

from sandboxd.api.operations import RawBody
from sandboxd.api.preconditions import CONDITIONS, conditions, require
from sandboxd.api.routing import ApiError, Reply, Routes
from sandboxd.files.access import Files
from sandboxd.files.digests import Digests
from sandboxd.files.errors import FileError
from sandboxd.files.etag import entity_tag
from sandboxd.files.filesystem_threads import FilesystemThreads
from sandboxd.files.form import Form, FormError, boundary
from sandboxd.files.operations import delete
from sandboxd.files.permissions import Owner, owner
from sandboxd.files.transfer import close_in_thread
from sandboxd.files.upload import Corrupt, Patch, Replacement, Upload, UploadResult
from sandboxd.messages.decoding import BadRequest
from sandboxd.messages.raw_files import Deleted, FileQuery, FormQuery, Stored, StoredFiles, UploadQuery
from sandboxd.reactor.threads import ThreadPool
from sandboxd.web.body import BodyStream
from sandboxd.web.ranges import parse_content_range
from sandboxd.web.request import Request

_ERRORS = (400, 403, 404, 409, 412, 413, 415, 507)

#: Bytes that are read from a connection at a time. Where so many come at once, more will.
READ_SIZE = 64 * 1024


def add_upload_routes(routes: Routes, files: Files) -> None:
    """
    Add ``PUT``, ``POST`` and ``DELETE /files`` to the API.

    :param files: the files that requests reach.
    """

    @routes.route(
        "PUT",
        "/files",
        RawBody(),
        query=UploadQuery,
        reply=Stored,
        status=201,
        errors=(200, *_ERRORS),
        headers=(*CONDITIONS, "Content-Digest", "Want-Content-Digest", "Content-Range"),
    )
    async def put(request: Request, body: BodyStream, query: UploadQuery) -> Reply:
        """
        Create a file from the body, or replace one (200), atomically once the whole body has arrived.

        A reader sees the old file or the new one, and an upload that breaks off leaves the old one. With `offset`, or
        a `Content-Range`, the body is written into its place in the file instead, which can be done in parallel.
        """
        if request.text_header(b"Content-Encoding") not in (None, "identity"):
            raise ApiError(415, "Content-Encoding: the body is stored as it comes; leave it out")
        check = require(conditions(request))
        try:
            digests = Digests(request.text_header(b"Content-Digest"), request.text_header(b"Want-Content-Digest"))
        except ValueError as error:
            raise BadRequest(str(error)) from None
        offset, length = _part(request, body, query)
        mode, whose = query.permissions, await _owner(files.threads, query.owner)
        upload: Upload
        if offset is None:
            upload = Replacement(files.root, query.path, check, mode, whose, digests, parents=query.parents)
        else:
            upload = Patch(files.root, query.path, check, mode, whose, digests, offset=offset, size=query.size)
        written = await _receive(await files.threads.find_pool(query.path), upload, body, length)
        stored = _stored(query.path, written)
        request.setHeader(b"ETag", stored.etag.encode("ascii"))
        if (digest := digests.header()) is not None:
            request.setHeader(b"Content-Digest", digest.encode("ascii"))
        return Reply(stored, 201 if written.created else 200)

    @routes.route(
        "POST",
        "/files",
        RawBody("multipart/form-data"),
        query=FormQuery,
        reply=StoredFiles,
        status=201,
        errors=_ERRORS,
    )
    async def post(request: Request, body: BodyStream, query: FormQuery) -> StoredFiles:
        """
        Write the files of a form into a directory, each atomically once it has arrived.

        If one cannot be written, those before it are: the error lists them.
        """
        whose = await _owner(files.threads, query.owner)
        pool = await files.threads.find_pool(query.path)

        def upload(name: str) -> Upload:
            path = os.path.join(query.path, name)
            return Replacement(files.root, path, lambda old: None, query.permissions, whose, parents=query.parents)

        try:
            form = Form(boundary(request.text_header(b"Content-Type")), upload)
        except FormError as error:
            raise BadRequest(str(error)) from None
        try:
            await receive_form(pool, form, body)
        except FormError as error:
            raise ApiError(400, str(error), files=_files(query.path, form)) from None
        except FileError as error:
            raise ApiError(error.status, str(error), files=_files(query.path, form)) from None
        return StoredFiles(_files(query.path, form))

    @routes.route(
        "DELETE", "/files", query=FileQuery, reply=Deleted, errors=(400, 403, 404, 409, 412), headers=CONDITIONS
    )
    async def delete_file(request: Request, query: FileQuery) -> Deleted:
        """Remove a file, a link, or an empty directory."""
        await files.call(delete, query.path, require(conditions(request)))
        return Deleted(query.path)


async def receive_form(pool: ThreadPool, form: Form, body: BodyStream) -> None:
    """
    Write the files of a form as it arrives.

    :raise FormError: if it is malformed.
    :raise FileError: if a file cannot be written; those before it are.
    """
    try:
        while data := await body.read():
            await pool(form.feed, data)
        form.end()
    finally:
        if not form.over:
            close_in_thread(pool, form)


async def _receive(pool: ThreadPool, upload: Upload, body: BodyStream, length: int | None) -> UploadResult:
    """
    Write a body to an upload as it arrives, and commit it.

    :param length: bytes that must come, where the body itself does not say it.
    :raise ApiError: if it is not what its digest says, or has another length.
    """
    left = length
    try:
        await pool(upload.open, body.length)
        while data := await body.read():
            if left is not None and (left := left - len(data)) < 0:
                raise BadRequest(f"Content-Range: says {length} bytes, but the body has more")
            if upload.direct and len(data) >= READ_SIZE:
                data = await _receive_directly(pool, upload, body, data)
            if data:
                await pool(upload.write, data)
        if left:
            raise BadRequest(f"Content-Range: says {length} bytes, but the body has {left} less")
        return await pool(upload.commit)
    except Corrupt as error:
        raise ApiError(400, str(error)) from None
    finally:
        if not upload.over:
            close_in_thread(pool, upload)


async def _receive_directly(pool: ThreadPool, upload: Upload, body: BodyStream, data: bytes) -> bytes:
    """
    Let the kernel write what arrives behind ``data``, which is never in our memory, as long as much comes.

    :return: ``data`` if that was not written.
    """
    count = READ_SIZE
    while count >= READ_SIZE and (lent := body.socket()) is not None:
        count = 0
        try:
            count = await pool(upload.receive, *lent, data)
        finally:
            body.received(count)
        data = b""
    return data


async def _owner(threads: FilesystemThreads, text: str | None) -> Owner | None:
    """
    Return the owner that a query asks for, or None.

    :raise BadRequest: if there is no such user or group.
    """
    try:
        return None if text is None else await threads("/", owner, text)
    except ValueError as error:
        raise BadRequest(str(error)) from None


def _part(request: Request, body: BodyStream, query: UploadQuery) -> tuple[int | None, int | None]:
    """
    Return the offset in the file at which a partial body belongs, None if the body is the whole file; and how many
    bytes must come, None if any number may, or as many as the body says itself.

    :raise BadRequest: if ``Content-Range`` is malformed, or says another thing.
    """
    text = request.text_header(b"Content-Range")
    if text is None:
        return query.offset, None
    part = parse_content_range(text)
    if part is None:
        raise BadRequest(f"Content-Range: {text!r} is not as in bytes 0-99/1000")
    if query.offset not in (None, part.start):
        raise BadRequest(f"offset: is {query.offset}, but Content-Range says {part.start}")
    if body.length not in (None, part.end - part.start):
        raise BadRequest(f"Content-Range: says {part.end - part.start} bytes, but the body has {body.length}")
    return part.start, part.end - part.start if body.length is None else None


def _stored(path: str, written: UploadResult) -> Stored:
    return Stored(path, written.info.st_size, entity_tag(written.info), written.created)


def _files(directory: str, form: Form) -> list[Stored]:
    return [_stored(os.path.join(directory, name), written) for name, written in form.written]
