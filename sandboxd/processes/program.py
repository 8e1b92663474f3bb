"""The program that a command executes: a shell with a script, or an argument list."""

from __future__ import annotations

import os

from sandboxd.processes.command import Command
from sandboxd.processes.spawn_messages import SCRIPT_FD

#: The shell, by its full path: a command's PATH must not change it.
SH = "/bin/sh"

#: Bytes of an argument, its NUL included, that execve(2) takes at most (``MAX_ARG_STRLEN``).
MAX_ARGUMENT = 128 * 1024

#: Evaluates that script. The descriptor is closed before, ``$0``, stdin and the exit status are those of ``-c``.
_EVALUATE = f'eval "$(exec /bin/cat <&{SCRIPT_FD})" {SCRIPT_FD}<&-'

#: Names of shells that have the syntax of POSIX.
POSIX_SHELLS = frozenset({"ash", "bash", "dash", "ksh", "ksh93", "lksh", "mksh", "oksh", "posh", "sh", "yash", "zsh"})


def script_is_long(cmd: str) -> bool:
    """Return whether a script is too long to be an argument."""
    return len(cmd) * 4 >= MAX_ARGUMENT and len(os.fsencode(cmd)) >= MAX_ARGUMENT


def arguments(command: Command) -> tuple[bytes, list[bytes], bytes | None]:
    """
    Return the program, its argument list, and the script if it is too long to be an argument.

    :return: the program, with a slash in it unless PATH is to be searched; the arguments; a script for
        :data:`SCRIPT_FD`, or None.
    """
    if command.argv is not None:
        return os.fsencode(command.argv[0]), list(map(os.fsencode, command.argv)), None
    shell = os.fsencode(command.shell or SH)
    name = b"sh" if command.shell is None else shell
    options = [b"-l"] if command.login else []
    if command.cmd is None:
        return shell, [name, *options], None
    if script_is_long(command.cmd):
        return shell, [name, *options, b"-c", _EVALUATE.encode("ascii")], os.fsencode(command.cmd)
    return shell, [name, *options, b"-c", os.fsencode(command.cmd)], None
