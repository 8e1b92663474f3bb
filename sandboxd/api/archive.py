"""Routes of ``/archive``: download and upload a directory tree as one tar archive."""

from __future__ import annotations

import os
from urllib.parse import quote_from_bytes

from twisted.logger import Logger

from sandboxd.api.operations import RawBody
from sandboxd.api.routing import ApiError, Reply, Routes
from sandboxd.files.access import Files
from sandboxd.files.archive.compression import CompressionError, compressor, preferred
from sandboxd.files.archive.pack import Packing
from sandboxd.files.archive.tar import TarError
from sandboxd.files.archive.unpack import TooMuch, Unpacking
from sandboxd.files.errors import FileError
from sandboxd.files.transfer import close_in_thread
from sandboxd.messages.archive import ArchiveQuery, Unpacked, UnpackQuery
from sandboxd.reactor.threads import ThreadPool
from sandboxd.web.body import BodyStream
from sandboxd.web.request import Request
from sandboxd.web.response import ResponseStream

_log = Logger()

#: By ``format``: how it is compressed, and its ``Content-Type``.
FORMATS = {
    "tar": ("identity", "application/x-tar"),
    "tar.gz": ("gzip", "application/gzip"),
    "tar.zst": ("zstd", "application/zstd"),
}

#: Accepted values of ``Content-Encoding``. The coding itself is recognised by the first bytes of the body.
CODINGS = (None, "identity", "gzip", "x-gzip", "zstd")


def add_archive_routes(routes: Routes, files: Files) -> None:
    """
    Add ``GET`` and ``PUT /archive`` to the API.

    :param files: the files that requests reach.
    """

    @routes.get(
        "/archive",
        query=ArchiveQuery,
        reply=(RawBody("application/x-tar"), RawBody("application/gzip"), RawBody("application/zstd")),
        errors=(403, 404, 409),
        headers=("Accept-Encoding",),
    )
    async def get(request: Request, query: ArchiveQuery) -> None:
        """
        Download a directory's contents, or a file, as a tar archive that is made while it is sent.

        It is of the pax format, with times to the nanosecond, and compressed with zstd or gzip if `Accept-Encoding`
        has them. Links are kept, sockets, FIFOs and devices are left out. A file that changes its size meanwhile is cut
        or filled with zeros to the size that it had. If something cannot be read, the connection breaks off.
        """
        coding, media_type = FORMATS[query.format or "tar"]
        if query.format is None:
            coding = preferred(request.text_header(b"Accept-Encoding"))
        pool = await files.threads.find_pool(query.path)
        excluded = await pool(query.excluded)
        packing = Packing(files.root, query.path, excluded, compressor(coding), query.unreadable == "skip")
        try:
            await pool(packing.open)
            piece = await pool(packing.read)
            if query.format is None:
                request.setHeader(b"Vary", b"Accept-Encoding")
                if coding != "identity":
                    request.setHeader(b"Content-Encoding", coding.encode("ascii"))
            request.setHeader(b"Content-Type", media_type.encode("ascii"))
            request.setHeader(b"Content-Disposition", _disposition(query))
            if request.method != b"HEAD":
                await _send(request, pool, packing, piece)
        finally:
            close_in_thread(pool, packing)

    @routes.route(
        "PUT",
        "/archive",
        RawBody("application/x-tar"),
        query=UnpackQuery,
        reply=Unpacked,
        errors=(400, 403, 404, 409, 413, 415, 507),
        headers=("Content-Encoding",),
    )
    async def put(request: Request, body: BodyStream, query: UnpackQuery) -> Reply:
        """
        Unpack a tar archive into a directory as it arrives.

        It may be compressed with gzip or zstd. Nothing is written outside of the directory: names that are absolute or
        have `..` are refused, and no link is followed. Links are made as they are; devices and FIFOs are skipped. Files
        that are there are replaced, each in one step. Permissions are the archive's, less set-user-id, set-group-id and
        sticky bits; the umask does not count. All belongs to the daemon's user, unless `owner` says otherwise. If it
        breaks off, what was unpacked stays, and the error says how much that is.
        """
        if (request.text_header(b"Content-Encoding") or "").lower() not in ("", *filter(None, CODINGS)):
            raise ApiError(415, "Content-Encoding: send gzip or zstd, or neither")
        keep_owner = query.owner == "keep"
        if keep_owner and os.geteuid() != 0:
            raise ApiError(403, "owner: only root can keep the owners, and the daemon is not root")
        unpacking = Unpacking(
            files.root,
            query.path,
            parents=query.parents,
            keep_owner=keep_owner,
            max_size=query.max_size,
            max_entries=query.max_entries,
        )
        pool = await files.threads.find_pool(query.path)
        try:
            await pool(unpacking.open)
            while data := await body.read():
                while await pool(unpacking.feed, data):
                    data = b""
            await pool(unpacking.finish)
        except (TarError, CompressionError) as error:
            raise ApiError(400, str(error), **unpacking.report()) from None
        except TooMuch as error:
            raise ApiError(413, str(error), **unpacking.report()) from None
        except FileError as error:
            raise ApiError(error.status, str(error), **unpacking.report()) from None
        finally:
            close_in_thread(pool, unpacking)
        return Reply({"path": query.path, **unpacking.report()})


async def _send(request: Request, pool: ThreadPool, packing: Packing, piece: bytes | None) -> None:
    """Send an archive piece by piece; the next piece is made while the last one is sent."""
    stream = ResponseStream(request)
    try:
        while piece is not None:
            await stream.when_ready()
            if piece:
                stream.write(piece)
            piece = await pool(packing.read)
    except FileError as error:
        _log.warn("an archive breaks off: {error}", error=str(error))
        request.connection.abort()
    finally:
        stream.finish()


def _disposition(query: ArchiveQuery) -> bytes:
    """Return the ``Content-Disposition`` of an archive, with a file name to save it by (RFC 6266, RFC 8187)."""
    name = os.path.basename(query.path.rstrip("/")) or "root"
    name = f"{name}.{query.format or 'tar'}"
    return b"attachment; filename*=UTF-8''" + quote_from_bytes(os.fsencode(name), safe="").encode("ascii")
