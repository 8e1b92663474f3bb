"""Routes ``/run`` and ``/run_streaming``: run a command while its caller waits."""

from __future__ import annotations

import errno
import os
import signal as signals
from collections.abc import Callable, Iterator
from typing import TypedDict, TypeVar

from msgspec import UNSET
from msgspec.structs import replace
from twisted.internet.defer import CancelledError

from sandboxd.api.operations import Events
from sandboxd.api.routing import ApiError, LongFields, Routes, changing_nothing, send_json_parts
from sandboxd.api.streaming import check_streams, follow, output_events, resume_after
from sandboxd.execution.buffered import BufferedOutput, HeadAndTail
from sandboxd.execution.execution import Execution
from sandboxd.execution.table import ProcessTable
from sandboxd.files.access import Files
from sandboxd.files.root import Root
from sandboxd.messages.agent_sandbox import ExecuteResult
from sandboxd.messages.decoding import BadRequest, Error
from sandboxd.messages.executions import CommandRequest, Complete, Output, RunResult, StreamQuery
from sandboxd.processes.child import SpawnError
from sandboxd.processes.command import Command
from sandboxd.processes.trees import Survivors
from sandboxd.processes.users import find_user, own_shell
from sandboxd.reactor.oneshot import shielded
from sandboxd.reactor.turn_budget import TurnBudget
from sandboxd.web.ascii_json import dumps, escaped
from sandboxd.web.idempotency import IdempotencyStore, KeyConflict, KeyedResult
from sandboxd.web.request import Request
from sandboxd.web.sse import Streams, event

T = TypeVar("T")
Result = TypeVar("Result", RunResult, ExecuteResult)


#: Bytes of each stream that ``/run`` keeps: the first half and the last half of them.
MAX_OUTPUT = 128 * 1024 * 1024

#: Bytes of output up to which a reply is made in one piece.
SMALL = 256 * 1024

#: Not the command's fault, and it has not been executed: the client may try again.
EXHAUSTED = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.ETIMEDOUT, errno.ECANCELED)


class CommandStarter:
    """
    The starter of the commands that requests ask for: it checks them, and finds them again by idempotency key.

    :param table: where executions live.
    :param files: the files that requests reach.
    :param turns: shares out the time of the reactor.
    :param store: knows which requests have come before.
    """

    def __init__(self, table: ProcessTable, files: Files, turns: TurnBudget, store: IdempotencyStore) -> None:
        self._table = table
        self._files = files
        self._cached = files.cached_reader()
        self._turns = turns
        self.store = store

    @property
    def long_fields(self) -> LongFields:
        """The fields of a :class:`CommandRequest` that may be long."""
        return LongFields(self._files.decode, ("cmd", "input", "input_base64"))

    async def check(self, body: CommandRequest, interactive: bool = False) -> Command:
        """
        Return the command that a request asks for, checked.

        :param interactive: whether a terminal without a command gets the user's login shell.
        :raise BadRequest: if it is malformed.
        :raise ApiError: if its working directory is not a directory.
        """
        user, shell = None, None
        if body.user is not None:
            try:
                with changing_nothing():
                    user = await self._files.threads("/", find_user, body.user)
            except ValueError as error:
                raise BadRequest(f"user: {error}") from None
        if interactive and body.terminal() and not body.names_program:
            shell = await self._files.threads("/", own_shell) if user is None else user.shell
        data = await self._files.decode(body.stdin_bytes) if body.has_long_input else None
        command = body.command(user, shell, data)
        if self._files.root.confined or (command.cwd is not None and not self._cached.is_directory(command.cwd)):
            cwd = command.cwd or "."
            command = replace(command, cwd=await self._files.call(_directory, cwd))
        if not self._turns.working:
            await self._turns.turn()  # as the caller starts the command now
        return command

    async def start(
        self, request: Request, body: CommandRequest, *, background: bool = False, detached: bool = False
    ) -> tuple[Execution, bool]:
        """
        Start the command of a request, or return the execution of an earlier request with the same idempotency key.

        One that is to outlive its connection is started even if that is lost meanwhile.

        :return: the execution, which runs or has timed out before that, and whether the request may come again.
        :raise BadRequest: if it is malformed.
        :raise KeyConflict: if the request's key is another's, or its execution was forgotten.
        :raise ApiError: if the working directory cannot be entered.
        :raise SpawnError: if it cannot be started for another reason.
        """
        request.make_fingerprint()  # while its body is there, which is dropped if the connection is lost
        starting = self._start(request, body, background)
        return await (shielded(starting) if background or detached else starting)

    async def _start(self, request: Request, body: CommandRequest, background: bool) -> tuple[Execution, bool]:
        command = await self.check(body, interactive=background)
        entry = self.once(request, lambda: self._table.start(command, background=background).id)
        assert entry.value is not None
        try:
            execution = self._table.get(entry.value)
        except KeyError:
            raise KeyConflict("Idempotency-Key: the command was executed, but its record is no longer kept") from None
        await self.until_started(execution, entry)
        return execution, entry.keyed

    def once(self, request: Request, start: Callable[[], T]) -> KeyedResult[T]:
        """
        Return the result of ``start``, called now or by the first request with the same idempotency key.

        :raise KeyConflict: if the request's key is another's.
        """
        return self.store.once(request.idempotency_key, request.make_fingerprint(), start)

    def buffered(self, command: Command, limit: int) -> BufferedOutput:
        """
        Start a command, and collect its output for one reply.

        :param limit: bytes of each stream to keep, at most.
        :raise SpawnError: if that cannot even be tried.
        """
        return BufferedOutput(self._table.start(command, background=False, collect=True), limit)

    async def until_started(self, execution: Execution, entry: KeyedResult[T]) -> None:
        """
        Wait until an execution's process runs, or its timeout has passed before that; its pid is None then.

        :param entry: the entry of its request in the store; removed if the start fails without effect.
        :raise ApiError: if the working directory cannot be entered.
        :raise SpawnError: if it cannot be started for another reason.
        """
        try:
            await execution.when_started()
        except SpawnError as error:
            if error.unknown:
                self.store.lose(entry, "it is unknown whether the command was executed; send a new key to run it again")
            else:
                self.store.forget(entry)
            if error.at_cwd:
                raise _bad_cwd(execution.command.cwd or "") from None
            if error.at_exec:
                raise _not_executable(execution.command, error) from None
            if not execution.timed_out:
                raise
        except CancelledError:
            if not entry.keyed:
                execution.kill_without_waiting()
            raise


