"""The liveness of TCP peers: how it is noticed that the machine of one has vanished, which closes no connection."""

from __future__ import annotations

import socket

#: Seconds between two looks for peers that have vanished.
INTERVAL = 15.0

#: Retransmissions of the same bytes after which a peer is given up: at the least 100 seconds, as each waits twice as
#: long as the one before it. The kernel would try for a quarter of an hour, and sends no keep-alive probes meanwhile.
#: TCP_USER_TIMEOUT would not do: it also ends connections to peers that acknowledge all, but read nothing.
RETRANSMISSIONS = 9

#: Options with which the kernel notices within about two minutes that a silent peer is gone.
KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4))


def keep_alive(sock: socket.socket) -> None:
    """Set TCP_NODELAY and keep-alive, unless it is a Unix socket: the kernel knows of the end of those anyway."""
    if sock.family == socket.AF_UNIX:
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEP_ALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def has_vanished(sock: socket.socket) -> bool:
    """Return whether the peer's machine acknowledges nothing of what it was sent; one that only reads nothing does."""
    if sock.family == socket.AF_UNIX:
        return False
    # struct tcp_info begins with the octets tcpi_state, tcpi_ca_state and tcpi_retransmits.
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 3)
    return len(info) == 3 and info[2] >= RETRANSMISSIONS
