"""A daemon that is claimed, and tokens that change while it runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from twisted.internet.defer import gatherResults

from tests.client import Api, Response
from tests.daemon import SECRET, Daemon
from tests.test_daemon import IN_FOREGROUND, assert_refused, twistd
from tests.waiting import until

CLAIMERS = 20


def claims(daemon: Daemon, tokens: list[str], path: str, body: Any) -> Any:
    """What each token gets that is sent at the same time as the others."""
    from twisted.internet.defer import Deferred

    return gatherResults([Deferred.fromCoroutine(Api(daemon.url, token).post(path, body)) for token in tokens])


async def test_one_of_many_claims_it_for_ever(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    secret, marks = tmp_path / "state" / "secret", tmp_path / "marks"
    pool = {"SANDBOX_SECRET": "", "SANDBOX_AUTH_MODE": "pool", "SANDBOX_SECRET_PATH": str(secret), "LOG_LEVEL": "debug"}
    daemon = start_daemon(**pool)
    probe = Api(daemon.url, "not-to-be-remembered")
    assert (await probe.get("/health")).status == 200
    for path in ("/status", "/openapi.json", "/koyeb-sandbox/status", "/no-such-route"):
        assert (await probe.get(path)).status == 401
    for headers in ({}, {"Authorization": "Bearer"}, {"Authorization": "Basic eDp5"}, {"Authorization": "Bearer ä"}):
        assert (await Api(daemon.url, None).post("/run", {"cmd": "true"}, headers)).status == 401
    assert not secret.exists()

    tokens = [f"a-token-of-a-claimer-{number}" for number in range(CLAIMERS)]
    answers: list[Response] = await claims(daemon, tokens, "/koyeb-sandbox/run", {"cmd": f"echo ran >> {marks}"})
    (winner,) = [token for token, answer in zip(tokens, answers, strict=True) if answer.status == 200]
    assert [answer.status for answer in answers].count(401) == CLAIMERS - 1
    assert marks.read_text() == "ran\n"
    assert secret.read_text() == f"{winner}\n"
    assert secret.stat().st_mode & 0o777 == 0o600
    stdout = (await Api(daemon.url, winner).run("env"))["stdout"]
    assert str(secret) not in stdout
    assert winner not in stdout

    assert daemon.stop() == 0
    assert not any(token in daemon.log.read_text() for token in tokens)
    daemon = start_daemon(**pool)
    for token in [*tokens[:3], winner]:
        expected = 200 if token == winner else 401
        assert (await Api(daemon.url, token).post("/list_dir", {"path": "/"})).status == expected


async def test_nothing_is_claimed_by_a_token_that_cannot_be_stored(
    start_daemon: Callable[..., Daemon], tmp_path: Path
) -> None:
    blocker = tmp_path / "blocker"
    blocker.touch()
    secret = blocker / "secret"
    daemon = start_daemon(SANDBOX_SECRET="", SANDBOX_AUTH_MODE="pool", SANDBOX_SECRET_PATH=str(secret))
    answers: list[Response] = await claims(daemon, ["first-to-try", "second-to-try"], "/run", {"cmd": "true"})
    for answer in answers:
        assert answer.status == 503
        assert "stored" in answer.json()["error"]
    await until(lambda: "could not be claimed" in daemon.log.read_text())  # the log is written by a thread
    log = daemon.log.read_text()
    assert str(blocker) in log
    assert "to-try" not in log
    blocker.unlink()
    same = ["third-to-try"] * 3
    answers = await claims(daemon, same, "/run", {"cmd": "true"})
    assert [answer.status for answer in answers] == [200] * 3
    assert (await Api(daemon.url, "first-to-try").get("/port_status")).status == 401
    assert secret.read_text() == "third-to-try\n"


def test_a_secret_and_pool_are_refused_together(tmp_path: Path) -> None:
    ended = twistd(tmp_path, *IN_FOREGROUND, "sandboxd", SANDBOX_SECRET=SECRET, SANDBOX_AUTH_MODE="pool")
    assert_refused(ended, "SANDBOX_SECRET", "pool")


async def test_tokens_are_rotated_by_sighup(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    credential = tmp_path / "sandbox-secret"
    credential.write_text("the-old-token\n")
    daemon = start_daemon(SANDBOX_SECRET="", CREDENTIALS_DIRECTORY=str(tmp_path), LOG_LEVEL="debug")
    reloads = 0

    async def reload(text: str | None) -> set[str]:
        """The tokens that are accepted after a change of the file and a SIGHUP."""
        nonlocal reloads
        reloads += 1
        credential.unlink() if text is None else credential.write_text(text)
        os.kill(daemon.pid, signal.SIGHUP)
        await until(lambda: daemon.log.read_text().count("the tokens") == reloads)
        tokens = ("the-old-token", "the-new-token")
        return {token for token in tokens if (await Api(daemon.url, token).get("/port_status")).status == 200}

    assert await reload("the-old-token\n") == {"the-old-token"}
    assert await reload("the-new-token\nthe-old-token\n") == {"the-old-token", "the-new-token"}
    assert await reload("the-new-token\n") == {"the-new-token"}
    for bad in ("", "the-old-token with a space", None):
        assert await reload(bad) == {"the-new-token"}
        assert "could not be reloaded" in daemon.log.read_text()
    stdout = (await Api(daemon.url, "the-new-token").run("env"))["stdout"]
    assert str(tmp_path) not in stdout.replace(f"PWD={tmp_path}", "")
    assert daemon.stop() == 0
    log = daemon.log.read_text()
    assert "the-old-token" not in log
    assert "the-new-token" not in log
