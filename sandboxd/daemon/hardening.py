"""Process attributes of the daemon itself: subreaper, dumpable, erased secrets. Linux only, prctl(2) and proc(5)."""

from __future__ import annotations

import ctypes
import os

_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def become_subreaper() -> None:
    """
    Become the parent of every orphaned descendant, PR_SET_CHILD_SUBREAPER.

    :raise OSError: if the kernel refuses.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def forbid_inspection() -> None:
    """
    Keep processes of the same user from reading our memory and ``/proc/<pid>/environ``; root still can.

    :raise OSError: if the kernel refuses.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def environment_at_exec() -> dict[str, str]:
    """
    Return the environment that this process was started with, whatever was removed from ``os.environ`` since.

    :raise OSError: if ``/proc`` cannot be read.
    """
    with open("/proc/self/environ", "rb") as environ:
        variables = os.fsdecode(environ.read()).split("\0")
    return dict(variable.split("=", 1) for variable in variables if "=" in variable)


def erase(secret: str) -> None:
    """
    Overwrite a secret where ``/proc/<pid>/environ`` and ``/proc/<pid>/cmdline`` show it: in the memory that the
    kernel laid out at exec, which neither ``del os.environ[...]`` nor changing ``sys.argv`` touches.
    """
    wanted = secret.encode("utf-8", "surrogateescape")
    with open("/proc/self/stat", "rb") as stat:
        # proc(5): fields 48 to 51 are arg_start, arg_end, env_start, env_end. The name in field 2 may hold spaces.
        fields = stat.read().rpartition(b")")[2].split()
    arg_start, arg_end, env_start, env_end = map(int, fields[45:49])
    for start, end in ((arg_start, arg_end), (env_start, env_end)):
        if not start:
            continue
        memory = ctypes.string_at(start, end - start)
        position = memory.find(wanted)
        while position >= 0:
            ctypes.memset(start + position, ord("*"), len(wanted))
            position = memory.find(wanted, position + len(wanted))
