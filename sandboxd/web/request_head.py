"""
The head of a request, parsed and checked for what a server must not accept (RFC 9112 sections 2 to 6).

llhttp, Node's parser, reads the fields. It would accept some requests that a proxy in front of the daemon may read
otherwise; the request line, ``Host``, ``Transfer-Encoding`` and ``Connection`` are therefore checked here.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser

#: Fields that a head may have.
MAX_FIELDS = 500

#: Between a head and what follows it.
END = b"\r\n\r\n"

Fields = list[tuple[bytes, bytes]]

#: RFC 9112 section 3, and one empty line before it (section 2.2). A target has no fragment, and is ASCII.
_REQUEST_LINE = re.compile(rb"(?:\r\n)?([!#$%&'*+.^_`|~0-9A-Za-z-]+) ([\x21\x22\x24-\x7e]+) (HTTP/1\.[01])\r\n")

#: The beginning of a malformed head: one without a token, or with a line that ends in LF alone.
_MALFORMED = re.compile(rb"\A[^!#$%&'*+.^_`|~0-9A-Za-z\r-]|(?<!\r)\n")

#: RFC 9112 section 3.2 and RFC 3986 section 3.2.2, by the characters alone.
_HOST = re.compile(rb"[A-Za-z0-9._~!$&'()*+,;=%:\[\]-]*")

#: Scheme and authority of a target in absolute form, RFC 9112 section 3.2.2.
_ABSOLUTE_FORM = re.compile(rb"https?://([^/?#]*)", re.IGNORECASE)

#: Fields of which there may be one only.
_SINGLE = (b"host", b"content-length", b"transfer-encoding")

#: Blanks at the end of a value, which llhttp keeps, or takes for a part of ``chunked``.
_BLANKS = re.compile(rb"(?<=[^ \t\r\n])[ \t]+\r\n")

_START = b"POST / HTTP/1.1\r\n"


class MalformedRequest(Exception):
    """A request is not HTTP/1.0 or HTTP/1.1, or is ambiguous."""


class Head(NamedTuple):
    """
    The head of a request.

    :ivar data: the bytes of the head, as they were sent.
    :ivar target: in origin form if the client sent it in absolute form.
    :ivar version: ``HTTP/1.0`` or ``HTTP/1.1``.
    :ivar fields: names in lower case and values without blanks around them, in the order in which they were sent.
    :ivar last: the last value of each field.
    :ivar length: bytes of the body, or None if it is chunked.
    :ivar persistent: whether the client may send another request on the connection.
    :ivar expects_continue: whether it waits for a ``100 Continue``.
    """

    data: bytes
    method: bytes
    target: bytes
    version: bytes
    fields: Fields
    last: dict[bytes, bytes]
    length: int | None
    persistent: bool
    expects_continue: bool


class _Collector:
    """A receiver of header fields from the parser."""

    def __init__(self) -> None:
        self.fields: Fields = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.fields.append((name.lower(), value))


def parse_fields(section: bytes) -> Fields:
    """
    Parse a section of header fields.

    :param section: from behind the line before it to the empty line, both ends included.
    :raise MalformedRequest: if it is malformed.
    """
    if b" \r\n" in section or b"\t\r\n" in section:
        section = _BLANKS.sub(b"\r\n", section)
    collector = _Collector()
    try:
        HttpRequestParser(collector).feed_data(_START + section)
    except HttpParserUpgrade:
        pass  # raised behind the head of each request that asks for an upgrade
    except HttpParserError as error:
        raise MalformedRequest from error
    return collector.fields


def parse_head(data: bytes) -> Head:
    """
    Parse the head of a request.

    :param data: all of it, up to and with :data:`END`.
    :raise MalformedRequest: if it is not to be accepted.
    """
    line = _REQUEST_LINE.match(data)
    if line is None:
        raise MalformedRequest
    method, target, version = line.groups()
    fields = parse_fields(data[line.end() :])
    last = dict(fields)
    if len(last) != len(fields):
        names = [name for name, _ in fields]
        if len(fields) > MAX_FIELDS or any(names.count(name) > 1 for name in _SINGLE):
            raise MalformedRequest
    coding = last.get(b"transfer-encoding")
    if coding is not None and (coding.lower() != b"chunked" or version == b"HTTP/1.0"):
        raise MalformedRequest
    host = last.get(b"host", b"" if version == b"HTTP/1.0" else None)
    if host is None or not _HOST.fullmatch(host):
        raise MalformedRequest
    if target[0] != 0x2F and (authority := _ABSOLUTE_FORM.match(target)):  # which then counts, not Host
        target = origin_form(target)
        last[b"host"] = authority[1]
        fields = [(name, authority[1] if name == b"host" else value) for name, value in fields]
    length = int(last.get(b"content-length", b"0")) if coding is None else None
    persistent, expects_continue = version == b"HTTP/1.1", False
    if persistent:
        persistent = b"connection" not in last or not _has_token(fields, b"connection", b"close")
        expects_continue = length != 0 and last.get(b"expect", b"").lower() == b"100-continue"
    return Head(data, method, target, version, fields, last, length, persistent, expects_continue)


def origin_form(target: bytes) -> bytes:
    """Return a request's target without scheme and authority, which RFC 9112 section 3.2.2 has servers accept."""
    authority = _ABSOLUTE_FORM.match(target)
    if authority is None:
        return target
    rest = target[authority.end() :]
    return rest if rest.startswith(b"/") else b"/" + rest


def is_malformed(beginning: bytes) -> bool:
    """Return whether the beginning of a head is malformed, so that the rest need not be waited for."""
    return _MALFORMED.search(beginning) is not None


def _has_token(fields: Fields, field: bytes, token: bytes) -> bool:
    """Return whether one of a field's lists contains a token."""
    lists = (value.lower().split(b",") for name, value in fields if name == field)
    return any(each.strip(b" \t") == token for values in lists for each in values)
