"""The reactor's loop without log contexts, on a reactor and sockets of its own."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.selectreactor import SelectReactor
from twisted.logger import capturedLogs

from sandboxd.reactor.polling import poll_without_log_context


class Echo(Protocol):
    """Sends back what it gets; fails at ``fail``."""

    lost = 0

    def dataReceived(self, data: bytes) -> None:
        if data == b"fail":
            raise RuntimeError("a fault in dataReceived")
        assert self.transport is not None
        self.transport.write(data)

    def connectionLost(self, reason: object = None) -> None:
        Echo.lost += 1
        raise RuntimeError("a fault in connectionLost")


@pytest.fixture
def reactor() -> Iterator[Any]:
    reactor: Any = EPollReactor()
    poll_without_log_context(reactor)
    yield reactor
    reactor.removeAll()
    reactor._poller.close()
    if reactor.waker is not None:
        reactor.waker.connectionLost(None)


def test_events_are_handled_and_faults_are_logged_and_close_the_connection(reactor: Any) -> None:
    mine, theirs = socket.socketpair()
    theirs.setblocking(False)
    reactor.adoptStreamConnection(theirs.fileno(), socket.AF_UNIX, Factory.forProtocol(Echo))
    theirs.close()
    with mine:
        mine.settimeout(5)
        mine.sendall(b"hello")
        reactor.iterate(1)
        reactor.iterate(1)
        assert mine.recv(100) == b"hello"
        mine.sendall(b"fail")
        with capturedLogs() as logs:
            reactor.iterate(1)
        text = "".join(str(event.get("log_failure") or event.get("failure")) for event in logs)
        assert "a fault in connectionLost" in text  # Twisted's own code has logged the other
        assert mine.recv(100) == b""
    assert Echo.lost == 1


def test_another_reactor_stays_as_it_is() -> None:
    reactor: Any = SelectReactor.__new__(SelectReactor)
    poll_without_log_context(reactor)
    assert "doIteration" not in vars(reactor)
