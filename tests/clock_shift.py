"""A library to preload, with which a program's wall clock is ahead by the seconds in a file, whatever reads it."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

SOURCE = r"""
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static volatile int64_t *shift;

__attribute__((constructor)) static void map_shift(void)
{
    const char *path = getenv("CLOCK_SHIFT");
    int fd = path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    if (fd >= 0) {
        void *found = mmap(0, sizeof *shift, PROT_READ, MAP_SHARED, fd, 0);
        shift = found == MAP_FAILED ? 0 : found;
        close(fd);
    }
}

int clock_gettime(clockid_t id, struct timespec *now)
{
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && shift && (id == CLOCK_REALTIME || id == CLOCK_REALTIME_COARSE))
        now->tv_sec += *shift;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    struct timespec precise;
    clock_gettime(CLOCK_REALTIME, &precise);
    now->tv_sec = precise.tv_sec;
    now->tv_usec = precise.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *result)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result)
        *result = now.tv_sec;
    return now.tv_sec;
}
"""


class ClockShift:
    """
    The library, and the file.

    :ivar environ: what a program needs in its environment.
    """

    def __init__(self, folder: Path) -> None:
        """
        Compile it.

        :raise OSError: if there is no C compiler, or it fails.
        """
        compiler = shutil.which("cc")
        if compiler is None:
            raise OSError("there is no cc")
        library = folder / "clock_shift.so"
        command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), "-x", "c", "-"]
        made = subprocess.run(command, input=SOURCE, text=True, capture_output=True, check=False, timeout=60)
        if made.returncode != 0:
            raise OSError(made.stderr)
        self._file = folder / "clock_shift"
        self._file.write_bytes(bytes(8))
        self.environ = {"LD_PRELOAD": str(library), "CLOCK_SHIFT": str(self._file)}

    def set(self, seconds: int) -> None:
        """Let the clock be ahead by so many seconds, from now on."""
        with self._file.open("r+b", buffering=0) as file:
            file.write(struct.pack("=q", seconds))
