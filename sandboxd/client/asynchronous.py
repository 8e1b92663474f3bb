"""The asyncio client: :class:`AsyncSandbox`, whose methods are coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import wraps
from typing import TYPE_CHECKING, Concatenate, Generic, Literal, ParamSpec, TypeVar

from sandboxd.client import file_operations, operations, transfers, trees
from sandboxd.client.attaching import Attaching
from sandboxd.client.errors import SandboxError, SandboxGone, Unavailable, error_of
from sandboxd.client.flow import Backoff, BlockingCall, ConnectionLost, Flow, HttpRequest, HttpResponse, Step
from sandboxd.client.follow import CommandFollow, Follow, follow_changes, follow_command, follow_log
from sandboxd.client.http import ASYNC_EXTENSIONS, auth_headers, check_url, head, httpx, lost, timeouts, verify
from sandboxd.client.operations import Cmd, CommandOptions
from sandboxd.client.outcome import checked, ended
from sandboxd.client.replies import Change, Complete, Gap, Output, Record, RunResult

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

    from sandboxd.client.async_sockets import AsyncAttachment, AsyncForward, AsyncTunnel

P = ParamSpec("P")
T = TypeVar("T")


def awaitable(describe: Callable[P, Flow[T]]) -> Callable[Concatenate[AsyncSandbox, P], Awaitable[T]]:
    """Return the coroutine method that carries out an operation."""

    @wraps(describe)
    async def method(self: AsyncSandbox, /, *args: P.args, **options: P.kwargs) -> T:
        return await self.carry_out(describe(*args, **options))

    return method


class AsyncSandbox:
    """
    A client of one sandbox, for asyncio. Local files are read and written in threads.

    :param url: where its API is, such as ``http://127.0.0.1:3030``; with the prefix if it has one.
    :param secret: its token.
    :param patience: seconds for which what has failed is tried again, if that does no harm, before an error is raised.
    """

    def __init__(self, url: str, secret: str | None = None, *, patience: float = 30.0) -> None:
        self.url = check_url(url)
        self.patience = patience
        self.secret = secret
        self.headers = auth_headers(secret)
        self._http = httpx.AsyncClient(
            headers=self.headers,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
            verify=verify(self.url),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    # Commands

    async def run(
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
        Run a command and return its output when it has ended. The command is killed if this is cancelled.

        Without ``on_stdout`` and ``on_stderr``, it is killed also if the connection breaks. With one of them the output
        is read as by :meth:`stream`: a connection that breaks is resumed, and the command runs on meanwhile, also if
        this process is killed.

        :param check: raise CommandFailed if its code is not 0.
        :param max_output: bytes of each stream to keep, half of the beginning and half of the end.
        :param on_stdout: called with each line as it comes; then the result has no output.
        :raise CommandTimeout: if it was killed because of its ``timeout`` or ``idle_timeout``.
        :raise SandboxGone: if the connection broke, and could not be resumed without a loss of lines, or the daemon was
            restarted meanwhile. The command is not run again.
        """
        if on_stdout is None and on_stderr is None:
            return await self.carry_out(operations.run(cmd, check=check, max_output=max_output, **options))
        async with self.stream(cmd, **options) as stream:
            async for output in stream:
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
    ) -> AsyncCommandEvents:
        """
        Run a command and iterate over its output as it comes. Leaving the ``async with`` statement early kills it.

        Iterating raises SandboxGone if the daemon was restarted meanwhile. The command is not run again.

        :param reconnect: whether the command outlives a connection that breaks, so that the stream is resumed. Without,
            it is killed when the connection breaks, also if this process is killed.
        :param on_start: called with the execution's id when the command runs, which may be long before its output.
        """
        return AsyncCommandEvents(self, follow_command(cmd, reconnect, on_start, options))

    # Background processes

    start = awaitable(operations.start)
    processes = awaitable(operations.processes)
    process = awaitable(operations.process)
    kill = awaitable(operations.kill)
    signal = awaitable(operations.signal)
    wait = awaitable(operations.wait)
    records = awaitable(operations.records)
    write_stdin = awaitable(operations.write_stdin)
    resize = awaitable(operations.resize)

    def logs(
        self,
        id: str,
        *,
        after: int | None = None,
        tail: int | None = None,
        stream: Literal["stdout", "stderr"] | None = None,
        follow: bool = True,
    ) -> AsyncEvents[Record | Gap]:
        """
        Iterate over the log of a process: first the records that are kept, then new ones until it has ended.

        :param after: only what is behind the record of this number.
        :param tail: only the last so many, and what comes.
        :param follow: whether to go on with new lines as they come.
        """
        return AsyncEvents(self, follow_log(id, after=after, tail=tail, stream=stream, follow=follow))

    def attach(self, id: str, *, after: int | None = None, tail: int | None = None) -> AsyncAttachment:
        """
        Attach to a process: its output as it is written, its stdin, and its terminal.

        :param after: only what is behind the record of this number.
        :param tail: only the last so many records, and what comes; 0 for a terminal that is to be drawn anew.
        """
        from sandboxd.client.async_sockets import AsyncAttachment

        return AsyncAttachment(self, Attaching(id, after, tail))

    # Files

    read = awaitable(file_operations.read)
    read_text = awaitable(file_operations.read_text)
    read_lines = awaitable(file_operations.read_lines)
    write = awaitable(file_operations.write)
    append = awaitable(file_operations.append)
    edit = awaitable(file_operations.edit)
    upload = awaitable(transfers.upload)
    download = awaitable(transfers.download)
    upload_tree = awaitable(trees.upload_tree)
    upload_entries = awaitable(trees.upload_entries)
    download_tree = awaitable(trees.download_tree)
    stat = awaitable(file_operations.stat)
    exists = awaitable(file_operations.exists)
    list_files = awaitable(file_operations.list_files)
    list_page = awaitable(file_operations.list_page)
    glob = awaitable(file_operations.glob)
    grep = awaitable(file_operations.grep)
    make_dir = awaitable(file_operations.make_dir)
    move = awaitable(file_operations.move)
    copy = awaitable(file_operations.copy)
    chmod = awaitable(file_operations.chmod)
    touch = awaitable(file_operations.touch)
    link = awaitable(file_operations.link)
    delete = awaitable(file_operations.delete)
    delete_tree = awaitable(file_operations.delete_tree)

    def watch(
        self, path: str, *, recursive: bool = False, exclude: Sequence[str] = (), after: int | None = None
    ) -> AsyncEvents[Change]:
        """
        Iterate over the changes in a directory. The first one is ``ready``: all from then on are reported.

        :param recursive: whether what is in the directories below is meant too.
        :param exclude: patterns of what is left out.
        """
        return AsyncEvents(self, follow_changes(path, recursive=recursive, exclude=exclude, after=after))

    # Ports

    ports = awaitable(operations.ports)
    wait_for_port = awaitable(operations.wait_for_port)
    bind_port = awaitable(operations.bind_port)
    unbind_port = awaitable(operations.unbind_port)
    port_status = awaitable(operations.port_status)

    def tunnel(self, port: int) -> AbstractAsyncContextManager[AsyncTunnel]:
        """Connect to a port of the sandbox: ``async with sandbox.tunnel(8080) as tunnel:``."""
        from sandboxd.client.async_sockets import tunnel

        return tunnel(self, port)

    def forward_port(self, port: int, local: int = 0, host: str = "127.0.0.1") -> AsyncForward:
        """
        Forward a local port to one of the sandbox: ``async with sandbox.forward_port(8080) as forward:``.

        :param local: the local port; 0 for any. ``forward.port`` is the one it is.
        :param host: the local address to listen on.
        """
        from sandboxd.client.async_sockets import AsyncForward

        return AsyncForward(self, port, local, host)

    # The daemon

    health = awaitable(operations.health)
    ready = awaitable(operations.ready)
    status = awaitable(operations.status)
    metrics = awaitable(operations.metrics)
    openapi = awaitable(operations.openapi)

    # How it is done

    async def carry_out(self, flow: Flow[T]) -> T:
        """Carry out the steps of a flow, and return its result."""
        backoff = Backoff(self.patience)
        try:
            step = next(flow)
            while True:
                try:
                    result = await self._step(step, backoff)
                except Exception as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(result)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            flow.close()

    async def _step(self, step: Step, backoff: Backoff) -> object:
        if isinstance(step, HttpRequest):
            return await self._send(step)
        if isinstance(step, BlockingCall):
            return await asyncio.to_thread(step.function)
        await asyncio.sleep(backoff.after(step))
        return None

    async def _send(self, request: HttpRequest) -> HttpResponse:
        async with self.open_stream(request) as response:
            answer = head(response)
            if request.sink is None or answer.status >= 400:
                return HttpResponse(answer.status, answer.headers, await response.aread())
            write = await asyncio.to_thread(request.sink, answer)
            async for data in response.aiter_raw():
                await asyncio.to_thread(write, data)
            return answer

    @asynccontextmanager
    async def open_stream(self, request: HttpRequest) -> AsyncIterator[httpx.Response]:
        """
        Send a request, and give its reply, with the body unread, to the ``async with`` statement.

        :raise ConnectionLost: there too, when the connection breaks.
        """
        try:
            async with self._http.stream(
                request.method,
                self.url + request.path,
                headers=dict(request.headers),
                content=_in_thread(request.body) if callable(request.body) else request.body,
                timeout=timeouts(request.timeout),
                extensions=ASYNC_EXTENSIONS,
            ) as response:
                yield response
        except httpx.TransportError as error:
            raise lost(error, self.url) from None


