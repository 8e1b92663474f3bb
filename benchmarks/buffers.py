"""Large buffers for whole streams, touched before a clock starts and used again by the next measurement."""

from __future__ import annotations

_pool: list[bytearray] = []


def buffers(count: int, size: int) -> list[bytearray]:
    """So many buffers of at least so many bytes. The next call returns the same memory."""
    for number in range(count):
        if number == len(_pool):
            _pool.append(bytearray())
        if len(_pool[number]) < size:
            _pool[number] = bytearray(b"\1") * size  # writes to every page, where bytearray(size) would not
    return _pool[:count]
