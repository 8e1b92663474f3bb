"""
The messages between the daemon and its spawn servers: fixed binary layouts, with bounds that are checked.

Each is one message of a ``SOCK_SEQPACKET`` socket. Requests go to the server: a kind, the number of a child, a payload.
Records come back: the number, a kind, and one or two integers. Either side raises :exc:`MalformedMessage` for anything
else; nothing that a message says makes its reader allocate more than the message itself.

Imports little of the standard library and nothing else, for :mod:`sandboxd.processes.spawn_server` uses it.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, Sequence
from struct import Struct, error, pack, unpack_from

#: The name of this process and of a child that has not executed its program yet (proc(5), ``/proc/pid/comm``).
NAME = b"sandboxd-spawn"

#: Kinds of requests: start a child, likewise with the payload in a memfd, signal a child, fork another server.
START, START_LONG, SIGNAL, FORK = range(4)

#: Kinds of records: a child was forked and has yet to execute its program; it executes it; it has failed to; it exited;
#: it was started and has exited, and this is all of its output.
FORKED, STARTED, FAILED, EXITED, DONE = range(5)

#: The step that has failed, in a FAILED record: any other, entering the working directory, executing the program.
AT_START, AT_CWD, AT_EXEC = range(3)

#: Most bytes of a message; a longer request goes through a memfd.
INLINE = 64 * 1024

#: Flags with which either side receives: a number, as the operator of the enumeration is slow.
RECEIVE_FLAGS = int(socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT)

#: Most bytes of output in a record.
MAX_OUTPUT = 32 * 1024

#: Upper bounds of the numbers in records: ``PID_MAX_LIMIT`` and ``MAX_ERRNO`` of the kernel, a wait status.
_MAX_STATUS = 0xFFFF
_MAX = {FORKED: 1 << 22, STARTED: 1 << 22, FAILED: 4095, EXITED: _MAX_STATUS, DONE: 1 << 22}

_REQUEST = Struct("<BQ")
_RECORD = Struct("<QBiB")
_OUTPUT = Struct("<HH")
_START = Struct("<QBBHIIIII")
_LIMIT = Struct("<BQ")

_STDIN, _USER, _CWD, _MERGE, _SCRIPT, _TTY, _COLLECT, _DIRECTORY = 1, 2, 4, 8, 16, 32, 64, 128

#: The descriptor of a child at which its shell finds a script that is too long for an argument.
SCRIPT_FD = 9


class MalformedMessage(Exception):
    """A message has a form that the other side does not send unless it is faulty."""


class StartRequest:
    """
    The request to start a child; its descriptors travel beside it.

    :ivar argv: the arguments.
    :ivar program: what is executed; it is looked for in the child's PATH if it has no slash.
    :ivar env: ``NAME=value``, joined by NULs.
    :ivar mark: the mark of its process tree.
    :ivar stdin: whether a descriptor for stdin is among those that are sent.
    :ivar cwd: the working directory, or None for the server's own.
    :ivar user: uid, gid and groups, or None for the server's own.
    :ivar cgroup: the directory of the cgroup that it joins, or empty.
    :ivar limits: soft and hard value of resource limits, by their numbers.
    :ivar merge: whether its stderr is its stdout, so that none is sent.
    :ivar script: whether a descriptor for :data:`SCRIPT_FD` is among those that are sent.
    :ivar tty: whether one terminal is sent for stdin, stdout and stderr, to control the child's session.
    :ivar collect: whether the server makes the pipes for output. It reports all at once if the child exits soon, with
        little output, and else sends the daemon's ends with the STARTED record. None of the child's descriptors are
        sent then.
    :ivar directory: whether a descriptor of ``cwd`` is the last of those that are sent. Entering it does not block.
    """

    __slots__ = (
        "argv",
        "cgroup",
        "collect",
        "cwd",
        "directory",
        "env",
        "limits",
        "mark",
        "merge",
        "program",
        "script",
        "stdin",
        "tty",
        "user",
    )

    def __init__(
        self,
        argv: list[bytes],
        env: bytes,
        mark: int,
        stdin: bool = False,
        cwd: bytes | None = None,
        user: tuple[int, int, Sequence[int]] | None = None,
        cgroup: bytes = b"",
        limits: Mapping[int, int] | None = None,
        program: bytes = b"/bin/sh",
        merge: bool = False,
        script: bool = False,
        tty: bool = False,
        collect: bool = False,
        directory: bool = False,
    ) -> None:
        self.argv = argv
        self.env = env
        self.mark = mark
        self.stdin = stdin
        self.cwd = cwd
        self.user = user
        self.cgroup = cgroup
        self.limits = {} if limits is None else limits
        self.program = program
        self.merge = merge
        self.script = script
        self.tty = tty
        self.collect = collect
        self.directory = directory

    @property
    def targets(self) -> list[tuple[int, ...]]:
        """The child's own descriptors for each that is sent, in this order."""
        if self.tty:
            return [(0, 1, 2), *([(SCRIPT_FD,)] if self.script else [])]
        output: list[tuple[int, ...]] = [(1, 2)] if self.merge else [(1,), (2,)]
        return [*output, *([(0,)] if self.stdin else []), *([(SCRIPT_FD,)] if self.script else [])]

    def pack(self) -> bytes:
        """
        Return the request as a payload.

        :raise OSError: EINVAL if an argument has a NUL in it.
        """
        for text in (*self.argv, self.program):
            if b"\0" in text:
                raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        argv, env, cwd = b"\0".join(self.argv), self.env, self.cwd or b""
        groups = () if self.user is None else (self.user[0], self.user[1], *self.user[2])
        flags = _STDIN * self.stdin | _USER * (self.user is not None) | _CWD * (self.cwd is not None)
        flags |= _MERGE * self.merge | _SCRIPT * self.script | _TTY * self.tty | _COLLECT * self.collect
        flags |= _DIRECTORY * self.directory
        sizes = (len(argv), len(env), len(cwd), len(self.cgroup), len(self.program))
        limits = b"".join(_LIMIT.pack(*limit) for limit in self.limits.items())
        packed = (
            _START.pack(self.mark, flags, len(self.limits), len(groups), *sizes),
            limits,
            pack(f"<{len(groups)}I", *groups),
        )
        return b"".join((*packed, argv, env, cwd, self.cgroup, self.program))

    @classmethod
    def unpack(cls, data: bytes) -> StartRequest:
        """
        Return the request that a payload holds.

        :raise MalformedMessage: if it has another layout.
        """
        try:
            mark, flags, limit_count, group_count, *sizes = _START.unpack_from(data)
            position = _START.size
            limits = {}
            for _ in range(limit_count):
                number, value = _LIMIT.unpack_from(data, position)
                limits[number] = value
                position += _LIMIT.size
            groups = unpack_from(f"<{group_count}I", data, position)
        except error as reason:
            raise MalformedMessage(str(reason)) from None
        position += 4 * group_count
        texts = []
        for size in sizes:
            texts.append(data[position : position + size])
            position += size
        if position != len(data) or (bool(flags & _USER) != (group_count >= 2)):
            raise MalformedMessage("a start request whose parts do not add up")
        argv, env, cwd, cgroup, program = texts
        user = (groups[0], groups[1], groups[2:]) if flags & _USER else None
        return cls(
            argv.split(b"\0"),
            env,
            mark,
            bool(flags & _STDIN),
            cwd if flags & _CWD else None,
            user,
            cgroup,
            limits,
            program,
            bool(flags & _MERGE),
            bool(flags & _SCRIPT),
            bool(flags & _TTY),
            bool(flags & _COLLECT),
            bool(flags & _DIRECTORY),
        )


