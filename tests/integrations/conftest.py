"""Fixtures for the adapters: the real daemon, and what a module's docstring has people write."""

from __future__ import annotations

import importlib
import os
import re
import textwrap
from collections.abc import Callable, Iterator

import pytest

from tests.daemon import Daemon


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """
    A daemon for all tests.

    It is root, if the tests are, but has not the right to pass over the permissions of files, as the frameworks' tests
    expect of a sandbox.
    """
    via = ("setpriv", "--bounding-set=-dac_override,-dac_read_search") if os.geteuid() == 0 else ()
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), via=via)
    yield daemon
    assert daemon.stop() == 0
    assert "Traceback" not in daemon.log.read_text()


@pytest.fixture
def example(daemon: Daemon) -> Callable[..., str]:
    """Returns the code in the docstring of a module, the last unless another is asked for, for the shared daemon."""

    def find(module: str, which: int = -1) -> str:
        text = importlib.import_module(module).__doc__ or ""
        code = re.findall(r"::\n\n((?:    .*\n|\n)+)", text)[which]
        return textwrap.dedent(code).replace("http://localhost:3030", daemon.url).replace("your-secret", daemon.secret)

    return find


@pytest.fixture(autouse=True)
def _no_proxy_for_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that honour the environment's proxies must not send loopback traffic there."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
