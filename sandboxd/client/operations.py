"""
The operations of the API, each described once for both clients: its request, and the type of its reply.

Every function returns a flow; :mod:`sandboxd.client.blocking` and :mod:`sandboxd.client.asynchronous` carry them out.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypedDict, TypeVar
from urllib.parse import quote

from sandboxd.client.errors import NotFound, refusal
from sandboxd.client.flow import Flow, Request, call, exchange, target
from sandboxd.client.outcome import checked
from sandboxd.client.replies import (
    Awaited,
    Bound,
    DaemonStatus,
    Deleted,
    Done,
    EditedFile,
    Execution,
    FileInfo,
    FileList,
    Found,
    FoundList,
    Health,
    Lines,
    Linked,
    ListeningPort,
    Logs,
    Matches,
    Metric,
    MetricsReply,
    PermissionsChanged,
    PortReadiness,
    Ports,
    PortStatus,
    Process,
    Processes,
    Readiness,
    RunResult,
    Started,
    StdinWritten,
    Stored,
    Touched,
    Transferred,
    decode,
    fields,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., object])

#: A line for ``sh -c``, or a program and its arguments, which no shell sees.
Cmd = str | Sequence[str]

FileType = Literal["file", "dir", "link", "fifo", "socket", "char", "block"]

#: For each operation of the API (``POST /run``): the function that describes it, and the type of its reply.
OPERATIONS: dict[str, tuple[Callable[..., object], object]] = {}


def operation(name: str, reply: object = None) -> Callable[[F], F]:
    """Return a decorator that enters an operation into :data:`OPERATIONS`."""

    def register(describe: F) -> F:
        OPERATIONS[name] = (describe, reply)
        return describe

    return register


class Terminal(TypedDict, total=False):
    """A pseudo-terminal: its size in characters, and the value of ``TERM``."""

    cols: int
    rows: int
    term: str


class CommandOptions(TypedDict, total=False):
    """
    The options of a command. All but ``input`` are as in the body of ``/run``, see docs/api.md.

    ``input``: what it reads from stdin, text or bytes.
    """

    cwd: str | None
    env: Mapping[str, str | None]
    timeout: float
    idle_timeout: float
    input: str | bytes
    user: str | int
    limits: Mapping[str, float]
    shell: str
    login: bool
    merge_stderr: bool
    flush_after: float
    tty: bool | Terminal
    stdin: bool
    survive: bool


#: Fields of a command's body that are not options of the same name, by what they are made from.
COMMAND_FIELDS = {
    "cmd": "cmd",
    "argv": "cmd",
    "input_base64": "input",
    "max_output": "max_output",
    "detach": "reconnect",
}


def command_body(cmd: Cmd, options: CommandOptions) -> dict[str, Any]:
    """Return the body of a request that starts a command."""
    body: dict[str, Any] = dict(options)
    if isinstance(cmd, str):
        body["cmd"] = cmd
    else:
        body["argv"] = list(cmd)
    given = body.get("input")
    if isinstance(given, bytes):
        del body["input"]
        body["input_base64"] = base64.b64encode(given).decode("ascii")
    return body


def post(path: str, body: Mapping[str, Any], **fields: Any) -> Request:
    """Return a request with a JSON body. Fields that are None are left out, except in a command's ``env``."""
    content = json.dumps({name: value for name, value in body.items() if value is not None}).encode("ascii")
    headers = {"Content-Type": "application/json", **fields.pop("headers", {})}
    return Request("POST", path, headers, content, **fields)


def new_key() -> str:
    """Return a new ``Idempotency-Key``, with which a request can be sent again safely."""
    return str(uuid.uuid4())


def one(id: str) -> str:
    """Return the path of an execution."""
    return f"/processes/{quote(id, safe='')}"


# Commands


@operation("POST /run", RunResult)
def run(
    cmd: Cmd, *, check: bool = False, max_output: int | None = None, **options: Unpack[CommandOptions]
) -> Flow[RunResult]:
    """
    Run a command and return its output when it has ended. The command is killed if the connection breaks.

    :param check: raise CommandFailed if its code is not 0.
    :param max_output: bytes of each stream to keep, half of the beginning and half of the end.
    :raise CommandTimeout: if it was killed because of its ``timeout`` or ``idle_timeout``.
    """
    body = {**command_body(cmd, options), "max_output": max_output}
    result = yield from call(post("/run", body, timeout=None, repeatable=False), RunResult)
    return checked(result, check)


