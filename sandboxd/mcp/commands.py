"""MCP tools that run commands, and start, watch and stop background processes."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from twisted.internet.defer import CancelledError, Deferred

from sandboxd.api.commands import CommandStarter, cannot_start, signal_name
from sandboxd.api.listeners import when_listening
from sandboxd.api.probe import HttpProbe
from sandboxd.api.streaming import texts
from sandboxd.api.waits import Waits
from sandboxd.execution.execution import Execution
from sandboxd.execution.log import Batch, DroppedRecords
from sandboxd.execution.table import ProcessTable
from sandboxd.mcp.tool import Arguments, Progress, Tool, ToolError, as_json
from sandboxd.messages.executions import CommandRequest, LineText, SignalRequest, WaitRequest
from sandboxd.messages.listeners import HttpPath
from sandboxd.processes.child import SpawnError
from sandboxd.processes.listeners import ListenerPoll
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.timeout import within
from sandboxd.reactor.timestamps import rfc3339

#: Bytes of each stream that a result has: the first and the last half of them.
MAX_OUTPUT = 30_000

#: Lines of a log that one call returns.
MAX_LINES = 2000

#: Bytes of a log that one call returns, about.
MAX_LOG = 60_000

Command = Annotated[str, Meta(min_length=1, description="The command line, run by sh -c.")]
Directory = Annotated[str, Meta(description="Working directory; by default the sandbox's.")]
Variables = Annotated[dict[str, str], Meta(description="Environment variables to set.")]
ProcessId = Annotated[str, Meta(description="The id that start_process returned.")]
Port = Annotated[int, Meta(ge=1, le=65535)]
Timeout = Annotated[float, Meta(ge=0, le=86400, description="Seconds to wait at most.")]


class RunCommand(Arguments):
    """Arguments of ``run_command``."""

    command: Command
    cwd: Directory | None = None
    env: Variables | None = None
    timeout: Annotated[
        float, Meta(gt=0, le=86400, description="Seconds after which it is killed, with all that it started.")
    ] = 120.0
    input: Annotated[str, Meta(description="What it reads from stdin.")] | None = None


class CommandResult(msgspec.Struct, omit_defaults=True):
    """Output and exit code of a command."""

    exit_code: Annotated[int, Meta(description="-1 if a signal or the timeout ended it.")]
    stdout: str
    stderr: str
    timed_out: bool = False
    still_running: Annotated[list[int], Meta(description="Pids that could not be killed.")] = []
    signal: str | None = None
    stdout_bytes_left_out: Annotated[int, Meta(description="From the middle.")] = 0
    stderr_bytes_left_out: Annotated[int, Meta(description="From the middle.")] = 0


class StartProcess(Arguments):
    """Arguments of ``start_process``."""

    command: Command
    cwd: Directory | None = None
    env: Variables | None = None
    stdin: Annotated[bool, Meta(description="Whether write_to_process can write to its stdin.")] = False


class ProcessState(msgspec.Struct, omit_defaults=True):
    """A background process."""

    id: str
    pid: int
    status: Annotated[str, Meta(description="running, completed (exit code 0), failed or killed")]
    command: str
    started_at: str
    exit_code: int | None = None


class NoArguments(Arguments):
    """Arguments of a tool that takes none."""


class ProcessList(msgspec.Struct):
    """The background processes, in the order of their start."""

    processes: list[ProcessState]


class ReadProcessOutput(Arguments):
    """Arguments of ``read_process_output``."""

    id: ProcessId
    after: Annotated[int, Meta(ge=0, description="Begin behind this line number: `last` of the call before.")] = 0
    tail: Annotated[int, Meta(ge=1, le=MAX_LINES, description="Begin with the last lines instead.")] | None = None


class ProcessOutput(msgspec.Struct, omit_defaults=True):
    """Lines that a process has written."""

    status: str
    output: Annotated[str, Meta(description="stdout and stderr in the order of writing.")]
    last: Annotated[int, Meta(description="Give it as `after` for what comes next.")]
    more: Annotated[bool, Meta(description="Whether there is more already.")] = False
    lines_lost: Annotated[int, Meta(description="Lines that are no longer kept.")] = 0
    exit_code: int | None = None


class WriteToProcess(Arguments):
    """Arguments of ``write_to_process``."""

    id: ProcessId
    text: Annotated[str, Meta(description='What to write; end a line with "\\n".')] = ""
    close: Annotated[bool, Meta(description="Whether to close its stdin afterwards.")] = False


class WriteToProcessResult(msgspec.Struct):
    """The number of bytes that were written."""

    bytes: int


class WaitForProcess(Arguments):
    """Arguments of ``wait_for_process``."""

    id: ProcessId
    timeout: Timeout = 60.0
    output: Annotated[LineText, Meta(description="Until a line of its output contains this text.")] | None = None
    port: Annotated[Port, Meta(description="Until it listens on this TCP port.")] | None = None


class WaitForProcessResult(msgspec.Struct, omit_defaults=True):
    """Why the wait ended, and how the process is."""

    reason: Annotated[str, Meta(description="output, port, exit or timeout")]
    status: str
    exit_code: int | None = None
    line: Annotated[str, Meta(description="The line that contains the text.")] | None = None


class StopProcess(Arguments):
    """Arguments of ``stop_process``."""

    id: ProcessId
    signal: Annotated[str, Meta(description="Sent first; KILL follows after `grace` seconds.")] = "TERM"
    grace: Annotated[float, Meta(ge=0, le=600)] = 5.0


class WaitForPort(Arguments):
    """Arguments of ``wait_for_port``."""

    port: Port
    path: Annotated[HttpPath, Meta(description="Until GET of this path answers 2xx or 3xx.")] | None = None
    timeout: Timeout = 60.0


class PortState(msgspec.Struct):
    """Whether a port is ready."""

    ready: bool


class CommandTools:
    """
    The MCP tools for commands and processes.

    :param starter: starts commands.
    :param waits: waits for processes.
    :param poll: looks for sockets that listen.
    """

    def __init__(
        self,
        reactor: Reactor,
        table: ProcessTable,
        starter: CommandStarter,
        waits: Waits,
        poll: ListenerPoll,
        probe: HttpProbe,
    ) -> None:
        self._reactor = reactor
        self._table = table
        self._starter = starter
        self._waits = waits
        self._poll = poll
        self._probe = probe

    def tools(self) -> list[Tool]:
        """Return the tools."""
        return [
            Tool(
                "run_command",
                "Run a command",
                "Run a shell command in the sandbox, wait until it ends, and return its exit code and output. Output "
                f"over {MAX_OUTPUT} bytes is cut in the middle. For servers and other long tasks use start_process.",
                RunCommand,
                CommandResult,
                self._run,
                _result_text,
                destructive=True,
            ),
            Tool(
                "start_process",
                "Start a background process",
                "Start a shell command in the background, such as a server, and return its id at once. It runs until "
                "it ends or is stopped. Read what it writes with read_process_output.",
                StartProcess,
                ProcessState,
                self._start,
                as_json,
                destructive=True,
            ),
            Tool(
                "list_processes",
                "List background processes",
                "List the background processes that run, and those that have ended.",
                NoArguments,
                ProcessList,
                self._list,
                as_json,
                read_only=True,
            ),
            Tool(
                "read_process_output",
                "Read output of a process",
                "Return lines that a background process has written: from its beginning, behind `after`, or the last "
                "`tail` ones.",
                ReadProcessOutput,
                ProcessOutput,
                self._read,
                _output_text,
                read_only=True,
            ),
            Tool(
                "write_to_process",
                "Write to a process",
                "Write text to the stdin of a background process that was started with `stdin`.",
                WriteToProcess,
                WriteToProcessResult,
                self._write,
                as_json,
            ),
            Tool(
                "wait_for_process",
                "Wait for a process",
                "Wait until a background process writes a text, listens on a port, or ends.",
                WaitForProcess,
                WaitForProcessResult,
                self._wait,
                as_json,
                read_only=True,
            ),
            Tool(
                "stop_process",
                "Stop a process",
                "Stop a background process and everything that it has started; returns when all of it is gone.",
                StopProcess,
                ProcessState,
                self._stop,
                as_json,
                destructive=True,
            ),
            Tool(
                "wait_for_port",
                "Wait for a port",
                "Wait until a TCP port in the sandbox is listened on or, with `path`, answers HTTP requests.",
                WaitForPort,
                PortState,
                self._wait_for_port,
                as_json,
                read_only=True,
            ),
        ]

    async def _run(self, arguments: RunCommand, progress: Progress | None) -> CommandResult:
        request = CommandRequest(
            cmd=arguments.command,
            cwd=arguments.cwd,
            env=_environment(arguments.env),
            timeout=arguments.timeout,
            input=arguments.input,
        )
        command = await self._starter.check(request)
        try:
            buffered = self._starter.buffered(command, MAX_OUTPUT)
        except SpawnError as error:
            raise ToolError(str(cannot_start(error))) from None
        execution = buffered.execution
        try:
            await _when_started(execution)
            if progress is not None:
                await _follow(execution, progress)
            await execution.when_settled()
        except BaseException:
            execution.kill_without_waiting()
            raise
        found = {name: stream.text() for name, stream in buffered.kept.items()}
        dropped = {name: stream.dropped for name, stream in buffered.kept.items()}
        return CommandResult(
            exit_code=-1 if execution.exit_code is None else execution.exit_code,
            stdout=found["stdout"],
            stderr=found["stderr"],
            timed_out=execution.timed_out,
            still_running=execution.survivors,
            signal=None if execution.signal is None else signal_name(execution.signal),
            stdout_bytes_left_out=dropped["stdout"],
            stderr_bytes_left_out=dropped["stderr"],
        )

    async def _start(self, arguments: StartProcess, progress: Progress | None) -> ProcessState:
        request = CommandRequest(
            cmd=arguments.command, cwd=arguments.cwd, env=_environment(arguments.env), stdin=arguments.stdin
        )
        command = await self._starter.check(request)
        try:
            execution = self._table.start(command, background=True)
        except SpawnError as error:
            raise ToolError(str(cannot_start(error))) from None
        await _when_started(execution)
        return _state(execution)

    async def _list(self, arguments: NoArguments, progress: Progress | None) -> ProcessList:
        return ProcessList([_state(execution) for execution in self._table.background()])

    async def _read(self, arguments: ReadProcessOutput, progress: Progress | None) -> ProcessOutput:
        execution = self._get(arguments.id)
        log = execution.log
        after = arguments.after if arguments.tail is None else max(0, log.next - 1 - arguments.tail)
        pieces: list[str] = []
        lines = size = lost = 0
        last = min(after, log.next - 1)
        with closing(log.cursor(after)) as cursor:
            while lines < MAX_LINES and size < MAX_LOG and (item := cursor.read()) is not None:
                if isinstance(item, DroppedRecords):
                    lost += item.dropped
                    continue
                found = texts(item, min(item.count, MAX_LINES - lines))
                pieces += found if item.partial else [f"{text}\n" for text in found]
                lines += len(found)
                size += len(item.data)
                last = item.first + len(found) - 1
        return ProcessOutput(execution.status, "".join(pieces), last, last < log.next - 1, lost, execution.exit_code)

    async def _write(self, arguments: WriteToProcess, progress: Progress | None) -> WriteToProcessResult:
        data = arguments.text.encode("utf-8", "surrogateescape")
        try:
            await self._get(arguments.id).feed(data, arguments.close)
        except BrokenPipeError as error:
            raise ToolError(f"it reads no stdin: {error.strerror}; start it with stdin: true") from None
        return WriteToProcessResult(len(data))

    async def _wait(self, arguments: WaitForProcess, progress: Progress | None) -> WaitForProcessResult:
        execution = self._get(arguments.id)
        found = await self._waits.wait(
            execution, WaitRequest(timeout=arguments.timeout, output=arguments.output, port=arguments.port)
        )
        return WaitForProcessResult(found["reason"], execution.status, execution.exit_code, found.get("line"))

    async def _stop(self, arguments: StopProcess, progress: Progress | None) -> ProcessState:
        execution = self._get(arguments.id)
        survivors = await execution.kill(SignalRequest(arguments.signal).signum(), arguments.grace)
        if survivors.pids:
            raise ToolError(f"these processes could not be killed: {', '.join(map(str, survivors.pids))}")
        return _state(execution)

    async def _wait_for_port(self, arguments: WaitForPort, progress: Progress | None) -> PortState:
        ready: Any = (
            when_listening(self._poll, arguments.port)
            if arguments.path is None
            else self._probe.when_answered(arguments.port, arguments.path)
        )
        return PortState(await within(self._reactor, arguments.timeout, ready))

    def _get(self, id: str) -> Execution:
        try:
            return self._table.get(id)
        except KeyError:
            raise ToolError(f"there is no process {id!r}; list_processes has those that there are") from None


def _environment(env: dict[str, str] | None) -> dict[str, str | None] | None:
    return None if env is None else dict(env)


async def _when_started(execution: Execution) -> None:
    """
    Wait until a command runs, or its timeout has passed.

    :raise ToolError: if it could not be started.
    """
    try:
        await execution.when_started()
    except SpawnError as error:
        if error.at_cwd:
            raise ToolError(f"cwd: there is no directory {execution.command.cwd!r}") from None
        if not execution.timed_out:
            raise ToolError(str(cannot_start(error))) from None
    except CancelledError:
        execution.kill_without_waiting()
        raise


async def _follow(execution: Execution, progress: Progress) -> None:
    """Send the output of a command as progress. A slow client gets less of it, and does not slow the command down."""
    with closing(execution.log.cursor(0)) as cursor:
        while not cursor.ended:
            while (item := cursor.read()) is not None:
                if isinstance(item, Batch):
                    await progress("\n".join(texts(item, item.count)))
            if not cursor.ended:
                more: Deferred[None] = cursor.when_more()
                await more


def _state(execution: Execution) -> ProcessState:
    assert execution.pid is not None
    return ProcessState(
        execution.id,
        execution.pid,
        execution.status,
        execution.command.text,
        rfc3339(execution.started_at),
        execution.exit_code,
    )


def _result_text(result: CommandResult) -> str:
    parts = [result.stdout]
    if result.stderr:
        parts.append(f"[stderr]\n{result.stderr}")
    end = "timed out; it was killed" if result.timed_out else f"exit code {result.exit_code}"
    if result.still_running:
        end = f"timed out; could not be killed, and still run: {', '.join(map(str, result.still_running))}"
    if result.signal is not None and not result.timed_out:
        end = f"ended by {result.signal}"
    parts.append(f"[{end}]")
    return "\n".join(part.removesuffix("\n") for part in parts if part)


def _output_text(result: ProcessOutput) -> str:
    lost = f"[{result.lines_lost} lines are no longer kept]\n" if result.lines_lost else ""
    more = "; there is more" if result.more else ""
    return f"{lost}{result.output}[{result.status}; last line {result.last}{more}]"
