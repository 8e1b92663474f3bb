"""
A sandbox for agents of the OpenAI Agents SDK.

It needs the extra ``openai-agents``. Five lines::

    from agents import RunConfig, Runner
    from agents.sandbox import SandboxAgent, SandboxRunConfig
    from sandboxd.integrations.openai_agents import SandboxdClient

    config = RunConfig(sandbox=SandboxRunConfig(client=SandboxdClient("http://localhost:3030", "your-secret")))
    result = Runner.run_sync(SandboxAgent(name="Coder", model=model), "Say hello.", run_config=config)

Each session gets a directory of its own as its workspace, unless its manifest names one. Programs that run on,
terminals, snapshots, manifests and exposed ports work as with the SDK's own sandboxes.
"""

from __future__ import annotations

import asyncio
import io
import posixpath
import re
import stat
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast

from agents.sandbox.errors import (
    ExecNonZeroError,
    ExecTimeoutError,
    ExecTransportError,
    WorkspaceArchiveReadError,
    WorkspaceArchiveWriteError,
    WorkspaceReadNotFoundError,
    WorkspaceStartError,
)
from agents.sandbox.files import EntryKind, FileEntry
from agents.sandbox.manifest import Manifest
from agents.sandbox.session import (
    BaseSandboxClient,
    BaseSandboxClientOptions,
    BaseSandboxSession,
    SandboxSession,
    SandboxSessionState,
)
from agents.sandbox.session.pty_output import collect_pty_output
from agents.sandbox.session.pty_types import (
    PTY_PROCESSES_MAX,
    PtyExecUpdate,
    allocate_pty_process_id,
    clamp_pty_yield_time_ms,
    process_id_to_prune_from_meta,
    resolve_pty_write_yield_time_ms,
)
from agents.sandbox.session.runtime_helpers import RESOLVE_WORKSPACE_PATH_HELPER, RuntimeHelperScript
from agents.sandbox.session.workspace_payloads import coerce_write_payload
from agents.sandbox.snapshot import SnapshotBase, SnapshotSpec, resolve_snapshot
from agents.sandbox.types import ExecResult, ExposedPortEndpoint, Permissions, User

from sandboxd.client import AsyncSandbox, BadRequest, CommandTimeout, NotFound, SandboxError
from sandboxd.client.attaching import Chunk
from sandboxd.client.flow import HttpRequest, HttpResponse, Writer, call, exchange, target
from sandboxd.client.operations import CommandOptions
from sandboxd.client.replies import FileInfo, Unpacked
from sandboxd.integrations.exit_code import exit_code

#: The root of a manifest that names none.
DEFAULT_ROOT = "/workspace"

#: Bytes that are kept of output that the agent has not asked for, and pieces in which it may wait.
KEPT = 1024 * 1024
PIECES = 256

#: Bytes of an archive that are kept in memory, and sent at a time.
SPOOL = 16 * 1024 * 1024
PIECE = 256 * 1024

KINDS = {"file": EntryKind.FILE, "dir": EntryKind.DIRECTORY, "link": EntryKind.SYMLINK}


class SandboxdClientOptions(BaseSandboxClientOptions):
    """
    The options of a session.

    :ivar exposed_ports: ports of the sandbox that are made ports of this machine, when they are asked for.
    """

    type: Literal["sandboxd"] = "sandboxd"
    exposed_ports: tuple[int, ...] = ()


class SandboxdSessionState(SandboxSessionState):
    """
    The state that a session is resumed from. It has neither the daemon's URL nor its token: the client has them.

    :ivar workspace_root_owned: whether the workspace was made for the session, and is removed with it.
    """

    type: Literal["sandboxd"] = "sandboxd"
    workspace_root_owned: bool = False


