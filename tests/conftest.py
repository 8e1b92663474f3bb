"""Fixtures: the real daemon, and a client of it. Coroutine tests run in the reactor, each with a deadline."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from twisted.internet import reactor
from twisted.internet.defer import Deferred

from tests.client import Api
from tests.connection import Connection
from tests.daemon import Daemon

#: Seconds after which a coroutine test fails.
DEADLINE = float(os.environ.get("TEST_DEADLINE", "60"))

# A run in a script's background ignores SIGINT, as would all that the tests start and send it to.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: ``make fuzz``: many more examples than each run of the suite has time for.
settings.register_profile("fuzz", max_examples=5000, deadline=None, print_blob=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow, beside the tests that say so themselves, those that start daemons or ``sandboxctl``."""
    ctl = Path(__file__).with_name("ctl")
    for item in items:
        if "start_daemon" in getattr(item, "fixturenames", ()) or ctl in item.path.parents:
            item.add_marker("slow")


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    """Give every coroutine test a deadline: a Deferred that never fires would hang the run."""
    test = pyfuncitem.obj
    if inspect.iscoroutinefunction(test):

        @functools.wraps(test)
        def with_deadline(*args: object, **kwargs: object) -> Deferred[None]:
            return Deferred.fromCoroutine(test(*args, **kwargs)).addTimeout(DEADLINE, reactor)

        del with_deadline.__wrapped__
        pyfuncitem.obj = with_deadline


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests that do not need one of their own."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon"))
    yield daemon
    deadline = time.monotonic() + 5  # orphans are reaped once a second
    while zombies := daemon.zombies():
        assert time.monotonic() < deadline, f"zombies: {zombies}"
        time.sleep(0.1)
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


@pytest.fixture
def start_daemon(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Starts daemons that are stopped after the test: as :class:`Daemon` is made, less the folder."""
    started: list[Daemon] = []

    def start(*options: str, **keywords: Any) -> Daemon:
        folder = tmp_path / f"daemon{len(started)}"
        folder.mkdir()
        started.append(Daemon(folder, *options, **keywords))
        return started[-1]

    yield start
    for daemon in started:
        daemon.stop()


@pytest.fixture
def api(daemon: Daemon) -> Api:
    """A client of the shared daemon."""
    return Api(daemon.url, daemon.secret)


@pytest.fixture
def connection(daemon: Daemon) -> Iterator[Connection]:
    """A connection to the shared daemon."""
    connection = Connection(daemon)
    with connection.sock:
        yield connection


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small project."""
    top = tmp_path / "tree"
    for name in ("README.md", "src/a.py", "src/b.py", "src/lib/c.py", "src/lib/d.txt", ".git/config", "src/.hidden"):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"this is {name}\n")
    (top / "link").symlink_to("src")
    return top


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for 1 MiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, text=True, check=False, timeout=5
    )
    if mounted.returncode != 0:
        pytest.skip(f"NOT TESTED: cannot mount a small disk: {mounted.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True, timeout=5)


@pytest.fixture(autouse=True)
def _no_proxy_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that honour the environment's proxies must not send loopback traffic there."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
