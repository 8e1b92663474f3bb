"""Permissions: modes as chmod(1) takes them, owners as chown(1) does, and changes of both."""

from __future__ import annotations

import grp
import os
import pwd
import re
import stat as modes
from collections.abc import Callable
from typing import NamedTuple

from sandboxd.files.errors import os_errors
from sandboxd.files.root import Root
from sandboxd.files.walk import GONE, walk

_CLAUSE = re.compile(r"([ugoa]*)((?:[-+=][rwxXst]*)+)")
_ACTION = re.compile(r"([-+=])([rwxXst]*)")
_BITS = {"r": 0o444, "w": 0o222, "x": 0o111}
_WHO = {"u": 0o4700, "g": 0o2070, "o": 0o1007, "a": 0o7777}

#: From a file's mode, and whether it is a directory, to its new mode.
ModeChange = Callable[[int, bool], int]


def parse_mode(text: str) -> ModeChange:
    """
    Parse a mode, octal as ``0644`` or symbolic as ``u+x,go-w``. The umask does not count.

    :raise ValueError: if it is neither octal nor symbolic.
    """
    if re.fullmatch("[0-7]{1,5}", text) and int(text, 8) <= 0o7777:
        mode = int(text, 8)
        return lambda old, is_dir: mode
    clauses = [_CLAUSE.fullmatch(clause) for clause in text.split(",")]
    if None in clauses:
        raise ValueError(f"mode: {text!r} is neither octal, as 0644, nor symbolic, as u+x,go-w")

    def change(old: int, is_dir: bool) -> int:
        mode = old
        for clause in clauses:
            assert clause is not None
            who = 0
            for letter in clause[1] or "a":
                who |= _WHO[letter]
            for sign, letters in _ACTION.findall(clause[2]):
                bits = _bits(letters, mode, is_dir) & who
                if sign == "+":
                    mode |= bits
                elif sign == "-":
                    mode &= ~bits
                else:
                    mode = mode & ~(who & 0o777 | bits) | bits
        return mode

    return change


def _bits(letters: str, mode: int, is_dir: bool) -> int:
    bits = 0
    for letter in letters:
        if letter == "X":
            bits |= 0o111 if is_dir or mode & 0o111 else 0
        elif letter == "s":
            bits |= 0o6000
        elif letter == "t":
            bits |= 0o1000
        else:
            bits |= _BITS[letter]
    return bits


def change(root: Root, path: str, mode: ModeChange | None, owner: Owner | None, recursive: bool = False) -> int:
    """
    Change the mode or the owner of a file, or of a directory tree. A link in the last place is followed; of links below
    a directory the owner is changed, and nothing of what they lead to.

    :return: how many files that was.
    :raise FileError: if it may not be changed; then some of a tree may have been.
    """
    with os_errors("chmod" if mode is not None else "chown", path):
        fd = root.open(path, os.O_PATH)
        try:
            info = os.fstat(fd)
            _change(fd, info, mode, owner)
        finally:
            os.close(fd)
        if not (recursive and modes.S_ISDIR(info.st_mode)):
            return 1
        count = 1
        for entry in walk(root.open(path, os.O_RDONLY | os.O_DIRECTORY)):
            try:
                if owner is not None:
                    os.chown(entry.name, owner.uid, owner.gid, dir_fd=entry.dir_fd, follow_symlinks=False)
                fd = entry.open(os.O_PATH)
            except OSError as error:
                if error.errno not in GONE:
                    raise
                continue
            try:
                info = os.fstat(fd)
                if not modes.S_ISLNK(info.st_mode):
                    _change(fd, info, mode, None)
            finally:
                os.close(fd)
            count += 1
        return count


def _change(fd: int, info: os.stat_result, mode: ModeChange | None, owner: Owner | None) -> None:
    """
    Change owner and mode, the owner first, as a change of it clears set-user-id. The descriptor may be ``O_PATH``.
    """
    here = f"/proc/self/fd/{fd}"
    if owner is not None:
        os.chown(here, owner.uid, owner.gid)
    if mode is not None:
        os.chmod(here, mode(modes.S_IMODE(info.st_mode), modes.S_ISDIR(info.st_mode)))


class Owner(NamedTuple):
    """A user and a group; -1 leaves one as it is."""

    uid: int
    gid: int


def owner(text: str) -> Owner:
    """
    Parse an owner as chown(1) takes it: ``user``, ``user:group`` or ``:group``, by name or by number. Blocks.

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
