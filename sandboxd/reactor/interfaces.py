"""The reactor interfaces that the daemon is built on, as one type for annotations."""

from __future__ import annotations

from twisted.internet.interfaces import (
    IReactorCore,
    IReactorFDSet,
    IReactorSocket,
    IReactorTCP,
    IReactorThreads,
    IReactorTime,
)


class Reactor(IReactorCore, IReactorFDSet, IReactorSocket, IReactorTCP, IReactorThreads, IReactorTime):
    """A reactor with all interfaces that the daemon uses; Twisted's reactors on Linux provide them."""