# Background processes


@operation("POST /start_process", Started)
def start(cmd: Cmd | None = None, **options: Unpack[CommandOptions]) -> Flow[Started]:
    """
    Start a background process.

    :param cmd: None, with ``tty``, for the login shell of the user.
    """
    body = dict(options) if cmd is None else command_body(cmd, options)
    return call(post("/start_process", body, headers={"Idempotency-Key": new_key()}), Started)


@operation("GET /list_processes", Processes)
def processes() -> Flow[list[Process]]:
    """Return the background processes that run or are remembered, in the order of their start."""
    reply = yield from call(Request("GET", "/list_processes"), Processes)
    return reply.processes


@operation("GET /processes/{id}", Execution)
def process(id: str) -> Flow[Execution]:
    """Return the details of an execution."""
    return call(Request("GET", one(id)), Execution)


@operation("POST /kill_process", Done)
def kill(id: str, signal: str | int | None = None, grace: float | None = None) -> Flow[None]:
    """
    End a process and all that it has started; return when they are gone.

    :param signal: what is sent first, SIGKILL by default.
    :param grace: seconds until SIGKILL follows another signal.
    """
    timeout = 60.0 + (grace or 0.0)
    body = {"id": id, "signal": signal, "grace": grace}
    yield from call(post("/kill_process", body, timeout=timeout, repeatable=False), Done)


@operation("POST /processes/{id}/signal", Done)
def signal(id: str, signal: str | int) -> Flow[None]:
    """Send a signal to the processes of an execution."""
    yield from call(post(f"{one(id)}/signal", {"signal": signal}, repeatable=False), Done)


@operation("POST /processes/{id}/wait", Awaited)
def wait(
    id: str,
    timeout: float | None = None,
    *,
    output: str | None = None,
    port: int | None = None,
    http: str | None = None,
) -> Flow[Awaited]:
    """
    Wait until a process has ended, or the first of the conditions holds.

    :param timeout: seconds after which to return in any case.
    :param output: text that a line of its output contains.
    :param port: a port that one of its processes listens on.
    :param http: with ``port``: a path that is to answer with 2xx or 3xx.
    """
    body = {"timeout": timeout, "output": output, "port": port, "http": http}
    return call(post(f"{one(id)}/wait", body, timeout=None), Awaited)


@operation("GET /processes/{id}/logs", Logs)
def records(
    id: str,
    *,
    after: int | None = None,
    tail: int | None = None,
    stream: Literal["stdout", "stderr"] | None = None,
    limit: int | None = None,
) -> Flow[Logs]:
    """
    Return records of an execution's log as it is now, at most 10,000.

    :param after: only what is behind the record of this number.
    :param tail: only the last so many.
    """
    path = target(f"{one(id)}/logs", after=after, tail=tail, stream=stream, limit=limit)
    return call(Request("GET", path), Logs)


@operation("POST /processes/{id}/stdin", StdinWritten)
def write_stdin(id: str, data: str | bytes = b"", *, close: bool = False) -> Flow[int]:
    """
    Write to the stdin of a command that was started with ``stdin=True``; return the number of bytes.

    :param close: whether this is the end of its stdin.
    """
    content = data.encode() if isinstance(data, str) else data
    headers = {"Content-Type": "application/octet-stream"}
    path = target(f"{one(id)}/stdin", close=close)
    request = Request("POST", path, headers, content, timeout=None, repeatable=False)
    reply = yield from call(request, StdinWritten)
    return reply.bytes


@operation("POST /processes/{id}/resize", Done)
def resize(id: str, cols: int, rows: int) -> Flow[None]:
    """Set the size of a process's pseudo-terminal, in characters."""
    yield from call(post(f"{one(id)}/resize", {"cols": cols, "rows": rows}), Done)


# Files


@operation("GET /files")
def read(path: str, *, start: int = 0, size: int | None = None) -> Flow[bytes]:
    """
    Return the bytes of a file, or of a part of it.

    :param start: where to begin.
    :param size: how many bytes at most.
    """
    if size == 0:
        return b""
    headers = {}
    if start or size is not None:
        headers["Range"] = f"bytes={start}-{'' if size is None else start + size - 1}"
    response = yield from exchange(Request("GET", target("/files", path=path), headers, timeout=60.0))
    return response.body if response.status == 206 or not headers else response.body[start:][:size]


