"""Exit codes as a shell reports them."""

from __future__ import annotations

import signal

from sandboxd.client.replies import Complete, RunResult

#: What ``timeout(1)`` exits with when the time is over.
TIMED_OUT = 124


def exit_code(result: RunResult | Complete) -> int:
    """Return the exit code of a command; 128 and the number of the signal, if one has ended it."""
    if result.signal is None:
        return result.code
    return 128 + signal.Signals[result.signal] if result.signal in signal.Signals.__members__ else 255
