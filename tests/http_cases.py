"""
The table of HTTP/1.1 messages, each with the answer that the server owes it (RFC 9112, and known smuggling tricks).

Section numbers are those of RFC 9112. A verdict is the status codes of the answers, in order, and what becomes of the
connection: ``open`` if the next request on it is answered, ``closed`` if it is not read.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.daemon import SECRET

AUTH = f"Authorization: Bearer {SECRET}".encode()

#: A body that ``/read_file`` answers with 200 and an error that names the path.
BODY = b'{"path": "/no/such"}'
READ = b"POST /read_file HTTP/1.1"
GET = b"GET /health HTTP/1.1"


class Case(NamedTuple):
    """
    A message, and what it is answered with.

    :ivar name: unique; begins with the section.
    :ivar data: what the client sends; :data:`SENTINEL` follows at once.
    :ivar twisted: the verdict of ``twisted.web`` 26.10, which the daemon was built on before, where it is another.
    """

    name: str
    data: bytes
    verdict: str
    twisted: str | None = None


#: The request that follows each message: it is answered if, and only if, the server knows where the message ends.
SENTINEL_ID = b"sentinel"
SENTINEL = b"GET /health HTTP/1.1\r\nHost: sentinel\r\nX-Request-Id: " + SENTINEL_ID + b"\r\n\r\n"


def head(line: bytes, *fields: bytes, host: bytes | None = b"Host: test") -> bytes:
    """A request's head: the line, ``Host`` unless that is None, the fields."""
    return b"\r\n".join((line, *([] if host is None else [host]), *fields, b"", b""))


def counted(*fields: bytes, body: bytes = BODY) -> bytes:
    """A request with ``body`` and the fields given, which say how long it is."""
    return head(READ, AUTH, *fields) + body


def chunked(body: bytes, *fields: bytes) -> bytes:
    """A request with a body in the chunked coding, as given."""
    return head(READ, AUTH, b"Transfer-Encoding: chunked", *fields) + body


def field(line: bytes) -> bytes:
    """A request with one field more."""
    return head(GET, line)


SIZE = b"%x" % len(BODY)
LENGTH = b"Content-Length: %d" % len(BODY)
CHUNK = SIZE + b"\r\n" + BODY + b"\r\n"
END = b"0\r\n\r\n"

