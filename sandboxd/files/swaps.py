"""Changes of what a name stands for: one at a time, so that a check and the change that hangs on it are one step."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_guard = Lock()
_swapping: dict[tuple[int, int, bytes], tuple[Lock, int]] = {}


@contextmanager
def swapping(dir_fd: int, name: bytes) -> Iterator[None]:
    """
    Keep every other thread of ours from changing what a name in a directory stands for. Commands are not kept from it.

    :param dir_fd: the directory.
    """
    info = os.fstat(dir_fd)
    key = info.st_dev, info.st_ino, name
    with _guard:
        lock, users = _swapping.get(key, (Lock(), 0))
        _swapping[key] = lock, users + 1
    try:
        with lock:
            yield
    finally:
        with _guard:
            lock, users = _swapping[key]
            if users > 1:
                _swapping[key] = lock, users - 1
            else:
                del _swapping[key]
