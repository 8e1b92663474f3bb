"""
Made-up HTTP: our parser beside Twisted's, and the real daemon under bytes that are no HTTP.

``make fuzz`` makes up many more.
"""

from __future__ import annotations

import json
from io import BytesIO
from typing import Any, NamedTuple, cast

from hypothesis import assume, event, example, given, settings
from hypothesis import strategies as st
from twisted.internet.testing import StringTransport
from twisted.web import http

from sandboxd.web.chunked import ChunkedDecoder
from sandboxd.web.request_head import END, MalformedRequest, parse_head
from tests.daemon import Daemon
from tests.http_cases import AUTH, BODY, SENTINEL, SENTINEL_ID
from tests.http_client import exchange

# Messages

#: Values of fields that frame a message, or that are read otherwise.
VALUES = {
    b"Content-Length": [b"0", b"3", b"20", b"020", b"+20", b"20, 20", b"-1", b"0x3", b"", b"9" * 20],
    b"Transfer-Encoding": [
        b"chunked",
        b"Chunked",
        b"identity",
        b"gzip, chunked",
        b"chunked, chunked",
        b"xchunked",
        b"",
    ],
    b"Connection": [b"close", b"keep-alive", b"keep-alive, close", b"upgrade", b"closed"],
    b"Expect": [b"100-continue", b"x"],
    b"Upgrade": [b"h2c", b"websocket"],
    b"Host": [b"", b"a:1", b"a b", b"[::1]"],
}
text = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=10)
fields = st.one_of(
    st.tuples(st.sampled_from([b"X", b"X-Request-Id", b"Cookie"]), text.map(lambda value: value.encode("latin-1"))),
    st.sampled_from([(name, value) for name, values in VALUES.items() for value in values]),
)
blanks = st.sampled_from([b" ", b"", b"\t", b"  ", b" \t"])
lines = st.builds(lambda field, a, b: field[0] + b":" + a + field[1] + b, fields, blanks, blanks)
ends = st.sampled_from([b"\r\n"] * 200 + [b"\n", b"\r", b"\r\r\n", b"\r\n ", b" \r\n", b"\0\r\n"])
methods = [b"GET", b"POST"] * 8 + [b"PUT", b"HEAD", b"BREW", b"get", b"G(T", b""]
targets = [b"/health", b"/read_file", b"/nope", b"/%ff", b"*", b"http://test/health", b"/a?b=c", b"//", b"h:1"] * 4
targets += [b"", b"/a b", b"/#"]
versions = [b"HTTP/1.1"] * 30 + [b"HTTP/1.0", b"HTTP/1.2", b"HTTP/0.9", b"http/1.1", b"HTTP/1.1 ", b""]
request_lines = st.tuples(*(st.sampled_from(each) for each in (methods, targets, versions))).map(b" ".join)
hosts = st.sampled_from([[b"Host: test"]] * 12 + [[], [b"Host: a", b"Host: b"], [b"Host : test"]])


@st.composite
def heads(draw: st.DrawFn) -> bytes:
    """The head of a request, with faults now and then."""
    parts = [draw(request_lines), *draw(hosts), *draw(st.lists(lines, max_size=5))]
    return b"".join(part + draw(ends) for part in parts) + b"\r\n"


