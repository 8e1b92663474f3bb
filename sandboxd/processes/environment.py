"""
The environment of commands: the daemon's own without its secrets, its settings and its service manager's variables.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from sandboxd.processes.command import Command

#: Variables by which a service manager speaks with the daemon (sd_notify(3), sd_listen_fds(3)). A child must neither
#: answer on NOTIFY_SOCKET nor take LISTEN_FDS for its own.
MANAGER = frozenset(
    {
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "LISTEN_FDS",
        "LISTEN_PID",
        "LISTEN_FDNAMES",
        "LISTEN_PIDFDID",
    }
)

#: Variables that no child gets: those, and the daemon's secrets.
PRIVATE = MANAGER | {"SANDBOX_SECRET", "SANDBOX_SECRET_FILE", "SANDBOX_SECRET_PATH", "CREDENTIALS_DIRECTORY"}

#: The daemon's own settings: a command's server that listens on ``PORT`` would collide with it.
SETTINGS = frozenset({"PORT", "PROXY_PORT", "LOG_LEVEL", "LOG_FORMAT"})
SETTINGS_PREFIX = "SANDBOX_"

_LOCALE = frozenset({"LANG", "LANGUAGE", "LC_ALL", "LC_MESSAGES"})


class Environment:
    """
    The variables that commands inherit.

    :param environ: the daemon's own environment.
    :ivar inherited: the daemon's variables without the :data:`PRIVATE` ones and its settings.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        self.inherited = {name: value for name, value in environ.items() if not _is_withheld(name)}
        # The clients match English messages ("No such file"), so those stay English; the encoding is kept.
        self._english = {name: value for name, value in self.inherited.items() if name not in ("LANGUAGE", "LC_ALL")}
        if everything := self.inherited.get("LC_ALL"):  # empty is as good as absent
            self._english.update(LANG=everything, LC_CTYPE=everything)
        self._english["LC_MESSAGES"] = "C"

        self._inherited_packed = packed(self.inherited)
        self._english_packed = packed(self._english)

    def merged(self, command: Command) -> bytes:
        """
        Return the inherited variables updated with the command's, as :func:`packed` does.

        Messages are English unless the command sets a locale.

        :raise OSError: EINVAL if a variable has a NUL in it.
        """
        english = _LOCALE.isdisjoint(command.env)
        user = command.user
        if user is None and not command.env and command.tty is None:
            return self._english_packed if english else self._inherited_packed
        login = {} if user is None else {"HOME": user.home, "USER": user.name, "LOGNAME": user.name}
        terminal = {} if command.tty is None else {"TERM": command.tty.term}
        return packed({**(self._english if english else self.inherited), **login, **terminal, **command.env})


def _is_withheld(name: str) -> bool:
    return name in PRIVATE or name in SETTINGS or name.startswith(SETTINGS_PREFIX)


def packed(environ: Mapping[str, str | None]) -> bytes:
    """
    Return variables as ``NAME=value``, joined by NULs; those whose value is None are left out.

    :raise OSError: EINVAL if one has a NUL in it.
    """
    entries = [f"{name}={value}" for name, value in environ.items() if name and value is not None]
    text = "\0".join(entries)
    if entries and text.count("\0") != len(entries) - 1:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return os.fsencode(text)
