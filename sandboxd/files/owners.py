"""Whose a file is to be."""

from __future__ import annotations

import grp
import pwd
from collections.abc import Callable
from typing import NamedTuple


class Owner(NamedTuple):
    """
    User and group; -1 for leaving one as it is.
    """

    uid: int
    gid: int


def owner(text: str) -> Owner:
    """
    As chown(1) takes it: ``user``, ``user:group`` or ``:group``, each a name or a number. Blocks.

    :raise ValueError: if there is no such user or group.
    """
    user, _, group = text.partition(":")
    return Owner(
        _id("user", user, lambda: pwd.getpwnam(user).pw_uid), _id("group", group, lambda: grp.getgrnam(group).gr_gid)
    )


def _id(kind: str, name: str, look_up: Callable[[], int]) -> int:
    if not name:
        return -1
    if name.isascii() and name.isdigit() and len(name) < 10:
        return int(name)
    try:
        return look_up()
    except (KeyError, ValueError):
        raise ValueError(f"owner: there is no {kind} {name!r}") from None
