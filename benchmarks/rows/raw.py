"""``/files`` and ``/archive``: large files as they are, and many small ones in one request."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from time import perf_counter
from urllib.parse import quote

from benchmarks import limits
from benchmarks.buffers import buffers
from benchmarks.client import Failed, NoRoute
from benchmarks.measure import Row, Scale, Trial, measures

#: Files of a tree in one directory.
PER_DIRECTORY = 100

#: Bytes that are written with one call.
PIECE = 1 << 20


@cache
def content(megabytes: int) -> bytes:
    """So many megabytes, no two kilobytes of them the same."""
    return b"".join([b"%0999d\n" % (number * 7919) for number in range(megabytes * 1000)])


def expect(trial: Trial, route: str) -> None:
    """
    See that there is such a route: it is not of the contract.

    :raise NoRoute: if not.
    """
    with trial.server.connect() as connection:
        connection.call(trial.server.request("GET", f"{route}?path=/none/such"))
        if not connection.holds(b"/none/such"):
            raise NoRoute(f"it has no route {route}")


def target(path: Path) -> str:
    """A path in the query of a request."""
    return f"path={quote(str(path))}"


def bare_get(scale: Scale, folder: Path) -> Sequence[float]:
    """The file system, by itself: a file that it has in memory, read into ours."""
    path, data = folder / "bare-raw", content(scale.raw_megabytes)
    path.write_bytes(data)
    (buffer,) = buffers(1, len(data))
    began, end = perf_counter(), 0
    with path.open("rb", 0) as file:
        while count := file.readinto(memoryview(buffer)[end : end + PIECE]):
            end += count
    took = perf_counter() - began
    path.unlink()
    return [end / 1e6 / took]


def bare_put(scale: Scale, folder: Path) -> Sequence[float]:
    """The file system, by itself: a file that is written, and on the disk before it gets its name."""
    path, data = folder / "bare-raw", memoryview(content(scale.raw_megabytes))
    began = perf_counter()
    with path.with_suffix(".new").open("wb", 0) as file:
        for at in range(0, len(data), PIECE):
            file.write(data[at : at + PIECE])
        os.fsync(file.fileno())
    path.with_suffix(".new").rename(path)
    took = perf_counter() - began
    path.unlink()
    return [len(data) / 1e6 / took]


@measures(Row("files-get", "GET /files, 256 MB", "MB/s"), limit=bare_get)
def get_file(trial: Trial) -> Sequence[float]:
    """A large file is sent."""
    expect(trial, "/files")
    path, data = trial.folder / "raw", content(trial.scale.raw_megabytes)
    path.write_bytes(data)
    (buffer,) = buffers(1, len(data) + (1 << 16))
    with trial.server.connect(buffer) as connection:
        with trial.clock() as window:
            connection.call(trial.server.request("GET", f"/files?{target(path)}"))
        if connection.status != 200 or connection.body() != data:
            raise Failed(f"status {connection.status}, or other bytes than those of the file")
    path.unlink()
    return [len(data) / 1e6 / window.seconds]


@measures(Row("files-put", "PUT /files, 256 MB (limit: with fsync)", "MB/s"), limit=bare_put)
def put_file(trial: Trial) -> Sequence[float]:
    """A large file is stored."""
    expect(trial, "/files")
    path, data = trial.folder / "raw", content(trial.scale.raw_megabytes)
    request = trial.server.request("PUT", f"/files?{target(path)}", data)
    with trial.server.connect() as connection:
        with trial.clock() as window:
            connection.call(request)
        if connection.status not in (200, 201) or path.read_bytes() != data:
            raise Failed(f"status {connection.status}, or other bytes in the file: {connection.body()[:200]!r}")
    path.unlink()
    return [len(data) / 1e6 / window.seconds]


@cache
def tree(count: int, folder: Path) -> Path:
    """A directory with so many small files, in directories of a hundred."""
    top = folder / f"tree-{count}"
    for number in range(count):
        path = top / f"{number // PER_DIRECTORY:04d}" / f"{number:06d}.txt"
        if number % PER_DIRECTORY == 0:
            path.parent.mkdir(parents=True)
        path.write_bytes(b"%0999d\n" % number)
    return top


def files_of(top: Path) -> dict[str, bytes]:
    """The files of a tree: names, and what is in them."""
    return {str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*.txt")}


def packed(top: Path) -> bytes:
    """What ``tar`` makes of a tree."""
    return subprocess.run(["tar", "-cf", "-", "-C", top, "."], check=True, capture_output=True).stdout


def bare_pack(scale: Scale, folder: Path) -> Sequence[float]:
    """``tar`` into a pipe."""
    top = tree(scale.tree, folder)
    return [scale.tree / limits.pipe_seconds(f"exec tar -cf - -C {top} .", len(packed(top)))]


def bare_unpack(scale: Scale, folder: Path) -> Sequence[float]:
    """``tar`` from a pipe."""
    data, into = packed(tree(scale.tree, folder)), folder / "bare-unpacked"
    into.mkdir()
    began = perf_counter()
    subprocess.run(["tar", "-xf", "-", "-C", into], check=True, input=data)
    took = perf_counter() - began
    shutil.rmtree(into)
    return [scale.tree / took]


@measures(Row("archive-get", "GET /archive, 10,000 files of 1 kB (limit: tar)", "files/s"), limit=bare_pack)
def get_archive(trial: Trial) -> Sequence[float]:
    """A tree is sent."""
    expect(trial, "/archive")
    top = tree(trial.scale.tree, trial.folder)
    (buffer,) = buffers(1, trial.scale.tree * 4000)
    with trial.server.connect(buffer) as connection:
        with trial.clock() as window:
            connection.call(trial.server.request("GET", f"/archive?{target(top)}"))
        if connection.status != 200:
            raise Failed(f"status {connection.status}: {connection.body()[:200]!r}")
        with tarfile.open(fileobj=io.BytesIO(connection.body())) as archive:
            files = [(member.name, archive.extractfile(member)) for member in archive]
            found = {os.path.normpath(name): file.read() for name, file in files if file}
    if found != files_of(top):
        raise Failed(f"other files in the archive than in the tree: {len(found)} instead of {trial.scale.tree}")
    return [trial.scale.tree / window.seconds]


@measures(Row("archive-put", "PUT /archive, 10,000 files of 1 kB (limit: tar)", "files/s"), limit=bare_unpack)
def put_archive(trial: Trial) -> Sequence[float]:
    """A tree is stored."""
    expect(trial, "/archive")
    top = tree(trial.scale.tree, trial.folder)
    request = trial.server.request("PUT", f"/archive?{target(trial.folder / 'unpacked')}&parents=true", packed(top))
    with trial.server.connect() as connection:
        with trial.clock() as window:
            connection.call(request)
        if connection.status not in (200, 201):
            raise Failed(f"status {connection.status}: {connection.body()[:200]!r}")
    if files_of(trial.folder / "unpacked") != files_of(top):
        raise Failed("other files were unpacked than packed")
    shutil.rmtree(trial.folder / "unpacked")
    return [trial.scale.tree / window.seconds]
