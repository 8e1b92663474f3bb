"""Pseudo-terminals, pty(7)."""

from __future__ import annotations

import fcntl
import os
import struct
import termios

from sandboxd.processes.command import Terminal

#: ``IUTF8`` of termios(3), which Python has no name for: a backspace takes a whole character back.
_IUTF8 = 0o040000


def open_terminal(terminal: Terminal, opened: list[int]) -> tuple[dict[int, int], list[int]]:
    """
    Open a terminal, without making it the daemon's controlling terminal.

    :param opened: gets every descriptor, as soon as it is open.
    :return: the daemon's ends, one to read and one to write, for epoll knows one owner of a descriptor; the child's.
    :raise OSError: if that fails.
    """
    master, slave = os.openpty()
    opened.extend((master, slave))
    set_size(master, terminal.cols, terminal.rows)
    attributes = termios.tcgetattr(slave)
    attributes[0] |= _IUTF8
    termios.tcsetattr(slave, termios.TCSANOW, attributes)
    opened.append(os.dup(master))
    return {1: master, 0: opened[-1]}, [slave]


def set_size(fd: int, cols: int, rows: int) -> None:
    """
    Set the size of a terminal, in characters.

    :raise OSError: if that fails.
    """
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))
