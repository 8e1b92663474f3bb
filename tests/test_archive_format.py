"""The format of archives, their compression, and the patterns of what is left out."""

from __future__ import annotations

import gzip
import io
import os
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet import reactor
from twisted.internet.threads import deferToThread

from sandboxd.files.archive.compression import CompressionError, Decompressor, compressor, preferred, recognised
from sandboxd.files.archive.tar import Member, MemberType, Reader, Receiver, TarError, header
from sandboxd.files.patterns import Pattern, PatternError
from tests.archives import member, tar


class Collected(Receiver):
    def __init__(self) -> None:
        self.members: list[tuple[str, bytes]] = []

    def begin(self, member: Member) -> None:
        self.members.append((member.name, b""))

    def data(self, data: bytes) -> None:
        name, before = self.members.pop()
        self.members.append((name, before + data))

    def end(self) -> None:
        pass


SAMPLE = tar(member("a", b"x" * 600), member("ü" * 80, b"y" * 512), member("d", type=tarfile.DIRTYPE), member("z"))


@settings(deadline=None)
@given(st.lists(st.integers(1, 700), min_size=1))
def test_an_archive_is_read_the_same_in_any_pieces(sizes: list[int]) -> None:
    collected = Collected()
    reader = Reader(collected)
    position = 0
    while position < len(SAMPLE):
        for size in sizes:
            reader.feed(SAMPLE[position : position + size])
            position += size
    reader.finish()
    assert collected.members == [("a", b"x" * 600), ("ü" * 80, b"y" * 512), ("d", b""), ("z", b"")]


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=130)


BYTES = st.binary(min_size=1, max_size=130).filter(lambda data: 0 not in data).map(os.fsdecode)


IDS = st.one_of(st.integers(0, 70_000), st.integers(8**7 - 2, (1 << 32) - 2))


@settings(deadline=None)
@given(
    st.one_of(NAMES, BYTES, st.integers(95, 105).map("n".__mul__)),
    st.sampled_from([MemberType.FILE, MemberType.DIRECTORY, MemberType.SYMLINK, MemberType.HARD_LINK]),
    st.integers(0, 0o7777),
    st.one_of(st.integers(-(1 << 70), 1 << 70), st.integers(-(1 << 33), 1 << 34).map((10**9).__mul__)),
    st.one_of(st.integers(0, 1 << 20), st.integers(8**11 - 2, 1 << 62)),
    st.one_of(NAMES, BYTES),
    st.tuples(IDS, IDS),
    st.tuples(st.text("ab\u00e4", max_size=40), st.text("ab", max_size=40)),
)
def test_headers_are_read_by_others(
    name: str,
    kind: MemberType,
    mode: int,
    mtime: int,
    size: int,
    target: str,
    ids: tuple[int, int],
    owners: tuple[str, str],
) -> None:
    name, target = name.strip("/") or "name", target.rstrip("/") or "target"
    is_link = kind in (MemberType.SYMLINK, MemberType.HARD_LINK)
    size = size if kind is MemberType.FILE else 0
    member = Member(name, kind, mode, mtime, size, target if is_link else "", *ids, *owners)
    blocks = header(member)
    assert len(blocks) % 512 == 0
    archive = tarfile.TarFile(fileobj=io.BytesIO(blocks + bytes(1024)), errors="surrogateescape", encoding="utf-8")
    info = archive.next()
    assert info is not None
    assert (info.name, info.linkname, info.mode, info.size) == (name, member.target, mode, size)
    assert (info.uid, info.gid, info.uname, info.gname) == (*ids, *owners)
    assert info.mtime == pytest.approx(mtime / 10**9)
    assert archive.offset == len(blocks) + (size + 511) // 512 * 512  # what follows is its data


@settings(deadline=None)
@given(st.binary(max_size=2000), st.integers(0, len(SAMPLE)))
def test_garbage_is_refused_and_nothing_else_happens(garbage: bytes, position: int) -> None:
    reader = Reader(Collected())
    try:
        reader.feed(SAMPLE[:position] + garbage + SAMPLE[position:])
        reader.finish()
    except TarError:
        pass