START_LINE = (
    Case("3 a plain request", head(GET), "200 open"),
    Case("2.2 one empty line before it", b"\r\n" + head(GET), "200 open"),
    Case("2.2 two empty lines before it", b"\r\n\r\n" + head(GET), "400 closed"),
    Case("2.2 a lone LF before it", b"\n" + head(GET), "400 closed"),
    Case("2.2 lines that end in LF", head(GET).replace(b"\r\n", b"\n"), "400 closed"),
    Case("2.2 a lone LF behind the request line", b"GET /health HTTP/1.1\nHost: test\r\n\r\n", "400 closed"),
    Case("2.2 a lone CR behind the request line", b"GET /health HTTP/1.1\rHost: test\r\n\r\n", "400 closed"),
    Case("2.2 a space before the first field", b"GET /health HTTP/1.1\r\n Host: test\r\n\r\n", "400 closed"),
    Case("3 two spaces before the target", head(b"GET  /health HTTP/1.1"), "400 closed"),
    Case("3 two spaces before the version", head(b"GET /health  HTTP/1.1"), "400 closed"),
    Case("3 tabs for spaces", head(b"GET\t/health\tHTTP/1.1"), "400 closed"),
    Case("3 a space at the end", head(b"GET /health HTTP/1.1 "), "400 closed"),
    Case("3 a space at the beginning", head(b" GET /health HTTP/1.1"), "400 closed"),
    Case("3 four words", head(b"GET /health HTTP/1.1 x"), "400 closed"),
    Case("3 no method", head(b"/health HTTP/1.1"), "400 closed"),
    Case("3 no target", head(b"GET HTTP/1.1"), "400 closed"),
    Case("3 no version, as in HTTP/0.9", b"GET /health\r\n\r\n", "400 closed"),
    Case("3.1 a method that is no token", head(b"GE(T /health HTTP/1.1"), "400 closed"),
    Case("3.1 a NUL in the method", head(b"GET\0 /health HTTP/1.1"), "400 closed"),
    Case("3.1 a method in lower case", head(b"get /health HTTP/1.1"), "200 open"),
    Case("3.1 a method that there is not", head(b"BREW /health HTTP/1.1"), "405 open"),
    Case("3.1 a method of WebDAV", head(b"PROPFIND /health HTTP/1.1"), "405 open"),
    Case("3.2 a NUL in the target", head(b"GET /heal\0th HTTP/1.1"), "400 closed"),
    Case("3.2 DEL in the target", head(b"GET /health?\x7f HTTP/1.1"), "400 closed", "200 open"),
    Case("3.2 UTF-8 in the target", head("GET /health?ä HTTP/1.1".encode()), "400 closed"),
    Case("3.2 an octet over 127 in the target", head(b"GET /health?\xa0 HTTP/1.1"), "400 closed", "200 open"),
    Case("3.2 a fragment in the target", head(b"GET /health?x#y HTTP/1.1"), "400 closed", "200 open"),
    Case("3.2 a fragment as another path", head(b"GET /health#/../run HTTP/1.1"), "400 closed", "401 open"),
    Case("3.2 a target without a slash", head(b"GET health HTTP/1.1"), "401 open"),
    Case("3.2.2 an absolute target", head(b"GET http://test/health HTTP/1.1"), "200 open"),
    Case("3.2.2 an absolute target, its scheme in capitals", head(b"GET HTTP://test/health HTTP/1.1"), "200 open"),
    Case("3.2.2 an absolute target of another host", head(b"GET http://other/health?x HTTP/1.1"), "200 open"),
    Case("3.2.2 an absolute target of another scheme", head(b"GET ftp://test/health HTTP/1.1"), "401 open"),
    Case("3.2.2 an absolute target without a path", head(b"GET http://test HTTP/1.1"), "401 open"),
    Case("3.2.3 CONNECT", head(b"CONNECT test:80 HTTP/1.1"), "401 open"),
    Case("3.2.3 CONNECT to a route", head(b"CONNECT /health HTTP/1.1"), "405 open"),
    Case("3.2.4 the asterisk", head(b"OPTIONS * HTTP/1.1"), "401 open"),
    Case("3 a target that is too long", head(b"GET /health?" + b"x" * 20_000 + b" HTTP/1.1"), "400 closed"),
    Case("2.3 HTTP/1.0", head(b"GET /health HTTP/1.0"), "200 closed"),
    Case("2.3 HTTP/1.0 without Host", head(b"GET /health HTTP/1.0", host=None), "200 closed"),
    Case("9.3 HTTP/1.0 that would go on", head(b"GET /health HTTP/1.0", b"Connection: keep-alive"), "200 closed"),
    *(
        Case(f"2.3 {version!a}", head(b"GET /health " + version.encode()), "400 closed")
        for version in (
            "HTTP/0.9", "HTTP/1.2", "HTTP/1.10", "HTTP/1.01", "HTTP/01.1", "HTTP/2.0", "HTTP/2", "HTTP/1", "HTTP/1,1",
            "HTTP/ 1.1", "http/1.1", "HTTP/1.1\v", "HTTP/1.1\0", "HTTPS/1.1", "ICE/1.0",
        )
    ),
    Case("2.3 the preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400 closed"),
    Case("2.3 a TLS handshake", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "400 closed"),
)  # fmt: skip

