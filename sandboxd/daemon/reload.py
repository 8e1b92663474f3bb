"""Reload on SIGHUP: what is read again then."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from twisted.internet.defer import Deferred
from twisted.logger import Logger


class Reloads:
    """
    The parts of the daemon that can be reloaded, each by a coroutine function.

    :param began: is called when a reload begins.
    :param ended: is called when it has ended, whatever came of it.
    """

    _log = Logger()

    def __init__(self, began: Callable[[], None] = lambda: None, ended: Callable[[], None] = lambda: None) -> None:
        self._began = began
        self._ended = ended
        self._reloads: list[tuple[str, Callable[[], Coroutine[Any, Any, None]]]] = []
        self._running = False
        self._again = False

    def add(self, name: str, reload: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """
        Add a part to be reloaded.

        :param name: the part's name, for the log.
        :param reload: reads it again. It raises if that fails, and then keeps what it had.
        """
        self._reloads.append((name, reload))

    def run(self) -> None:
        """Reload everything; if that is going on already, once more after it."""
        self._again = self._running
        if not self._running:
            self._running = True
            Deferred.fromCoroutine(self._run())

    async def _run(self) -> None:
        self._began()
        self._log.info("sandboxd reloads")
        try:
            for name, reload in self._reloads:
                try:
                    await reload()
                except Exception:
                    self._log.failure("{name} could not be reloaded; what was there before holds", name=name)
                else:
                    self._log.info("{name} reloaded", name=name)
        finally:
            self._running = False
            self._ended()
        if self._again:
            self.run()
