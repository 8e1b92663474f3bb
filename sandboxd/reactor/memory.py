"""The return of free memory to the system, malloc_trim(3)."""

from __future__ import annotations

import ctypes
import os

from twisted.application.service import Service
from twisted.internet.interfaces import IReactorTime
from twisted.internet.task import LoopingCall

from sandboxd.reactor.threads import ThreadPool

#: Seconds between two looks at the memory.
INTERVAL = 5.0

#: Bytes by which the resident memory must have grown since the last return.
GROWTH = 16 * 1024 * 1024

#: Looks until the next return if the resident memory is higher than it was once, though it has not grown: at first, and
#: at most, as they double whenever a return has brought less than ``WORTH`` bytes.
AGAIN = 2
AGAIN_MAX = 64
WORTH = 1024 * 1024

_PAGE = os.sysconf("SC_PAGE_SIZE")


class MemoryTrimmer(Service):
    """
    Returns what is free in the heap once the resident memory has grown.

    The C library returns only what is free at the end of the heap. Bodies and outputs of some 100 kB leave holes
    between what lives longer: 100 MB after some hundred commands with large outputs at a time. To return them takes
    some 10 ms, in a thread.

    What was in use then may be free later, without any growth, as when the last of many requests is over. So it is
    repeated, ever more rarely, while the resident memory is much higher than the lowest so far.

    :param threads: runs what takes long.
    """

    def __init__(self, clock: IReactorTime, threads: ThreadPool) -> None:
        self._threads = threads
        self._call = LoopingCall(self._look)
        self._call.clock = clock
        self._trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc only
        self._last = self._lowest = 0
        self._looks, self._again = 0, AGAIN

    def startService(self) -> None:
        """Start looking."""
        super().startService()
        if self._trim is not None:
            self._last = self._lowest = _resident()
            self._call.start(INTERVAL, now=False)

    def stopService(self) -> None:
        """Stop looking."""
        super().stopService()
        if self._call.running:
            self._call.stop()

    async def _look(self) -> None:
        assert self._trim is not None
        try:
            resident = _resident()
            self._looks += 1
            grown = resident - self._last >= GROWTH
            if grown or (resident - self._lowest >= GROWTH and self._looks >= self._again):
                await self._threads(self._trim, 0)
                self._last = _resident()
                self._looks = 0
                worth = grown or resident - self._last >= WORTH
                self._again = AGAIN if worth else min(2 * self._again, AGAIN_MAX)
            self._lowest = min(self._lowest, self._last, resident)
        except OSError:
            pass  # no descriptor or no thread: next time


def _resident() -> int:
    """Return the bytes of this process that are in memory, as of proc(5)."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read().split()[1]) * _PAGE
