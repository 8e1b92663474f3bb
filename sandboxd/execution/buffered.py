"""The collection of a foreground command's output for one reply, within a bound."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from sandboxd.execution.execution import Execution
from sandboxd.execution.lines import character_border
from sandboxd.execution.log import Batch


class HeadAndTail:
    """
    A buffer that keeps the first and the last bytes of a stream.

    :param limit: most bytes kept: half from the head, the rest from the tail.
    :ivar size: bytes received.
    :ivar dropped: bytes of them that were not kept.
    """

    def __init__(self, limit: int) -> None:
        self.dropped = 0
        self.size = 0
        self._limit = limit
        self._head: list[bytes] = []
        self._head_size = 0
        self._tail: deque[bytes] = deque()
        self._tail_size = 0

    def add(self, data: bytes) -> None:
        """Append output."""
        self.size += len(data)
        if not self._tail:
            room = character_border(data, min(self._limit // 2 - self._head_size, len(data)))
            if room:
                self._head.append(data[:room])
                self._head_size += room
                data = data[room:]
            if not data:
                return
        self._tail.append(data)
        self._tail_size += len(data)
        while (excess := self._head_size + self._tail_size - self._limit) > 0:
            oldest = self._tail.popleft()
            if len(oldest) > excess:
                self._tail.appendleft(oldest[excess:])
            cut = min(len(oldest), excess)
            self._tail_size -= cut
            self.dropped += cut

    def pieces(self) -> Iterator[bytes]:
        """Return the kept bytes, in order."""
        yield from self._head
        yield from self._tail

    def text(self) -> str:
        """Return the kept bytes as text; a line in the middle says how much was cut out, if anything was."""
        cut = f"\n[... {self.dropped} bytes left out ...]\n" if self.dropped else ""
        head, tail = (b"".join(part).decode("utf-8", "replace") for part in (self._head, self._tail))
        return head + cut + tail


class BufferedOutput:
    """
    The output of an execution, collected for a reply when it has ended.

    :param execution: one that has just been requested, and has no output yet.
    :param limit: most bytes kept of each stream.
    :ivar kept: the output by stream; complete once the execution has ended.
    """

    def __init__(self, execution: Execution, limit: int) -> None:
        self.execution = execution
        self.kept = {"stdout": HeadAndTail(limit), "stderr": HeadAndTail(limit)}
        execution.log.listener = self._keep

    @property
    def size(self) -> int:
        """Bytes of output kept."""
        return sum(stream.size - stream.dropped for stream in self.kept.values())

    @property
    def cost(self) -> int:
        """Bytes of memory held, the execution's record included."""
        return self.size + self.execution.size

    def _keep(self, batch: Batch) -> None:
        self.kept[batch.stream].add(batch.data)