FIELDS = (
    Case("3.2 no Host", head(GET, host=None), "400 closed", "200 open"),
    Case("3.2 two of Host", field(b"Host: other"), "400 closed", "200 open"),
    Case("3.2 the same Host twice", field(b"Host: test"), "400 closed", "200 open"),
    Case("3.2 Host with a space", head(GET, host=b"Host: a b"), "400 closed", "200 open"),
    Case("3.2 Host with a slash", head(GET, host=b"Host: a/b"), "400 closed", "200 open"),
    Case("3.2 Host with a user", head(GET, host=b"Host: a@b"), "400 closed", "200 open"),
    Case("3.2 Host that is empty", head(GET, host=b"Host:"), "200 open"),
    Case("3.2 Host with a port", head(GET, host=b"Host: [::1]:3030"), "200 open"),
    Case("5 no colon", field(b"no colon"), "400 closed"),
    Case("5 no name", field(b": x"), "400 closed"),
    Case("5 a name that is no token", field(b"a(b: x"), "400 closed"),
    Case("5 a name with NUL", field(b"a\0: x"), "400 closed"),
    Case("5 a name with an octet over 127", field(b"a\xe4: x"), "400 closed"),
    Case("5 a name with every sign of a token", field(b"!#$%&'*+-.^_`|~09aZ: x"), "200 open"),
    Case("5.1 a space before the colon", field(b"X : y"), "400 closed"),
    Case("5.1 a tab before the colon", field(b"X\t: y"), "400 closed"),
    Case("5 an empty value", field(b"X:"), "200 open"),
    Case("5 only blanks for a value", field(b"X: \t "), "200 open"),
    Case("5.5 a value with octets over 127", field(b"X: \xe4\xff"), "200 open"),
    Case("5.5 a value with NUL", field(b"X: a\0b"), "400 closed"),
    Case("5.5 a value with another control", field(b"X: a\x01b"), "400 closed", "200 open"),
    Case("5.5 a value with DEL", field(b"X: a\x7fb"), "400 closed", "200 open"),
    Case("2.2 a value with a lone CR", field(b"X: a\rb"), "400 closed"),
    Case("2.2 a value with CR CR LF", field(b"X: a\r"), "400 closed"),
    Case("2.2 a value with a lone LF", field(b"X: a\nY: b"), "400 closed"),
    Case("2.2 a head that ends in LF LF", b"GET /health HTTP/1.1\r\nHost: test\n\n", "400 closed"),
    Case("5.2 a folded value", field(b"X: a\r\n b"), "400 closed", "200 open"),
    Case("5.2 a folded value, by a tab", field(b"X: a\r\n\tb"), "400 closed", "200 open"),
    Case("5.2 an empty fold", field(b"X: a\r\n \r\nY: b"), "400 closed", "200 open"),
    Case("5 too many fields", head(GET, *[b"a: b"] * 600), "400 closed"),
    Case("5 many fields", head(GET, *[b"a: b"] * 400), "200 open"),
    Case("5 a value that is too long", field(b"X: " + b"x" * 20_000), "400 closed"),
    Case("5 a name that is too long", field(b"x" * 20_000 + b": x"), "400 closed"),
)

LENGTHS = (
    Case("6.3 a length", counted(LENGTH), "200 open"),
    Case("6.3 no length is no body", head(READ, AUTH), "400 open"),
    Case("6.3 a body of a GET", head(b"GET /port_status HTTP/1.1", AUTH, b"Content-Length: 3") + b"abc", "200 open"),
    Case("6.3 a body of a GET that takes none", head(GET, b"Content-Length: 3") + b"abc", "413 closed"),
    Case("6.2 a length of 0", head(GET, b"Content-Length: 0"), "200 open"),
    Case("6.2 a length with zeros before it", counted(b"Content-Length: 00%d" % len(BODY)), "200 open"),
    Case("6.2 a length with blanks around it", counted(b"Content-Length: \t%d \t" % len(BODY)), "200 open"),
    Case("6.2 a length and more", counted(LENGTH, body=BODY + b"GARBAGE\r\n\r\n"), "200 400 closed"),
    *(
        Case(f"6.2 the length {value!a}", counted(b"Content-Length: " + value.encode("latin-1")), "400 closed")
        for value in (
            "", "-1", "+20", "0x14", "20.0", "2e1", "20;", "2 0", "20, 20", "20,20", "20, 21", ",20", "20\v", "twenty",
            "\xb2\xb0", "2_0", "'20'",
        )
    ),
    Case("6.3 two lengths", counted(LENGTH, b"Content-Length: 5"), "400 closed"),
    Case("6.3 the same length twice", counted(LENGTH, LENGTH), "400 closed"),
    Case("6.3 two lengths, the first with a space", counted(b"Content-Length : 5", LENGTH), "400 closed"),
    Case("6.2 a length over the limit", counted(b"Content-Length: 999999999999999"), "413 closed"),
    Case("6.2 a length over 64 bits", counted(b"Content-Length: 99999999999999999999"), "400 closed", "413 closed"),
    Case("6.3 a length and chunked", chunked(CHUNK + END, LENGTH), "400 closed"),
    Case("6.3 chunked and a length", counted(LENGTH, b"Transfer-Encoding: chunked", body=CHUNK + END), "400 closed"),
    Case("6.3 a length of 0 and chunked", chunked(CHUNK + END, b"Content-Length: 0"), "400 closed"),
    Case("6.3 a folded coding and a length", counted(b"Transfer-Encoding:\r\n chunked", LENGTH), "400 closed"),
    *(
        Case(f"6.1 the coding {value!a}", counted(b"Transfer-Encoding: " + value.encode(), body=CHUNK + END),
             "400 closed")
        for value in (
            "", "gzip, chunked", "chunked, gzip", "chunked, chunked", "chunked, identity", "chunked,", ",chunked",
            "xchunked", "chunkedx", "chunked;q=1", "\vchunked", "chunked\0", "'chunked'", "chunke", "c hunked", "gzip",
        )
    ),
    Case("6.1 identity", counted(b"Transfer-Encoding: identity"), "400 closed", "400 400 closed"),
    Case("6.1 identity and a length", counted(b"Transfer-Encoding: identity", LENGTH), "400 closed", "200 open"),
    Case("6.1 chunked in capitals", head(READ, AUTH, b"Transfer-Encoding: CHUNKED") + CHUNK + END, "200 open"),
    Case("6.1 chunked with blanks", head(READ, AUTH, b"Transfer-Encoding: \tchunked \t") + CHUNK + END, "200 open"),
    Case("6.1 chunked twice", chunked(CHUNK + END, b"Transfer-Encoding: chunked"), "400 closed"),
    Case("6.1 chunked and identity", chunked(CHUNK + END, b"Transfer-Encoding: identity"), "400 closed", "200 open"),
    Case("6.1 chunked with a space", counted(b"Transfer-Encoding : chunked", LENGTH), "400 closed"),
    Case("6.1 a name that looks like it", counted(b"Transfer_Encoding: chunked", LENGTH), "200 open"),
    Case("6.1 chunked in HTTP/1.0",
         head(b"POST /read_file HTTP/1.0", AUTH, b"Transfer-Encoding: chunked") + CHUNK + END,
         "400 closed", "200 closed"),
)  # fmt: skip


