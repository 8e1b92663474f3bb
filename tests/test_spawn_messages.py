"""The messages between the daemon and its spawn servers: what is packed is unpacked, all else is refused."""

from __future__ import annotations

import errno

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sandboxd.processes.spawn_messages import (
    DONE,
    EXITED,
    FAILED,
    FORKED,
    MAX_OUTPUT,
    STARTED,
    MalformedMessage,
    StartRequest,
    pack_done,
    pack_record,
    pack_request,
    unpack_done,
    unpack_record,
    unpack_request,
)

TEXT = st.binary(max_size=50).map(lambda data: data.replace(b"\0", b"."))
U32 = st.integers(0, 2**32 - 1)
U64 = st.integers(0, 2**64 - 1)
REQUESTS = st.builds(
    StartRequest,
    argv=st.lists(TEXT, min_size=1, max_size=5),
    env=st.lists(TEXT.map(lambda text: b"x=" + text), max_size=5).map(b"\0".join),
    mark=U64,
    stdin=st.booleans(),
    cwd=st.none() | TEXT,
    user=st.none() | st.tuples(U32, U32, st.lists(U32, max_size=5).map(tuple)),
    cgroup=TEXT,
    limits=st.dictionaries(st.integers(0, 15), U64, max_size=8),
    collect=st.booleans(),
    directory=st.booleans(),
)


@given(REQUESTS)
def test_a_request_is_unpacked_as_it_was_packed(request: StartRequest) -> None:
    unpacked = StartRequest.unpack(request.pack())
    assert {name: getattr(unpacked, name) for name in StartRequest.__slots__} == {
        name: getattr(request, name) for name in StartRequest.__slots__
    }


def test_an_argument_with_a_nul_is_refused() -> None:
    with pytest.raises(OSError, match="Invalid argument") as raised:
        StartRequest([b"sh", b"a\0b"], b"", mark=1).pack()
    assert raised.value.errno == errno.EINVAL


@given(st.binary(max_size=200))
@example(b"")
def test_bytes_are_a_request_or_malformed(data: bytes) -> None:
    for unpack in (StartRequest.unpack, unpack_request):
        try:
            unpack(data)
        except MalformedMessage:
            continue


@given(REQUESTS, st.data())
def test_a_changed_request_is_a_request_or_malformed(request: StartRequest, data: st.DataObject) -> None:
    packed = bytearray(request.pack())
    packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    try:
        StartRequest.unpack(bytes(packed))
    except MalformedMessage:
        return


def test_a_request_has_kind_number_and_payload() -> None:
    assert unpack_request(pack_request(2, 7, b"\x0f")) == (2, 7, b"\x0f")


@pytest.mark.parametrize(
    ("kind", "value"), [(FORKED, 1), (STARTED, 1 << 22), (FAILED, errno.ENOENT), (EXITED, 0), (EXITED, 0xFF00)]
)
def test_a_record_is_unpacked_as_it_was_packed(kind: int, value: int) -> None:
    assert unpack_record(pack_record(5, kind, value, 1)) == (5, kind, value, 1)


@pytest.mark.parametrize(
    ("kind", "value", "detail"),
    [
        (STARTED, 0, 0),
        (STARTED, -1, 0),
        (STARTED, (1 << 22) + 1, 0),
        (FAILED, 0, 0),
        (FAILED, 4096, 0),
        (EXITED, -1, 0),
        (EXITED, 0x10000, 0),
        (5, 1, 0),
        (DONE, 0, 0),
        (EXITED, 0, 3),
    ],
)
def test_a_record_out_of_bounds_is_malformed(kind: int, value: int, detail: int) -> None:
    with pytest.raises(MalformedMessage):
        unpack_record(pack_record(5, kind, value, detail))


@given(st.integers(0, 0xFFFF), st.binary(max_size=100), st.binary(max_size=100))
def test_a_record_of_all_output_is_unpacked_as_it_was_packed(status: int, stdout: bytes, stderr: bytes) -> None:
    record = pack_done(5, 7, status, stdout, stderr)
    assert unpack_record(record) == (5, DONE, 7, 0)
    assert unpack_done(record) == (status, stdout, stderr)


def test_more_output_than_a_record_may_have_is_malformed() -> None:
    unpack_done(pack_done(5, 7, 0, b"x" * MAX_OUTPUT, b""))
    with pytest.raises(MalformedMessage):
        unpack_done(pack_done(5, 7, 0, b"x" * MAX_OUTPUT, b"x"))


@given(st.binary(max_size=40))
def test_bytes_are_a_record_or_malformed(data: bytes) -> None:
    for unpack in (unpack_record, unpack_done):
        try:
            unpack(data)
        except MalformedMessage:
            continue
