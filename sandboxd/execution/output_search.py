"""The search for a text in the output of an execution, in what is kept and in what follows."""

from __future__ import annotations

from typing import NamedTuple

from sandboxd.execution.log import Batch, DroppedRecords, OutputLog, Stream
from sandboxd.reactor.turn_budget import TurnBudget

#: Bytes that are kept of the earlier records of a line that comes in several.
LINE = 64 * 1024


class OutputMatch(NamedTuple):
    """
    The place where a text was found.

    :ivar seq: the number of the record in which it ends.
    :ivar line: the line so far, its last :data:`LINE` bytes if it is longer.
    """

    seq: int
    line: str


class OutputSearch:
    """
    A search of a log for a text; a line that is in several records counts as one.

    :param text: what to look for, without a newline in it.
    """

    def __init__(self, log: OutputLog, text: str, turns: TurnBudget) -> None:
        self._text = text.encode("utf-8", "surrogateescape")
        self._turns = turns
        self._cursor = log.cursor()
        self._begun: dict[Stream, bytes] = {}

    async def available(self) -> OutputMatch | None:
        """Search all records that there are now; return the match or None."""
        while True:
            await self._turns.turn()
            found = self._cursor.read()
            if found is None:
                return None
            if isinstance(found, DroppedRecords):
                self._begun.clear()
            elif (match := self._in_batch(found)) is not None:
                return match

    async def until_ended(self) -> OutputMatch | None:
        """Search until the log ends; return the match, or None if there was none."""
        while (match := await self.available()) is None and not self._cursor.ended:
            await self._cursor.when_more()
        return match

    def close(self) -> None:
        """End the search."""
        self._cursor.close()

    def _in_batch(self, batch: Batch) -> OutputMatch | None:
        begun = self._begun.pop(batch.stream, b"")
        if not (begun or batch.partial or self._text in batch.data):
            return None
        for index, record in enumerate(batch.lines.records()):
            line = begun + record
            if self._text in line:
                return OutputMatch(batch.first + index, line[-LINE:].decode("utf-8", "replace"))
            begun = line[-LINE:] if batch.partial else b""
        if begun:
            self._begun[batch.stream] = begun
        return None
