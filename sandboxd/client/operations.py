"""
The operations of the API, each described once for both clients: its request, and the type of its reply.

Those on files are in :mod:`sandboxd.client.file_operations`, ``transfers`` and ``trees``, those over WebSockets in
``attaching``, and event streams in ``follow``.

Every function returns a flow; :mod:`sandboxd.client.blocking` and :mod:`sandboxd.client.asynchronous` carry them out.
"""

from __future__ import annotations

import base64
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, ParamSpec, TypedDict, TypeVar
from urllib.parse import quote

from sandboxd.client.flow import Flow, HttpRequest, call, exchange, target
from sandboxd.client.outcome import checked
from sandboxd.client.replies import (
    Awaited,
    Bound,
    DaemonStatus,
    Done,
    Execution,
    Health,
    ListeningPort,
    Logs,
    Metric,
    MetricsReply,
    PortReadiness,
    Ports,
    PortStatus,
    Process,
    Processes,
    Readiness,
    RunResult,
    Started,
    StdinWritten,
    fields,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

P = ParamSpec("P")
F = TypeVar("F", bound=Callable[..., object])

#: A line for ``sh -c``, or a program and its arguments, which no shell sees.
Cmd = str | Sequence[str]

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


def post(path: str, body: Mapping[str, Any], **fields: Any) -> HttpRequest:
    """Return a request with a JSON body. Fields that are None are left out, except in a command's ``env``."""
    content = json.dumps({name: value for name, value in body.items() if value is not None}).encode("ascii")
    headers = {"Content-Type": "application/json", **fields.pop("headers", {})}
    return HttpRequest("POST", path, headers, content, **fields)


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
    reply = yield from call(HttpRequest("GET", "/list_processes"), Processes)
    return reply.processes


@operation("GET /processes/{id}", Execution)
def process(id: str) -> Flow[Execution]:
    """Return the details of an execution."""
    return call(HttpRequest("GET", one(id)), Execution)


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
    return call(HttpRequest("GET", path), Logs)


@operation("POST /processes/{id}/stdin", StdinWritten)
def write_stdin(id: str, data: str | bytes = b"", *, close: bool = False) -> Flow[int]:
    """
    Write to the stdin of a command that was started with ``stdin=True``; return the number of bytes.

    :param close: whether this is the end of its stdin.
    """
    content = data.encode() if isinstance(data, str) else data
    headers = {"Content-Type": "application/octet-stream"}
    path = target(f"{one(id)}/stdin", close=close)
    request = HttpRequest("POST", path, headers, content, timeout=None, repeatable=False)
    reply = yield from call(request, StdinWritten)
    return reply.bytes


@operation("POST /processes/{id}/resize", Done)
def resize(id: str, cols: int, rows: int) -> Flow[None]:
    """Set the size of a process's pseudo-terminal, in characters."""
    yield from call(post(f"{one(id)}/resize", {"cols": cols, "rows": rows}), Done)


# Ports


@operation("GET /ports", Ports)
def ports() -> Flow[list[ListeningPort]]:
    """Return the TCP ports that processes of the sandbox listen on, without the daemon's own."""
    reply = yield from call(HttpRequest("GET", "/ports"), Ports)
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
    return call(HttpRequest("GET", "/port_status"), PortStatus)


# The daemon


@operation("GET /health", Health)
def health() -> Flow[Health]:
    """Return the daemon's health. Needs no token."""
    return call(HttpRequest("GET", "/health", timeout=10.0), Health)


@operation("GET /ready", Readiness)
def ready() -> Flow[None]:
    """
    Wait until the daemon accepts commands. Needs no token.

    :raise Unavailable: if it does not for as long as the client is patient, with the reason.
    """
    yield from call(HttpRequest("GET", "/ready", timeout=10.0), Readiness)


@operation("GET /status", DaemonStatus)
def status() -> Flow[DaemonStatus]:
    """Return the daemon's version, uptime and load."""
    return call(HttpRequest("GET", "/status"), DaemonStatus)


@operation("GET /metrics.json", MetricsReply)
def metrics() -> Flow[list[Metric]]:
    """Return the daemon's metrics."""
    reply = yield from call(HttpRequest("GET", "/metrics.json"), MetricsReply)
    return reply.metrics


@operation("GET /openapi.json")
def openapi() -> Flow[dict[str, Any]]:
    """Return the API as an OpenAPI 3.1 document."""
    response = yield from exchange(HttpRequest("GET", "/openapi.json"))
    return fields(response.body)
