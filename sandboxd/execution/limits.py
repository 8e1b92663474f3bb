"""
What a child inherits that is not the daemon's own: rlimits, and its place in the kernel's choice when memory is short.

Both are set before the child can have children of its own: by the shell that becomes the command, or on the daemon
for the moment in which the child is born. From outside, after the start, it could be too late.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from io import FileIO

#: How much more willing the kernel is to kill a command than the daemon when memory is short; see proc(5).
OOM_SCORE_STEP = 200
OOM_SCORE_MAX = 1000

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
def inherited_oom_score() -> Iterator[None]:
    """
    A process that is started inside is killed before the daemon when memory is short; see proc(5).

    The daemon's own score is raised for the moment, for what is done to a child from outside may come too late.
    """
    own = _oom_score_file and int(os.pread(_oom_score_file.fileno(), 16, 0))
    if not isinstance(own, int) or own >= OOM_SCORE_MAX:
        yield
        return
    _set_oom_score(min(own + OOM_SCORE_STEP, OOM_SCORE_MAX))
    try:
        yield
    finally:
        _set_oom_score(own)


def _set_oom_score(score: int) -> None:
    assert _oom_score_file is not None
    with suppress(OSError):  # where lowering it takes a privilege, it stays: a child's is never the lower one
        os.pwrite(_oom_score_file.fileno(), str(score).encode("ascii"), 0)


@contextmanager
def inherited_nofile(opened: Sequence[int]) -> Iterator[list[str]]:
    """
    A process that is started inside may open as many files as the daemon could when it was started.

    :param opened: the newest of our descriptors.
    :return: what a shell has to do for that, if the daemon has too many files open to start a child under that limit.
    """
    if _own_nofile is None:
        yield []
        return
    soft, hard = _own_nofile
    if max(opened) + 16 >= soft:
        yield [f"ulimit -S -n {soft}"]
        return
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        yield []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


_own_nofile: tuple[int, int] | None = None
_oom_score_file: FileIO | None = None


def prepare_process() -> None:
    """
    Prepare this process, which is the daemon's for good, to start children.

    It may open as many files as the hard limit has it, three for each child and one for each client; children keep
    the soft limit that the daemon was started with, since programs that use ``select`` need it low.
    """
    global _own_nofile, _oom_score_file
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _own_nofile = (soft, hard)
    with suppress(OSError):
        # Opened now, and kept: a process that may not be inspected cannot open it any more.
        _oom_score_file = open("/proc/self/oom_score_adj", "r+b", buffering=0)  # noqa: SIM115
