"""Parts of files, conditions and digests: what the headers mean."""

from __future__ import annotations

import base64
import hashlib
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.api.downloads import disposition
from sandboxd.files.digests import Digests
from sandboxd.web.conditions import Conditions, MalformedHeader, if_range
from sandboxd.web.ranges import MAX_RANGES, Span, Unsatisfiable, parse_content_range, parse_range, part_heads

# Range


@pytest.mark.parametrize(
    ("text", "spans"),
    [
        ("bytes=0-0", [(0, 1)]),
        ("bytes=0-499", [(0, 100)]),
        ("bytes=99-", [(99, 100)]),
        ("bytes=-1", [(99, 100)]),
        ("bytes=-500", [(0, 100)]),
        ("BYTES = 5-9", [(5, 10)]),
        ("bytes= 0-1 , ,\t5-6,", [(0, 2), (5, 7)]),
        ("bytes=90-95,1-2", [(90, 96), (1, 3)]),
        ("bytes=0-1,500-600", [(0, 2)]),
        ("bytes=5-9,0-6", [(0, 10)]),
        ("bytes=0-4,5-9", [(0, 10)]),
        ("bytes=0-,0-,0-", [(0, 100)]),
    ],
)
def test_ranges(text: str, spans: list[tuple[int, int]]) -> None:
    assert parse_range(text, 100) == [Span(*span) for span in spans]


NO_RANGES = "bytes|bytes=|bytes=,|bytes=a-b|bytes=5-4|bytes=--5|bytes=1-2-3|lines=0-1|bytes=-|bytes=0-1,x|bytes=0x1-2"


@pytest.mark.parametrize("text", [None, "", "bytes=\u0661-2", *NO_RANGES.split("|")])
def test_what_is_no_range_asks_for_all(text: str | None) -> None:
    assert parse_range(text, 100) is None


@pytest.mark.parametrize("text", ["bytes=100-", "bytes=-0", "bytes=500-600,200-", "bytes=" + "0-0," * (MAX_RANGES + 1)])
def test_unsatisfiable_ranges(text: str) -> None:
    with pytest.raises(Unsatisfiable):
        parse_range(text, 100)


def test_an_empty_file_has_no_ranges() -> None:
    with pytest.raises(Unsatisfiable):
        parse_range("bytes=0-", 0)


specs = st.one_of(
    st.tuples(st.integers(0, 120), st.integers(0, 120)).map(lambda pair: f"{min(pair)}-{max(pair)}"),
    st.integers(0, 120).map(lambda first: f"{first}-"),
    st.integers(0, 120).map(lambda last: f"-{last}"),
)


def bytes_of(spec: str, size: int) -> set[int]:
    """The bytes that one range asks for, as the RFC puts it."""
    first, _, last = spec.partition("-")
    if not first:
        return set(range(max(0, size - int(last)), size))
    return set(range(int(first), min(int(last) + 1 if last else size, size)))


@given(st.lists(specs, min_size=1, max_size=8), st.integers(0, 100))
def test_ranges_have_the_bytes_that_are_asked_for_each_once(asked: list[str], size: int) -> None:
    wanted = set().union(*(bytes_of(spec, size) for spec in asked))
    try:
        spans = parse_range("bytes=" + ",".join(asked), size)
    except Unsatisfiable:
        assert wanted == set()
        return
    assert spans is not None
    sent = [position for span in spans for position in range(*span)]
    assert len(sent) == len(set(sent))
    assert set(sent) == wanted


@given(st.text(max_size=40), st.integers(0, 1000))
def test_any_text_is_understood_or_not(text: str, size: int) -> None:
    for value in (text, f"bytes={text}"):
        try:
            spans = parse_range(value, size)
        except Unsatisfiable:
            continue
        assert spans is None or all(0 <= span.start < span.end <= size for span in spans)


def test_the_parts_of_a_multipart_body() -> None:
    heads, tail = part_heads([Span(0, 2), Span(5, 6)], 10, "text/plain", "xyz")
    assert heads[1] == b"\r\n--xyz\r\nContent-Type: text/plain\r\nContent-Range: bytes 5-5/10\r\n\r\n"
    assert tail == b"\r\n--xyz--\r\n"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("bytes 0-99/1000", (0, 100, 1000)),
        ("bytes 5-5/*", (5, 6, None)),
        ("bytes 5-4/10", None),
        ("bytes 5-10/10", None),
        ("bytes */10", None),
        ("lines 0-1/2", None),
        ("", None),
    ],
)
def test_content_range(text: str, part: tuple[int, int, int | None] | None) -> None:
    assert parse_content_range(text) == part


# Conditions

TAG = '"a-1"'
DAY = 86400