def read_text(path: str) -> Flow[str]:
    """Return the text of a file; what is not UTF-8 becomes U+FFFD."""
    content = yield from read(path)
    return content.decode("utf-8", "replace")


@operation("POST /read_file", Lines)
def read_lines(path: str, offset: int = 1, limit: int | None = None) -> Flow[Lines]:
    """
    Return some lines of a text file, of any size.

    :param offset: the number of the first one, from 1.
    """
    response = yield from exchange(post("/read_file", {"path": path, "offset": offset, "limit": limit}))
    return decode(accepted(response.body), Lines)


def write(
    path: str,
    content: str | bytes,
    *,
    mode: str | None = None,
    owner: str | None = None,
    parents: bool = False,
    if_match: str | None = None,
    exclusive: bool = False,
) -> Flow[Stored]:
    """
    Create a file, or replace one atomically.

    :param mode: permissions in octal, as ``"0644"``.
    :param parents: make the directories above.
    :param if_match: the entity tag that the file must have; else PreconditionFailed.
    :param exclusive: only if there is none; else PreconditionFailed.
    """
    data = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    headers = {"Content-Type": "application/octet-stream"}
    if if_match is not None:
        headers["If-Match"] = if_match
    if exclusive:
        headers["If-None-Match"] = "*"
    where = target("/files", path=path, mode=mode, owner=owner, parents=parents)
    # A conditional request that is sent again would meet what it has written itself.
    plain = if_match is None and not exclusive
    return call(Request("PUT", where, headers, data, timeout=300.0, repeatable=plain), Stored)


@operation("DELETE /files", Deleted)
def delete(path: str, *, if_match: str | None = None) -> Flow[None]:
    """Remove a file, a link or an empty directory."""
    headers = {} if if_match is None else {"If-Match": if_match}
    yield from call(Request("DELETE", target("/files", path=path), headers, repeatable=False), Deleted)


@operation("POST /delete_dir", Done)
def delete_tree(path: str) -> Flow[None]:
    """Remove a file or a directory tree, as ``rm -rf`` does; it is no error if there is none."""
    response = yield from exchange(post("/delete_dir", {"path": path}, timeout=None))
    decode(accepted(response.body), Done)


@operation("POST /make_dir", Done)
def make_dir(path: str) -> Flow[None]:
    """Make a directory and those above it, as ``mkdir -p`` does."""
    response = yield from exchange(post("/make_dir", {"path": path}))
    decode(accepted(response.body), Done)


@operation("GET /files/stat", FileInfo)
def stat(path: str, *, follow: bool = False) -> Flow[FileInfo]:
    """
    Return the description of a file, a directory or a link.

    :param follow: about what a link leads to, instead of itself.
    """
    return call(Request("GET", target("/files/stat", path=path, follow=follow)), FileInfo)


def exists(path: str) -> Flow[bool]:
    """Return whether a path exists, also if it is a broken link."""
    try:
        yield from stat(path)
    except NotFound:
        return False
    return True


@operation("GET /files/list", FileList)
def list_page(
    path: str,
    *,
    depth: int = 1,
    glob: str | None = None,
    exclude: Sequence[str] = (),
    type: FileType | None = None,
    hidden: bool = True,
    limit: int | None = None,
    after: str | None = None,
) -> Flow[FileList]:
    """
    Return a page of the list of a directory.

    :param depth: how deep to go; 1 is the directory itself.
    :param after: the ``next`` of the page before.
    """
    where = target(
        "/files/list",
        path=path,
        depth=depth,
        glob=glob,
        exclude=list(exclude),
        type=type,
        hidden="true" if hidden else "false",
        limit=limit,
        after=after or None,
    )
    return call(Request("GET", where), FileList)


