"""The blocking client: :class:`Sandbox`, whose methods return when the operation is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, Generic, Literal, ParamSpec, TypeVar

from sandboxd.client import file_operations, operations, transfers, trees
from sandboxd.client.attaching import Attaching
from sandboxd.client.errors import SandboxError, SandboxGone, Unavailable, error_of
from sandboxd.client.flow import Backoff, BlockingCall, ConnectionLost, Flow, HttpRequest, HttpResponse, Step
from sandboxd.client.follow import CommandFollow, Follow, follow_changes, follow_command, follow_log
from sandboxd.client.http import EXTENSIONS, auth_headers, check_url, head, httpx, lost, timeouts, verify
from sandboxd.client.operations import Cmd, CommandOptions
from sandboxd.client.outcome import checked, ended
from sandboxd.client.replies import Change, Complete, Gap, Output, Record, RunResult

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from sandboxd.client.sockets import Attachment, Forward, Tunnel

P = ParamSpec("P")
T = TypeVar("T")


def blocking(describe: Callable[P, Flow[T]]) -> Callable[Concatenate[Sandbox, P], T]:
    """Return the blocking method that carries out an operation."""

    @wraps(describe)
    def method(self: Sandbox, /, *args: P.args, **options: P.kwargs) -> T:
        return self.carry_out(describe(*args, **options))

    return method


class Sandbox:
    """
    A client of one sandbox, whose methods block. Several threads may use it.

    :param url: where its API is, such as ``http://127.0.0.1:3030``; with the prefix if it has one.
    :param secret: its token.
    :param patience: seconds for which what has failed is tried again, if that does no harm, before an error is raised.
    """

    def __init__(self, url: str, secret: str | None = None, *, patience: float = 30.0) -> None:
        self.url = check_url(url)
        self.patience = patience
        self.secret = secret
        self.headers = auth_headers(secret)
        self._verify = verify(self.url)
        self._http = self._client()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    # Commands

    def run(
        self,
        cmd: Cmd,
        *,
        check: bool = False,
        max_output: int | None = None,
        on_stdout: Callable[[str], object] | None = None,
        on_stderr: Callable[[str], object] | None = None,
        **options: Unpack[CommandOptions],
    ) -> RunResult:
        """
        Run a command and return its output when it has ended.

        Without ``on_stdout`` and ``on_stderr``, the command is killed if the connection breaks. With one of them the
        output is read as by :meth:`stream`: a connection that breaks is resumed, and the command runs on meanwhile,
        also if this process is killed.

        :param check: raise CommandFailed if its code is not 0.
        :param max_output: bytes of each stream to keep, half of the beginning and half of the end.
        :param on_stdout: called with each line as it comes; then the result has no output.
        :raise CommandTimeout: if it was killed because of its ``timeout`` or ``idle_timeout``.
        :raise SandboxGone: if the connection broke, and could not be resumed without a loss of lines, or the daemon was
            restarted meanwhile. The command is not run again.
        """
        if on_stdout is None and on_stderr is None:
            return self.carry_out(operations.run(cmd, check=check, max_output=max_output, **options))
        with self.stream(cmd, **options) as stream:
            for output in stream:
                if isinstance(output, Gap):
                    raise SandboxGone(f"{output.dropped} lines were lost while the connection was broken")
                callback = on_stdout if output.stream == "stdout" else on_stderr
                if callback is not None:
                    callback(output.text)
        return checked(ended(stream.result), check)

    def stream(
        self,
        cmd: Cmd,
        *,
        reconnect: bool = True,
        on_start: Callable[[str], object] | None = None,
        **options: Unpack[CommandOptions],
    ) -> CommandEvents:
        """
        Run a command and iterate over its output as it comes. Leaving the ``with`` statement early kills it.

        Iterating raises SandboxGone if the daemon was restarted meanwhile. The command is not run again.

        :param reconnect: whether the command outlives a connection that breaks, so that the stream is resumed. Without,
            it is killed when the connection breaks, also if this process is killed.
        :param on_start: called with the execution's id when the command runs, which may be long before its output.
        """
        return CommandEvents(self, follow_command(cmd, reconnect, on_start, options))

    # Background processes

    start = blocking(operations.start)
    processes = blocking(operations.processes)
    process = blocking(operations.process)
    kill = blocking(operations.kill)
    signal = blocking(operations.signal)
    wait = blocking(operations.wait)
    records = blocking(operations.records)
    write_stdin = blocking(operations.write_stdin)
    resize = blocking(operations.resize)

    def logs(
        self,
        id: str,
        *,
        after: int | None = None,
        tail: int | None = None,
        stream: Literal["stdout", "stderr"] | None = None,
        follow: bool = True,
    ) -> Events[Record | Gap]:
        """
        Iterate over the log of a process: first the records that are kept, then new ones until it has ended.

        :param after: only what is behind the record of this number.
        :param tail: only the last so many, and what comes.
        :param follow: whether to go on with new lines as they come.
        """
        return Events(self, follow_log(id, after=after, tail=tail, stream=stream, follow=follow))

    def attach(self, id: str, *, after: int | None = None, tail: int | None = None) -> Attachment:
        """
        Attach to a process: its output as it is written, its stdin, and its terminal.

        :param after: only what is behind the record of this number.
        :param tail: only the last so many records, and what comes; 0 for a terminal that is to be drawn anew.
        """
        from sandboxd.client.sockets import Attachment

        return Attachment(self, Attaching(id, after, tail))

    # Files

    read = blocking(file_operations.read)
    read_text = blocking(file_operations.read_text)
    read_lines = blocking(file_operations.read_lines)
    write = blocking(file_operations.write)
    append = blocking(file_operations.append)
    edit = blocking(file_operations.edit)
    upload = blocking(transfers.upload)
    download = blocking(transfers.download)
    upload_tree = blocking(trees.upload_tree)
    upload_entries = blocking(trees.upload_entries)
    download_tree = blocking(trees.download_tree)
    stat = blocking(file_operations.stat)
    exists = blocking(file_operations.exists)
    list_files = blocking(file_operations.list_files)
    list_page = blocking(file_operations.list_page)
    glob = blocking(file_operations.glob)
    grep = blocking(file_operations.grep)
    make_dir = blocking(file_operations.make_dir)
    move = blocking(file_operations.move)
    copy = blocking(file_operations.copy)
    chmod = blocking(file_operations.chmod)
    touch = blocking(file_operations.touch)
    link = blocking(file_operations.link)
    delete = blocking(file_operations.delete)
    delete_tree = blocking(file_operations.delete_tree)

    def watch(
        self, path: str, *, recursive: bool = False, exclude: Sequence[str] = (), after: int | None = None
    ) -> Events[Change]:
        """
        Iterate over the changes in a directory. The first one is ``ready``: all from then on are reported.

        :param recursive: whether what is in the directories below is meant too.
        :param exclude: patterns of what is left out.
        """
        return Events(self, follow_changes(path, recursive=recursive, exclude=exclude, after=after))

    # Ports

    ports = blocking(operations.ports)
    wait_for_port = blocking(operations.wait_for_port)
    bind_port = blocking(operations.bind_port)
    unbind_port = blocking(operations.unbind_port)
    port_status = blocking(operations.port_status)

    def tunnel(self, port: int) -> AbstractContextManager[Tunnel]:
        """Connect to a port of the sandbox: ``with sandbox.tunnel(8080) as tunnel:``."""
        from sandboxd.client.sockets import tunnel

        return tunnel(self, port)

    def forward_port(self, port: int, local: int = 0, host: str = "127.0.0.1") -> Forward:
        """
        Forward a local port to one of the sandbox: ``with sandbox.forward_port(8080) as forward:``, then
        ``forward.port``.

        :param local: the local port; 0 for any.
        :param host: the local address to listen on.
        """
        from sandboxd.client.sockets import Forward

        return Forward(self, port, local, host)

    # The daemon

    health = blocking(operations.health)
    ready = blocking(operations.ready)
    status = blocking(operations.status)
    metrics = blocking(operations.metrics)
    openapi = blocking(operations.openapi)

    # How it is done

    def carry_out(self, flow: Flow[T]) -> T:
        """Carry out the steps of a flow, and return its result."""
        backoff = Backoff(self.patience)
        try:
            step = next(flow)
            while True:
                try:
                    result = self._step(step, backoff)
                except Exception as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            flow.close()

    def _step(self, step: Step, backoff: Backoff) -> object:
        if isinstance(step, HttpRequest):
            return self._send(step)
        if isinstance(step, BlockingCall):
            return step.function()
        time.sleep(backoff.after(step))
        return None

    def _client(self) -> httpx.Client:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=20)
        return httpx.Client(headers=self.headers, limits=limits, verify=self._verify)

    def _send(self, request: HttpRequest) -> HttpResponse:
        with self._opened(self._http, request) as response:
            answer = head(response)
            if request.sink is None or answer.status >= 400:
                return HttpResponse(answer.status, answer.headers, response.read())
            write = request.sink(answer)
            for data in response.iter_raw():
                write(data)
            return answer

    @contextmanager
    def _opened(self, client: httpx.Client, request: HttpRequest) -> Iterator[httpx.Response]:
        """
        Send a request, and give its reply, with the body unread, to the ``with`` statement.

        :raise ConnectionLost: there too, when the connection breaks.
        """
        try:
            with client.stream(
                request.method,
                self.url + request.path,
                headers=dict(request.headers),
                content=request.body() if callable(request.body) else request.body,
                timeout=timeouts(request.timeout),
                extensions=EXTENSIONS,
            ) as response:
                yield response
        except httpx.TransportError as error:
            raise lost(error, self.url) from None

    @contextmanager
    def open_stream(self, request: HttpRequest) -> Iterator[httpx.Response]:
        """
        Send a request over a connection of its own, and give its reply, with the body unread, to the ``with``
        statement.

        The garbage collector may close a stream that was abandoned, and does so at any time: also while this thread
        holds the lock of the pool that the connection belongs to, and would wait for itself for ever.
        """
        with self._client() as client, self._opened(client, request) as response:
            yield response


class Events(Generic[T]):
    """
    An event stream: iterate over it, once. It is resumed when it breaks.

    Use it in a ``with`` statement, or call :meth:`close`, if you may not iterate to the end.
    """

    def __init__(self, sandbox: Sandbox, follow: Follow[T]) -> None:
        self._sandbox = sandbox
        self._follow = follow
        self._events = self._iterate()

    @property
    def id(self) -> str | None:
        """The id of the execution, once the stream has begun; None if the stream is not of an execution."""
        return self._follow.id

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._events.close()

    def _iterate(self) -> Generator[T, None, None]:
        follow, backoff = self._follow, Backoff(self._sandbox.patience)
        while not follow.ended:
            try:
                self._sandbox.carry_out(follow.prepare())
                with self._sandbox.open_stream(follow.open()) as response:
                    if response.status_code >= 400:
                        raise error_of(response.status_code, response.read())
                    follow.opened(head(response))
                    for data in response.iter_raw():
                        backoff.reset()
                        yield from follow.feed(data)
                if not follow.ended:
                    raise ConnectionLost(f"{self._sandbox.url}: the stream broke off", True)
            except (ConnectionLost, Unavailable) as error:
                if follow.ended:
                    return
                if not follow.may_resume(error):
                    raise
                time.sleep(backoff.next(error))


class CommandEvents(Events[Output | Gap]):
    """The output of a command that runs. Closing it before its end kills the command."""

    def __init__(self, sandbox: Sandbox, follow: CommandFollow) -> None:
        super().__init__(sandbox, follow)
        self._command = follow

    @property
    def result(self) -> Complete | None:
        """How the command ended, once it has."""
        return self._command.result

    def close(self) -> None:
        """Close the connection, and kill the command if it runs."""
        super().close()
        if not self._command.running:
            return
        try:
            if self.id is None:  # the connection broke before the reply began; this joins the command
                with self._sandbox.open_stream(self._follow.open()) as response:
                    self._follow.opened(head(response))
            if self.id is not None:
                self._sandbox.kill(self.id)
        except SandboxError as error:
            if error.status not in (400, 404, 409):  # it has ended meanwhile
                raise
