"""
Resource limits, of commands and of the daemon itself.

Those of a command are set by the shell that becomes it, before it can have children of its own: from outside it could
be too late.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

#: How ``sh`` sets each limit. For the number of processes, dash and BusyBox say -p where bash says -u.
_ULIMITS = {
    "as": "ulimit -v {}",
    "core": "ulimit -c {}",
    "cpu": "ulimit -t {}",
    "data": "ulimit -d {}",
    "fsize": "ulimit -f {}",
    "nofile": "ulimit -n {}",
    "nproc": "{{ ulimit -p {0} 2>/dev/null || ulimit -u {0}; }}",
    "stack": "ulimit -s {}",
}

#: The bytes that ``ulimit`` counts by; POSIX has blocks of 512 for files, and shells have KiB for memory.
_UNITS = {"as": 1024, "core": 512, "data": 1024, "fsize": 512, "stack": 1024}

#: The resource limits that can be set, by their names in getrlimit(2).
LIMITS = {name: int(getattr(resource, f"RLIMIT_{name.upper()}")) for name in _ULIMITS}


def check_limits(limits: Mapping[str, int]) -> None:
    """
    See that limits can be had.

    :raise ValueError: if the hard limit of the daemon itself is lower; the text names the limit.
    """
    for name, value in limits.items():
        hard = resource.getrlimit(LIMITS[name])[1]
        if hard != resource.RLIM_INFINITY and value > hard:
            raise ValueError(f"limits.{name}: the system allows at most {hard}")


def ulimits(limits: Mapping[str, int]) -> list[str]:
    """What a shell is to do to set them."""
    return [_ULIMITS[name].format(value // _UNITS.get(name, 1)) for name, value in limits.items()]


@contextmanager
def inherited_nofile(soft: int) -> Iterator[None]:
    """A process that is started inside may open ``soft`` files, as its soft limit."""
    own = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, own[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, own)


_own_nofile: int | None = None


def own_nofile() -> int:
    """How many files this process could open when it was started, as its soft limit: what its children get."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] if _own_nofile is None else _own_nofile


def prepare_process() -> None:
    """
    Let this process, which is the daemon's for good, open as many files as the hard limit has it.

    It needs two for each child and one for each client. Children keep the soft limit that the daemon was started
    with, since programs that use ``select`` need it low.
    """
    global _own_nofile
    _own_nofile, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
