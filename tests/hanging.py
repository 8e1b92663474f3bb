"""A FUSE file system whose root can be looked at, but neither entered nor searched: the questions to it hang."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import threading
from pathlib import Path

_IN_HEADER = struct.Struct("<IIQQIIII")
_OUT_HEADER = struct.Struct("<IiQ")
_ATTR = struct.Struct("<QQQQQQIIIIIIIIII")
_LOOKUP, _FORGET, _GETATTR, _STATFS, _INIT, _ACCESS = 1, 2, 3, 17, 26, 34
_ENOSYS = 38


class HangingDirectory:
    """
    Mount it at ``path``.

    :raise OSError: if it cannot be mounted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self._fd},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()},allow_other"
        mounted = subprocess.run(
            ["mount", "-i", "-t", "fuse", "-o", options, "hanging", path],
            pass_fds=(self._fd,),
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
        if mounted.returncode != 0:
            os.close(self._fd)
            raise OSError(mounted.stderr.strip())
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                request = os.read(self._fd, 1 << 17)
            except OSError:
                return  # it was unmounted
            _, opcode, unique, *_ = _IN_HEADER.unpack_from(request)
            if opcode == _INIT:
                self._reply(unique, struct.pack("<IIIIHHIIHH32x", 7, 31, 0, 0, 0, 0, 4096, 1, 0, 0))
            elif opcode == _GETATTR:
                attr = _ATTR.pack(1, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o755, 2, 0, 0, 0, 4096, 0)
                self._reply(unique, struct.pack("<QII", 3600, 0, 0) + attr)
            elif opcode == _STATFS:
                self._reply(unique, struct.pack("<QQQQQIIII24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0))
            elif opcode not in (_ACCESS, _LOOKUP, _FORGET):
                self._reply(unique, b"", -_ENOSYS)

    def _reply(self, unique: int, data: bytes, error: int = 0) -> None:
        os.write(self._fd, _OUT_HEADER.pack(_OUT_HEADER.size + len(data), error, unique) + data)

    def close(self) -> None:
        """Unmount it; what hangs in it fails."""
        # -f ends what hangs, but may find it busy still.
        subprocess.run(["umount", "-f", self._path], check=False, capture_output=True, timeout=10)
        subprocess.run(["umount", "-l", self._path], check=False, capture_output=True, timeout=10)
        os.close(self._fd)
