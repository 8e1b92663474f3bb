"""``GET /watch``: nothing that changes is lost, or it is said."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from twisted.internet.threads import deferToThread

from sandboxd.watch.changes import Change, ChangeBatch, ChangeLog, DroppedChanges
from sandboxd.watch.watcher import Watcher
from tests.client import Api, Event, Events
from tests.daemon import Daemon
from tests.waiting import until, within


class Watching:
    """An open watch that has said ``ready``."""

    def __init__(self, top: Path, stream: Events) -> None:
        self.top = top
        self.stream = stream
        self.events: AsyncIterator[Event] = aiter(stream)
        self.seen: list[Event] = []

    async def next(self) -> Event:
        event = await within(10, anext(self.events))
        self.seen.append(event)
        return event

    async def told(self) -> tuple[str, ...]:
        """The next event in short: its name, the paths in it from the top, and whether it is of a directory."""
        event = await self.next()
        paths = [event.data[key] for key in ("from", "path", "to") if key in event.data]
        return (event.name, *(os.path.relpath(path, self.top) for path in paths), event.data.get("type", ""))

    async def until_created(self, path: Path) -> list[Event]:
        """All events until that of the creation of ``path``."""
        first = len(self.seen)
        while not ((event := await self.next()).name == "created" and event.data["path"] == str(path)):
            pass
        return self.seen[first:-1]


async def watch(api: Api, top: Path, query: str = "", headers: dict[str, str] | None = None) -> Watching:
    stream = Events(await api.request("GET", f"/watch?path={quote(os.fsencode(top))}{query}", headers=headers))
    assert stream.status == 200
    watching = Watching(top, stream)
    ready = await watching.next()
    assert ready.name == "ready"
    return watching


async def test_ready_tells_what_is_watched(api: Api, tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("a")
    flat = await watch(api, tmp_path)
    assert flat.seen[0].data == {"path": str(tmp_path), "recursive": False, "directories": 1, "unreadable": 0}
    deep = await watch(api, tmp_path, "&recursive=true")
    assert deep.seen[0].data == {"path": str(tmp_path), "recursive": True, "directories": 3, "unreadable": 0}
    for watching in (flat, deep):
        watching.stream.close()


@pytest.mark.slow
async def test_what_happens_is_told_in_order(api: Api, tmp_path: Path) -> None:
    watching = await watch(api, tmp_path)
    (tmp_path / "f").write_text("text")
    assert await watching.told() == ("created", "f", "file")
    (tmp_path / "f").write_text("more")
    assert await watching.told() == ("modified", "f", "file")
    (tmp_path / "f").chmod(0o600)
    assert await watching.told() == ("modified", "f", "file")
    (tmp_path / "f").rename(tmp_path / "g")
    assert await watching.told() == ("moved", "f", "g", "file")
    (tmp_path / "d").mkdir()
    assert await watching.told() == ("created", "d", "dir")
    (tmp_path / "d").rename(tmp_path / "e")
    assert await watching.told() == ("moved", "d", "e", "dir")
    (tmp_path / "g").unlink()
    assert await watching.told() == ("deleted", "g", "file")
    (tmp_path / "e").rmdir()
    assert await watching.told() == ("deleted", "e", "dir")
    (tmp_path / "l").symlink_to("nowhere")
    assert await watching.told() == ("created", "l", "file")
    watching.stream.close()


async def test_without_recursive_only_the_directory_itself(api: Api, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    watching = await watch(api, tmp_path)
    (tmp_path / "d/inner").touch()
    (tmp_path / "end").touch()
    assert await watching.until_created(tmp_path / "end") == []
    watching.stream.close()


async def test_many_modifications_within_a_moment_are_one(api: Api, tmp_path: Path) -> None:
    watching = await watch(api, tmp_path)
    with (tmp_path / "f").open("w") as file:
        for _ in range(500):
            file.write("x")
            file.flush()
    (tmp_path / "end").touch()
    events = await watching.until_created(tmp_path / "end")
    assert events[0].name == "created"
    assert len(events) < 100
    watching.stream.close()


@pytest.mark.slow
async def test_five_thousand_changes_lose_none(api: Api, tmp_path: Path) -> None:
    for n in range(20):
        (tmp_path / f"d{n}").mkdir()
    watching = await watch(api, tmp_path, "&recursive=true")

    def change() -> None:
        for n in range(1250):
            path = tmp_path / f"d{n % 20}" / f"f{n}"
            path.write_text("text")
            path.rename(path.with_name(f"g{n}"))
            (path.with_name(f"g{n}")).write_text("more")
            (path.with_name(f"g{n}")).unlink()
        (tmp_path / "end").touch()

    thread = threading.Thread(target=change)
    thread.start()
    events = await watching.until_created(tmp_path / "end")
    thread.join()
    watching.stream.close()
    if any(event.name in ("overflow", "gap") for event in events):
        return
    told: dict[str, list[str]] = {}
    for event in events:
        for key in ("from", "to", "path"):
            if key in event.data and event.name != "modified":
                told.setdefault(event.data[key], []).append(event.name)
    for n in range(1250):
        old, new = (str(tmp_path / f"d{n % 20}" / f"{letter}{n}") for letter in "fg")
        assert (told[old], told[new]) == (["created", "moved"], ["moved", "deleted"])


async def test_new_directories_lose_nothing_of_what_is_put_into_them_at_once(api: Api, tmp_path: Path) -> None:
    watching = await watch(api, tmp_path, "&recursive=true")

    def change() -> set[str]:
        made = set()
        for n in range(60):
            for path in (tmp_path / f"{n}", tmp_path / f"{n}/a", tmp_path / f"{n}/a/b", tmp_path / f"{n}/c"):
                path.mkdir()
                made.add(str(path))
                for m in range(3):
                    (path / f"f{m}").touch()
                    made.add(str(path / f"f{m}"))
        (tmp_path / "end").touch()
        return made

    made = await deferToThread(change)
    created = [
        event.data["path"] for event in await watching.until_created(tmp_path / "end") if event.name == "created"
    ]
    assert sorted(created) == sorted(made)
    (tmp_path / "59/a/b/later").touch()
    await watching.until_created(tmp_path / "59/a/b/later")
    watching.stream.close()


async def test_a_moved_directory_takes_what_is_in_it_along(api: Api, tmp_path: Path) -> None:
    (tmp_path / "old/inner").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    watching = await watch(api, tmp_path, "&recursive=true")
    (tmp_path / "old").rename(tmp_path / "other/new")
    (tmp_path / "other/new/inner/f").touch()
    assert await watching.told() == ("moved", "old", "other/new", "dir")
    assert await watching.told() == ("created", "other/new/inner/f", "file")
    watching.stream.close()


async def test_what_is_moved_out_is_deleted_and_what_is_moved_in_is_created(api: Api, tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    (inside / "d/e").mkdir(parents=True)
    outside.mkdir()
    watching = await watch(api, inside, "&recursive=true")
    (inside / "d").rename(outside / "d")
    assert await watching.told() == ("deleted", "d", "dir")
    (outside / "d/e/f").touch()  # nobody's business any more
    (outside / "d").rename(inside / "back")
    assert sorted([await watching.told() for _ in range(3)]) == [
        ("created", "back", "dir"),
        ("created", "back/e", "dir"),
        ("created", "back/e/f", "file"),
    ]
    (inside / "back/e/g").touch()
    assert await watching.told() == ("created", "back/e/g", "file")
    watching.stream.close()


@pytest.mark.parametrize("how", ["after", "Last-Event-ID"])
async def test_resumes_where_it_broke_off(api: Api, tmp_path: Path, how: str) -> None:
    watching = await watch(api, tmp_path)
    (tmp_path / "one").touch()
    last = (await watching.next()).id or ""
    watching.stream.close()
    (tmp_path / "two").touch()
    (tmp_path / "three").touch()
    query, headers = (f"&after={last}", None) if how == "after" else ("", {"Last-Event-ID": last})
    again = await watch(api, tmp_path, query, headers)
    created = []
    while "three" not in created:
        event = await again.next()
        assert event.name in ("created", "modified")
        created += [os.path.basename(event.data["path"])] if event.name == "created" else []
    assert created == ["two", "three"]
    again.stream.close()


async def test_resuming_behind_ready_brings_all_since_then(api: Api, tmp_path: Path) -> None:
    watching = await watch(api, tmp_path)
    watching.stream.close()
    (tmp_path / "one").touch()
    again = await watch(api, tmp_path, f"&after={watching.seen[0].id}")
    assert await again.told() == ("created", "one", "file")
    again.stream.close()


async def test_what_cannot_be_had_any_more_is_told(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    daemon = start_daemon("--watch-linger", "1")
    api = Api(daemon.url, daemon.secret)
    watching = await watch(api, top)
    (top / "one").touch()
    last = (await watching.next()).id
    before = daemon.descriptors()
    watching.stream.close()
    await until(lambda: daemon.descriptors() < before - 1)  # the connection's, and then inotify's
    (top / "two").touch()
    again = await watch(api, top, f"&after={last}")
    gap = await again.next()
    assert (gap.name, gap.data) == ("gap", {"dropped": None})
    (top / "three").touch()
    assert await again.told() == ("created", "three", "file")
    stopped = deferToThread(daemon.stop)
    while (event := await again.next()).name != "end":
        pass
    assert event.data == {"reason": "stopped"}
    assert await stopped == 0


@pytest.mark.slow
async def test_a_reader_that_falls_behind_is_told_how_much_it_missed(api: Api, tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*["n" * 250] * 14)  # a log keeps fewer changes of long paths
    deep.mkdir(parents=True)
    watching = await watch(api, tmp_path, "&recursive=true")
    watching.stream.pause()

    def change() -> None:
        for n in range(3000):
            (deep / f"{n}").touch()
            (deep / f"{n}").unlink()
        (deep / "end").touch()

    other = await watch(api, tmp_path, "&recursive=true")
    await deferToThread(change)
    await other.until_created(deep / "end")
    watching.stream.resume()
    await watching.until_created(deep / "end")
    position = int(watching.seen[0].id or "")
    assert any(event.name == "gap" for event in watching.seen)
    for event in watching.seen[1:]:
        position += event.data["dropped"] if event.name == "gap" else 1
        assert int(event.id or "") == position
    for stream in (watching.stream, other.stream):
        stream.close()


@pytest.mark.slow
async def test_changes_that_the_kernel_has_lost_are_told(tmp_path: Path) -> None:
    limit = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    if limit > 100_000:
        pytest.skip(f"NOT TESTED: the kernel queues {limit} events")
    (tmp_path / "d").mkdir()
    watcher = Watcher(lambda: os.open(tmp_path, os.O_PATH), recursive=True)
    watcher.begin()
    for n in range(limit // 2 + 2):
        (tmp_path / "d" / f"{n % 7}").touch()
        (tmp_path / "d" / f"{n % 7}").unlink()
    (tmp_path / "d/new").mkdir()
    changes: list[Change] = []
    more = True
    while more:
        found, more = watcher.step()
        changes += found
    assert changes[-1].kind == "overflow"
    (tmp_path / "d/new/f").touch()  # it is followed though its creation was not told
    assert [change.kind for change in watcher.step()[0]][:1] == ["created"]
    watcher.close()


@pytest.mark.parametrize("recursive", [False, True])
@pytest.mark.parametrize(("how", "reason"), [("remove", "deleted"), ("move", "moved")])
async def test_the_end_of_what_is_watched(api: Api, tmp_path: Path, how: str, reason: str, recursive: bool) -> None:
    top = tmp_path / "top"
    (top / "d").mkdir(parents=True)
    watching = await watch(api, top, f"&recursive={recursive}")
    if how == "remove":
        shutil.rmtree(top)
    else:
        top.rename(tmp_path / "elsewhere")
    while (event := await watching.next()).name != "end":
        pass
    assert event.data == {"reason": reason}
    with pytest.raises(StopAsyncIteration):
        await anext(watching.events)


async def test_a_file_is_watched_through_its_replacement(api: Api, tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.touch()
    watching = await watch(api, path)
    watching.top = tmp_path
    (tmp_path / "other").touch()
    path.write_text("text")
    assert await watching.told() == ("modified", "f", "file")
    (tmp_path / "other").rename(path)
    assert await watching.told() == ("created", "f", "file")
    path.unlink()
    assert await watching.told() == ("deleted", "f", "file")
    watching.stream.close()


async def test_names_that_are_not_utf8(api: Api, tmp_path: Path) -> None:
    top = Path(os.fsdecode(bytes(tmp_path) + b"/\xff"))
    top.mkdir()
    watching = await watch(api, top)
    (top / os.fsdecode(b"\xfe\xe2\x82")).touch()
    event = await watching.next()
    assert os.fsencode(event.data["path"]) == bytes(tmp_path) + b"/\xff/\xfe\xe2\x82"
    assert watching.stream.raw.isascii()
    watching.stream.close()


async def test_what_is_excluded_is_not_told(api: Api, tmp_path: Path) -> None:
    (tmp_path / "node_modules/m").mkdir(parents=True)
    (tmp_path / "src").mkdir()
    watching = await watch(api, tmp_path, "&recursive=true&exclude=node_modules&exclude=src/*.o")
    assert watching.seen[0].data["directories"] == 2
    (tmp_path / "node_modules/m/f").touch()
    (tmp_path / "node_modules/f").touch()
    (tmp_path / "src/f.o").touch()
    (tmp_path / "src/f.c").touch()
    assert await watching.told() == ("created", "src/f.c", "file")
    (tmp_path / "src/f.o").rename(tmp_path / "src/g")
    assert await watching.told() == ("created", "src/g", "file")
    watching.stream.close()


async def test_bad_requests(api: Api, tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    missing = await api.get(f"/watch?path={tmp_path}/missing")
    assert missing.status == 404
    assert missing.json() == {"error": f"watch {tmp_path}/missing: no such file or directory"}
    assert (await api.get(f"/watch?path={tmp_path}/f/g")).status in (404, 409)
    for query in ("", "?path=", f"?path={tmp_path}&after=x", f"?path={tmp_path}&exclude=..", "?path=%00"):
        response = await api.get(f"/watch{query}")
        assert response.status == 400, response
        assert set(response.json()) == {"error"}


async def test_too_many_watches(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = start_daemon("--max-watches", "2")
    api = Api(daemon.url, daemon.secret)
    for name in "abc":
        (tmp_path / name).mkdir()
    first, _second = [await watch(api, tmp_path / name) for name in "ab"]
    shared = await watch(api, tmp_path / "a")
    response = await api.get(f"/watch?path={tmp_path}/c")
    assert response.status == 503
    assert "limit" in response.json()["error"]
    first.stream.close()
    shared.stream.close()

    async def third() -> Any:
        events = Events(await api.request("GET", f"/watch?path={tmp_path}/c"))
        events.close()
        return events.status == 200

    while not await within(5, third()):  # as soon as one has no client
        pass


async def test_a_client_that_leaves_before_ready_leaves_nothing(daemon: Daemon, tmp_path: Path) -> None:
    head = f"GET /watch?path={tmp_path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {daemon.secret}\r\n\r\n"
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", daemon.port)) as sock:
            sock.sendall(head.encode())
    api = Api(daemon.url, daemon.secret)
    watching = await watch(api, tmp_path)
    (tmp_path / "f").touch()
    assert await watching.told() == ("created", "f", "file")
    watching.stream.close()


# The parts


NAMES = st.sampled_from([b"a", b"b", b"a/c"])
CHANGES = st.one_of(
    st.builds(Change, st.sampled_from(["created", "modified", "deleted"]), NAMES),
    st.builds(lambda path, origin: Change("moved", path, False, origin), NAMES, NAMES),
)


@settings(deadline=None)
@given(st.lists(CHANGES))
def test_a_batch_leaves_out_nothing_but_modifications_of_what_was_just_told(changes: list[Change]) -> None:
    batch = ChangeBatch()
    for change in changes:
        batch.add(change)
    taken = batch.take()
    assert [c for c in taken if c.kind != "modified"] == [c for c in changes if c.kind != "modified"]
    left = iter(taken)
    assert all(change in left for change in taken)
    for index, change in enumerate(changes):
        if change.kind == "modified":
            assert any(c.path == change.path and c.kind in ("created", "modified") for c in changes[: index + 1])
    assert batch.take() == []


@settings(deadline=None)
@given(st.lists(st.integers(0, 9)), st.integers(0, 60))
def test_a_log_gives_each_change_once_or_tells_how_many_are_gone(batches: list[int], start: int) -> None:
    log = ChangeLog(10, max_changes=7)
    for size in batches:
        log.append([Change("created", b"%d" % (log.next + n)) for n in range(size)])
    position, found = log.read(start, 3)
    if not 10 <= start <= log.next:
        assert found == DroppedChanges(None)
    elif isinstance(found, DroppedChanges):
        assert found == DroppedChanges(position - start)
        assert start < position == log.next - 7
    while position < log.next:
        behind, found = log.read(position, 3)
        assert isinstance(found, list)
        assert [change.path for change in found] == [b"%d" % n for n in range(position, behind)]
        assert 0 < behind - position <= 3
        position = behind


# Moves, in an order that only the kernel's queue has


def follow_all(top: Path, act: Callable[[], object]) -> tuple[Watcher, list[Change]]:
    """All changes of some acts that are over when the watcher looks."""
    watcher = Watcher(lambda: os.open(top, os.O_PATH | os.O_DIRECTORY), True, None, None)
    watcher.begin()
    act()
    changes: list[Change] = []
    while True:
        found, more = watcher.step()
        changes += found
        if not found and not more:
            return watcher, changes


def last_kinds(changes: list[Change]) -> dict[bytes, str]:
    """The last event of each name; of a move both names have one."""
    found: dict[bytes, str] = {}
    for change in changes:
        if change.origin is not None:
            found[change.origin] = "moved away"
        found[change.path] = change.kind
    return found


def test_a_name_that_is_made_anew_after_a_move_away_is_there_in_the_end(tmp_path: Path) -> None:
    top = tmp_path / "top"
    top.mkdir()
    (top / "f").write_text("old")

    def act() -> None:
        (top / "f").rename(tmp_path / "elsewhere")
        (top / "f").write_text("new")

    watcher, changes = follow_all(top, act)
    watcher.close()
    assert last_kinds(changes)[b"f"] in ("created", "modified")


def test_a_directory_that_replaces_another_is_still_watched(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "a").mkdir(parents=True)

    def act() -> None:
        (top / "new").mkdir()
        (top / "new" / "b").mkdir()
        (top / "a").rename(top / "new" / "b")

    watcher, changes = follow_all(top, act)
    (top / "new" / "b" / "f").write_text("text")
    found, _ = watcher.step()
    watcher.close()
    assert b"new/b/f" in {change.path for change in found}, changes


def test_a_directory_that_moves_into_a_new_one_is_still_watched(tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "a" / "inner").mkdir(parents=True)

    def act() -> None:
        (top / "new").mkdir()
        (top / "a").rename(top / "new" / "a")

    watcher, _ = follow_all(top, act)
    for name in ("f", "inner/f"):
        (top / "new" / "a" / name).write_text("text")
        found, _ = watcher.step()
        assert f"new/a/{name}".encode() in {change.path for change in found}
    watcher.close()


def test_a_new_directory_that_cannot_be_watched_for_want_of_descriptors_is_reported(tmp_path: Path) -> None:
    refused = False

    def opened() -> int:
        if refused:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return os.open(tmp_path, os.O_PATH | os.O_DIRECTORY)

    watcher = Watcher(opened, True, None, None)
    watcher.begin()
    (tmp_path / "new").mkdir()
    refused = True
    changes, _ = watcher.step()
    watcher.close()
    assert [(change.kind, change.path) for change in changes] == [("created", b"new"), ("overflow", b"new")]
