"""Fixtures: the program, in an environment that knows the shared daemon."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

from tests.clients.cutting import CuttingProxy
from tests.daemon import Daemon

#: The program.
PROGRAM = [sys.executable, "-m", "sandboxd.ctl"]

Ctl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def environ(daemon: Daemon, tmp_path: Path) -> dict[str, str]:
    """The environment of the program."""
    names = ("PATH", "HOME", "LANG", "PYTHONPATH")
    own = {name: os.environ[name] for name in names if name in os.environ}
    return {
        **own,
        "SANDBOX_URL": daemon.url,
        "SANDBOX_SECRET": daemon.secret,
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "TERM": "xterm-256color",
    }


@pytest.fixture
def ctl(environ: dict[str, str]) -> Ctl:
    """Runs the program to its end: ``ctl("ps", "--json", input=..., env={...}, code=0)``."""

    def run(*arguments: str, code: int | None = 0, env: dict[str, str] | None = None, **keywords: Any) -> Any:
        keywords = {"text": True, "timeout": 60, "stdin": subprocess.DEVNULL, **keywords}
        if "input" in keywords:
            del keywords["stdin"]
        done = subprocess.run(
            [*PROGRAM, *arguments], env={**environ, **(env or {})}, capture_output=True, check=False, **keywords
        )
        if code is not None:
            assert done.returncode == code, done
        assert "Traceback" not in str(done.stderr), done.stderr
        return done

    return run


@pytest.fixture
def terminal(environ: dict[str, str]) -> Iterator[Callable[..., Any]]:
    """Runs the program in a pseudo-terminal: ``terminal("shell", env={...})`` is a pexpect child."""
    children: list[Any] = []

    def spawn(*arguments: str, env: dict[str, str] | None = None, **keywords: Any) -> Any:
        keywords = {"encoding": "utf-8", "timeout": 20, "dimensions": (40, 120), **keywords}
        child = pexpect.spawn(PROGRAM[0], [*PROGRAM[1:], *arguments], env={**environ, **(env or {})}, **keywords)
        children.append(child)
        return child

    yield spawn
    for child in children:
        child.close(force=True)


@pytest.fixture
def proxy(daemon: Daemon) -> Iterator[CuttingProxy]:
    """A proxy to the shared daemon."""
    proxy = CuttingProxy(daemon.port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """Fail a test that hangs: they block the reactor, whose own deadline cannot end them."""

    def over(signum: int, frame: object) -> None:
        raise TimeoutError("over 120 s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
