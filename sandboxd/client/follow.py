"""Event streams that are resumed after their last event, without I/O."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, Literal, TypeVar

from sandboxd.client.errors import NotFound, SandboxError, SandboxGone
from sandboxd.client.flow import ConnectionLost, Flow, HttpRequest, HttpResponse, target
from sandboxd.client.operations import Cmd, CommandOptions, command_body, new_key, operation, post, process
from sandboxd.client.replies import Change, Complete, Gap, Output, Record, decode
from sandboxd.client.sse import Event, EventParser

T = TypeVar("T")

#: Seconds of silence after which a stream is taken for broken. The daemon sends a comment every 15 seconds.
SILENCE = 50.0


class Follow(Generic[T]):
    """
    The state of an event stream, which may take several requests.

    :param request: opens it.
    :param beginning: query parameters that say where it begins; when it is resumed, the last event's id does.
    :ivar asked: whether it has been opened, or that was tried.
    :ivar ended: whether there is no more to come.
    :ivar id: the execution's id, once the stream has begun and if it is of one.
    """

    def __init__(self, request: HttpRequest, beginning: Mapping[str, object] | None = None) -> None:
        self._request = replace(request, timeout=SILENCE)
        self._beginning = beginning or {}
        self._parser = EventParser()
        self.asked = False
        self.ended = False
        self.id: str | None = None

    def may_resume(self, error: SandboxError) -> bool:
        """Return whether the stream can be opened again after an error."""
        return self._request.repeatable or not (isinstance(error, ConnectionLost) and error.sent)

    def prepare(self) -> Flow[None]:
        """Find out what must be known before the stream is opened."""
        yield from ()

    def open(self) -> HttpRequest:
        """Return the request for the events after the last one that was seen."""
        self._parser.restart()
        self.asked = True
        request = self._request
        if self._parser.last_id:
            return replace(request, headers={**request.headers, "Last-Event-ID": self._parser.last_id})
        more = target("", **self._beginning)
        return replace(request, path=request.path + (more.replace("?", "&") if "?" in request.path else more))

    def opened(self, response: HttpResponse) -> None:
        """Take the head of a successful reply."""
        self.id = response.headers.get("x-execution-id", self.id)

    def feed(self, data: bytes) -> Iterator[T]:
        """
        Yield the events that are complete with ``data``.

        :raise SandboxError: what the daemon reports in the stream.
        """
        for event in self._parser.feed(data):
            if not self.ended:
                yield from self._take(event)

    def _take(self, event: Event) -> Iterator[T]:
        raise NotImplementedError


class CommandFollow(Follow["Output | Gap"]):
    """
    The stream of a command's output.

    :ivar result: how it ended, once it has.
    :ivar on_start: called with the execution's id when the command runs.
    """

    result: Complete | None = None
    on_start: Callable[[str], object] | None = None

    def prepare(self) -> Flow[None]:
        """
        Check that the execution is still there, before the request that started it is repeated.

        A daemon that was restarted does not know the request's key, and would run the command a second time.

        :raise SandboxGone: if it is not.
        """
        if self.id is not None:
            try:
                yield from process(self.id)
            except NotFound:
                raise self._gone(self.id) from None

    def opened(self, response: HttpResponse) -> None:
        """
        Take the head of a successful reply, and report the command's id, once.

        :raise SandboxGone: if the reply is of another execution: the daemon was restarted since :meth:`prepare`.
        """
        before = self.id
        super().opened(response)
        if before is not None and self.id != before:
            raise self._gone(before)
        if self.on_start is not None and self.id is not None:
            report, self.on_start = self.on_start, None
            report(self.id)

    @property
    def running(self) -> bool:
        """Whether the command may still run although the connection is closed."""
        return self.asked and not self.ended and self._request.repeatable

    def _gone(self, id: str) -> SandboxGone:
        return SandboxGone(
            f"execution {id} is gone: the daemon was restarted, or no longer keeps its record; "
            "how the command ended is unknown"
        )

    def _take(self, event: Event) -> Iterator[Output | Gap]:
        if event.name == "output":
            yield decode(event.data, Output, seq=_number(event.id))
        elif event.name == "error":
            raise SandboxError(_error(event) or "the command could not be started")
        elif event.name == "complete":
            self.result = decode(event.data, Complete)
            self.ended = True
        elif event.name == "gap":
            yield decode(event.data, Gap)


class LogFollow(Follow["Record | Gap"]):
    """
    The stream of a process's log.

    :param tail: how many of the last records to begin with. The number of the first one is asked for once: if the
        connection broke before the first record, the last ones would be others by then.
    """

    def __init__(self, request: HttpRequest, id: str, beginning: Mapping[str, object], tail: int | None) -> None:
        super().__init__(request, beginning)
        self._process = id
        self._tail = tail

    def prepare(self) -> Flow[None]:
        """Find out the record that the stream begins with."""
        if self._tail is not None:
            found = yield from process(self._process)
            self._beginning = {"after": max(0, found.output.records - self._tail)}
            self._tail = None

    def _take(self, event: Event) -> Iterator[Record | Gap]:
        if event.name == "log":
            yield decode(event.data, Record, seq=_number(event.id))
        elif event.name == "gap":
            yield decode(event.data, Gap)
        elif event.name == "error":
            raise NotFound(_error(event) or "there is no such process")
        elif event.name == "complete":
            self.ended = True


class ChangeFollow(Follow[Change]):
    """The stream of changes in a directory."""

    _stands = False

    def _take(self, event: Event) -> Iterator[Change]:
        if event.name == "ready" and self._stands:
            return  # it was resumed
        self._stands = self._stands or event.name == "ready"
        self.ended = event.name == "end"
        yield decode(event.data, Change, event=event.name)


@operation("POST /run_streaming", Output)
def follow_command(
    cmd: Cmd, reconnect: bool, on_start: Callable[[str], object] | None, options: CommandOptions
) -> CommandFollow:
    """
    Return the stream of a command's output.

    :param reconnect: whether the command outlives a connection that breaks, so that the stream can be resumed.
    :param on_start: called with the execution's id when the command runs.
    """
    headers = {"Idempotency-Key": new_key()} if reconnect else {}
    follow = CommandFollow(post("/run_streaming", command_body(cmd, options), headers=headers, repeatable=reconnect))
    follow.on_start = on_start
    return follow


@operation("GET /process_logs_streaming", Record)
def follow_log(
    id: str,
    *,
    after: int | None = None,
    tail: int | None = None,
    stream: Literal["stdout", "stderr"] | None = None,
    follow: bool = True,
) -> LogFollow:
    """
    Return the stream of a process's log.

    :param after: only what is behind the record of this number.
    :param tail: only the last so many, and what comes.
    :param follow: whether to go on with new lines as they come.
    """
    path = target("/process_logs_streaming", id=id, stream=stream, follow=None if follow else "false")
    # The records of one stream have gaps in their numbers: only the daemon can count them.
    counted = tail if stream is None else None
    return LogFollow(HttpRequest("GET", path), id, {"after": after, "tail": tail if counted is None else None}, counted)


@operation("GET /watch", Change)
def follow_changes(
    path: str, *, recursive: bool = False, exclude: Sequence[str] = (), after: int | None = None
) -> ChangeFollow:
    """
    Return the stream of changes in a directory.

    :param recursive: whether what is in the directories below is meant too.
    :param exclude: patterns of what is left out.
    """
    where = target("/watch", path=path, recursive=recursive, exclude=list(exclude))
    return ChangeFollow(HttpRequest("GET", where), {"after": after})


def _error(event: Event) -> str | None:
    return decode(event.data, dict[str, Any]).get("error")


def _number(id: str) -> int:
    return int(id) if id.isdigit() else 0