def list_files(
    path: str,
    *,
    depth: int = 1,
    glob: str | None = None,
    exclude: Sequence[str] = (),
    type: FileType | None = None,
    hidden: bool = True,
) -> Flow[list[FileInfo]]:
    """
    Return the entries of a directory, and of those below it, each directory before its own entries.

    :param depth: how deep to go; 1 is the directory itself.
    :param glob: what names match, or with a slash what paths from the directory do.
    :param exclude: patterns of what is left out, with all that is in it.
    """
    found: list[FileInfo] = []
    after: str | None = None
    while True:
        page = yield from list_page(
            path, depth=depth, glob=glob, exclude=exclude, type=type, hidden=hidden, limit=10_000, after=after
        )
        found += page.entries
        if page.next is None:
            return found
        after = page.next


@operation("POST /files/glob", FoundList)
def glob(
    path: str,
    pattern: str,
    *,
    type: FileType | None = None,
    hidden: bool = False,
    exclude: Sequence[str] = (),
) -> Flow[list[Found]]:
    """
    Return the paths below a directory that match a pattern.

    :param pattern: ``*``, ``?``, ``[...]`` within a name, ``**`` for directories, ``{a,b}``.
    """
    found: list[Found] = []
    body: dict[str, Any] = {"path": path, "pattern": pattern, "type": type, "hidden": hidden, "exclude": list(exclude)}
    body["limit"] = 10_000
    while True:
        page = yield from call(post("/files/glob", body), FoundList)
        found += page.entries
        if page.next is None:
            return found
        body["after"] = page.next


@operation("POST /files/grep", Matches)
def grep(
    path: str,
    pattern: str,
    *,
    literal: bool = False,
    ignore_case: bool = False,
    glob: Sequence[str] = (),
    exclude: Sequence[str] = (),
    hidden: bool = False,
    context: int = 0,
    max_matches: int = 1000,
    max_file_size: int | None = None,
    timeout: float = 10.0,
) -> Flow[Matches]:
    """
    Search a file, or all files below a directory, for lines that match a regular expression of Python.

    :param literal: whether the pattern is a text instead.
    :param glob: which files to search.
    :param context: lines to return before and after each match.
    :param timeout: seconds after which it ends with what it has.
    """
    body = {
        "path": path,
        "pattern": pattern,
        "literal": literal,
        "ignore_case": ignore_case,
        "glob": list(glob),
        "exclude": list(exclude),
        "hidden": hidden,
        "context": context,
        "max_matches": max_matches,
        "max_file_size": max_file_size,
        "timeout": timeout,
    }
    return call(post("/files/grep", body, timeout=timeout + 60.0), Matches)


@operation("POST /files/edit", EditedFile)
def edit(
    path: str, *edits: tuple[str, str], replace_all: bool = False, if_match: str | None = None
) -> Flow[EditedFile]:
    """
    Replace texts in a file by a list of edits, all or none.

    :param edits: the old text and the new one. The old must be there exactly once, unless ``replace_all``.
    :param if_match: the entity tag that the file must have; else PreconditionFailed.
    """
    items = [{"old": old, "new": new, "replace_all": replace_all} for old, new in edits]
    body = {"path": path, "edits": items, "if_match": if_match}
    return call(post("/files/edit", body, repeatable=False), EditedFile)


@operation("POST /files/move", Transferred)
def move(source: str, to: str, *, overwrite: bool = False, parents: bool = False) -> Flow[Transferred]:
    """Rename a file or a directory. ``to`` is the new path, not a directory to move it into."""
    body = {"from": source, "to": to, "overwrite": overwrite, "parents": parents}
    return call(post("/files/move", body, timeout=None, repeatable=False), Transferred)


@operation("POST /files/copy", Transferred)
def copy(source: str, to: str, *, overwrite: bool = False, parents: bool = False) -> Flow[Transferred]:
    """Copy a file, a link, or a directory tree, within the sandbox."""
    body = {"from": source, "to": to, "overwrite": overwrite, "parents": parents}
    return call(post("/files/copy", body, timeout=None, repeatable=overwrite), Transferred)


@operation("POST /files/chmod", PermissionsChanged)
def chmod(
    path: str,
    mode: str | None = None,
    *,
    owner: str | None = None,
    group: str | None = None,
    recursive: bool = False,
) -> Flow[int]:
    """Change mode, owner or group; return the number of files that were changed."""
    body = {"path": path, "mode": mode, "owner": owner, "group": group, "recursive": recursive}
    reply = yield from call(post("/files/chmod", body, timeout=None), PermissionsChanged)
    return reply.changed


