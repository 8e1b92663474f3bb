"""Resource limits (rlimits) of commands and of the daemon itself."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

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


@contextmanager
def inherited_nofile(soft: int) -> Iterator[None]:
    """Set the soft limit of open files for processes that are started inside, which inherit it."""
    own = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, own[1]))
    try:
        yield
    finally:
        restore(resource.RLIMIT_NOFILE, own)


def restore(limit: int, value: tuple[int, int]) -> None:
    """
    Set a limit of this process back, unless another process has lowered its hard limit meanwhile.

    A spawn server notices that at its next request; the child that it has just started must not be lost.
    """
    with suppress(OSError, ValueError):
        resource.setrlimit(limit, value)


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
