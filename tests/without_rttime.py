"""Run a program in whose processes RLIMIT_RTTIME cannot be set: a seccomp filter refuses it with EPERM. x86-64 only."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_PRLIMIT64, _RLIMIT_RTTIME = 302, 15
#: Offsets in struct seccomp_data: the number of the call; its second argument; both halves of the third.
_NUMBER, _RESOURCE, _NEW_LOW, _NEW_HIGH = 0, 24, 32, 36


def main() -> None:
    code = [
        (_LOAD, 0, 0, _NUMBER),
        (_JUMP_IF_EQUAL, 0, 6, _PRLIMIT64),
        (_LOAD, 0, 0, _RESOURCE),
        (_JUMP_IF_EQUAL, 0, 4, _RLIMIT_RTTIME),
        (_LOAD, 0, 0, _NEW_LOW),
        (_JUMP_IF_EQUAL, 0, 3, 0),
        (_LOAD, 0, 0, _NEW_HIGH),
        (_JUMP_IF_EQUAL, 0, 1, 0),
        (_RETURN, 0, 0, _ALLOW),  # another call, or one that only reads the limit
        (_RETURN, 0, 0, _ERRNO | errno.EPERM),
    ]
    program = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *each) for each in code))
    filter = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(code), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    for call in ((_PR_SET_NO_NEW_PRIVS, 1, 0), (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(filter))):
        number, *arguments = call
        if libc.prctl(number, *map(ctypes.c_ulong, arguments), 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "no seccomp")
    os.execvp(sys.argv[1], sys.argv[1:])


if __name__ == "__main__":
    main()
