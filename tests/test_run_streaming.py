"""``POST /run_streaming``: a command whose output is an event stream."""

from __future__ import annotations

import os
import random
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.threads import deferToThread

from tests.client import Api, Event, Events
from tests.daemon import Daemon, alive
from tests.waiting import HARD, gone, hard_to_end, pids_in, settled, until, within

MEGABYTES_100 = 100_000_000

#: Bytes that the daemon may need, beyond what it has, for a stream of any size.
MEMORY = 48 * 1024 * 1024

COMPLETE = ("complete", {"code": 0, "error": False})


async def events_of(api: Api, cmd: str, **fields: Any) -> list[tuple[str, Any]]:
    """Name and data of every event of a command."""
    return [(event.name, event.data) for event in await (await api.stream(cmd, **fields)).all()]


def output(stream: str, data: str) -> tuple[str, Any]:
    return "output", {"stream": stream, "data": data}


async def lines_of(stream: Events, name: str = "stdout") -> tuple[list[str], Event]:
    """The whole lines of one output stream, pieces joined; and the last event."""
    lines, pieces, event = [], [], None
    async for event in stream:
        if event.name == "output" and event.data["stream"] == name:
            pieces.append(event.data["data"])
            if not event.data.get("partial"):
                lines.append("".join(pieces))
                pieces = []
    assert event is not None
    assert not pieces
    return lines, event


# Events


async def test_lines_then_one_complete(api: Api) -> None:
    assert await events_of(api, "echo one; echo two") == [output("stdout", "one"), output("stdout", "two"), COMPLETE]


async def test_stderr_is_told_apart(api: Api) -> None:
    assert await events_of(api, "echo bad >&2") == [output("stderr", "bad"), COMPLETE]


async def test_failure(api: Api) -> None:
    assert await events_of(api, "exit 3") == [("complete", {"code": 3, "error": True})]


async def test_death_by_signal(api: Api) -> None:
    assert await events_of(api, "kill -9 $$") == [("complete", {"code": -1, "error": True, "signal": "SIGKILL"})]


async def test_empty_command(api: Api) -> None:
    assert await events_of(api, "") == [COMPLETE]


async def test_line_ends_are_not_part_of_lines(api: Api) -> None:
    events = await events_of(api, r"printf 'a\r\n\nb\rc\r\r\n  d \n\r\nlast'")
    assert [event[1].get("data") for event in events] == ["a", "", "b\rc\r", "  d ", "", "last", None]


async def test_backslashes_and_quotes(api: Api) -> None:
    text = '\\n "\\" \\\\n \\u000a'
    assert await events_of(api, f"cat <<'E'\n{text}\nplain\nE") == [
        output("stdout", text),
        output("stdout", "plain"),
        COMPLETE,
    ]


async def test_any_bytes(api: Api, tmp_path: Path) -> None:
    random_bytes = random.Random(1)
    alphabet = [b"\n", b"\r", b"\r\n", b"\\", b"\\n", b'"', b"\0", b"\x1b", b"\xff", b"\xf0\x9f", "é\u2028😀".encode()]
    content = b"".join(random_bytes.choice(alphabet) for _ in range(50_000))
    (tmp_path / "bytes").write_bytes(content + b"\n")
    lines, last = await lines_of(await api.stream(f"cat {tmp_path}/bytes"))
    expected = [line.removesuffix(b"\r").decode("utf-8", "replace") for line in content.split(b"\n")]
    assert lines == expected
    assert (last.name, last.data) == COMPLETE


async def test_a_line_comes_when_it_is_written(api: Api) -> None:
    stream = await api.stream("echo $$; sleep 300")
    first = await anext(aiter(stream))
    assert alive(int(first.data["data"]))
    stream.close()
    await gone([int(first.data["data"])])


async def test_the_headers_come_before_any_output(api: Api) -> None:
    stream = await within(3, api.stream("sleep 300"))
    assert stream.status == 200
    assert stream.headers.getRawHeaders("Content-Type")[0].startswith("text/event-stream")
    stream.close()


async def test_framing(api: Api) -> None:
    stream = await api.stream("echo one; echo two >&2; printf three")
    await stream.all()
    assert stream.raw.endswith(b"\n\n")
    assert b"\r" not in stream.raw
    for block in stream.raw.decode("ascii").removesuffix("\n\n").split("\n\n"):
        fields = [line.partition(": ")[0] for line in block.split("\n") if not line.startswith(":")]
        assert fields.count("event") == fields.count("data") == 1
        assert set(fields) <= {"event", "data", "id"}


