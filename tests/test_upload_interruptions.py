"""Uploads that break off: the old file is left, or the new one is complete, and nothing else."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.threads import deferToThread

from sandboxd.files import copying
from sandboxd.files.root import Root
from sandboxd.files.upload import STALE, Replacement
from tests.connection import Connection
from tests.daemon import Daemon
from tests.file_transfers import at, open_files
from tests.waiting import until

OLD = b"old" * 10_000


def litter(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".sandboxd-")]


async def test_clients_that_break_off_leave_the_old_file(daemon: Daemon, tmp_path: Path) -> None:
    """Hundreds of them, anywhere in the request, the last bytes included."""
    path = tmp_path / "f"
    path.write_bytes(OLD)
    new = b"new" * 10_000
    request = f"PUT {at(path)} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(new)}\r\n".encode()

    def break_off(cut: int) -> None:
        connection = Connection(daemon)
        whole = request + connection.auth + b"\r\n" + new
        connection.sock.sendall(whole[: len(whole) - cut])
        if cut % 2:
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.sock.close()

    def all_of_them() -> None:
        for turn in range(300):
            break_off(1 + turn * 100 if turn % 3 else 1 + turn % 7)

    await deferToThread(all_of_them)
    await until(lambda: not [fd for fd in open_files(daemon) if str(tmp_path) in fd])
    assert path.read_bytes() == OLD
    assert os.listdir(tmp_path) == ["f"]
    await deferToThread(lambda: [break_off(0) for _ in range(20)])
    await until(lambda: not [fd for fd in open_files(daemon) if str(tmp_path) in fd])
    assert path.read_bytes() in (OLD, new)
    assert os.listdir(tmp_path) == ["f"]


#: Puts one of two versions after the other into a file, as the daemon does it, until it is killed.
WRITER = """
import sys
from sandboxd.files.root import Root
from sandboxd.files.upload import Patch, Replacement, Upload
print(flush=True)
while True:
    for letter in b"ab":
        upload = Replacement(Root(), sys.argv[1], lambda old: None, durable=False)
        upload.open(None)
        for _ in range(4):
            upload.write(bytes([letter]) * 50_000)
        upload.commit()
"""


@pytest.mark.slow
def test_a_writer_that_is_killed_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    """Some dozens of them, anywhere in their work."""
    path = tmp_path / "f"
    versions = [bytes([letter]) * 200_000 for letter in b"ab"]
    path.write_bytes(versions[0])
    seen = set()
    for _ in range(30):
        with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(random.random() * 0.01)  # no event tells of the middle of a write
            writer.kill()
        content = path.read_bytes()
        assert content in versions
        seen.add(content)
        # Between two system calls the new file has a name of its own, always the same, which the next upload takes.
        assert len(litter(tmp_path)) <= 1
    assert len(seen) == 2
    upload = Replacement(Root(), str(path), lambda old: None)
    upload.open(None)
    upload.commit()
    assert os.listdir(tmp_path) == ["f"]


@pytest.mark.slow
def test_a_daemon_that_is_killed_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(OLD)
    folder = tmp_path / "daemon"
    folder.mkdir()
    daemon = Daemon(folder)
    connections = [Connection(daemon) for _ in range(10)]
    for connection in connections:
        connection.send(f"PUT {at(path)}", connection.auth + b"Content-Length: 1000000\r\n", b"new" * 200_000)
    deadline = time.monotonic() + 10
    while len([fd for fd in open_files(daemon) if str(tmp_path / "#") in fd]) < len(connections):
        assert time.monotonic() < deadline, open_files(daemon)
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    for connection in connections:
        connection.sock.close()
    assert sorted(os.listdir(tmp_path)) == ["daemon", "f"]
    assert path.read_bytes() == OLD


@pytest.fixture
def no_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel says of O_TMPFILE where it knows none of it is what it says of O_DIRECTORY: EISDIR."""
    monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)


def upload_later(folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, content: bytes = b"text") -> None:
    """Upload the file ``f`` as it would be done so many seconds from now."""
    now = time.time
    with monkeypatch.context() as patched:
        patched.setattr(time, "time", lambda: now() + seconds)
        upload = Replacement(Root(), str(folder / "f"), lambda old: None)
        upload.open(None)
        assert len(litter(folder)) > 0
        upload.write(content)
        upload.commit()
    assert (folder / "f").read_bytes() == content


def test_without_files_that_have_no_name(tmp_path: Path, no_tmpfile: None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (".sandboxd-left", ".sandboxd-locked", "other"):
        (tmp_path / name).write_text("x")
    with (tmp_path / ".sandboxd-locked").open() as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        upload_later(tmp_path, monkeypatch, STALE / 2)
        assert sorted(litter(tmp_path)) == [".sandboxd-left", ".sandboxd-locked"]
        upload_later(tmp_path, monkeypatch, STALE + 1, b"again")
        assert litter(tmp_path) == [".sandboxd-locked"]
        upload = Replacement(Root(), str(tmp_path / "f"), lambda old: None)
        upload.open(None)
        upload.write(b"other")
        upload.close()
    assert sorted(os.listdir(tmp_path)) == [".sandboxd-locked", "f", "other"]
    assert (tmp_path / "f").read_bytes() == b"again"


def test_an_upload_does_not_remove_a_copy_that_another_request_makes(
    tmp_path: Path, no_tmpfile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_text("old")
    os.utime(source, (1, 1))
    copy_contents, rename = copying._copy_contents, copying.rename

    def slowly(*args: Any) -> None:
        upload_later(tmp_path, monkeypatch, 2 * STALE)
        copy_contents(*args)

    def after_an_upload(*args: Any, **keywords: Any) -> None:
        upload_later(tmp_path, monkeypatch, 0)
        rename(*args, **keywords)

    monkeypatch.setattr(copying, "_copy_contents", slowly)
    monkeypatch.setattr(copying, "rename", after_an_upload)
    copying.copy(Root(), str(source), str(tmp_path / "target"))
    target = tmp_path / "target"
    assert (target.read_text(), target.stat().st_mtime) == ("old", 1)
    assert litter(tmp_path) == []
