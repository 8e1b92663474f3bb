"""The names of temporary files, which are renamed to their targets once they are complete."""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
from contextlib import suppress

#: The beginning of each name.
PREFIX = b".sandboxd-"


def temporary_name() -> str:
    """Return a new random name."""
    return f"{os.fsdecode(PREFIX)}{secrets.token_hex(8)}.tmp"


def temporary_for(name: bytes) -> bytes:
    """
    Return the name of the temporary file for a target; the same one each time.

    There is one for each, so that what a kill leaves behind is in the way of the next upload only.
    """
    return PREFIX + hashlib.sha256(name).hexdigest()[:16].encode("ascii")


def lock_temporary(fd: int) -> None:
    """Keep uploads from removing a temporary file, while it is open, as one that a killed daemon has left."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