class AsyncEvents(Generic[T]):
    """
    An event stream: iterate over it, once. It is resumed when it breaks.

    Use it in an ``async with`` statement, or call :meth:`close`, if you may not iterate to the end.
    """

    def __init__(self, sandbox: AsyncSandbox, follow: Follow[T]) -> None:
        self._sandbox = sandbox
        self._follow = follow
        self._events = self._iterate()

    @property
    def id(self) -> str | None:
        """The id of the execution, once the stream has begun; None if the stream is not of an execution."""
        return self._follow.id

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        return await self._events.__anext__()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._events.aclose()

    async def _iterate(self) -> AsyncGenerator[T, None]:
        follow, backoff = self._follow, Backoff(self._sandbox.patience)
        while not follow.ended:
            try:
                await self._sandbox.carry_out(follow.prepare())
                async with self._sandbox.open_stream(follow.open()) as response:
                    if response.status_code >= 400:
                        raise error_of(response.status_code, await response.aread())
                    follow.opened(head(response))
                    async for data in response.aiter_raw():
                        backoff.reset()
                        for each in follow.feed(data):
                            yield each
                if not follow.ended:
                    raise ConnectionLost(f"{self._sandbox.url}: the stream broke off", True)
            except (ConnectionLost, Unavailable) as error:
                if follow.ended:
                    return
                if not follow.may_resume(error):
                    raise
                await asyncio.sleep(backoff.next(error))


class AsyncCommandEvents(AsyncEvents[Output | Gap]):
    """The output of a command that runs. Closing it before its end kills the command."""

    def __init__(self, sandbox: AsyncSandbox, follow: CommandFollow) -> None:
        super().__init__(sandbox, follow)
        self._command = follow

    @property
    def result(self) -> Complete | None:
        """How the command ended, once it has."""
        return self._command.result

    async def close(self) -> None:
        """Close the connection, and kill the command if it runs."""
        await super().close()
        if not self._command.running:
            return
        try:
            if self.id is None:  # the connection broke before the reply began; this joins the command
                async with self._sandbox.open_stream(self._follow.open()) as response:
                    self._follow.opened(head(response))
            if self.id is not None:
                await self._sandbox.kill(self.id)
        except SandboxError as error:
            if error.status not in (400, 404, 409):  # it has ended meanwhile
                raise


async def _in_thread(body: Callable[[], Iterable[bytes]]) -> AsyncIterator[bytes]:
    """Yield the pieces of a body; each is made in a thread."""
    iterator = iter(await asyncio.to_thread(body))
    while (data := await asyncio.to_thread(next, iterator, None)) is not None:
        yield data
