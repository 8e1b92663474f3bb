"""Fixtures: a sandbox through each client, directly and through a proxy that cuts connections."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from sandboxd.client import Sandbox
from tests.clients.cutting import CuttingProxy
from tests.clients.over_asyncio import OverAsyncio
from tests.daemon import Daemon

#: Seconds after which a test fails.
DEADLINE = 60

#: The type that the tests take both clients for: the asyncio one is driven by an adapter that waits for each call.
AnySandbox = Sandbox


@pytest.fixture(autouse=True)
def _deadline() -> Iterator[None]:
    """Fail a test that hangs: they block the reactor, whose own deadline cannot end them."""

    def over(signum: int, frame: object) -> None:
        raise TimeoutError(f"over {DEADLINE} s")

    before = signal.signal(signal.SIGALRM, over)
    signal.alarm(DEADLINE)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(params=["blocking", "asyncio"])
def connect(request: pytest.FixtureRequest, daemon: Daemon) -> Iterator[Callable[..., AnySandbox]]:
    """Makes sandboxes, which are closed after the test: ``connect(url)``."""
    made: list[AnySandbox] = []

    def make(url: str = daemon.url, secret: str | None = daemon.secret, patience: float = 10.0) -> AnySandbox:
        make: Callable[..., AnySandbox] = Sandbox if request.param == "blocking" else OverAsyncio  # type: ignore[assignment]
        made.append(make(url, secret, patience=patience))
        return made[-1]

    yield make
    for sandbox in made:
        sandbox.close()


@pytest.fixture
def sandbox(connect: Callable[..., AnySandbox]) -> AnySandbox:
    """The shared daemon, through each client."""
    return connect()


@pytest.fixture
def proxy(daemon: Daemon) -> Iterator[CuttingProxy]:
    """A proxy to the shared daemon."""
    proxy = CuttingProxy(daemon.port)
    yield proxy
    proxy.close()