@dataclass
class _Process:
    """A program that runs between the calls of the agent, with its output that the agent has not seen."""

    id: str
    tty: bool
    exit_code: int | None = None
    last_used: float = field(default_factory=time.monotonic)
    chunks: deque[bytes] = field(default_factory=deque)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    notify: asyncio.Event = field(default_factory=asyncio.Event)
    closed: asyncio.Event = field(default_factory=asyncio.Event)
    reader: asyncio.Task[None] | None = None

    def add(self, data: bytes) -> None:
        self.chunks.append(data)
        if len(self.chunks) > PIECES:
            kept = b"".join(self.chunks)[-KEPT:]
            self.chunks.clear()
            self.chunks.append(kept)
        self.notify.set()


class SandboxdSession(BaseSandboxSession):
    """
    A session: a workspace on a sandbox, and programs that run there.

    :param url: where the daemon is.
    """

    state: SandboxdSessionState

    def __init__(self, state: SandboxdSessionState, url: str, secret: str | None) -> None:
        self.state = state
        self._url = url
        self._secret = secret
        self._sandbox: AsyncSandbox | None = None
        self._processes: dict[int, _Process] = {}
        self._forwards = AsyncExitStack()
        self._ports: dict[int, int] = {}

    @property
    def sandbox(self) -> AsyncSandbox:
        """The client of the sandbox. It is closed at the shutdown, and made again if the session is used again."""
        if self._sandbox is None:
            self._sandbox = AsyncSandbox(self._url, self._secret)
        return self._sandbox

    # Its life

    async def running(self) -> bool:
        """Return whether the daemon answers."""
        try:
            await self.sandbox.health()
        except SandboxError:
            return False
        return True

    async def _prepare_backend_workspace(self) -> None:
        root = self._workspace_root_path()
        try:
            await self.sandbox.make_dir(root.as_posix())
        except SandboxError as error:
            raise WorkspaceStartError(path=root, cause=error, message=str(error)) from error

    async def _after_shutdown(self) -> None:
        self._ports.clear()
        await self._forwards.aclose()
        if self._sandbox is not None:
            await self._sandbox.close()
            self._sandbox = None

    async def _resolve_exposed_port(self, port: int) -> ExposedPortEndpoint:
        if port not in self._ports:
            forward = await self._forwards.enter_async_context(self.sandbox.forward_port(port))
            self._ports[port] = forward.port
        return ExposedPortEndpoint(host="127.0.0.1", port=self._ports[port])

    # Commands

    async def exec(
        self,
        *command: str | Path,
        timeout: float | None = None,
        shell: bool | list[str] = True,
        user: str | User | None = None,
    ) -> ExecResult:
        """Run a command until its end; as another user if the daemon is root."""
        return await self._run(self._prepare_exec_command(*command, shell=shell, user=None), timeout, user)

    async def _exec_internal(self, *command: str | Path, timeout: float | None = None) -> ExecResult:
        return await self._run([str(part) for part in command], timeout, None)

    async def _run(self, argv: list[str], timeout: float | None, user: str | User | None) -> ExecResult:
        options = await self._options(user, timeout)
        try:
            result = await self.sandbox.run(argv, **options)
        except CommandTimeout as error:
            raise ExecTimeoutError(command=argv, timeout_s=timeout, cause=error) from error
        except BadRequest as error:  # as a shell reports what it cannot start
            return ExecResult(stdout=b"", stderr=f"{error}\n".encode(), exit_code=127)
        except SandboxError as error:
            raise ExecTransportError(command=argv, cause=error, message=str(error)) from error
        return ExecResult(
            stdout=result.stdout.encode("utf-8", "surrogateescape"),
            stderr=result.stderr.encode("utf-8", "surrogateescape"),
            exit_code=exit_code(result),
        )

    async def _options(self, user: str | User | None, timeout: float | None = None) -> CommandOptions:
        options: CommandOptions = {
            "cwd": self._workspace_root_path().as_posix(),
            "env": await self.state.manifest.environment.resolve(),
        }
        if user is not None:
            options["user"] = _name(user)
        if timeout is not None:
            options["timeout"] = timeout
        return options

    # Programs that run on

    def supports_pty(self) -> bool:
        """Return that programs may run on, and have terminals."""
        return True

    async def pty_exec_start(
        self,
        *command: str | Path,
        timeout: float | None = None,
        shell: bool | list[str] = True,
        user: str | User | None = None,
        tty: bool = False,
        yield_time_s: float | None = None,
        max_output_tokens: int | None = None,
    ) -> PtyExecUpdate:
        """Start a program; return what it has written until it ends, or some seconds later."""
        argv = self._prepare_exec_command(*command, shell=shell, user=None)
        options = await self._options(user, timeout)
        if tty:
            options["tty"] = {"cols": 80, "rows": 24}
        try:
            started = await self.sandbox.start(argv, **options)
        except SandboxError as error:
            raise ExecTransportError(command=argv, cause=error, message=str(error), retryable=False) from error
        process = _Process(started.id, tty)
        process.reader = asyncio.create_task(self._read_output(process))
        number = allocate_pty_process_id(set(self._processes))
        self._processes[number] = process
        if len(self._processes) > PTY_PROCESSES_MAX:
            found = [(key, each.last_used, each.closed.is_set()) for key, each in self._processes.items()]
            oldest = process_id_to_prune_from_meta(found)
            if oldest is not None:
                await self._end(self._processes.pop(oldest))
        wait = clamp_pty_yield_time_ms(10_000 if yield_time_s is None else int(yield_time_s * 1000))
        return await self._update(number, process, wait, max_output_tokens)

    async def pty_write_stdin(
        self,
        *,
        session_id: int,
        chars: str,
        yield_time_s: float | None = None,
        max_output_tokens: int | None = None,
    ) -> PtyExecUpdate:
        """Write to a program's terminal; return what it has written until it ends, or some time later."""
        process = self._resolve_pty_session_entry(pty_processes=self._processes, session_id=session_id)
        if chars:
            if not process.tty:
                raise RuntimeError("stdin is not available for this process")
            with suppress(SandboxError):  # it has ended: what there is of its output says so
                await self.sandbox.write_stdin(process.id, chars)
        wait = resolve_pty_write_yield_time_ms(
            yield_time_ms=250 if yield_time_s is None else int(yield_time_s * 1000), input_empty=not chars
        )
        return await self._update(session_id, process, wait, max_output_tokens)

    async def pty_terminate_all(self) -> None:
        """Kill all programs that run on."""
        processes = [*self._processes.values()]
        self._processes.clear()
        for process in processes:
            await self._end(process)

    async def _read_output(self, process: _Process) -> None:
        """Read the output of a program until its end."""
        try:
            async with self.sandbox.attach(process.id) as attachment:
                async for event in attachment:
                    process.add(event.data if isinstance(event, Chunk) else b"\n[some output was lost]\n")
                process.exit_code = attachment.exit_code
        except SandboxError as error:
            process.add(f"\n[{error}]\n".encode())
        finally:
            process.closed.set()
            process.notify.set()

    async def _update(self, number: int, process: _Process, wait: int, max_tokens: int | None) -> PtyExecUpdate:
        output, tokens, ended = await collect_pty_output(
            output_chunks=process.chunks,
            output_lock=process.lock,
            output_notify=process.notify,
            is_done=process.closed.is_set,
            yield_time_ms=wait,
            max_output_tokens=max_tokens,
        )
        process.last_used = time.monotonic()
        if ended:
            self._processes.pop(number, None)
        return PtyExecUpdate(
            process_id=None if ended else number,
            output=output,
            exit_code=process.exit_code if ended else None,
            original_token_count=tokens,
        )

    async def _end(self, process: _Process) -> None:
        if process.reader is not None:
            process.reader.cancel()
            await asyncio.wait([process.reader])
        with suppress(SandboxError):  # it has ended already
            await self.sandbox.kill(process.id)

    # Files. The SDK's own check keeps paths within the workspace, whatever links are there.

    def _runtime_helpers(self) -> tuple[RuntimeHelperScript, ...]:
        return (RESOLVE_WORKSPACE_PATH_HELPER,)

    def _current_runtime_helper_cache_key(self) -> object:
        return self.state.session_id

    async def _validate_path_access(self, path: Path | str, *, for_write: bool = False) -> Path:
        place: Path = await self._validate_remote_path_access(path, for_write=for_write)
        return place

    async def read(self, path: Path, *, user: str | User | None = None) -> io.IOBase:
        """Return what is in a file."""
        return io.BytesIO(await self._read(path, user, None))

    async def _read_bounded(self, path: Path, *, max_bytes: int) -> bytes:
        return await self._read(path, None, max_bytes)

    async def _read(self, path: Path, user: str | User | None, size: int | None) -> bytes:
        if user is not None:
            await self._check_read_with_exec(path, user=user)
        place = await self._validate_path_access(path)
        try:
            return await self.sandbox.read(place.as_posix(), size=size)
        except NotFound as error:
            raise WorkspaceReadNotFoundError(path=path, cause=error) from error
        except SandboxError as error:
            if error.status == 416:  # an empty file has no range
                return b""
            raise WorkspaceArchiveReadError(path=path, cause=error, context={"reason": str(error)}) from error

    async def write(self, path: Path, data: io.IOBase, *, user: str | User | None = None) -> None:
        """Make a file, or replace one, and make the directories above it."""
        if user is not None:
            await self._check_write_with_exec(path, user=user)
        payload = coerce_write_payload(path=path, data=data)
        place = await self._validate_path_access(path, for_write=True)
        owner = None if user is None else _name(user)
        try:
            await self.sandbox.upload(_pieces(payload.stream), place.as_posix(), parents=True, owner=owner)
        except SandboxError as error:
            raise WorkspaceArchiveWriteError(path=place, cause=error, message=str(error)) from error

    async def ls(self, path: Path | str, *, user: str | User | None = None) -> list[FileEntry]:
        """List what is in a directory."""
        if user is not None:
            found: list[FileEntry] = await super().ls(path, user=user)
            return found
        place = (await self._validate_path_access(path)).as_posix()
        try:
            info = await self.sandbox.stat(place, follow=True)
            if info.type != "dir":
                return [_entry(place, info)]
            return [_entry(posixpath.join(place, file.path), file) for file in await self.sandbox.list_files(place)]
        except SandboxError as error:
            raise _failed(error, "ls", place) from error

    async def mkdir(self, path: Path | str, *, parents: bool = False, user: str | User | None = None) -> None:
        """Make a directory."""
        if user is not None or not parents:
            await super().mkdir(path, parents=parents, user=user)
            return
        place = (await self._validate_path_access(path, for_write=True)).as_posix()
        try:
            await self.sandbox.make_dir(place)
        except SandboxError as error:
            raise _failed(error, "mkdir", "-p", place) from error

    # Snapshots

    async def persist_workspace(self) -> io.IOBase:
        """Return the workspace as a tar archive."""
        root = self._workspace_root_path()
        spool = tempfile.SpooledTemporaryFile(SPOOL)  # noqa: SIM115 - the caller closes it

        def opened(response: HttpResponse) -> Writer:
            spool.seek(0)
            spool.truncate()
            return spool.write

        # Wildcards are taken as themselves; with the slash they are paths from the top.
        skipped = self._persist_workspace_skip_relpaths()
        exclude = [re.sub(r"([*?\[{])", r"[\1]", f"/{path.as_posix()}") for path in skipped]
        where = target("/archive", path=root.as_posix(), exclude=exclude, format="tar")
        try:
            await self.sandbox.carry_out(exchange(HttpRequest("GET", where, sink=opened)))
        except SandboxError as error:
            spool.close()
            raise WorkspaceArchiveReadError(path=root, cause=error, context={"reason": str(error)}) from error
        spool.seek(0)
        return cast("io.IOBase", spool)

    async def hydrate_workspace(self, data: io.IOBase) -> None:
        """Unpack an archive in the workspace. The daemon writes nothing outside of it."""
        root = self._workspace_root_path()
        where = target("/archive", path=root.as_posix(), parents=True)
        headers = {"Content-Type": "application/x-tar"}
        request = HttpRequest("PUT", where, headers, lambda: _pieces(data), timeout=300.0, repeatable=False)
        try:
            await self.sandbox.carry_out(call(request, Unpacked))
        except SandboxError as error:
            raise WorkspaceArchiveWriteError(path=root, cause=error, message=str(error)) from error


