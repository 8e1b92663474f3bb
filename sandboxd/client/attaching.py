"""
The WebSocket protocols of the API, without I/O: their paths, subprotocols and messages.

``/processes/<id>/attach`` has the framing of Kubernetes' remote command protocol: the first byte of a message is the
channel.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from sandboxd.client.errors import ProtocolError
from sandboxd.client.flow import Flow, target
from sandboxd.client.operations import one, operation, process
from sandboxd.client.replies import Gap, StreamName

ATTACH = "v5.channel.k8s.io"
BYTES = "sandboxd.bytes"

#: Channels.
STDIN, STDOUT, STDERR, STATUS, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255

#: Bytes of a message; the daemon takes no more than 1 MiB.
MESSAGE = 64 * 1024

#: Close codes that say what is wrong with what was sent, RFC 6455 section 7.4.1.
REFUSALS = (1002, 1003, 1007, 1008, 1009)


class Chunk(NamedTuple):
    """Output of a process, as it was written."""

    stream: StreamName
    data: bytes


class Lost(NamedTuple):
    """Output was lost while the connection was broken; how much is unknown."""


class Attaching:
    """
    The state of an attachment to a process, which may take several connections.

    A terminal's output is read on behind the bytes that have been seen. The messages of other processes have no
    numbers: from the start of a log that is still whole, what has been seen is skipped, byte by byte; else what was
    written meanwhile is lost, which is reported.

    :param after: only what is behind the record of this number.
    :param tail: only the last so many records, and what comes.
    :ivar exit_code: the exit code of the process, once it has ended; 128 and the number of the signal that ended it.
    :ivar size: the size that its terminal was given, columns and rows.
    """

    def __init__(self, id: str, after: int | None = None, tail: int | None = None) -> None:
        self.id = id
        self.exit_code: int | None = None
        self.size: tuple[int, int] | None = None
        self._first: dict[str, int | None] = {"after": after, "tail": tail}
        self._whole = after is None and tail is None
        self._seen = {"stdout": 0, "stderr": 0}
        self._skip = {"stdout": 0, "stderr": 0}
        self._connected = False
        self._lost = False

    @property
    def ended(self) -> bool:
        """Whether the process has ended and all of its output has arrived."""
        return self.exit_code is not None

    def path(self) -> Flow[str]:
        """Return the path of the next connection."""
        if not self._connected and not self._whole:
            return self._path(**self._first)
        found = yield from process(self.id)
        if self._whole and found.tty is not None:
            return self._path(offset=self._seen["stdout"])
        if not self._connected:
            return self._path()
        self._whole = self._whole and not found.output.truncated
        self._lost = not self._whole
        self._skip = dict(self._seen) if self._whole else {"stdout": 0, "stderr": 0}
        return self._path(tail=None if self._whole else 0)

    def _path(self, **query: int | None) -> str:
        return target(f"{one(self.id)}/attach", events=True, **query)

    def feed(self, message: bytes | str) -> Iterator[Chunk | Gap | Lost]:
        """
        Yield the output in a message.

        :raise ProtocolError: if it is not as the protocol has it.
        """
        self._connected = True
        if self._lost:
            self._lost = False
            yield Lost()
        if isinstance(message, str):
            event = self._json(message)
            if event.get("event") == "gap":
                if "offset" in event:
                    self._seen["stdout"] = event["offset"]
                else:  # what follows cannot be held against what was seen
                    self._whole, self._skip = False, {"stdout": 0, "stderr": 0}
                yield Gap(dropped=int(event.get("dropped", 0)))
        elif message[:1] in (b"\x01", b"\x02"):
            stream: StreamName = "stdout" if message[0] == STDOUT else "stderr"
            skipped = min(self._skip[stream], len(message) - 1)
            self._skip[stream] -= skipped
            data = message[1 + skipped :]
            self._seen[stream] += len(data)
            if data:
                yield Chunk(stream, data)
        elif message[:1] == b"\x03":
            self.exit_code = self._code(self._json(message[1:]))

    def _code(self, status: dict[str, Any]) -> int:
        if status.get("status") == "Success":
            return 0
        try:
            causes = status["details"]["causes"]
            return next(int(cause["message"]) for cause in causes if cause["reason"] == "ExitCode")
        except (KeyError, TypeError, ValueError, StopIteration):
            raise ProtocolError(f"an exit status without a code: {status}") from None

    def _json(self, text: str | bytes) -> dict[str, Any]:
        try:
            found = json.loads(text)
            assert isinstance(found, dict)
        except (ValueError, AssertionError):
            raise ProtocolError("a message that is not JSON") from None
        return found


def input_messages(data: bytes) -> Iterator[bytes]:
    """Yield the messages that write to stdin."""
    for start in range(0, len(data), MESSAGE):
        yield bytes([STDIN]) + data[start : start + MESSAGE]


def resize_message(cols: int, rows: int) -> bytes:
    """Return the message that sets the size of a terminal, in characters."""
    return bytes([RESIZE]) + json.dumps({"Width": cols, "Height": rows}).encode("ascii")


#: The message that ends stdin.
END_OF_INPUT = bytes([CLOSE, STDIN])


@operation("GET /processes/{id}/attach")
def attach(id: str, *, after: int | None = None, tail: int | None = None, events: bool = True) -> Attaching:
    """Return the state of an attachment that is not connected yet."""
    return Attaching(id, after, tail)


@operation("GET /ports/{port}/connect")
def connect(port: int) -> str:
    """Return the path of a tunnel."""
    return f"/ports/{port}/connect"
