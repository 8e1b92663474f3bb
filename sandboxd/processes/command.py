"""A command as the API asks for it, validated."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

import msgspec


class User(msgspec.Struct, frozen=True):
    """
    The user that a command runs as.

    :ivar gid: the login group.
    :ivar groups: all groups, the login group included; none for a uid that the system has no user for.
    :ivar shell: the login shell.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str
    shell: str = "/bin/sh"


class Terminal(msgspec.Struct, frozen=True):
    """
    The size and type of a pseudo-terminal that a command gets.

    :ivar term: the value of ``TERM``.
    """

    cols: int = 80
    rows: int = 24
    term: str = "xterm-256color"


class Command(msgspec.Struct, frozen=True):
    """
    A command to run: its program, its environment and its limits, validated.

    :ivar cmd: the script for the shell's ``-c``; may be empty. None for an interactive shell, or with ``argv``.
    :ivar cwd: the working directory, or None for the daemon's own.
    :ivar env: variables merged over the base environment; None takes one away.
    :ivar timeout: seconds until it is killed, or None.
    :ivar idle_timeout: seconds without output after which it is killed, or None.
    :ivar stdin: whether its stdin is a pipe, not ``/dev/null``.
    :ivar survive: whether its processes outlive a daemon that dies without a regular stop.
    :ivar limits: limits of each process, by the names of getrlimit(2) in lower case: ``nofile``, ``as``.
    :ivar tree_limits: limits of the whole tree: ``memory``, ``pids``, ``cpus``; see :meth:`.Cgroups.make`.
    :ivar user: None for the daemon's own user.
    :ivar argv: the program, looked for in PATH, and its arguments; in place of ``cmd``.
    :ivar shell: the shell, by its full path; None for ``/bin/sh``.
    :ivar login: whether the shell is a login shell.
    :ivar input: the first bytes of stdin, and all of them unless ``stdin`` is set.
    :ivar merge_stderr: whether its stderr is its stdout.
    :ivar flush_after: seconds after which an unfinished line becomes a record, or None.
    :ivar tty: the terminal that is its stdin, stdout and stderr, and controls its session; None for pipes.
    """

    cmd: str | None
    cwd: str | None = None
    env: Mapping[str, str | None] = msgspec.field(default_factory=dict)
    timeout: float | None = None
    idle_timeout: float | None = None
    stdin: bool = False
    survive: bool = False
    limits: Mapping[str, int] = msgspec.field(default_factory=dict)
    tree_limits: Mapping[str, float] = msgspec.field(default_factory=dict)
    user: User | None = None
    argv: tuple[str, ...] | None = None
    shell: str | None = None
    login: bool = False
    input: bytes | None = None
    merge_stderr: bool = False
    flush_after: float | None = None
    tty: Terminal | None = None

    @property
    def has_stdin(self) -> bool:
        """Whether the command's stdin is a pipe."""
        return self.tty is None and (self.stdin or self.input is not None)

    @property
    def text(self) -> str:
        """The command for people: the script, or the arguments quoted as for a shell."""
        if self.argv is not None:
            return shlex.join(self.argv)
        return self.cmd if self.cmd is not None else self.shell or "/bin/sh"

    @property
    def size(self) -> int:
        """Characters of the script, the variables and the input, which are kept as long as the command's record."""
        variables = sum(len(name) + len(value or "") for name, value in self.env.items())
        return len(self.text) + len(self.input or b"") + variables
