"""The sockets that the daemon listens on."""

from __future__ import annotations

import socket

#: Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn.
BACKLOG = 4096


def listen_on_port(port: int) -> socket.socket:
    """
    A listening socket for IPv6 and IPv4, or for IPv4 where that is all there is.

    :raise OSError: if the port cannot be had.
    """
    if socket.has_dualstack_ipv6():
        sock = socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    else:
        sock = socket.create_server(("", port), backlog=BACKLOG)
    sock.setblocking(False)
    return sock
