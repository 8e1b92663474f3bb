"""A command as the API asks for it, validated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class User:
    """
    The user that a command runs as.

    :ivar gid: the login group.
    :ivar groups: all groups, the login group included.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True)
class Command:
    """
    A shell command, its environment and its limits, validated.

    :ivar cmd: the script for ``sh -c``; may be empty.
    :ivar cwd: the working directory, or None for the daemon's own.
    :ivar env: variables merged over the base environment.
    :ivar timeout: seconds until it is killed, or None.
    :ivar idle_timeout: seconds without output after which it is killed, or None.
    :ivar stdin: whether its stdin is a pipe, not ``/dev/null``.
    :ivar survive: whether its processes outlive a daemon that dies without a regular stop.
    :ivar limits: limits of each process, by the names of getrlimit(2) in lower case: ``nofile``, ``as``.
    :ivar tree_limits: limits of the whole tree: ``memory``, ``pids``, ``cpus``; see :meth:`.Cgroups.make`.
    :ivar user: None for the daemon's own user.
    """

    cmd: str
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None
    idle_timeout: float | None = None
    stdin: bool = False
    survive: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)
    tree_limits: Mapping[str, float] = field(default_factory=dict)
    user: User | None = None

    @property
    def size(self) -> int:
        """Characters of its script and variables, which are kept as long as its record."""
        return len(self.cmd) + sum(len(name) + len(value) for name, value in self.env.items())
