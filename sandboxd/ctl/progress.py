"""A progress bar for transfers."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sandboxd.ctl.config import use_colours

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from sandboxd.client.transfers import Progress

#: Seconds after which a bar is shown.
DELAY = 0.5


class Bar:
    """A progress bar, shown once the transfer has run for :data:`DELAY` seconds."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._since = time.monotonic()
        self._bars: Bars | None = None

    def __call__(self, done: int, total: int | None) -> None:
        """Show the number of bytes transferred, and the total."""
        if self._bars is None:
            if time.monotonic() - self._since < DELAY:
                return
            self._bars = self._begin()
            self._task = self._bars.add_task(self._title, total=total, completed=done)
        self._bars.update(self._task, completed=done, total=total)

    def _begin(self) -> Bars:
        from rich import progress
        from rich.console import Console

        console = Console(stderr=True, no_color=not use_colours(True))
        bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
        )
        bars.start()
        return bars

    def close(self) -> None:
        """Stop updating the bar; its last state stays on the screen."""
        if self._bars is not None:
            self._bars.stop()


@contextmanager
def bar(title: str, quiet: bool = False) -> Iterator[Progress | None]:
    """Give a progress bar to the ``with`` statement; None if standard error is no terminal, or ``quiet`` is true."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    shown = Bar(title)
    try:
        yield shown
    finally:
        shown.close()
