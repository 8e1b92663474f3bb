"""Small files that are read without a thread: what they contain, and when they are left to one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.files.cached import LARGEST, CachedReader
from sandboxd.files.mounts import Mounts, parse_types
from sandboxd.files.root import Root


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    mounts = Mounts()
    mounts.open()
    yield mounts
    mounts.close()


@pytest.fixture
def reader(mounts: Mounts) -> CachedReader:
    return CachedReader(Root(), mounts)


@pytest.mark.parametrize("size", [1, 1000, 4096, 4097, LARGEST])
def test_what_is_in_memory_is_read(reader: CachedReader, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    assert reader.read(str(tmp_path / "f")) == data


def test_an_overlay_is_read(reader: CachedReader, tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "merged"):
        (tmp_path / name).mkdir()
    (tmp_path / "lower" / "f").write_bytes(b"text")
    options = f"lowerdir={tmp_path}/lower,upperdir={tmp_path}/upper,workdir={tmp_path}/work"
    command = ["mount", "-t", "overlay", "-o", options, "overlay", str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=5)
    if done.returncode:
        pytest.skip(f"NOT TESTED: cannot mount an overlay: {done.stderr.strip()}")
    try:
        assert reader.read(str(tmp_path / "merged" / "f")) is None  # it was not looked up before
        assert (tmp_path / "merged" / "f").read_bytes() == b"text"
        assert reader.read(str(tmp_path / "merged" / "f")) == b"text"
        (tmp_path / "merged" / "f").write_bytes(b"other")
        assert reader.read(str(tmp_path / "merged" / "f")) == b"other"
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True, timeout=5)


def test_a_memory_file_system_is_read_and_its_end_is_noticed(reader: CachedReader, small_disk: Path) -> None:
    (small_disk / "f").write_bytes(b"text")
    assert reader.read(str(small_disk / "f")) == b"text"


def test_what_is_on_disk_only_is_left_to_a_thread(reader: CachedReader, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(bytes(8192))
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    assert reader.read(str(path)) is None


@pytest.mark.parametrize("path", ["/proc/version", "/dev/zero", "/", "/proc/self/cwd/nothing", "", "\0", "nothing"])
def test_what_is_no_plain_file_is_left_to_a_thread(reader: CachedReader, path: str) -> None:
    assert reader.read(path) is None


def test_large_empty_and_special_files_are_left_to_a_thread(reader: CachedReader, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(bytes(LARGEST + 1))
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    for name in ("large", "empty", "fifo"):
        assert reader.read(str(tmp_path / name)) is None


def test_no_file_outside_of_a_root_is_read(mounts: Mounts, tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "root" / "f").write_text("text")
    os.symlink("../secret", tmp_path / "root" / "link")
    reader = CachedReader(Root(str(tmp_path / "root")), mounts)
    assert reader.read("f") == reader.read(str(tmp_path / "root" / "f")) == b"text"
    for path in ("../secret", "link", str(tmp_path / "secret")):
        assert reader.read(path) is None


def test_types_of_mounts() -> None:
    text = (
        b"36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n"
        b"37 35 0:22 / /tmp rw - tmpfs tmpfs rw\nmalformed\n"
    )
    assert parse_types(text) == {b"98:0": b"ext3", b"0:22": b"tmpfs"}


def test_a_directory_is_opened_if_it_is_known_and_local(reader: CachedReader, mounts: Mounts, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("text")
    fd = reader.open_directory(str(tmp_path))
    assert fd is not None
    assert os.path.samestat(os.fstat(fd), tmp_path.stat())
    os.close(fd)
    assert reader.is_directory(str(tmp_path))
    for other in ("/proc", str(tmp_path / "f"), str(tmp_path / "none"), "a\0b"):
        assert reader.open_directory(other) is None
        assert not reader.is_directory(other)
    assert CachedReader(Root(str(tmp_path)), mounts).open_directory(str(tmp_path)) is None