def status(tag: str | None, *, safe: bool = True, modified: float = 5 * DAY, **headers: Any) -> int | None:
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return Conditions(given.get).status(tag, modified, safe=safe)


EARLIER, THEN, LATER = (f"0{day} Jan 1970 00:00:00 GMT" for day in (5, 6, 7))


@pytest.mark.parametrize(
    ("headers", "read", "written"),
    [
        ({}, None, None),
        ({"If_Match": TAG}, None, None),
        ({"If_Match": f'"x", {TAG}'}, None, None),
        ({"If_Match": "*"}, None, None),
        ({"If_Match": '"x"'}, 412, 412),
        ({"If_Match": f"W/{TAG}"}, 412, 412),
        ({"If_None_Match": TAG}, 304, 412),
        ({"If_None_Match": f"W/{TAG}"}, 304, 412),
        ({"If_None_Match": "*"}, 304, 412),
        ({"If_None_Match": '"x"'}, None, None),
        ({"If_Modified_Since": THEN}, 304, None),
        ({"If_Modified_Since": LATER}, 304, None),
        ({"If_Modified_Since": EARLIER}, None, None),
        ({"If_Modified_Since": "yesterday"}, None, None),
        ({"If_Unmodified_Since": EARLIER}, 412, 412),
        ({"If_Unmodified_Since": THEN}, None, None),
        ({"If_None_Match": '"x"', "If_Modified_Since": LATER}, None, None),
        ({"If_Match": TAG, "If_Unmodified_Since": EARLIER}, None, None),
        ({"If_Match": TAG, "If_None_Match": TAG}, 304, 412),
    ],
)
def test_conditions_on_a_file(headers: dict[str, Any], read: int | None, written: int | None) -> None:
    assert status(TAG, safe=True, **headers) == read
    assert status(TAG, safe=False, **headers) == written


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"If_Match": "*"}, 412),
        ({"If_Match": TAG}, 412),
        ({"If_None_Match": "*"}, None),
        ({"If_Unmodified_Since": LATER}, 412),
    ],
)
def test_conditions_on_no_file(headers: dict[str, Any], expected: int | None) -> None:
    assert status(None, safe=False, **headers) == expected


@pytest.mark.parametrize("text", ["", " ,", "abc", '"a', 'a"', '"a" "b"', "*, x", 'w/"a"'])
def test_malformed_tags_are_refused(text: str) -> None:
    with pytest.raises(MalformedHeader, match="If-Match"):
        Conditions({"If-Match": text}.get)


def test_if_range() -> None:
    assert if_range(None, TAG, 5 * DAY)
    assert if_range(TAG, TAG, 5 * DAY)
    assert not if_range('"x"', TAG, 5 * DAY)
    assert not if_range(f"W/{TAG}", TAG, 5 * DAY)
    assert if_range(THEN, TAG, 5 * DAY)
    assert not if_range(LATER, TAG, 5 * DAY)
    assert not if_range("nonsense", TAG, 5 * DAY)


# Digests


def member(data: bytes, name: str = "sha-256") -> str:
    digest = hashlib.new(name.replace("-", ""), data).digest()
    return f"{name}=:{base64.b64encode(digest).decode()}:"


def test_digests() -> None:
    given = Digests(f"md5=:AAAA:, {member(b'abc')}", "sha-512=5")
    given.update(b"a")
    given.update(b"bc")
    assert given.mismatch() is None
    assert given.header() == f"{member(b'abc')}, {member(b'abc', 'sha-512')}"
    given.update(b"d")
    assert given.mismatch() is not None
    assert Digests(None).header() is None
    assert Digests(None, "sha-256=0").header() is None


@pytest.mark.parametrize("text", ["", "sha-256", "sha-256=abc", "sha-256=:a:", "sha-256=:====:", "md5=:AAAA:"])
def test_malformed_digests_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="Content-Digest"):
        Digests(text)


# Names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("plain.txt", 'attachment; filename="plain.txt"'),
        ('a"b\\c\n', "attachment; filename=\"a_b_c_\"; filename*=UTF-8''a%22b%5Cc%0A"),
        ("\u20ac 5", "attachment; filename=\"_ 5\"; filename*=UTF-8''%E2%82%AC%205"),
        ("n\udcff", "attachment; filename=\"n_\"; filename*=UTF-8''n%EF%BF%BD"),
    ],
)
def test_dispositions(name: str, value: str) -> None:
    assert disposition(name).decode() == value


@given(st.text(max_size=30))
def test_any_name_makes_a_header(name: str) -> None:
    assert re.fullmatch(rb'attachment; filename="[ !#$&-\[\]-~]*"(; filename\*=UTF-8\'\'[\w.~%-]*)?', disposition(name))
