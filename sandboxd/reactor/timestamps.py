"""The format of times."""

from __future__ import annotations

from datetime import datetime, timezone

#: The first and the last second that :class:`datetime` has, of the years 1 and 9999; a file's time may be outside.
_FIRST, _LAST = -62_135_596_800, 253_402_300_799


def rfc3339(seconds: float) -> str:
    """Format seconds since the epoch as RFC 3339 in UTC, with microseconds."""
    time = datetime.fromtimestamp(max(_FIRST, min(seconds, _LAST)), timezone.utc)
    return time.isoformat(timespec="microseconds").replace("+00:00", "Z")
