"""The return of free memory to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

#: In a process of its own, whose heap nothing else uses.
FRAGMENTED = """
import ctypes
from twisted.internet.defer import succeed
from twisted.internet.task import Clock
from sandboxd.reactor import memory

calls = []

def in_thread(function, *args):
    calls.append(args)
    return succeed(function(*args))

clock = Clock()
trimmer = memory.MemoryTrimmer(clock, in_thread)
trimmer.startService()
before = memory._resident()
clock.advance(memory.INTERVAL)
assert not calls
blocks = [b"x" * 100_000 for _ in range(1000)]
kept = blocks[::20]
del blocks
after = memory._resident()
assert after - before > 80e6, "the C library returns them itself"
clock.advance(memory.INTERVAL)
assert memory._resident() - before < 20e6, memory._resident() - before
clock.advance(memory.INTERVAL)
assert len(calls) == 1
trimmer.stopService()
assert not clock.getDelayedCalls()
"""


@pytest.mark.slow
def test_what_is_free_between_what_lives_longer_is_returned() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("NOT TESTED: only glibc has malloc_trim")
    subprocess.run([sys.executable, "-W", "ignore", "-c", FRAGMENTED], check=True, timeout=30)


#: All is in use when it has grown, and most of it is free later.
FREE_LATER = """
from twisted.internet.defer import succeed
from twisted.internet.task import Clock
from sandboxd.reactor import memory

calls = []

def in_thread(function, *args):
    calls.append(args)
    return succeed(function(*args))

clock = Clock()
trimmer = memory.MemoryTrimmer(clock, in_thread)
trimmer.startService()
before = memory._resident()
blocks = [b"x" * 100_000 for _ in range(1000)]
clock.advance(memory.INTERVAL)
assert len(calls) == 1
kept = blocks[::20]
del blocks
assert memory._resident() - before > 80e6, "the C library returns them itself"
for _ in range(memory.AGAIN):
    clock.advance(memory.INTERVAL)
assert memory._resident() - before < 20e6, memory._resident() - before

# While it stays in use, that is tried ever more rarely.
blocks = [b"x" * 100_000 for _ in range(1000)]
calls.clear()
for _ in range(100):
    clock.advance(memory.INTERVAL)
assert 3 < len(calls) < 9, len(calls)
"""


@pytest.mark.slow
def test_what_was_in_use_is_returned_when_it_is_free() -> None:
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("NOT TESTED: only glibc has malloc_trim")
    subprocess.run([sys.executable, "-W", "ignore", "-c", FREE_LATER], check=True, timeout=30)