def _directory(root: Root, cwd: str) -> str:
    """
    Return a command's working directory; within a root, the real path, as commands are not confined by it. Blocks.

    :raise ApiError: if it is not a directory, or not in the root.
    """
    with changing_nothing():
        if not root.is_directory(cwd):
            where = f" (it has to be in {root.directory})" if root.confined else ""
            raise _bad_cwd(cwd, where)
        return os.fsdecode(root.real(cwd)) if root.confined else cwd


def _bad_cwd(cwd: str, where: str = "") -> ApiError:
    return ApiError(400, f"Invalid working directory: {cwd}{where}")


def _not_executable(command: Command, error: SpawnError) -> ApiError:
    if command.argv is None and command.shell is None:
        return ApiError(500, f"Failed to start command: /bin/sh: {error}")
    field, name = ("shell", command.shell) if command.argv is None else ("argv", command.argv[0])
    return ApiError(400, f"{field}: cannot execute {name}: {str(error).lower()}")


def cannot_start(error: SpawnError) -> ApiError:
    """Return the error of a request whose command could not be started."""
    if error.errno == errno.E2BIG:
        return ApiError(400, "cmd or env: too long for the operating system; write it to a file and run that")
    status = 503 if error.errno in EXHAUSTED else 500
    return ApiError(status, f"Failed to start command: {error}")


def not_permitted(survivors: Survivors) -> ApiError:
    """Return the error of a request whose signal the daemon may not send to some of the processes."""
    denied = survivors.denied[0]
    return ApiError(409, f"{denied}: operation not permitted", survivors=survivors.pids)


class Outcome(TypedDict, total=False):
    """
    The fields of a reply that say how an execution ended, beside its exit code; each is present only if it applies.
    """

    timed_out: bool
    idle_timed_out: bool
    oom_killed: bool
    signal: str
    survivors: list[int]


def outcome(execution: Execution) -> Outcome:
    """Return the fields that say how an execution ended, beside its exit code."""
    found: Outcome = {}
    if execution.timed_out:
        found["timed_out"] = True
    if execution.idle_timed_out:
        found["idle_timed_out"] = True
    if execution.oom_killed:
        found["oom_killed"] = True
    if execution.signal is not None:
        found["signal"] = signal_name(execution.signal)
    if execution.survivors and (execution.timed_out or execution.idle_timed_out):
        found["survivors"] = execution.survivors
    return found


def code_of(execution: Execution) -> int:
    """Return the exit code for a reply; -1 also for a command that still runs because it could not be killed."""
    return -1 if execution.exit_code is None else execution.exit_code


def signal_name(signum: int) -> str:
    """Return the name of a signal, as in signal(7)."""
    try:
        return signals.Signals(signum).name
    except ValueError:  # Python has no names for most of the real-time ones
        return f"SIGRTMIN+{signum - signals.SIGRTMIN}"


def name_execution(request: Request, execution: Execution) -> None:
    """Set ``X-Execution-Id``, the id for the routes under ``/processes``, if the execution has a process."""
    if execution.pid is not None:
        request.setHeader(b"X-Execution-Id", execution.id.encode("ascii"))