async def test_the_stream_is_ascii(api: Api) -> None:
    stream = await api.stream(r"printf '\302\205 \342\200\250 \360\237\230\200 \377\n'")
    lines, _ = await lines_of(stream)
    assert lines == ["\u0085 \u2028 \U0001f600 \ufffd"]
    assert stream.raw.isascii()


async def test_no_event_carries_more_than_one_telling_key(api: Api) -> None:
    stream = await api.stream("head -c 100000 /dev/zero; echo; echo bad >&2; exit 4")
    for event in await stream.all():
        assert len({"stream", "code"} & set(event.data)) == 1
        assert ("error" in event.data) == (event.name == "complete")


async def test_a_command_that_cannot_be_started_is_an_error_event(api: Api) -> None:
    events = await events_of(api, "true", env={"X": "x" * 200_000})
    assert [name for name, _ in events] == ["error", "complete"]
    assert set(events[0][1]) == {"error"}
    assert events[1][1]["code"] != 0
    assert events[1][1]["error"] is True


async def test_errors_before_the_start_are_no_streams(api: Api) -> None:
    for body in (b"{", {"cmd": "echo hi", "cwd": "/no/such/folder"}, {"cmd": 1}):
        response = await api.post("/run_streaming", body)
        assert response.status == 400
        assert len(response.json()["error"]) < 200


@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
async def test_both_prefixes(api: Api, prefix: str) -> None:
    stream = Events(await api.request("POST", f"{prefix}/run_streaming", {"cmd": "echo hi"}))
    assert (await lines_of(stream))[0] == ["hi"]


async def test_surroundings_are_those_of_run(api: Api, tmp_path: Path) -> None:
    stream = await api.stream("pwd; echo $A; readlink /proc/self/fd/0", cwd=str(tmp_path), env={"A": "b"})
    assert (await lines_of(stream))[0] == [str(tmp_path), "b", "/dev/null"]


# Long lines


@pytest.mark.parametrize(
    ("make", "character"),
    [
        ("head -c 200000 /dev/zero | tr '\\0' x", "x"),
        ("head -c 200000 /dev/zero", "\0"),
        ("head -c 200000 /dev/zero | tr '\\0' '\\377'", "\ufffd"),
        ("yes 😀 | head -n 200000 | tr -d '\\n'", "😀"),
        ("yes é | head -n 200000 | tr -d '\\n'", "é"),
        ("yes '\\' | head -n 200000 | tr -d '\\n'", "\\"),
    ],
)
async def test_a_long_line_comes_in_pieces_that_clients_can_take(api: Api, make: str, character: str) -> None:
    stream = await api.stream(f"{make}; echo; echo next")
    data = [chunk async for chunk in stream.chunks()]
    assert max(len(line) for line in b"".join(data).split(b"\n")) < 65_536
    lines, last = await lines_of(await api.stream(f"{make}; echo; echo next"))
    assert lines == [character * 200_000, "next"]
    assert (last.name, last.data) == COMPLETE


async def test_all_pieces_but_the_last_are_partial(api: Api) -> None:
    events = await events_of(api, "head -c 200000 /dev/zero | tr '\\0' x; echo; echo short")
    *pieces, last_piece, short, _ = [data for _, data in events]
    assert pieces
    assert all(piece.get("partial") is True for piece in pieces)
    assert "partial" not in last_piece
    assert "partial" not in short


@pytest.mark.parametrize("size", [10_239, 10_240, 10_241, 65_535, 65_536, 65_537])
async def test_lines_of_awkward_sizes(api: Api, tmp_path: Path, size: int) -> None:
    (tmp_path / "lines").write_text(f"{'a' * size}\r\n{'b' * size}\n{'c' * size}")
    lines, _ = await lines_of(await api.stream(f"cat {tmp_path}/lines"))
    assert lines == [letter * size for letter in "abc"]


# The end


async def test_complete_comes_when_sh_has_exited_and_its_children_live_on(api: Api) -> None:
    lines, last = await within(3, lines_of(await api.stream("sleep 300 & echo $!")))
    assert (last.name, last.data) == COMPLETE
    assert alive(int(lines[0]))
    os.kill(int(lines[0]), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [1, 0.3])
async def test_timeout_kills_the_whole_tree(api: Api, tmp_path: Path, timeout: float) -> None:
    cmd, file = hard_to_end(tmp_path)
    events = await within(timeout + 5, events_of(api, "echo out;" + cmd, timeout=timeout))
    assert events == [
        output("stdout", "out"),
        ("complete", {"code": -1, "error": True, "timed_out": True, "signal": "SIGKILL"}),
    ]
    await gone(await pids_in(file, HARD))


async def test_disconnect_ends_the_whole_tree(api: Api, tmp_path: Path) -> None:
    cmd, file = hard_to_end(tmp_path)
    stream = await api.stream(cmd)
    pids = await pids_in(file, HARD)
    assert all(map(alive, pids))
    stream.close()
    await gone(pids)


