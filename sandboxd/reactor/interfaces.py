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
    """A reactor with everything that the daemon asks of one; Twisted's reactors on Linux have it."""