def add_command_routes(routes: Routes, starter: CommandStarter, streams: Streams) -> None:
    """Add ``POST /run`` and ``POST /run_streaming`` to the API."""

    @routes.post(
        "/run",
        CommandRequest,
        reply=RunResult,
        errors=(409, 503),
        headers=("Idempotency-Key",),
        long=starter.long_fields,
    )
    async def run(request: Request, body: CommandRequest) -> RunResult | None:
        """
        Run a command and answer with its output when it has ended.

        It ends with the connection, unless the request has an ``Idempotency-Key``.
        """
        buffered = await run_to_end(request, starter, body)
        code = code_of(buffered.execution)
        result = RunResult(
            stdout="",
            stderr="",
            code=code,
            error="Non-zero exit code" if code else UNSET,
            stdout_dropped=buffered.kept["stdout"].dropped or UNSET,
            stderr_dropped=buffered.kept["stderr"].dropped or UNSET,
            **outcome(buffered.execution),
        )
        return await with_output(request, result, buffered)

    @routes.post(
        "/run_streaming",
        CommandRequest,
        query=StreamQuery,
        reply=Events(output=Output, complete=Complete, error=Error),
        errors=(409, 503),
        headers=("Idempotency-Key", "Last-Event-ID"),
        long=starter.long_fields,
    )
    async def run_streaming(request: Request, body: CommandRequest, query: StreamQuery) -> None:
        """
        Run a command and send its output as Server-Sent Events as it comes; the last event is ``complete``.

        It ends with the connection, unless the request has ``detach`` or an ``Idempotency-Key``.
        """
        after = resume_after(request, query.after)
        check_streams(streams)
        try:
            execution, keyed = await starter.start(request, body, detached=body.detach)
        except SpawnError as error:
            if error.errno in EXHAUSTED:
                raise cannot_start(error) from None
            stream = streams.open(request)
            stream.write(event("error", Error(str(cannot_start(error))), 0))
            stream.write(event("complete", Complete(-1, True), 0))
            stream.finish()
            return
        name_execution(request, execution)
        cursor = execution.log.cursor(after, lossless=True)
        stream = streams.open(request)
        try:
            await follow(stream, streams, cursor, output_events)
            await execution.when_settled()
            code = code_of(execution)
            stream.write(event("complete", Complete(code, code != 0, **outcome(execution)), execution.log.last))
        except BaseException:
            if not (keyed or body.detach):
                execution.kill_without_waiting()
            raise
        finally:
            cursor.close()
            stream.finish()


async def run_to_end(request: Request, starter: CommandStarter, body: CommandRequest) -> BufferedOutput:
    """
    Run the command of a request, and wait for its end. It ends with the connection, unless the request has a key.

    :return: the execution, and what was kept of its output.
    :raise BadRequest: if the request is malformed.
    :raise ApiError: if the command cannot be started.
    :raise KeyConflict: if the request's key is another's.
    """
    command = await starter.check(body)
    limit = MAX_OUTPUT if body.max_output is None else body.max_output
    try:
        entry = starter.once(request, lambda: starter.buffered(command, limit))
        buffered = entry.value
        assert buffered is not None
        execution = buffered.execution
        if entry.keyed:
            execution.when_settled().addCallback(lambda _: starter.store.holds(entry, buffered.cost))
        try:
            await execution.when_settled()
        except CancelledError:
            if not entry.keyed:  # else the client may come again with its key
                execution.kill_without_waiting()
            raise
        if execution.pid is None:
            await starter.until_started(execution, entry)  # which raises why it was not, if not by its timeout
    except SpawnError as error:
        raise cannot_start(error) from None
    name_execution(request, execution)
    return buffered


async def with_output(request: Request, result: Result, buffered: BufferedOutput) -> Result | None:
    """Answer with a result whose first fields are ``stdout`` and ``stderr``, empty as yet; in parts if that is long."""
    stdout, stderr = buffered.kept["stdout"], buffered.kept["stderr"]
    if buffered.size <= SMALL:
        result.stdout = b"".join(stdout.pieces()).decode("utf-8", "replace")
        result.stderr = b"".join(stderr.pieces()).decode("utf-8", "replace")
        return result
    await send_json_parts(request, _in_parts(result, stdout, stderr))
    return None


def _in_parts(result: RunResult | ExecuteResult, stdout: HeadAndTail, stderr: HeadAndTail) -> Iterator[bytes]:
    """Encode a result in parts, each when it is needed; ``result`` has all but the output."""
    before = b'{"stdout":"'
    for stream, after in ((stdout, b'","stderr":"'), (stderr, b'"')):
        yield before
        for piece in stream.pieces():
            yield escaped(piece)
        before = after
    yield before + dumps(result).removeprefix(b'{"stdout":"","stderr":""')