class SandboxdClient(BaseSandboxClient[SandboxdClientOptions]):
    """
    The maker of sessions on a sandbox, for ``SandboxRunConfig(client=...)``.

    :param url: where the daemon is.
    :param secret: its token.
    :param directory: the directory on the sandbox below which each session gets its workspace.
    """

    backend_id = "sandboxd"
    supports_default_options = True

    def __init__(self, url: str, secret: str | None = None, *, directory: str = "/tmp") -> None:
        self._url = url
        self._secret = secret
        self._directory = directory

    async def create(
        self,
        *,
        snapshot: SnapshotSpec | SnapshotBase | None = None,
        manifest: Manifest | None = None,
        options: SandboxdClientOptions | None = None,
    ) -> SandboxSession:
        """Return a new session; nothing is made on the sandbox before it is started."""
        manifest = self._validate_manifest_for_create(manifest or Manifest())
        session_id = uuid.uuid4()
        owned = manifest.root == DEFAULT_ROOT
        if owned:
            root = posixpath.join(self._directory, f"openai-agents-{session_id.hex}")
            manifest = manifest.model_copy(update={"root": root}, deep=True)
        state = SandboxdSessionState(
            session_id=session_id,
            manifest=manifest,
            snapshot=resolve_snapshot(snapshot, str(session_id)),
            workspace_root_owned=owned,
            exposed_ports=() if options is None else options.exposed_ports,
        )
        return self._wrap_session(SandboxdSession(state, self._url, self._secret))

    async def delete(self, session: SandboxSession) -> SandboxSession:
        """End what still runs, and remove the workspace if it was made for the session."""
        inner = session._inner
        if not isinstance(inner, SandboxdSession):
            raise TypeError("the session is of another client")
        try:
            await inner.pty_terminate_all()
            if inner.state.workspace_root_owned:
                await inner.sandbox.delete_tree(inner.state.manifest.root)
        finally:
            await inner.shutdown()
        return session

    async def resume(self, state: SandboxSessionState) -> SandboxSession:
        """Return a session that goes on where another was, whose workspace may still be there."""
        if not isinstance(state, SandboxdSessionState):
            raise TypeError("the state is of another client")
        state.assert_path_grants_rebound()
        inner = SandboxdSession(state, self._url, self._secret)
        there = False
        with suppress(SandboxError):
            there = await inner.sandbox.exists(state.manifest.root)
        if not there:
            state.workspace_root_ready = False
        inner._set_start_state_preserved(there)
        return self._wrap_session(inner)

    def deserialize_session_state(self, payload: dict[str, object]) -> SandboxSessionState:
        """Return a state from its JSON."""
        return self._deserialize_session_state_payload(payload, SandboxdSessionState)


def _name(user: str | User) -> str:
    name: str = user if isinstance(user, str) else user.name
    return name


def _pieces(data: io.IOBase) -> Iterator[bytes]:
    while piece := data.read(PIECE):
        yield piece.encode() if isinstance(piece, str) else piece


def _entry(path: str, file: FileInfo) -> FileEntry:
    mode = int(file.mode, 8) | (stat.S_IFDIR if file.type == "dir" else 0)
    return FileEntry(
        path=path,
        permissions=Permissions.from_mode(mode),
        owner=file.owner or str(file.uid),
        group=file.group or str(file.gid),
        size=file.size,
        kind=KINDS.get(file.type, EntryKind.OTHER),
    )


def _failed(error: SandboxError, *command: str) -> ExecNonZeroError:
    """Return the SDK's exception for an operation that it would have run a command for."""
    result = ExecResult(stdout=b"", stderr=str(error).encode(), exit_code=1)
    return ExecNonZeroError(result, command=command, cause=error)
