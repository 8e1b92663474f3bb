"""A file system that hangs blocks its own callers only."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from sandboxd.files.mounts import Mounts, parse
from tests.client import Api
from tests.waiting import until, within

TABLE = rb"""22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:21 / /proc rw - proc proc rw
24 22 0:50 /a\040b /mnt/with\040space\134x rw - nfs server:/a\040b rw
25 22 0:51 / /mnt/twice rw - tmpfs one rw
26 25 0:52 / /mnt/twice rw - tmpfs two rw
"""


def test_the_table_of_mounts() -> None:
    assert parse(TABLE) == {
        b"/": b"254:0",
        b"/proc": b"0:21",
        b"/mnt/with space\\x": b"0:50",
        b"/mnt/twice": b"0:52",
    }


def device(path: Path | str) -> bytes:
    info = os.stat(path)
    return b"%d:%d" % (os.major(info.st_dev), os.minor(info.st_dev))


@pytest.fixture
def mounts() -> Iterator[Mounts]:
    mounts = Mounts()
    mounts.open()
    yield mounts
    mounts.close()


def test_links_are_followed_to_their_file_system(tmp_path: Path, mounts: Mounts) -> None:
    def lane(path: Path | str) -> bytes:
        resolution, arrived = mounts.begin(os.fsencode(path)), False
        while not arrived:
            resolution, arrived = mounts.advance(resolution)
        return resolution.device

    (tmp_path / "proc").symlink_to("/proc")
    (tmp_path / "chain").symlink_to("proc/self")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "back").symlink_to("/proc/../" + str(tmp_path))
    (tmp_path / "gone").symlink_to("/proc/nowhere")
    here, proc = device(tmp_path), device("/proc")
    assert here != proc
    assert lane("/") == device("/")
    assert lane("/proc/self/status") == lane(f"{tmp_path}/proc") == lane(f"{tmp_path}/chain/status") == proc
    assert lane(f"{tmp_path}/gone/x") == proc
    for path in ("", "/new", "/loop/x", "/back/f", "/proc/../" + str(tmp_path), "/missing/a/b"):
        assert lane(f"{tmp_path}{path}") == here


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A file system on which every write hangs, in the kernel and beyond the reach of signals, until ``thaw``."""
    image, path = tmp_path / "image", tmp_path / "frozen"
    path.mkdir()
    with image.open("wb") as file:
        file.truncate(4 * 1024 * 1024)
    commands: tuple[list[str | Path], ...] = (
        ["mkfs.ext4", "-q", "-F", image],
        ["mount", "-o", "loop", image, path],
        ["fsfreeze", "-f", path],
    )
    for command in commands:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
        except FileNotFoundError:
            pytest.skip(f"NOT TESTED: there is no {command[0]}")
        if done.returncode != 0:
            subprocess.run(["umount", path], capture_output=True, check=False, timeout=10)
            pytest.skip(f"NOT TESTED: {command[0]}: {done.stderr.strip()}")
    yield path
    thaw(path)
    subprocess.run(["umount", path], check=True, timeout=10)


def thaw(path: Path) -> None:
    subprocess.run(["fsfreeze", "-u", path], capture_output=True, check=False, timeout=10)


async def test_a_file_system_that_hangs_blocks_its_own_callers_only(api: Api, frozen: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(frozen)
    paths = [f"{folder}/f{turn}" for turn in range(20) for folder in (frozen, tmp_path / "link")]
    hanging = [api.call("PUT", f"/files?path={path}{turn}", b"x") for turn, path in enumerate(paths)]
    answers = [within(30, call) for call in hanging]
    answers.append(within(30, api.call("POST", "/write_file", {"path": f"{frozen}/text", "content": "x"})))
    for turn in range(5):
        assert (await within(5, api.call("PUT", f"/files?path={tmp_path}/f{turn}", b"x"))).status == 201
        assert (await within(5, api.post("/stat_file", {"path": str(tmp_path / "f0")}))).json()["entry"]["size"] == 1
        assert (await within(5, api.run("pwd", cwd=str(tmp_path))))["stdout"] == f"{tmp_path}\n"
        assert (await within(5, api.get("/health"))).status == 200
    assert not any(answer.called for answer in answers)
    thaw(frozen)
    statuses = [(await answer).status for answer in answers]
    assert statuses == [201] * len(paths) + [200]
    await until(lambda: len(os.listdir(frozen)) == len(paths) + 2)
