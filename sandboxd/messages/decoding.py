"""
The requests of the API as values: a body is decoded and checked here, or refused with the field's name.

The rules are those of the HTTP contract; unknown fields are ignored, because the official clients send some.
"""

from __future__ import annotations

import json
import os
import re
import signal as signals
from collections.abc import Hashable, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import Meta

from sandboxd.processes.command import Command, User
from sandboxd.processes.limits import check_limits


class BadRequest(Exception):
    """The request is malformed; the text says which field, and what to do."""


#: What has no NUL in it, as a regular expression.
NO_NUL = r"^[^\x00]*$"

#: Likewise a port.
PORT = "([1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])"

#: At most a year, lest a timer be set that the clock cannot count to.
Seconds = Annotated[float, Meta(ge=0, le=366 * 86400)]
Count = Annotated[int, Meta(ge=0, le=(1 << 62))]

After = Annotated[Count, Meta(description="Records behind this number; wins over Last-Event-ID.")] | None


#: Said in the OpenAPI document, and checked by code of ours, whose errors say more.
Path = Annotated[str, Meta(extra_json_schema={"minLength": 1, "pattern": NO_NUL})]
Port = Annotated[str | int, Meta(extra_json_schema={"minimum": 1, "maximum": 65535, "pattern": f"^{PORT}$"})]
PortOrNone = Annotated[str | int, Meta(extra_json_schema={"minimum": 1, "maximum": 65535, "pattern": f"^({PORT})?$"})]
Signal = Annotated[
    str | int,
    Meta(
        description="Its name, with SIG or without, or its number.",
        extra_json_schema={
            "enum": [
                *(signal.name for signal in signals.Signals),
                *(signal.name.removeprefix("SIG") for signal in signals.Signals),
                *map(int, signals.Signals),
            ]
        },
    ),
]


class LimitsRequest(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, rename={"as_": "as"}):
    """
    Limits of each process, by their names in getrlimit(2): seconds for ``cpu``, counts for ``nofile`` and ``nproc``,
    else bytes. Of the tree as a whole: ``memory`` in bytes, ``pids``, and ``cpus`` as a number of processors.
    """

    as_: Count | None = None
    core: Count | None = None
    cpu: Count | None = None
    data: Count | None = None
    fsize: Count | None = None
    nofile: Count | None = None
    nproc: Count | None = None
    stack: Count | None = None
    memory: Annotated[int, Meta(ge=1, le=(1 << 62))] | None = None
    pids: Annotated[int, Meta(ge=1, le=(1 << 22))] | None = None
    cpus: Annotated[float, Meta(gt=0, le=4096)] | None = None

    def of_tree(self) -> dict[str, float]:
        """Those that need a cgroup."""
        found = {"memory": self.memory, "pids": self.pids, "cpus": self.cpus}
        return {name: value for name, value in found.items() if value is not None}

    def of_process(self) -> dict[str, int]:
        """Those that are rlimits."""
        given: dict[str, int] = msgspec.to_builtins(self)
        return {name: value for name, value in given.items() if name not in self.of_tree()}


