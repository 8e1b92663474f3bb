"""JSON in ASCII only."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandboxd.api.files import CHUNK, escaped_chunks
from sandboxd.web.ascii_json import dumps, escaped
from tests.test_lines import FRAGMENTS

#: Characters, surrogates among them: those stand for the bytes of a file name that are not UTF-8.
SURROGATES = st.characters(exclude_categories=())

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.text(SURROGATES),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)

#: Text whose hard-to-cut part lies at the border of the first chunk.
AROUND_THE_BORDER = st.builds(
    lambda back, parts: b"a" * (CHUNK - back) + b"".join(parts),
    st.integers(0, 20),
    st.lists(st.sampled_from(FRAGMENTS) | st.binary(max_size=8), max_size=12),
)


@settings(deadline=None)
@given(VALUES)
@pytest.mark.slow
def test_any_value_becomes_ascii_json_on_one_line(value: object) -> None:
    encoded = dumps(value)
    assert encoded.isascii()
    assert not set(encoded) & set(range(0x20)), "a control character"
    assert json.loads(encoded) == value


@given(st.binary())
def test_escaped_is_the_inside_of_a_json_string(data: bytes) -> None:
    inside = escaped(data)
    assert inside.isascii()
    assert json.loads(b'"%b"' % inside) == data.decode("utf-8", "replace")


@settings(deadline=None)
@given(AROUND_THE_BORDER)
def test_a_chunk_at_a_time_is_the_same_as_at_once(data: bytes) -> None:
    assert b"".join(escaped_chunks(data)) == escaped(data)


def test_chunks_are_bounded_and_none_is_empty() -> None:
    chunks = list(escaped_chunks("😀".encode() * CHUNK))
    assert all(0 < len(chunk) <= 3 * CHUNK for chunk in chunks)
    assert list(escaped_chunks(b"")) == []
