"""The reactor's own loop, on a reactor and sockets of the test's."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
from twisted.internet.epollreactor import EPollReactor
from twisted.internet.error import ConnectionDone
from twisted.internet.protocol import Factory, Protocol
from twisted.internet.selectreactor import SelectReactor
from twisted.logger import capturedLogs
from twisted.python.failure import Failure

from sandboxd.reactor.polling import replace_poll


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
    replace_poll(reactor)
    yield reactor
    for selectable in reactor.removeAll():
        selectable.connectionLost(Failure(ConnectionDone()))
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
    replace_poll(reactor)
    assert "doIteration" not in vars(reactor)


class Recorder(Protocol):
    """Records what happens to it."""

    events: list[str]

    def connectionMade(self) -> None:
        self.events.append("accepted")

    def dataReceived(self, data: bytes) -> None:
        self.events.append(data.decode("ascii"))


def test_a_connection_is_accepted_first_and_its_request_is_read_in_the_same_turn(
    reactor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    monkeypatch.setattr(Recorder, "events", events, raising=False)
    factory = Factory.forProtocol(Recorder)
    factory.noisy = False
    port = reactor.listenTCP(0, factory, interface="127.0.0.1")
    mine, theirs = socket.socketpair()
    theirs.setblocking(False)
    reactor.adoptStreamConnection(theirs.fileno(), socket.AF_UNIX, factory)
    theirs.close()
    events.clear()
    mine.sendall(b"data of an older connection")
    with mine, socket.create_connection(("127.0.0.1", port.getHost().port)) as client:
        client.sendall(b"request")
        reactor.iterate(1)
    assert events == ["accepted", "data of an older connection", "request"]