class CommandRequest(msgspec.Struct):
    """Body of ``/run``, ``/run_streaming`` and ``/start_process``."""

    cmd: Annotated[str, Meta(description="What sh -c is given.", extra_json_schema={"pattern": NO_NUL})]
    cwd: Annotated[str, Meta(description="Working directory; the daemon's own if it is empty or left out.")] | None = (
        None
    )
    env: (
        Annotated[
            dict[str, str],
            Meta(
                description="Variables over the daemon's own.",
                extra_json_schema={"propertyNames": {"pattern": r"^[^\x00=]+$"}},
            ),
        ]
        | None
    ) = None
    timeout: Annotated[Seconds, Meta(description="Seconds that it may live; 0 for ever.")] | None = None
    idle_timeout: Annotated[Seconds, Meta(description="Seconds that it may go without output; 0 for ever.")] | None = (
        None
    )
    max_output: (
        Annotated[
            Count, Meta(description="/run only: bytes of each stream to keep, half from the start, half from the end.")
        ]
        | None
    ) = None
    stdin: Annotated[bool, Meta(description="Whether its stdin is a pipe, for /processes/{id}/stdin.")] = False
    detach: Annotated[bool, Meta(description="/run_streaming only: whether it outlives the connection.")] = False
    survive: Annotated[bool, Meta(description="Whether its processes may outlive a daemon that was killed.")] = False
    limits: LimitsRequest | None = None
    user: Annotated[str, Meta(description="Whom to run as, if the daemon is root.")] | None = None

    def command(self, user: User | None = None) -> Command:
        """
        The command that is asked for.

        :param user: what is known of the user that is named in it.
        :raise BadRequest: if the operating system could not take it.
        """
        env = self.env or {}
        limits = {} if self.limits is None else self.limits.of_process()
        try:
            check_limits(limits)
        except ValueError as error:
            raise BadRequest(str(error)) from None
        _no_nul("cmd", self.cmd)
        for name, value in env.items():
            if not name or "=" in name or "\0" in name:
                raise BadRequest(f"env: {name!r} is not a variable name; it must not be empty or have '=' or NUL in it")
            _no_nul(f"env.{name}", value)
        if self.cwd:
            _no_nul("cwd", self.cwd)
        return Command(
            self.cmd,
            self.cwd or None,
            env,
            timeout=self.timeout or None,
            idle_timeout=self.idle_timeout or None,
            stdin=self.stdin,
            survive=self.survive,
            limits=limits,
            tree_limits={} if self.limits is None else self.limits.of_tree(),
            user=user,
        )


class PathRequest(msgspec.Struct):
    """Body of the file routes that take a path only."""

    path: Path

    def __post_init__(self) -> None:
        check_path("path", self.path)


class WriteFileRequest(PathRequest):
    """Body of ``/write_file``; ``koyeb-cli`` leaves an empty ``content`` out."""

    content: str = ""


class BindPortRequest(msgspec.Struct):
    """Body of ``/bind_port``."""

    port: Port

    def number(self) -> int:
        """
        The port.

        :raise BadRequest: if it is not one.
        """
        return _port(self.port)


class UnbindPortRequest(msgspec.Struct):
    """Body of ``/unbind_port``."""

    port: PortOrNone | None = None

    def number(self) -> int | None:
        """
        The port, if one is given.

        :raise BadRequest: if it is not one.
        """
        return None if self.port in (None, "") else _port(self.port)


class KillProcessRequest(msgspec.Struct):
    """Body of ``/kill_process``."""

    id: Annotated[str, Meta(extra_json_schema={"minLength": 1})]
    signal: Signal | None = None
    grace: Annotated[Seconds, Meta(description="Seconds until SIGKILL follows, if the signal was another.")] = 5.0

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("id: Process ID is required")

    def signum(self) -> int:
        """
        The signal to send first.

        :raise BadRequest: if there is none of that name or number.
        """
        return signals.SIGKILL if self.signal is None else _signum(self.signal)


class SignalRequest(msgspec.Struct):
    """Body of ``/processes/<id>/signal``."""

    signal: Signal

    def signum(self) -> int:
        """
        The signal to send.

        :raise BadRequest: if there is none of that name or number.
        """
        return _signum(self.signal)


class LogsQuery(msgspec.Struct):
    """Query of ``/processes/<id>/logs``."""

    after: Annotated[Count, Meta(description="Records behind this sequence number.")] = 0
    limit: Annotated[Count, Meta(description="How many at most; 10,000 by default, and no more.")] | None = None


class ProcessLogsQuery(msgspec.Struct):
    """Query of ``/process_logs_streaming``."""

    id: Annotated[str, Meta(min_length=1)]
    after: After = None
    follow: Annotated[bool, Meta(description="Whether to go on with new lines as they come.")] = True


class StreamQuery(msgspec.Struct):
    """Query of ``/run_streaming``."""

    after: After = None


class StdinQuery(msgspec.Struct):
    """Query of ``/processes/<id>/stdin``."""

    close: Annotated[bool, Meta(description="Whether this is the end of its stdin.")] = False


