"""
The listening TCP sockets of this network namespace, and the processes that hold them.

The kernel is asked by ``sock_diag`` over netlink (sock_diag(7)) for sockets in the state LISTEN only: 0.09 ms, however
many connections there are, where ``/proc/net/tcp`` takes 7 ms with none and 25 ms with 8,000. That file is read where
the kernel has no ``sock_diag``.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress
from typing import NamedTuple

from twisted.internet.defer import Deferred
from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from sandboxd.processes.marks import mark_of
from sandboxd.reactor.threads import ThreadPool

#: Seconds between two looks at the sockets, while any caller waits.
INTERVAL = 0.1

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_LISTEN = 10

_NLMSGHDR = struct.Struct("=IHHII")
#: ``inet_diag_req_v2``: family, protocol, extensions, states; then 48 bytes that may name one socket.
_REQUEST = struct.Struct("=BBBxI48x")
#: ``inet_diag_msg``: family; the port and the address it is bound to, in network order; the inode.
_MESSAGE = struct.Struct("=B3x2s2x16s44xI")


class Listener(NamedTuple):
    """A listening socket."""

    port: int
    address: str
    inode: int


def listeners() -> list[Listener]:
    """Return the listening TCP sockets. Blocks briefly."""
    try:
        return [found for family in (socket.AF_INET, socket.AF_INET6) for found in _from_netlink(family)]
    except OSError:
        return list(_from_proc())


def owners(inodes: Collection[int]) -> dict[int, list[int]]:
    """
    Return the pids that hold sockets open, by the sockets' inodes. Blocks.

    Processes whose descriptors may not be read are left out.
    """
    wanted = {f"socket:[{inode}]": inode for inode in inodes}
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc") if wanted else ():
        if not name.isdigit():
            continue
        with suppress(OSError):
            for descriptor in os.listdir(f"/proc/{name}/fd"):
                with suppress(OSError):
                    inode = wanted.get(os.readlink(f"/proc/{name}/fd/{descriptor}"))
                    if inode is not None and int(name) not in found.setdefault(inode, []):
                        found[inode].append(int(name))
    return found


def marks_at(port: int) -> set[int]:
    """Return the marks of the processes that listen on a port. Blocks."""
    holders = owners([each.inode for each in listeners() if each.port == port])
    return {mark_of(pid) for pids in holders.values() for pid in pids}


def _from_netlink(family: int) -> Iterator[Listener]:
    """
    Ask the kernel for the listening sockets of an address family.

    :raise OSError: if the kernel does not support it.
    """
    size = 4 if family == socket.AF_INET else 16
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as kernel:
        request = _REQUEST.pack(family, socket.IPPROTO_TCP, 0, 1 << _LISTEN)
        length = _NLMSGHDR.size + len(request)
        kernel.send(_NLMSGHDR.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + request)
        while True:
            data = kernel.recv(1 << 18)
            while data:
                length, kind, _, _, _ = _NLMSGHDR.unpack_from(data)
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    raise OSError(-struct.unpack_from("=i", data, _NLMSGHDR.size)[0], "sock_diag")
                _, port, address, inode = _MESSAGE.unpack_from(data, _NLMSGHDR.size)
                yield Listener(int.from_bytes(port, "big"), socket.inet_ntop(family, address[:size]), inode)
                data = data[(length + 3) & ~3 :]


def _from_proc() -> Iterator[Listener]:
    """Read the listening sockets of both families from ``/proc/net``."""
    for family, name in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        with suppress(FileNotFoundError), open(f"/proc/net/{name}", encoding="ascii") as table:
            next(table)
            for line in table:
                fields = line.split()
                address, _, port = fields[1].partition(":")
                if int(fields[3], 16) == _LISTEN:
                    # Words of 32 bits, each in the byte order of the machine.
                    words = [int(address[i : i + 8], 16) for i in range(0, len(address), 8)]
                    packed = struct.pack(f"={len(words)}I", *words)
                    yield Listener(int(port, 16), socket.inet_ntop(family, packed), int(fields[9]))


class ListenerPoll:
    """
    The poll of the listening sockets: at most every :data:`INTERVAL` seconds, for all who wait, and only while a caller
    waits.

    :param blocking: runs a blocking function off the reactor's thread.
    """

    def __init__(self, clock: IReactorTime, blocking: ThreadPool) -> None:
        self._clock = clock
        self._blocking = blocking
        self._waiting: list[Deferred[list[Listener]]] = []
        self._looking = False
        self._next_look = 0.0

    def when_looked(self) -> Deferred[list[Listener]]:
        """Return a Deferred that fires with the sockets that the next look finds. Can be cancelled."""
        deferred: Deferred[list[Listener]] = Deferred(lambda cancelled: self._waiting.remove(cancelled))
        self._waiting.append(deferred)
        if not self._looking:
            self._looking = True
            self._clock.callLater(max(0.0, self._next_look - self._clock.seconds()), self._look)
        return deferred

    def _look(self) -> None:
        if not self._waiting:  # all were cancelled
            self._looking = False
            return
        self._next_look = self._clock.seconds() + INTERVAL
        self._blocking(listeners).addBoth(self._looked)

    def _looked(self, found: list[Listener] | Failure) -> None:
        self._looking = False
        waiting, self._waiting = self._waiting, []
        for deferred in waiting:
            if not deferred.called:
                deferred.callback(found)
