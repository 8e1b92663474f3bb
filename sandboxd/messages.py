"""
The requests of the API as values: a body is decoded and checked here, or refused with the field's name.

The rules are those of the HTTP contract; unknown fields are ignored, because the official clients send some.
"""

from __future__ import annotations

import signal as signals
from typing import Annotated, TypeVar

import msgspec

from sandboxd.execution.command import Command


class BadRequest(Exception):
    """The request is malformed; the text says which field, and what to do."""


Seconds = Annotated[float, msgspec.Meta(ge=0)]


class CommandRequest(msgspec.Struct):
    """Body of ``/run``, ``/run_streaming`` and ``/start_process``."""

    cmd: str
    cwd: str | None = None
    env: dict[str, str] | None = None
    timeout: Seconds | None = None
    max_output: Annotated[int, msgspec.Meta(ge=0)] | None = None

    def command(self) -> Command:
        """
        The command that is asked for.

        :raise BadRequest: if the operating system could not take it.
        """
        env = self.env or {}
        _no_nul("cmd", self.cmd)
        for name, value in env.items():
            if not name or "=" in name or "\0" in name:
                raise BadRequest(f"env: {name!r} is not a variable name; it must not be empty or have '=' or NUL in it")
            _no_nul(f"env.{name}", value)
        if self.cwd:
            _no_nul("cwd", self.cwd)
        return Command(self.cmd, self.cwd or None, env, self.timeout or None)


class PathRequest(msgspec.Struct):
    """Body of the file routes that take a path only."""

    path: str

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path: must not be empty")
        if "\0" in self.path:
            raise ValueError("path: must not contain NUL")


class WriteFileRequest(PathRequest):
    """Body of ``/write_file``."""

    content: str


class BindPortRequest(msgspec.Struct):
    """Body of ``/bind_port``."""

    port: str | int

    def number(self) -> int:
        """
        The port.

        :raise BadRequest: if it is not one.
        """
        return _port(self.port)


class UnbindPortRequest(msgspec.Struct):
    """Body of ``/unbind_port``."""

    port: str | int | None = None

    def number(self) -> int | None:
        """
        The port, if one is given.

        :raise BadRequest: if it is not one.
        """
        return None if self.port in (None, "") else _port(self.port)


class KillProcessRequest(msgspec.Struct):
    """Body of ``/kill_process``."""

    id: str
    signal: str | int | None = None
    grace: Seconds = 5.0

    def __post_init__(self) -> None:
        if not self.id:
            raise ValueError("id: Process ID is required")

    def signum(self) -> int:
        """
        The signal to send.

        :raise BadRequest: if there is none of that name or number.
        """
        if self.signal is None:
            return signals.SIGKILL
        try:
            if isinstance(self.signal, int) or self.signal.isdigit():
                return signals.Signals(int(self.signal))
            name = self.signal.upper()
            return signals.Signals[name if name.startswith("SIG") else f"SIG{name}"]
        except (KeyError, ValueError):
            raise BadRequest(
                f"signal: {self.signal!r} is not a signal; give a name such as TERM, or a number"
            ) from None


T = TypeVar("T")


def decode(body: bytes, type: type[T]) -> T:
    """
    A request's body as a value.

    :param body: JSON; empty means ``{}``.
    :raise BadRequest: if it is not JSON, or not of that type.
    """
    try:
        return msgspec.json.decode(body or b"{}", type=type)
    except msgspec.ValidationError as error:
        raise BadRequest(_validation(str(error))) from None
    except msgspec.DecodeError as error:
        raise BadRequest(f"the body is not valid JSON: {error}") from None
    except UnicodeDecodeError:
        raise BadRequest("the body is not valid JSON: it is not UTF-8") from None


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
    if text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65535:
        return int(text)
    raise BadRequest(f"port: {value!r} is not a port; give a number from 1 to 65535")