@st.composite
def chunked_bodies(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A well-formed chunked body, and its content."""
    pieces = draw(st.lists(st.binary(min_size=1, max_size=40), max_size=5))
    extension = st.sampled_from([b"", b";x", b';a="b c"', b";\xe4"])
    size = st.sampled_from(["{:x}", "{:X}", "00{:x}"])
    coded = b"".join(
        draw(size).format(len(piece)).encode() + draw(extension) + b"\r\n" + piece + b"\r\n" for piece in pieces
    )
    trailers = draw(st.sampled_from([b"", b"X: y\r\n", b"X: y\r\nZ:\r\n"]))
    return coded + b"0" + draw(extension) + b"\r\n" + trailers + b"\r\n", b"".join(pieces)


# Our parser beside Twisted's


class Understood(NamedTuple):
    """A request as it was understood."""

    method: bytes
    target: bytes
    body: bytes


class Recording(http.HTTPChannel):
    """Twisted's parser, which answers each request at once."""

    def __init__(self) -> None:
        super().__init__()
        self.understood: list[Understood] = []
        self.requestFactory = cast(Any, self.recorder)

    def recorder(self, channel: http.HTTPChannel, queued: object = None) -> http.Request:
        understood = self.understood

        class Recorder(http.Request):
            def gotLength(self, length: int | None) -> None:
                self.content = BytesIO()

            def process(self) -> None:
                assert self.content is not None
                understood.append(Understood(self.method, self.uri, self.content.read()))
                self.setHeader(b"Content-Length", b"0")
                self.finish()

        return Recorder(channel, parsePOSTFormSubmission=False)


def by_twisted(data: bytes) -> list[Understood]:
    """The requests that Twisted understands."""
    channel, transport = Recording(), StringTransport()
    channel.timeOut = None
    channel.makeConnection(transport)
    channel.dataReceived(data)
    return channel.understood


def by_us(data: bytes) -> tuple[list[Understood], bool]:
    """The requests that we understand, and whether more would be read."""
    understood: list[Understood] = []
    while END in data:
        end = data.index(END) + len(END)
        try:
            head = parse_head(data[:end])
            data = data[end:]
            body: list[bytes] = []
            if head.length is None:
                behind = ChunkedDecoder(body.append, 16384).feed(data)
                if behind is None:
                    return understood, True
                data = behind
            elif len(data) < head.length:
                return understood, True
            else:
                body, data = [data[: head.length]], data[head.length :]
        except MalformedRequest:
            return understood, False
        understood.append(Understood(head.method, head.target, b"".join(body)))
        if not head.persistent:
            return understood, False
    return understood, True


@given(st.lists(heads(), min_size=1, max_size=3), st.binary(max_size=30))
@settings(deadline=None)
@example([b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\n"], b"abcGET /b HTTP/1.1\r\nHost: x\r\n\r\n")
@example([b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"], b"3\r\nabc\r\n0\r\n\r\n")
@example([b"POST /a HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked \r\n\r\n"], b"3\r\nabc\r\n0\r\n\r\n")
@example([b"GET /a HTTP/1.1\r\nHost: x\r\nX: y\r\n \r\n\r\n"], b"")
def test_what_we_understand_twisted_understands_alike(requests: list[bytes], rest: bytes) -> None:
    data = b"".join(requests) + rest
    ours, ours_open = by_us(data)
    theirs = by_twisted(data)
    origin = [each._replace(target=each.target.removeprefix(b"http://test")) for each in theirs]
    event(f"{len(ours)} of {len(theirs)} understood")
    assert ours == origin[: len(ours)], "understood in another way"
    if len(ours) < len(origin):
        assert not ours_open, "neither understood nor refused"


@given(chunked_bodies(), st.binary(max_size=20), st.lists(st.integers(0, 300), max_size=8))
@settings(deadline=None)
def test_a_chunked_body_is_the_same_however_it_is_cut(
    body: tuple[bytes, bytes], behind: bytes, cuts: list[int]
) -> None:
    coded, content = body
    data, places = coded + behind, sorted({min(cut, len(coded) - 1) for cut in cuts})
    pieces = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    received: list[bytes] = []
    decoder = ChunkedDecoder(received.append, 1000)
    results = [decoder.feed(piece) for piece in pieces]
    assert b"".join(received) == content
    assert results == [*[None] * (len(pieces) - 1), behind]


@given(st.binary(max_size=60), st.lists(st.integers(0, 60), max_size=5))
@settings(deadline=None)
def test_a_malformed_chunked_body_gives_no_more_than_it_has(data: bytes, cuts: list[int]) -> None:
    whole = _decoded([data])
    places = sorted({min(cut, len(data)) for cut in cuts})
    assert _decoded([data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]) == whole


def _decoded(pieces: list[bytes]) -> Any:
    received: list[bytes] = []
    decoder = ChunkedDecoder(received.append, 1000)
    try:
        behind = None
        for index, piece in enumerate(pieces):
            behind = decoder.feed(piece)
            if behind is not None:
                behind += b"".join(pieces[index + 1 :])
                break
    except MalformedRequest:
        return "malformed"
    return b"".join(received), behind


@given(heads())
@settings(deadline=None)
def test_no_head_raises_anything_else(head: bytes) -> None:
    try:
        parsed = parse_head(head)
    except MalformedRequest:
        return
    assert parsed.length is None or parsed.length >= 0
    assert all(name == name.lower() and value == value.strip(b" \t") for name, value in parsed.fields)


# The daemon

POST = b"POST /read_file HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\n"


@given(
    st.lists(
        st.one_of(
            st.just(POST + b"Content-Length: 20\r\n\r\n" + BODY),
            st.just(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"),
            st.just(b"GET /nope HTTP/1.1\r\nHost: x\r\n" + AUTH + b"\r\n\r\n"),
            st.builds(
                lambda body: (
                    b"POST /read_file HTTP/1.1\r\nHost: x\r\n"
                    + AUTH
                    + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
                    + body[0]
                ),
                chunked_bodies(),
            ),
        ),
        min_size=1,
        max_size=6,
    ),
    st.lists(st.integers(0, 1000), max_size=6),
)
@settings(deadline=None)
def test_pipelined_requests_are_answered_in_order_however_they_are_cut(
    daemon: Daemon, requests: list[bytes], cuts: list[int]
) -> None:
    named = [
        each.replace(b"Host: x\r\n", b"Host: x\r\nX-Request-Id: %d\r\n" % number)
        for number, each in enumerate(requests)
    ]
    data = b"".join(named) + SENTINEL
    places = sorted({min(cut, len(data)) for cut in cuts})
    pieces = [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]
    got = exchange(daemon.port, *pieces, until=SENTINEL_ID)
    assert [answer.id for answer in got] == [*[b"%d" % index for index in range(len(named))], SENTINEL_ID]
    for request, answer in zip(named, got, strict=False):
        if BODY in request:
            assert "/no/such" in json.loads(answer.body)["error"]


@given(st.lists(st.one_of(heads(), st.binary(max_size=60), chunked_bodies().map(lambda body: body[0])), max_size=4))
@settings(deadline=None)
def test_the_daemon_answers_or_closes_whatever_it_gets(daemon: Daemon, pieces: list[bytes]) -> None:
    data = b"".join(pieces)
    understood, is_open = by_us(data + SENTINEL)
    assume(not is_open or understood[-1:] == [(b"GET", b"/health", b"")])  # else it waits for more
    assume(all(each.method != b"HEAD" for each in understood))  # whose answers have no body
    got = exchange(daemon.port, data + SENTINEL, until=SENTINEL_ID)
    assert got
    assert all(answer.status < 500 for answer in got)
