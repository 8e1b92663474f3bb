"""
Files of the kernel's own file systems (proc, sysfs, cgroup): reading makes their contents, and a write is a request.
"""

from __future__ import annotations

import ctypes

#: Magic numbers of statfs(2), from <linux/magic.h>: proc, sysfs, cgroup, cgroup2, debugfs, tracefs, securityfs,
#: configfs, selinuxfs, bpf, devpts.
_KERNEL = frozenset(
    (
        0x9FA0,
        0x62656572,
        0x27E0EB,
        0x63677270,
        0x64626720,
        0x74726163,
        0x73636673,
        0x62656570,
        0xF97CFF8C,
        0xCAFE4A11,
        0x1CD1,
    )
)

_libc = ctypes.CDLL(None, use_errno=True)


def is_kernel_file(fd: int) -> bool:
    """
    Return whether a file is in one of the kernel's own file systems.

    :param fd: the file; ``O_PATH`` suffices.
    """
    # struct statfs begins with f_type, a long. It has 120 bytes on 64-bit machines.
    buffer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, buffer) != 0:
        return False
    return ctypes.c_ulong.from_buffer(buffer).value in _KERNEL
