"""What is to be run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class User:
    """
    Whom a command runs as.

    :ivar name: the login name.
    :ivar uid: the user id.
    :ivar gid: the id of the login group.
    :ivar groups: the ids of all groups.
    :ivar home: the home directory.
    """

    name: str
    uid: int
    gid: int
    groups: tuple[int, ...]
    home: str


@dataclass(frozen=True)
class Command:
    """
    A shell command and its surroundings, already checked.

    :ivar cmd: the text that ``sh -c`` is given; may be empty.
    :ivar cwd: the working directory, or None for the daemon's own.
    :ivar env: variables merged over the base environment.
    :ivar timeout: seconds that the command may live, or None for ever.
    :ivar idle_timeout: seconds that it may go without output, or None for ever.
    :ivar stdin: whether it gets a pipe to read from, rather than ``/dev/null``.
    :ivar survive: whether its processes may outlive a daemon that dies without having stopped.
    :ivar limits: resource limits of each process, by their names in getrlimit(2) in lower case (``nofile``, ``as``).
    :ivar tree_limits: limits of the tree as a whole: ``memory``, ``pids``, ``cpus``; see :class:`Cgroups`.
    :ivar user: whom it runs as, or None for the daemon's own user.
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
