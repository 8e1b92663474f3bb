"""Resource limits (rlimits) of commands and of the daemon itself."""

from __future__ import annotations

import resource
from collections.abc import Mapping

#: The numbers of the limits that a command can have, by the names of getrlimit(2) in lower case.
LIMITS = {
    name: int(getattr(resource, f"RLIMIT_{name.upper()}"))
    for name in ("as", "core", "cpu", "data", "fsize", "nofile", "nproc", "stack")
}


def check_limits(limits: Mapping[str, int]) -> None:
    """
    Raise ValueError, naming the limit, if one is above the daemon's own hard limit.
    """
    for name, value in limits.items():
        hard = resource.getrlimit(LIMITS[name])[1]
        if hard != resource.RLIM_INFINITY and value > hard:
            raise ValueError(f"limits.{name}: the system allows at most {hard}")


class InheritedLimit:
    """
    A context manager that sets a soft limit of this process for processes that are started inside, which inherit it.

    Then it is set back, unless another process has lowered the hard limit meanwhile. A spawn server notices that at its
    next request; the child that it has just started must not be lost.
    """

    __slots__ = ("_limit", "_own", "_soft")

    def __init__(self, limit: int, soft: int) -> None:
        self._limit = limit
        self._soft = soft

    def __enter__(self) -> None:
        self._own = resource.getrlimit(self._limit)
        resource.setrlimit(self._limit, (self._soft, self._own[1]))

    def __exit__(self, *exc: object) -> None:
        try:  # noqa: SIM105 -- suppress() takes longer than the call
            resource.setrlimit(self._limit, self._own)
        except (OSError, ValueError):
            pass


def inherited_nofile(soft: int) -> InheritedLimit:
    """Return a context manager that sets the soft limit of open files for processes that are started inside."""
    return InheritedLimit(resource.RLIMIT_NOFILE, soft)


_own_nofile: int | None = None


def own_nofile() -> int:
    """Return the soft limit of open files that this process was started with, which its children get."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] if _own_nofile is None else _own_nofile


def prepare_process() -> None:
    """
    Raise this process's soft limit of open files to the hard one: it needs two for each child, one for each client.

    Children keep the soft limit that the daemon was started with: programs that use select(2) need it low.
    """
    global _own_nofile
    _own_nofile, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
