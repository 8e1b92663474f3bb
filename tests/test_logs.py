"""What the log looks like, and that it holds nobody up."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from twisted.logger import ILogObserver, LogEvent, Logger
from twisted.python.failure import Failure

from sandboxd.daemon import logs
from sandboxd.daemon.logs import RotatedFile, as_bare_text, as_json_line, log_observer
from sandboxd.web.request import request_id
from tests.client import Api
from tests.daemon import SECRET, TWISTD, Daemon
from tests.waiting import until


def events(act: Callable[[Logger], object]) -> list[LogEvent]:
    """What is logged."""
    found: list[LogEvent] = []
    act(Logger("some.where", observer=cast(ILogObserver, found.append)))
    return found


def broken() -> Failure:
    try:
        raise ValueError("why")
    except ValueError:
        return Failure()


def test_an_event_as_json() -> None:
    (event,) = events(lambda log: log.warn("{n} of {what}\n", n=3, what="é", other=[1], data=b"x", log_x="y"))
    line = as_json_line(event)
    assert line.isascii()
    assert line.count("\n") == 1
    found = json.loads(line)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", found.pop("time"))
    expected = {"level": "warn", "logger": "some.where", "message": "3 of é\n", "n": 3, "what": "é"}
    assert found == expected


def test_a_failure_as_json() -> None:
    (event,) = events(lambda log: log.failure("it broke", broken()))
    found = json.loads(as_json_line(event))
    assert (found["message"], found["level"]) == ("it broke", "critical")
    assert "ValueError: why" in found["traceback"]


def test_an_event_that_cannot_be_formatted_is_written_all_the_same() -> None:
    (event,) = events(lambda log: log.info("{missing}", present=1))
    assert json.loads(as_json_line(event))["present"] == 1


@pytest.mark.parametrize("as_json", [False, True])
def test_the_journal_gets_priorities_and_no_times(as_json: bool) -> None:
    lines: list[bytes] = []
    observer = log_observer(logs.LogWriter(lines.append), logs.LogLevel.info, as_json=as_json, to_journal=True)
    log = Logger("some.where", observer=observer)
    log.debug("quiet")
    log.info("one")
    log.failure("it broke", broken())
    text = b"".join(lines).decode()
    priorities = re.findall(r"^<(\d)>", text, re.M)
    assert len(priorities) == text.count("\n")
    assert (priorities[0], set(priorities[1:])) == ("6", {"2"})
    assert "quiet" not in text
    assert as_json or not re.search(r"\d\d:\d\d:\d\d", text)


def test_bare_text_says_where_from() -> None:
    (event,) = events(lambda log: log.error("oh"))
    assert as_bare_text(event) == "[some.where#error] oh\n"


@pytest.mark.parametrize("given", [b"a", b"0af7651916cd43dd8448eb211c80319c", b"a-b_c.d/e:f@g=h+i~j", b"x" * 128])
def test_a_good_request_id_is_kept(given: bytes) -> None:
    assert request_id(given) == given


@pytest.mark.parametrize("given", [None, b"", b"x" * 129, b"a b", b"a\nb", b"a\n", b'"', b"\xc3\xa9", b"<b>"])
def test_a_bad_one_is_replaced_by_a_new_one(given: bytes | None) -> None:
    one, other = request_id(given), request_id(given)
    assert one != other
    assert request_id(one) == one != given


async def test_requests_are_logged_with_their_ids_and_without_what_is_private(
    start_daemon: Callable[..., Daemon],
) -> None:
    daemon = start_daemon("--log-format=json", "--access-log", SANDBOX_OPEN_METRICS="1")
    api = Api(daemon.url, SECRET)
    anybody = Api(daemon.url, None)
    calls: list[tuple[Any, int]] = [
        (api.post("/run?query=private-a", {"cmd": "echo private-b"}, {"X-Request-Id": "mine-1"}), 200),
        (api.get("/processes/some-id", {"X-Request-Id": "mine-2"}), 404),
        (anybody.post("/run", {"cmd": "echo private-c"}, {"X-Request-Id": "mine-3"}), 401),
        (api.get("/no%20such\u001b[1m", {"X-Request-Id": "private d"}), 404),
        (anybody.get("/metrics"), 200),
        (anybody.get("/metrics.json"), 200),
        (anybody.get("/health"), 200),
        (anybody.get("/status"), 401),
    ]
    ids = []
    for call, status in calls:
        response = await call
        assert response.status == status
        ids += response.headers.getRawHeaders("X-Request-Id")
    assert ids[:3] == ["mine-1", "mine-2", "mine-3"]
    assert len(set(ids)) == len(calls)
    assert daemon.stop() == 0
    text = daemon.log.read_text()
    assert "private" not in text
    assert SECRET not in text
    logged = {found["request_id"]: found for line in text.splitlines() if "request_id" in (found := json.loads(line))}
    assert [logged[id]["status"] for id in ids] == [status for _, status in calls]
    run = logged["mine-1"]
    assert (run["method"], run["path"], run["route"]) == ("POST", "/run", "/run")
    assert 0 < run["latency"] <= run["duration"] < 60
    assert run["sent"] > 0
    assert run["peer"].endswith("127.0.0.1")
    assert logged["mine-2"]["route"] == "/processes/<id>"
    assert logged[ids[3]]["path"].isprintable()


async def test_requests_are_not_logged_unless_that_is_asked_for(daemon: Daemon, api: Api) -> None:
    response = await api.get("/health", {"X-Request-Id": "unheard-of"})
    assert response.headers.getRawHeaders("X-Request-Id") == ["unheard-of"]
    assert "unheard-of" not in daemon.log.read_text()


@pytest.mark.slow
async def test_a_log_that_nobody_reads_holds_nobody_up(tmp_path: Path) -> None:
    environ = {**os.environ, "SANDBOX_SECRET": SECRET, "PORT": "0", "PROXY_PORT": "0", "LOG_FORMAT": "json"}
    process = subprocess.Popen(
        [sys.executable, TWISTD, "-n", "--pidfile=", "sandboxd", "--access-log"],
        cwd=tmp_path, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if found := re.search(rb"listens on port (\d+)", line):
                break
        api = Api(f"http://127.0.0.1:{int(found[1])}", None)  # type: ignore[index]
        for _ in range(60):  # more than a pipe holds
            assert (await api.get(f"/{'x' * 8000}")).status == 401
        assert (await api.get("/health")).status == 200
        process.send_signal(signal.SIGTERM)
        await until(lambda: process.poll() is not None, 15)
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate(timeout=5)


def test_a_log_file_is_opened_again_if_it_could_not_be_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = RotatedFile(str(tmp_path / "log"), 9)
    log.write(b"x" * 1_000_000)
    with monkeypatch.context() as full:
        full.setattr("twisted.python.logfile.open", refused, raising=False)
        for _ in range(2):
            with pytest.raises(OSError, match="No space"):
                log.write(b"lost\n")
    log.write(b"written\n")
    log.close()
    assert (tmp_path / "log").read_bytes() == b"written\n"
    assert (tmp_path / "log.1").stat().st_size == 1_000_000
