"""
The log's formats: text for people, a JSON object a line, or lines for systemd's journal.

A reader of the log that has stopped reading must not stop the daemon, so while that runs a thread does the writing.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Condition, Thread
from typing import Any

from twisted.logger import (
    FilteringLogObserver,
    ILogObserver,
    LogEvent,
    LogLevel,
    LogLevelFilterPredicate,
    eventAsText,
    formatEvent,
    formatEventAsClassicLogText,
)
from twisted.python.logfile import LogFile
from zope.interface import implementer

from sandboxd.reactor.timestamps import rfc3339

#: Characters of log that may wait to be written; what comes when there are more is dropped, and counted.
BACKLOG = 4 * 1024 * 1024

#: Seconds that the end of the daemon waits for them.
PATIENCE = 1.0

#: The priorities of sd-daemon(3), by the names of Twisted's levels.
PRIORITIES = {"debug": 7, "info": 6, "warn": 4, "error": 3, "critical": 2}

#: Fields of an event that are of no use to a reader, or are there under another name.
_INTERNAL = {"format", "isError", "message", "printed", "system", "text", "time"}


class LogWriter:
    """
    The writer of the log's lines.

    :param write: writes them, and may block.
    """

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self._write = write
        self._thread: Thread | None = None
        self._changed = Condition()
        self._waiting: deque[str] = deque()
        self._size = 0
        self._dropped = 0
        self._stopping = False
        self._stuck = False

    def put(self, text: str) -> None:
        """Write lines now, or hand them to the thread."""
        if self._thread is None:
            if not self._stuck:
                self._write(_encoded(text))
            return
        with self._changed:
            if self._size + len(text) > BACKLOG:
                self._dropped += 1
                return
            self._waiting.append(text)
            self._size += len(text)
            self._changed.notify()

    def start(self) -> None:
        """Write in a thread from now on."""
        self._stopping = False
        self._thread = Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Write what is queued, unless that takes too long, and write without a thread from now on."""
        if self._thread is None:
            return
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(PATIENCE)
        self._stuck = self._thread.is_alive()
        self._thread = None

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._dropped or self._stopping)
                text, dropped = "".join(self._waiting), self._dropped
                if not text and not dropped:
                    return
                self._waiting.clear()
                self._size = self._dropped = 0
            if dropped:
                text += f"{dropped} log entries were dropped, because the log was not read\n"
            with suppress(OSError):  # the log itself cannot be written
                self._write(_encoded(text))


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")


def to_descriptor(fd: int) -> Callable[[bytes], None]:
    """Return a function that writes to a descriptor, without a buffer that an exit would have to wait for."""

    def write(data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(fd, left) :]

    return write


class RotatedFile:
    """
    A log file that is rotated at 1 MB.

    Twisted's own is of no use any more once a rotation has closed it and could not open another one.

    :param rotated: most files that are kept beside it.
    :raise OSError: if it cannot be opened.
    """

    def __init__(self, path: str, rotated: int) -> None:
        self._path = path
        self._rotated = rotated
        self._file: LogFile | None = self._open()

    def write(self, data: bytes) -> None:
        """
        Append data.

        :raise OSError: if that fails; the next call opens the file anew.
        """
        if self._file is None:
            self._file = self._open()
        try:
            self._file.write(data)
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Close it until the next write."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def _open(self) -> LogFile:
        file: LogFile = LogFile.fromFullPath(self._path, maxRotatedFiles=self._rotated)
        return file


@implementer(ILogObserver)
class Observer:
    """
    A log observer that writes events as text.

    :param render: makes text of one; lines, each with its end.
    """

    def __init__(self, outlet: LogWriter, render: Callable[[LogEvent], str]) -> None:
        self._outlet = outlet
        self._render = render

    def __call__(self, event: LogEvent) -> None:
        """Write an event."""
        self._outlet.put(self._render(event))


def log_observer(outlet: LogWriter, level: Any, *, as_json: bool, to_journal: bool) -> ILogObserver:
    """
    Return the observer that writes the log.

    :param level: what is below it is left out; one of :class:`twisted.logger.LogLevel`.
    :param as_json: whether each event is a JSON object.
    :param to_journal: whether systemd's journal reads it, which has a clock of its own and wants to know priorities.
    """
    render: Callable[[LogEvent], str] = as_json_line if as_json else as_bare_text if to_journal else as_text
    if to_journal:
        render = _prioritised(render)
    return FilteringLogObserver(Observer(outlet, render), [LogLevelFilterPredicate(level)])


def as_text(event: LogEvent) -> str:
    """Format an event as Twisted's own log files have it: time, origin, level, text; further lines are indented."""
    return formatEventAsClassicLogText(event) or ""


def as_bare_text(event: LogEvent) -> str:
    """Format an event without its time."""
    return f"{eventAsText(event, includeTimestamp=False)}\n"


def as_json_line(event: LogEvent) -> str:
    """
    Format an event as a JSON object: ``time`` (RFC 3339, UTC), ``level``, ``logger``, ``message``, the fields that the
    message was made of, and ``traceback`` if there is one.
    """
    seconds = event.get("log_time", 0.0)
    found: dict[str, object] = {
        "time": rfc3339(seconds),
        "level": event.get("log_level", LogLevel.info).name,
        "logger": event.get("log_namespace", ""),
        "message": formatEvent(event),
    }
    for name, value in event.items():
        if not name.startswith("log_") and name not in _INTERNAL and isinstance(value, (str, int, float, type(None))):
            found.setdefault(name, value)
    if "log_failure" in event:
        found["traceback"] = event["log_failure"].getTraceback()
    return json.dumps(found) + "\n"


def _prioritised(render: Callable[[LogEvent], str]) -> Callable[[LogEvent], str]:
    """Return a function that puts the event's priority at the beginning of each line, as sd-daemon(3) asks."""

    def prioritised(event: LogEvent) -> str:
        level = event.get("log_level", LogLevel.info).name
        return "".join(f"<{PRIORITIES[level]}>{line}\n" for line in render(event).splitlines())

    return prioritised
