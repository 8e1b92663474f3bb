"""Routes of ``/console/``: the static files of the web console. They need no token; the API calls of the page do."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from sandboxd.api.operations import RawBody
from sandboxd.api.routing import Routes
from sandboxd.web.request import Request

#: Media types by suffix; files with another suffix are not served.
MEDIA_TYPES: Mapping[str, str] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}

#: Nothing from another origin, no inline code, no frame around the page.
POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def add_console_routes(routes: Routes, directory: Path) -> None:
    """
    Add a route for each file of a directory, and of its ``vendor/``; ``index.html`` is ``/console/`` itself.

    :param directory: read once, now.
    """

    @routes.get("/console", reply=RawBody(), open=True, observes=True, documented=False)
    async def without_slash(request: Request) -> None:
        """Lead to the page, whose URLs are relative, wherever a front end has put it."""
        request.setResponseCode(308)
        request.setHeader(b"Location", b"console/")

    for file in sorted((*directory.iterdir(), *directory.glob("vendor/*"))):
        if file.suffix in MEDIA_TYPES:
            name = "" if file.name == "index.html" else file.relative_to(directory).as_posix()
            _add(routes, f"/console/{name}", MEDIA_TYPES[file.suffix], file.read_bytes())


def _add(routes: Routes, path: str, media_type: str, content: bytes) -> None:
    tag = b'"%s"' % hashlib.sha256(content).hexdigest()[:32].encode("ascii")

    @routes.get(path, reply=RawBody(media_type), open=True, observes=True, documented=path == "/console/")
    async def static(request: Request) -> None:
        """Return a file of the console, a page for people. Needs no token; the page's calls do."""
        for header, value in (
            (b"Content-Type", media_type.encode("ascii")),
            (b"Content-Security-Policy", POLICY),
            (b"X-Content-Type-Options", b"nosniff"),
            (b"Referrer-Policy", b"no-referrer"),
            (b"Cache-Control", b"no-cache"),
        ):
            request.setHeader(header, value)
        if request.setETag(tag) is not None:  # a conditional request whose answer is 304
            return
        request.setHeader(b"Content-Length", b"%d" % len(content))
        request.write(content)