def chunk(size: bytes, data: bytes = BODY, end: bytes = b"\r\n") -> bytes:
    """A chunked body of one chunk, whose size line and end are as given."""
    return size + data + end + END


CHUNKS = (
    Case("7.1 one chunk", chunked(CHUNK + END), "200 open"),
    Case("7.1 two chunks", chunked(b"5\r\n" + BODY[:5] + b"\r\nf\r\n" + BODY[5:] + b"\r\n" + END), "200 open"),
    Case("7.1 a size in capitals", chunked(b"5\r\n" + BODY[:5] + b"\r\nF\r\n" + BODY[5:] + b"\r\n" + END), "200 open"),
    Case("7.1 a size with zeros before it", chunked(chunk(b"000014\r\n")), "200 open"),
    Case("7.1 a last chunk of many zeros", chunked(CHUNK + b"0000\r\n\r\n"), "200 open"),
    Case("7.1 only a last chunk", chunked(END), "400 open"),
    Case("7.1.1 an extension", chunked(chunk(b'14;name="a, b"\r\n')), "200 open"),
    Case("7.1.1 an extension of the last chunk", chunked(CHUNK + b"0;x\r\n\r\n"), "200 open"),
    Case("7.1.1 an extension with a lone LF", chunked(chunk(b"14;x\ny\r\n")), "400 closed"),
    Case("7.1.1 an extension with a lone CR", chunked(chunk(b"14;x\ry\r\n")), "400 closed"),
    Case("7.1.1 an extension with NUL", chunked(chunk(b"14;\0\r\n")), "400 closed"),
    Case("7.1.1 an extension that is too long", chunked(chunk(b"14;" + b"x" * 20_000 + b"\r\n")), "400 closed"),
    *(
        Case(f"7.1 the size {size!a}", chunked(chunk(size.encode() + b"\r\n")), "400 closed")
        for size in (
            "", " 14", "14 ", "14 ;x", "\t14", "0x14", "+14", "-14", "1_4", "14h", "1 4", "14,14", "g", "14\v", "14\0",
        )
    ),
    Case("7.1 a size that ends in LF", chunked(chunk(b"14\n")), "400 closed"),
    Case("7.1 a size that ends in CR", chunked(chunk(b"14\r")), "400 closed"),
    Case("7.1 a size that ends in CR X", chunked(chunk(b"14\rX")), "400 closed"),
    Case("7.1 data that ends in LF", chunked(chunk(b"14\r\n", end=b"\n")), "400 closed"),
    Case("7.1 data that ends in CR", chunked(chunk(b"14\r\n", end=b"\r")), "400 closed"),
    Case("7.1 data that ends in nothing", chunked(chunk(b"14\r\n", end=b"")), "400 closed"),
    Case("7.1 data that is longer", chunked(chunk(b"13\r\n")), "400 closed"),
    Case("7.1 data that is shorter", chunked(chunk(b"15\r\n")), "400 closed"),
    Case("7.1.2 a trailer", chunked(CHUNK + b"0\r\nX: y\r\nZ: a\r\n\r\n"), "200 open"),
    Case("7.1.2 a trailer that frames", chunked(CHUNK + b"0\r\nContent-Length: 40\r\n\r\n"), "200 open"),
    Case("7.1.2 a trailer without a colon", chunked(CHUNK + b"0\r\nnonsense\r\n\r\n"), "400 closed", "200 open"),
    Case("7.1.2 a request for a trailer", chunked(CHUNK + b"0\r\n" + head(GET)), "400 closed", "200 open"),
    Case("7.1.2 a trailer with a lone LF", chunked(CHUNK + b"0\r\nX: a\nY: b\r\n\r\n"), "400 closed", "200 open"),
    Case("7.1.2 a trailer that is too long", chunked(CHUNK + b"0\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"), "400 closed"),
)  # fmt: skip

