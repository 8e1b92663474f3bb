"""Bearer tokens."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandboxd.web.auth import BearerAuth

SECRET = "s3cret"


@pytest.mark.parametrize("header", [b"Bearer s3cret", b"bearer s3cret", b"BEARER s3cret", b" Bearer  s3cret "])
def test_the_secret_is_allowed(header: bytes) -> None:
    assert BearerAuth(SECRET).allows(header)


@pytest.mark.parametrize(
    "header",
    [
        None,
        b"",
        b"Bearer",
        b"Bearer ",
        b"s3cret",
        b"Basic s3cret",
        b"Bearers3cret",
        b"Bearer s3cre",
        b"Bearer s3cret2",
        b"Bearer S3CRET",
        b"Bearer s3cret s3cret",
        b"Bearer Bearer s3cret",
        b"Bearer \xff",
    ],
)
def test_all_else_is_not(header: bytes | None) -> None:
    assert not BearerAuth(SECRET).allows(header)


@given(st.binary())
def test_no_other_token_is_allowed(token: bytes) -> None:
    assert BearerAuth(SECRET).allows(b"Bearer " + token) == (token.strip() == SECRET.encode())


def test_a_secret_beyond_ascii_is_compared_as_utf_8() -> None:
    assert BearerAuth("pässwört").allows("Bearer pässwört".encode())
    assert not BearerAuth("pässwört").allows("Bearer pässwört".encode("latin-1"))