def pack_request(kind: int, number: int, payload: bytes = b"") -> bytes:
    """Return a request as a message: for a child's number, a start's payload or a signal's number."""
    return _REQUEST.pack(kind, number) + payload


def unpack_request(message: bytes) -> tuple[int, int, bytes]:
    """
    Return kind, number and payload of a request.

    :raise MalformedMessage: if it has another layout.
    """
    if len(message) < _REQUEST.size:
        raise MalformedMessage("a request that is too short")
    kind, number = _REQUEST.unpack_from(message)
    return kind, number, message[_REQUEST.size :]


def pack_record(number: int, kind: int, value: int, detail: int = 0) -> bytes:
    """Return a record as a message. ``value`` is a pid, an errno or a wait status."""
    return _RECORD.pack(number, kind, value, detail)


def pack_done(number: int, pid: int, status: int, stdout: bytes, stderr: bytes) -> bytes:
    """Return the record of a child that has exited, with all of its output."""
    sizes = _OUTPUT.pack(status, len(stdout))
    return b"".join((_RECORD.pack(number, DONE, pid, 0), sizes, stdout, stderr))


def unpack_done(message: bytes) -> tuple[int, bytes, bytes]:
    """
    Return wait status, stdout and stderr of a DONE record.

    :raise MalformedMessage: if it has none.
    """
    start = _RECORD.size + _OUTPUT.size
    if not start <= len(message) <= start + MAX_OUTPUT:
        raise MalformedMessage(f"a record of {len(message)} bytes")
    status, size = _OUTPUT.unpack_from(message, _RECORD.size)
    if start + size > len(message):
        raise MalformedMessage("a record whose parts do not add up")
    return status, message[start : start + size], message[start + size :]


def unpack_record(message: bytes) -> tuple[int, int, int, int]:
    """
    Return number, kind, value and detail of a record.

    :raise MalformedMessage: if it is none, or has a value that its kind cannot have.
    """
    if len(message) < _RECORD.size:
        raise MalformedMessage(f"a record of {len(message)} bytes")
    number, kind, value, detail = _RECORD.unpack_from(message)
    if kind != DONE and len(message) != _RECORD.size:
        raise MalformedMessage(f"a record of {len(message)} bytes")
    if kind not in _MAX or not (0 if kind == EXITED else 1) <= value <= _MAX[kind]:
        raise MalformedMessage(f"a record of kind {kind} with the value {value}")
    if detail not in (AT_START, AT_CWD, AT_EXEC):
        raise MalformedMessage(f"a record with the detail {detail}")
    return number, kind, value, detail