@operation("POST /files/append", Touched)
def append(path: str, content: str | bytes, *, parents: bool = False) -> Flow[Touched]:
    """Append to a file with one write; create it if it does not exist."""
    body: dict[str, Any] = {"path": path, "parents": parents}
    if isinstance(content, bytes):
        body["base64"] = base64.b64encode(content).decode("ascii")
    else:
        body["content"] = content
    return call(post("/files/append", body, repeatable=False), Touched)


@operation("POST /files/touch", Touched)
def touch(path: str, mtime: str | None = None, *, parents: bool = False) -> Flow[Touched]:
    """
    Set a file's time to now, or to another time; create it if it does not exist.

    :param mtime: RFC 3339.
    """
    return call(post("/files/touch", {"path": path, "mtime": mtime, "parents": parents}), Touched)


@operation("POST /files/link", Linked)
def link(
    path: str,
    target: str,
    *,
    kind: Literal["symbolic", "hard"] = "symbolic",
    overwrite: bool = False,
    parents: bool = False,
) -> Flow[Linked]:
    """Make a symbolic or hard link to ``target``."""
    body = {"path": path, "target": target, "kind": kind, "overwrite": overwrite, "parents": parents}
    return call(post("/files/link", body, repeatable=overwrite), Linked)


# Ports


@operation("GET /ports", Ports)
def ports() -> Flow[list[ListeningPort]]:
    """Return the TCP ports that processes of the sandbox listen on, without the daemon's own."""
    reply = yield from call(Request("GET", "/ports"), Ports)
    return reply.ports


@operation("POST /ports/wait", PortReadiness)
def wait_for_port(port: int, http: str | None = None, timeout: float | None = None) -> Flow[PortReadiness]:
    """
    Wait until a process listens on a port.

    :param http: a path that is to answer with 2xx or 3xx.
    :param timeout: seconds after which to return in any case.
    """
    return call(post("/ports/wait", {"port": port, "http": http, "timeout": timeout}, timeout=None), PortReadiness)


@operation("POST /bind_port", Bound)
def bind_port(port: int) -> Flow[None]:
    """Make the sandbox's TCP proxy forward to a port."""
    yield from call(post("/bind_port", {"port": str(port)}, repeatable=False), Bound)


@operation("POST /unbind_port", Done)
def unbind_port(port: int | None = None) -> Flow[None]:
    """
    Make the TCP proxy forward to no port.

    :param port: the port that it has to forward to now; else Conflict.
    """
    yield from call(post("/unbind_port", {"port": None if port is None else str(port)}), Done)


@operation("GET /port_status", PortStatus)
def port_status() -> Flow[PortStatus]:
    """Return the port that the TCP proxy forwards to."""
    return call(Request("GET", "/port_status"), PortStatus)


# The daemon


@operation("GET /health", Health)
def health() -> Flow[Health]:
    """Return the daemon's health. Needs no token."""
    return call(Request("GET", "/health", timeout=10.0), Health)


@operation("GET /ready", Readiness)
def ready() -> Flow[None]:
    """
    Wait until the daemon accepts commands. Needs no token.

    :raise Unavailable: if it does not for as long as the client is patient, with the reason.
    """
    yield from call(Request("GET", "/ready", timeout=10.0), Readiness)


@operation("GET /status", DaemonStatus)
def status() -> Flow[DaemonStatus]:
    """Return the daemon's version, uptime and load."""
    return call(Request("GET", "/status"), DaemonStatus)


@operation("GET /metrics.json", MetricsReply)
def metrics() -> Flow[list[Metric]]:
    """Return the daemon's metrics."""
    reply = yield from call(Request("GET", "/metrics.json"), MetricsReply)
    return reply.metrics


@operation("GET /openapi.json")
def openapi() -> Flow[dict[str, Any]]:
    """Return the API as an OpenAPI 3.1 document."""
    response = yield from exchange(Request("GET", "/openapi.json"))
    return fields(response.body)


def accepted(body: bytes) -> bytes:
    """
    Return the body of a reply, or raise the error in it: file routes of the original API answer errors with 200.

    :raise SandboxError: if it did.
    """
    error = fields(body).get("error")
    if isinstance(error, str):
        raise refusal(error)
    return body
