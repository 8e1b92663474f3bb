"""
The two protocols of a service manager: socket activation, sd_listen_fds(3), and notification, sd_notify(3).

Written out here because they are small, and because the daemon decides for itself what blocks and what may fail.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, Sequence

from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall
from twisted.logger import Logger

#: The first descriptor that is passed on, SD_LISTEN_FDS_START.
FIRST_FD = 3


class ActivationError(Exception):
    """The sockets that the service manager has passed cannot be used. The text says why."""


def inherited_sockets(environ: Mapping[str, str], names: Sequence[str]) -> dict[str, list[socket.socket]]:
    """
    Return the listening sockets that the service manager has opened for this process, by name.

    Takes the descriptors: they are not inherited by children from now on. If none has a name of ours, which is so
    when FileDescriptorName= was not set, they are taken in the order of ``names``, one for each.

    :param names: the valid names.
    :raise ActivationError: if one has another name, or is no stream socket that listens.
    """
    found: dict[str, list[socket.socket]] = {name: [] for name in names}
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return found
    count = environ.get("LISTEN_FDS", "")
    if not (count.isascii() and count.isdigit() and len(count) <= 4):
        raise ActivationError(f"LISTEN_FDS: {count[:20]!r} is not a number of descriptors")
    called = [*environ.get("LISTEN_FDNAMES", "").split(":"), *[""] * int(count)][: int(count)]
    if not set(called) & set(names) and len(called) <= len(names):
        called = [*names][: len(called)]
    for fd, name in enumerate(called, FIRST_FD):
        if name not in found:
            raise ActivationError(f"a socket is called {name!r}; FileDescriptorName= must be one of {', '.join(names)}")
        found[name].append(_listening(fd))
    return found


def _listening(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
        listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise ActivationError(f"descriptor {fd} of LISTEN_FDS: {error.strerror}") from None
    if not listens:
        sock.close()
        raise ActivationError(f"descriptor {fd} of LISTEN_FDS is no stream socket that listens; Accept= must be no")
    sock.set_inheritable(False)
    return sock


class ServiceManager:
    """
    The service manager that has set NOTIFY_SOCKET, to which the daemon's state is sent. Without one nothing is sent.

    :param environ: the daemon's environment.
    :param reactor: its timer feeds the watchdog. If it is blocked, no keep-alive is sent, and the manager acts.
    """

    _log = Logger()

    def __init__(self, environ: Mapping[str, str], reactor: IReactorTime) -> None:
        self._address = environ.get("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):  # an abstract one, unix(7)
            self._address = "\0" + self._address[1:]
        self._watchdog = LoopingCall(self.notify, WATCHDOG="1")
        self._watchdog.clock = reactor
        self._interval = _watchdog_interval(environ)

    def ready(self, status: str) -> None:
        """Report that the daemon serves, or has reloaded, and feed the watchdog from now on."""
        self.notify(READY="1", STATUS=status)
        if self._interval is not None and not self._watchdog.running:
            self._watchdog.start(self._interval)

    def reloading(self) -> None:
        """Report that a reload begins; :meth:`ready` reports its end."""
        self.notify(RELOADING="1", MONOTONIC_USEC=str(time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000))

    def stopping(self, status: str) -> None:
        """Report that the daemon has begun to stop. The watchdog is fed until the end, which may take seconds."""
        self.notify(STOPPING="1", STATUS=status)

    def notify(self, **fields: str) -> None:
        """Send fields that sd_notify(3) lists. Never waits: a manager that does not read cannot hold up the daemon."""
        if not self._address:
            return
        message = "\n".join(f"{name}={value}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.sendto(message.encode("utf-8"), self._address)
        except OSError as error:
            self._log.warn("the service manager was not notified of {fields}: {error}", fields=[*fields], error=error)


def _watchdog_interval(environ: Mapping[str, str]) -> float | None:
    """Return half of the watchdog's timeout in seconds, or None if there is no watchdog for this process."""
    if environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    microseconds = environ.get("WATCHDOG_USEC", "")
    return int(microseconds) / 2e6 if microseconds.isascii() and microseconds.isdigit() and int(microseconds) else None
