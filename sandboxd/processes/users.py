"""The users that commands run as, by name or by number."""

from __future__ import annotations

import grp
import os
import pwd

from sandboxd.processes.command import User

#: The largest uid and gid; the next one means "unchanged" to chown(2) and setresuid(2).
_MAX_ID = (1 << 32) - 2


def find_user(given: str | int) -> User:
    """
    Return the user that ``name``, ``uid``, ``name:group`` or ``uid:gid`` stands for. Blocks.

    A uid that the system has no user for is as in docker: gid 0, home ``/``, no supplementary groups. With a group that
    is given, that is the only one.

    :raise ValueError: if there is no such user, or this process cannot run commands as that user.
    :raise OSError: if this process has no descriptor left.
    """
    _check_descriptors()
    name, colon, group = str(given).partition(":")
    uid = _id(name, "uid") if name.isdigit() else None
    try:
        entry = pwd.getpwnam(name) if uid is None else pwd.getpwuid(uid)
    except (KeyError, ValueError):  # ValueError for a NUL in it
        _check_descriptors()
        if uid is None:
            raise ValueError(f"there is no user {name!r}") from None
        user = User(name, uid, 0, (), "/")
    else:
        groups = tuple(os.getgrouplist(entry.pw_name, entry.pw_gid)) if os.geteuid() == 0 and not colon else ()
        _check_descriptors()
        shell = entry.pw_shell or "/bin/sh"
        user = User(entry.pw_name, entry.pw_uid, entry.pw_gid, groups, entry.pw_dir, shell)
    if colon:
        gid = _group(group)
        user = User(user.name, user.uid, gid, (gid,), user.home, user.shell)
    if os.geteuid() != 0 and user.uid != os.geteuid():
        raise ValueError("the daemon does not run as root, so it cannot run commands as another user")
    if os.geteuid() != 0 and user.gid not in (os.getegid(), *os.getgroups()):
        raise ValueError("the daemon does not run as root, so it cannot run commands as another group")
    return user


def own_shell() -> str:
    """Return the login shell of this process's user, or ``/bin/sh``. Blocks."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_shell or "/bin/sh"
    except KeyError:
        return "/bin/sh"


def _group(name: str) -> int:
    if name.isdigit():
        return _id(name, "gid")
    try:
        return grp.getgrnam(name).gr_gid
    except (KeyError, ValueError):
        _check_descriptors()
        raise ValueError(f"there is no group {name!r}") from None


def _check_descriptors() -> None:
    """
    Check that files can be opened; where not, Python and the C library report users and groups as missing.

    :raise OSError: if this process has no descriptor left.
    """
    os.close(os.open("/", os.O_PATH | os.O_CLOEXEC))


def _id(text: str, what: str) -> int:
    if not text.isascii() or len(text) > 10 or int(text) > _MAX_ID:
        raise ValueError(f"{text!r} is not a {what}")
    return int(text)
