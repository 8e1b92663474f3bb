"""
The execution of a command's program: where it is found, and what a forked child does before execve(2).

Imports little of the standard library and nothing else, for :mod:`sandboxd.processes.spawn_server` uses it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import warnings  # noqa: F401 - os.execvpe imports it, and the command's user may not be able to read it

from sandboxd.processes.marks import mark_variable
from sandboxd.processes.spawn_messages import AT_CWD, AT_EXEC, AT_START, SCRIPT_FD, StartRequest

#: Directories in which a program is looked for, and from which it is executed, without a process that may block.
STANDARD_PATH = (b"/usr/local/sbin", b"/usr/local/bin", b"/usr/sbin", b"/usr/bin", b"/sbin", b"/bin")

_TIOCSCTTY = 0x540E


def execute(request: StartRequest, fds: list[int], nofile: int, errors: int) -> None:
    """Become the program of a request; report through ``errors`` and exit if that fails. Runs in the forked child."""
    step, number = AT_START, errno.EINVAL
    try:
        os.setsid()
        errors = fcntl.fcntl(errors, fcntl.F_DUPFD_CLOEXEC, SCRIPT_FD + 1)  # not where the script is to be
        if request.tty:
            fcntl.ioctl(fds[0], _TIOCSCTTY, 0)
            if request.user is not None and os.geteuid() == 0:
                os.fchown(fds[0], request.user[0], -1)  # as login(1) does, for who opens it by its name
        for fd, targets in zip(fds, request.targets):  # noqa: B905
            for target in targets:
                os.dup2(fd, target) if fd != target else os.set_inheritable(fd, True)
        if request.cgroup:
            with open(os.path.join(request.cgroup, b"cgroup.procs"), "wb", buffering=0) as procs:
                procs.write(b"0")
        if request.user is not None:
            uid, gid, groups = request.user
            if os.geteuid() == 0:
                os.setgroups(list(groups))
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        if request.cwd is not None:
            step = AT_CWD
            os.chdir(request.cwd)  # with the rights of the command's user
            step = AT_START
        env = with_mark(variables(request.env), request.mark)
        resource.setrlimit(resource.RLIMIT_NOFILE, (nofile, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        for limit, value in request.limits.items():
            resource.setrlimit(limit, (value, value))
        step = AT_EXEC
        os.execvpe(request.program, request.argv, env)
    except OSError as error:
        number = error.errno or errno.EIO
    except BaseException:
        pass
    finally:
        os.write(errors, bytes([step]) + number.to_bytes(4, "little"))
        os._exit(127)


def variables(env: bytes) -> dict[bytes, bytes]:
    """
    Return the variables of a request.

    :raise ValueError: if one has no ``=``.
    """
    return dict(entry.split(b"=", 1) for entry in env.split(b"\0")) if env else {}


def with_mark(env: dict[bytes, bytes], mark: int) -> dict[bytes, bytes]:
    """Return an environment with the variable of a mark, if it needs one."""
    return {**env, **{name.encode("ascii"): value.encode("ascii") for name, value in mark_variable(mark).items()}}


def standard_path(program: bytes, env: dict[bytes, bytes]) -> bytes | None:
    """Return the path of a program in one of the standard directories; None if the child has to search for it."""
    if b"/" in program:
        return program if os.path.dirname(program) in STANDARD_PATH else None
    for directory in env.get(b"PATH", os.fsencode(os.defpath)).split(b":"):
        if directory not in STANDARD_PATH:
            return None
        path = os.path.join(directory, program)
        if os.access(path, os.X_OK) and not os.path.isdir(path):
            return path
    return None