CONNECTIONS = (
    Case("9.3.2 two requests in one piece", head(GET) + head(GET), "200 200 open"),
    Case("9.3.2 a request behind a counted body", counted(LENGTH) + head(GET), "200 200 open"),
    Case("9.3.2 a request behind a chunked body", chunked(CHUNK + END) + head(GET), "200 200 open"),
    Case("9.3.2 an empty line behind a body", counted(LENGTH) + b"\r\n" + head(GET), "200 200 open"),
    Case("9.3.2 nonsense behind a request", head(GET) + b"nonsense\r\n\r\n", "200 400 closed"),
    Case("9.3.2 a request behind a bad one", b"nonsense\r\n\r\n" + head(GET), "400 closed"),
    Case("9.6 close", head(GET, b"Connection: close") + head(GET), "200 closed"),
    Case("9.6 close in capitals", head(GET, b"Connection: CLOSE"), "200 closed"),
    Case("9.6 close in a list", head(GET, b"Connection: x,close"), "200 closed", "200 open"),
    Case("9.6 close in a second field", head(GET, b"Connection: x", b"Connection: close"), "200 closed", "200 open"),
    Case("9.6 what begins like close", head(GET, b"Connection: closed"), "200 open"),
    Case("9.6 close and a body", counted(LENGTH, b"Connection: close"), "200 closed"),
    Case("9.6 a HEAD", head(b"HEAD /health HTTP/1.1"), "200 open"),
    Case("9.8 an upgrade that is not spoken",
         head(GET, b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMA"), "200 open"),
    Case("9.8 an upgrade with a body",
         counted(LENGTH, b"Connection: upgrade", b"Upgrade: x") + head(GET), "200 200 open"),
    Case("9.8 an upgrade with a chunked body",
         chunked(CHUNK + END, b"Connection: upgrade", b"Upgrade: x") + head(GET), "200 200 open"),
    Case("9.8 a WebSocket of a route that is none",
         head(GET, b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13",
              b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA=="), "200 open"),
    Case("RFC 9110 10.1.1 100-continue", counted(LENGTH, b"Expect: 100-continue"), "100 200 open"),
    Case("RFC 9110 10.1.1 100-continue in capitals", counted(LENGTH, b"Expect: 100-Continue"), "100 200 open"),
    Case("RFC 9110 10.1.1 100-continue in HTTP/1.0",
         head(b"POST /read_file HTTP/1.0", AUTH, LENGTH, b"Expect: 100-continue") + BODY, "200 closed"),
    Case("RFC 9110 10.1.1 another expectation", counted(LENGTH, b"Expect: x"), "200 open"),
    Case("RFC 9110 10.1.1 100-continue without a body", head(GET, b"Expect: 100-continue"), "200 open", "100 200 open"),
    Case("a body that nobody asked for", head(READ, LENGTH) + BODY, "401 closed"),
    Case("a chunked body that nobody asked for", head(READ, b"Transfer-Encoding: chunked") + CHUNK + END, "401 closed"),
    Case("a request in place of a body", head(READ, b"Content-Length: 100") + head(GET), "401 closed"),
)  # fmt: skip

CASES = (*START_LINE, *FIELDS, *LENGTHS, *CHUNKS, *CONNECTIONS)