@pytest.mark.slow
async def test_disconnect_of_a_client_that_does_not_read_ends_a_busy_tree(api: Api, tmp_path: Path) -> None:
    stream = await api.stream(f"echo $$ > {tmp_path}/pid; exec yes")
    stream.pause()
    (pid,) = await pids_in(tmp_path / "pid")
    await settled(lambda: written(pid))
    stream.close()
    await gone([pid])


async def test_complete_comes_also_when_the_daemon_stops(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon()
    stream = await Api(daemon.url, daemon.secret).stream("echo $$; sleep 300")
    events = aiter(stream)
    pid = int((await anext(events)).data["data"])
    stopped = deferToThread(daemon.stop)
    rest = [(event.name, event.data) async for event in events]
    assert rest == [("complete", {"code": -1, "error": True, "signal": "SIGTERM"})]
    assert await stopped == 0
    assert not alive(pid)


# Much output


def written(pid: int) -> int:
    """Bytes that a process has written so far."""
    found = re.search(r"^wchar: (\d+)", Path(f"/proc/{pid}/io").read_text(), re.M)
    assert found
    return int(found[1])


@pytest.mark.slow
async def test_stderr_over_a_pipes_size_before_stdout(api: Api) -> None:
    stream = await api.stream("seq 1 200000 >&2; echo out")
    events = await within(10, stream.all())
    assert [event.data["data"] for event in events if event.data.get("stream") == "stderr"] == [
        str(n) for n in range(1, 200_001)
    ]
    assert events[-1].name == "complete"


async def test_a_million_lines_take_seconds(api: Api) -> None:
    async def count() -> int:
        return sum([chunk.count(b"event: ") async for chunk in (await api.stream("seq 1 1000000")).chunks()])

    # A chunk border can fall inside "event: ", but in few of the million.
    assert await within(10, count()) > 990_000


@pytest.mark.slow
async def test_100_megabytes_of_lines_and_little_memory(api: Api, daemon: Daemon) -> None:
    daemon.reset_peak()
    before = daemon.memory()
    text = "0123456789" * 100
    stream = await api.stream(f"yes {text} | head -n 100000")
    lines, last = await within(30, lines_of(stream))
    assert len(lines) == 100_000
    assert set(lines) == {text}
    assert (last.name, last.data) == COMPLETE
    assert daemon.peak_memory() - before < MEMORY


@pytest.mark.slow
async def test_100_megabytes_in_one_line_and_little_memory(api: Api, daemon: Daemon) -> None:
    daemon.reset_peak()
    before = daemon.memory()
    lines, last = await within(30, lines_of(await api.stream(f"head -c {MEGABYTES_100} /dev/zero | tr '\\0' x")))
    assert lines == ["x" * MEGABYTES_100]
    assert (last.name, last.data) == COMPLETE
    assert daemon.peak_memory() - before < MEMORY


@pytest.mark.slow
async def test_a_slow_client_pauses_the_command_and_loses_nothing(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    size = 50_000
    file = tmp_path / "file"
    file.write_text("".join(f"{n:0999}\n" for n in range(size)))
    daemon.reset_peak()
    before = daemon.memory()
    stream = await api.stream(f"echo $$ > {tmp_path}/pid; exec dd bs=64k status=none if={file}")
    stream.pause()
    (pid,) = await pids_in(tmp_path / "pid")
    await until(lambda: written(pid) > 0)
    assert await settled(lambda: written(pid)) < file.stat().st_size
    assert alive(pid)
    stream.resume()
    lines, last = await within(30, lines_of(stream))
    assert lines == file.read_text().splitlines()
    assert (last.name, last.data) == COMPLETE
    assert daemon.peak_memory() - before < MEMORY


@pytest.mark.slow
async def test_hanging_up_on_an_ended_command_leaves_what_it_left_behind(api: Api) -> None:
    """All its output is in the log, and the client, which reads nothing, has yet to be sent it."""
    stream = await api.stream("sleep 300 >&- 2>&- & echo $!; yes | head -c 400000")
    (id,) = stream.headers.getRawHeaders("X-Execution-Id")
    pid = int((await anext(aiter(stream))).data["data"])
    stream.pause()
    try:
        waited = await within(10, api.post(f"/processes/{id}/wait", {"timeout": 5}))
        assert waited.json()["status"] == "completed"
        stream.close()
        while (await api.get(f"/processes/{id}")).json()["output"]["followers"]:
            pass
        assert await settled(lambda: alive(pid), still=0.5)
    finally:
        os.kill(pid, signal.SIGKILL)
