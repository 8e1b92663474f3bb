"""Entity tags of files."""

from __future__ import annotations

import os


def entity_tag(info: os.stat_result) -> str:
    """
    Return a strong entity tag: it differs after every change of a file whose times the kernel's clock can distinguish.

    It is of device, inode, size, and the times (ns) of the last change of contents and of anything (mode, owner, name).
    """
    return f'"{info.st_dev:x}-{info.st_ino:x}-{info.st_size:x}-{info.st_mtime_ns:x}-{info.st_ctime_ns:x}"'