class WaitRequest(msgspec.Struct):
    """Body of ``/processes/<id>/wait``."""

    timeout: Seconds | None = None


T = TypeVar("T")

#: An escape for half a surrogate pair, perhaps.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def check_path(field: str, path: str) -> None:
    """
    Check what no file system takes.

    :raise ValueError: if it is empty or has a NUL in it.
    """
    if not path:
        raise ValueError(f"{field}: must not be empty")
    if "\0" in path:
        raise ValueError(f"{field}: must not contain NUL")


def decode(body: bytes, type: type[T]) -> T:
    """
    A request's body as a value.

    :param body: JSON; empty means ``{}``. ``\\udc80`` to ``\\udcff`` alone are bytes 80 to ff that are not UTF-8.
    :raise BadRequest: if it is not JSON, or not of that type.
    """
    try:
        try:
            return msgspec.json.decode(body or b"{}", type=type)
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            if not _SURROGATE.search(body):
                raise
        # msgspec takes pairs only.
        return msgspec.convert(_with_surrogates(body), type)
    except msgspec.ValidationError as error:
        raise BadRequest(_validation(str(error))) from None
    except (msgspec.DecodeError, json.JSONDecodeError) as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    except UnicodeDecodeError:
        raise BadRequest("the body is not valid JSON: it is not UTF-8") from None


def decode_query(args: Mapping[bytes, Sequence[bytes]], type: type[T]) -> T:
    """
    A request's query as a value. Of a parameter that is given twice the first counts, unless its type is a list. What
    is not UTF-8 comes as in paths; see :mod:`sandboxd.files`.

    :raise BadRequest: if it is not of that type.
    """
    given: dict[str, object] = {}
    for name, values in args.items():
        texts = [os.fsdecode(value) for value in values]
        given[os.fsdecode(name)] = texts if os.fsdecode(name) in _lists(cast(Hashable, type)) else texts[0]
    try:
        found = msgspec.convert(given, type, strict=False)
    except msgspec.ValidationError as error:
        raise BadRequest(_validation(str(error))) from None
    for parameter in given:
        if getattr(found, parameter, ...) is None:  # msgspec makes None of the text "null"
            raise BadRequest(f"{parameter}: must not be null; leave it out")
    return found


@cache
def _lists(type: Any) -> frozenset[str]:
    """The fields of a type that are lists."""
    found = msgspec.inspect.type_info(type)
    assert isinstance(found, msgspec.inspect.StructType)
    return frozenset(
        field.encode_name for field in found.fields if isinstance(_bare(field.type), msgspec.inspect.ListType)
    )


def _bare(type: msgspec.inspect.Type) -> msgspec.inspect.Type:
    """A type without what is said of it."""
    return type.type if isinstance(type, msgspec.inspect.Metadata) else type


def _with_surrogates(body: bytes) -> object:
    """
    A body that has halves of surrogate pairs in it, decoded.

    :raise BadRequest: if one is not a byte.
    """
    value: object = json.loads(body)
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise BadRequest("the body has half a surrogate pair in it; only \\udc80 to \\udcff may stand alone") from None
    return value


def _validation(text: str) -> str:
    """msgspec's words, with the field first: ``cmd: Expected `str`, got `int```."""
    text, _, path = text.partition(" - at `$")
    field = path.strip("`.")
    return f"{field}: {text}" if field else text


def _no_nul(field: str, value: str) -> None:
    if "\0" in value:
        raise BadRequest(f"{field}: must not contain NUL")


def _port(value: str | int) -> int:
    text = str(value).strip()
    if text.isascii() and text.isdigit() and len(text) <= 5 and 1 <= int(text) <= 65535:
        return int(text)
    raise BadRequest(f"port: {value!r} is not a port; give a number from 1 to 65535")


def _signum(value: str | int) -> int:
    try:
        if isinstance(value, int) or value.isdigit():
            return signals.Signals(int(value))
        name = value.upper()
        return signals.Signals[name if name.startswith("SIG") else f"SIG{name}"]
    except (KeyError, ValueError):
        raise BadRequest(f"signal: {value!r} is not a signal; give a name such as TERM, or a number") from None