@settings(deadline=None)
@given(st.binary(max_size=300), st.sampled_from(["gzip", "zstd", "identity"]), st.integers(1, 50))
def test_compression_in_any_pieces(data: bytes, coding: str, size: int) -> None:
    compress = compressor(coding)
    packed = compress.compress(data) + compress.flush()
    decompressor = Decompressor(coding)
    pieces = [packed[n : n + size] for n in range(0, len(packed), size)]
    assert b"".join(piece for part in pieces for piece in decompressor.feed(part)) == data
    decompressor.finish()
    if coding != "identity":
        broken = Decompressor(coding)
        assert data.startswith(b"".join(broken.feed(packed[:-1])))
        with pytest.raises(CompressionError):
            broken.finish()


@pytest.mark.parametrize(
    ("accepted", "coding"),
    [
        (None, "identity"),
        ("", "identity"),
        ("gzip, deflate, br, zstd", "zstd"),
        ("gzip;q=1.0, zstd;q=0.5", "gzip"),
        ("*", "zstd"),
        ("zstd;q=0, *", "gzip"),
        ("gzip;q=0", "identity"),
        ("identity, gzip;q=0.5", "identity"),
        ("gzip;q=x", "identity"),
    ],
)
def test_preferred_coding(accepted: str | None, coding: str) -> None:
    assert preferred(accepted) == coding


@pytest.mark.parametrize(
    ("pattern", "path", "expected"),
    [
        ("*.py", "a.py", True),
        ("*.py", "d/a.py", False),
        ("**/*.py", "a.py", True),
        ("**/*.py", "d/e/a.py", True),
        ("d/**", "d/e/a.py", True),
        ("d/**/a.py", "d/a.py", True),
        ("d/**/a.py", "e/a.py", False),
        ("{a,b}/[0-9]?", "b/12", True),
        ("{a,b}/[!0-9]?", "b/12", False),
        ("{a}", "{a}", True),
        ("a**b", "axb", True),
        ("**", ".git/x", False),
        ("*", ".x", False),
        (".*", ".x", True),
        ("\udcff*", "\udcffx", True),
    ],
)
def test_patterns(pattern: str, path: str, expected: bool) -> None:
    assert Pattern(pattern, hidden=False).matches_path(path) is expected


@pytest.mark.parametrize("pattern", ["", "/", "a/../b", "{a,b}" * 20, "x" * 5000])
def test_bad_patterns(pattern: str) -> None:
    with pytest.raises(PatternError):
        Pattern(pattern)


async def test_no_pattern_takes_long() -> None:
    def match() -> list[bool]:
        return [
            Pattern("*a" * 60 + "b").matches_path("a" * 255),
            Pattern("**/" * 100 + "b").matches_path("a/" * 2000 + "a"),
            Pattern("{a,b}" * 8 + "/**/x").matches_path("a" * 8 + "/x"),
        ]

    assert await deferToThread(match).addTimeout(10, reactor) == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("cut", [0, 100, 300])
def test_zeros_behind_a_compressed_archive_are_no_archive_wherever_they_are_cut(cut: int) -> None:
    whole = gzip.compress(b"data")
    decompressor = Decompressor("gzip")
    found = b"".join(decompressor.feed(whole + bytes(cut))) + b"".join(decompressor.feed(bytes(512 - cut)))
    assert found + b"".join(decompressor.feed(whole)) == b"datadata"
    decompressor.finish()


def test_zstd_may_begin_with_a_frame_that_is_skipped() -> None:
    made = compressor("zstd")
    data = b"\x50\x2a\x4d\x18\x02\0\0\0ab" + made.compress(b"data") + made.flush()
    assert recognised(data) == "zstd"
    decompressor = Decompressor("zstd")
    assert b"".join(decompressor.feed(data)) == b"data"
