"""Routes ``GET`` and ``HEAD /files``: a file's bytes, read from disk at the pace at which the client takes them."""

from __future__ import annotations

import mimetypes
import os
import secrets
from functools import cache
from urllib.parse import quote

from twisted.logger import Logger

from sandboxd.api.operations import RawBody
from sandboxd.api.preconditions import CONDITIONS, conditions, failed
from sandboxd.api.routing import ApiError, Reply, Routes
from sandboxd.files.access import Files
from sandboxd.files.download import Download
from sandboxd.files.transfer import close_in_thread
from sandboxd.messages.raw_files import FileQuery
from sandboxd.reactor.threads import ThreadPool
from sandboxd.web.conditions import Conditions, http_date, if_range
from sandboxd.web.ranges import Span, Unsatisfiable, parse_range, part_heads
from sandboxd.web.request import Request
from sandboxd.web.response import ResponseStream

_log = Logger()

#: Bytes from which on the kernel sends a file by itself. Less is sent as quickly with a read and a write.
DIRECT = 256 * 1024

_HEADERS = (*CONDITIONS, "If-Modified-Since")
_ERRORS = (304, 403, 404, 409, 412)


def add_download_routes(routes: Routes, files: Files) -> None:
    """
    Add ``GET`` and ``HEAD /files`` to the API.

    :param files: the files that requests reach.
    """

    async def get(request: Request, query: FileQuery) -> Reply | None:
        """
        Download a file of any size and kind.

        `Range` asks for parts of it, and the conditional headers for nothing if it is, or is not, what the client has.
        """
        return await send_file(request, files, query.path)

    async def head(request: Request, query: FileQuery) -> Reply | None:
        """Return the headers of a `GET` of a file, without its bytes."""
        return await get(request, query)

    routes.get("/files", query=FileQuery, reply=RawBody(), errors=(206, *_ERRORS, 416), headers=(*_HEADERS, "Range"))(
        get
    )
    routes.route("HEAD", "/files", query=FileQuery, reply=RawBody(), errors=_ERRORS, headers=_HEADERS)(head)


async def send_file(request: Request, files: Files, path: str) -> Reply | None:
    """
    Send a file, or 304 or 412 if the request's conditions say so.

    :raise FileError: if it cannot be read.
    :raise ApiError: if its conditions are not met.
    """
    asked = conditions(request)
    pool = await files.threads.find_pool(path)
    file = Download(files.root, path)
    try:
        await pool(file.open)
        return await _send(request, pool, file, asked)
    finally:
        if not file.over:
            close_in_thread(pool, file)


async def _send(request: Request, pool: ThreadPool, file: Download, asked: Conditions) -> Reply | None:
    """Send a file, or 304 or 412 if the request's conditions say so."""
    if file.tag:
        request.setHeader(b"ETag", file.tag.encode("ascii"))
        request.setHeader(b"Last-Modified", http_date(file.modified).encode("ascii"))
    status = asked.status(file.tag, file.modified, safe=True)
    if status == 412:
        raise failed(file.tag)
    if status is not None:
        request.setResponseCode(status)
        return None
    media_type = _media_type(file.name)
    request.setHeader(b"Content-Type", media_type.encode("ascii"))
    request.setHeader(b"X-Content-Type-Options", b"nosniff")
    request.setHeader(b"Content-Disposition", disposition(file.name))
    if file.size is None:
        await _send_spans(request, pool, file, [(b"", Span(0, 1 << 62))], b"")
        return None
    request.setHeader(b"Accept-Ranges", b"bytes" if file.tag else b"none")
    spans = _spans(request, file, file.size)
    parts, tail = [(b"", span) for span in spans or [Span(0, file.size)]], b""
    if spans is not None:
        request.setResponseCode(206)
        if len(spans) == 1:
            request.setHeader(b"Content-Range", spans[0].of(file.size).encode("ascii"))
        else:
            boundary = secrets.token_hex(16)
            request.setHeader(b"Content-Type", f"multipart/byteranges; boundary={boundary}".encode("ascii"))
            heads, tail = part_heads(spans, file.size, media_type, boundary)
            parts = list(zip(heads, spans, strict=True))
    length = sum(len(head) + span.end - span.start for head, span in parts) + len(tail)
    request.setHeader(b"Content-Length", b"%d" % length)
    if request.method != b"HEAD":
        await _send_spans(request, pool, file, parts, tail)
    return None


def _spans(request: Request, file: Download, size: int) -> list[Span] | None:
    """
    Return the byte ranges that a request asks for; None for the whole file.

    :raise ApiError: if there are none.
    """
    wanted = request.text_header(b"Range")
    # RFC 9110 section 14.2 defines it for GET alone.
    if request.method != b"GET" or not file.tag:
        return None
    if not if_range(request.text_header(b"If-Range"), file.tag, file.modified):
        return None
    try:
        return parse_range(wanted, size)
    except Unsatisfiable as error:
        request.setHeader(b"Content-Range", b"bytes */%d" % size)
        raise ApiError(416, f"Range: {wanted!r}: {error} (the file has {size} bytes)") from None


async def _send_spans(
    request: Request, pool: ThreadPool, file: Download, parts: list[tuple[bytes, Span]], tail: bytes
) -> None:
    stream = ResponseStream(request)
    try:
        for head, (position, end) in parts:
            stream.write(head)
            while position < end:
                if end - position >= DIRECT and (sent := await _send_directly(stream, pool, file, position, end)):
                    position += sent
                    continue
                data = file.known(position, end) or await pool(file.read, position, end)
                if not data:
                    break
                await stream.when_ready()
                stream.write(data)
                position += len(data)
            if position < end and file.size is not None:
                _log.warn("{path} became shorter while it was sent", path=file.name)
                request.connection.abort()
                return
        stream.write(tail)
    finally:
        stream.finish()


async def _send_directly(stream: ResponseStream, pool: ThreadPool, file: Download, start: int, end: int) -> int:
    """Have the kernel send part of a file with sendfile(2); return the number of bytes sent, 0 if it cannot."""
    await stream.when_drained()
    socket = stream.socket()
    if socket is None:
        return 0
    sent = await pool(file.send, socket, start, end)
    stream.sent(sent)
    return sent


@cache
def _types() -> mimetypes.MimeTypes:
    """Return the table of media types, without a look at the machine's own, which are not the same everywhere."""
    return mimetypes.MimeTypes()


def _media_type(name: str) -> str:
    media_type, encoding = _types().guess_type(name)
    if encoding is not None:
        return "application/gzip" if encoding == "gzip" else "application/octet-stream"
    return media_type or "application/octet-stream"


def disposition(name: str) -> bytes:
    """Return the ``Content-Disposition`` of a file to save: RFC 6266, with the name in UTF-8 too if it is not ASCII."""
    plain = "".join(c if " " <= c <= "~" and c not in '"\\%' else "_" for c in name)
    value = f'attachment; filename="{plain}"'
    if plain != name:
        value += f"; filename*=UTF-8''{quote(os.fsencode(name).decode('utf-8', 'replace'), safe='')}"
    return value.encode("ascii")
