"""
The options of ``twistd sandboxd``: its command line, with the environment for what that does not give.

The limits among the options become :class:`sandboxd.settings.Settings`. The environment is not read here, but given.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

from twisted.logger import InvalidLogLevelError, LogLevel
from twisted.python import usage

from sandboxd.settings import Settings
from sandboxd.web.tokens import BadTokens, Credentials, check_token, read_tokens, stored_tokens

#: The default path of the file that holds a claimed token.
SECRET_PATH = "/var/lib/sandboxd/sandbox-secret"

#: The limits among the options, and what they say; the fields of :class:`Settings` with dashes.
LIMITS = {
    "max-executions": "Commands that may run at a time.",
    "max-streams": "Event streams that may be open at a time.",
    "max-body": "Bytes of a request's body.",
    "max-upload": "Bytes of an upload or an archive.",
    "max-header": "Bytes of a request's headers.",
    "request-timeout": "Seconds in which a request must have arrived.",
    "keep-alive": "Seconds that an HTTP connection stays open between two requests.",
    "drain": "Seconds in which foreground commands may end by themselves on SIGTERM; 0 for none.",
    "heartbeat": "Seconds of silence after which a stream gets a comment.",
    "keep-finished": "Executions that are remembered after their end.",
    "keep-seconds": "Seconds for which they are.",
    "max-watches": "Directories or trees that may be watched at a time.",
    "watch-linger": "Seconds for which a watch lives on without a client.",
}


def _field(option: str) -> str:
    return option.replace("-", "_")


def _default(option: str) -> int | str:
    value: int | None = getattr(Settings, _field(option))
    return "none" if value is None else value


def _variable(option: str) -> str:
    return f"SANDBOX_{_field(option).upper()}"


class ServiceOptions(usage.Options):
    """
    The options of ``twistd sandboxd``.

    :cvar environ: the environment that fills in what was not given.
    """

    environ: ClassVar[Mapping[str, str]] = {}

    synopsis = "[options] [-- command [arguments]]"
    longdesc = (
        "An HTTP API to this machine for agents: commands, processes, files, a TCP proxy. "
        "A command after -- is run beside it; the daemon ends when it does, with its exit code."
    )

    optParameters: ClassVar[list[list[str | None]]] = [
        ["secret", "s", None, "The bearer token of the API. [SANDBOX_SECRET]"],
        ["secret-file", None, None, "A file with such tokens, one a line; read again on SIGHUP. [SANDBOX_SECRET_FILE]"],
        [
            "auth-mode",
            None,
            None,
            "static; or pool: the first token that a client sends becomes the daemon's."
            " [SANDBOX_AUTH_MODE, default static]",
        ],
        ["secret-path", None, None, f"Where pool keeps that token. [SANDBOX_SECRET_PATH, default {SECRET_PATH}]"],
        ["port", "p", None, "Port of the HTTP API; 0 for any. [PORT, default 3030]"],
        ["proxy-port", None, None, "Port of the TCP proxy; 0 for any. [PROXY_PORT, default 3031]"],
        [
            "socket",
            None,
            None,
            "A Unix socket for the HTTP API, in place of the port or beside it. [SANDBOX_SOCKET]",
        ],
        ["root", None, None, "The directory that file requests and working directories stay in. [SANDBOX_ROOT]"],
        ["cgroup", None, None, "A cgroup v2 directory for limits of whole commands. [SANDBOX_CGROUP]"],
        ["log-level", None, None, "debug, info, warn, error or critical. [LOG_LEVEL, default info]"],
        ["log-format", None, None, "text, or json: an object a line. [LOG_FORMAT, default text]"],
    ]

    optFlags: ClassVar[list[list[str | None]]] = [
        ["access-log", None, "Log every request, as debug does. [SANDBOX_ACCESS_LOG=1]"],
        ["no-console", None, "Do not serve the page /console/. [SANDBOX_CONSOLE=0]"],
        ["open-metrics", None, "Let /metrics be read without a token. [SANDBOX_OPEN_METRICS=1]"],
    ]

    optParameters += [
        [option, None, None, f"{text} [{_variable(option)}, default {_default(option)}]"]
        for option, text in LIMITS.items()
    ]

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """
        Parse the options and check them.

        :raise SystemExit: if something is wrong; its one line goes to stderr. (``twistd`` would print the whole
            usage text to stdout.)
        """
        self._given = list(sys.argv[1:] if options is None else options)
        try:
            super().parseOptions(self._given)
        except usage.UsageError as error:
            raise SystemExit(f"twistd sandboxd: {error}") from None

    def parseArgs(self, *args: str) -> None:
        """
        Take the companion's command, which follows ``--``.

        :raise usage.UsageError: if there is something else that is no option.
        """
        if args and self._given[-len(args) - 1 : -len(args)] != ["--"]:
            raise usage.UsageError(f"{args[0]!r} is no option; a command to run beside the daemon stands behind --")
        self["companion"] = args

    def postOptions(self) -> None:
        """
        Take what the command line does not give from the environment.

        :raise usage.UsageError: if a value is missing or bad.
        """
        try:
            self["credentials"] = self._credentials()
        except BadTokens as error:
            raise usage.UsageError(str(error)) from None
        self["socket"] = self["socket"] or self.environ.get("SANDBOX_SOCKET") or None
        only_socket = self["socket"] and self["port"] is None and not self.environ.get("PORT")
        self["port"] = None if only_socket else self._port("port", "PORT", 3030)
        self["proxy-port"] = self._port("proxy-port", "PROXY_PORT", 3031)
        self["root"] = self["root"] or self.environ.get("SANDBOX_ROOT") or None
        self["cgroup"] = self["cgroup"] or self.environ.get("SANDBOX_CGROUP")
        self["settings"] = Settings(**cast("Any", {_field(option): self._limit(option) for option in LIMITS}))
        level = self["log-level"] or self.environ.get("LOG_LEVEL") or "info"
        try:
            self["log-level"] = LogLevel.levelWithName({"warning": "warn"}.get(level.lower(), level.lower()))
        except InvalidLogLevelError:
            raise usage.UsageError(
                f"LOG_LEVEL (--log-level): {level!r} is none of debug, info, warn, error, critical"
            ) from None

        self["log-format"] = (self["log-format"] or self.environ.get("LOG_FORMAT") or "text").lower()
        if self["log-format"] not in ("text", "json"):
            raise usage.UsageError(f"LOG_FORMAT (--log-format): {self['log-format']!r} is neither text nor json")
        for flag in ("access-log", "open-metrics"):
            self[flag] = self._flag(flag)
        self["console"] = not self["no-console"] and self._switch("SANDBOX_CONSOLE", "--no-console", default=True)

    def _flag(self, option: str) -> bool:
        return bool(self[option]) or self._switch(_variable(option), f"--{option}", default=False)

    def _switch(self, variable: str, option: str, *, default: bool) -> bool:
        text = self.environ.get(variable, "").lower()
        if text not in ("", "0", "1", "false", "true"):
            raise usage.UsageError(f"{variable} ({option}): {text!r} is neither 1 nor 0")
        return text in ("1", "true") if text else default

    def _credentials(self) -> Credentials:
        """
        Return the tokens from the command line, the environment, or a credential of systemd's, in this order.

        :raise BadTokens: if a token file cannot be used.
        :raise usage.UsageError: if there is none, or more than one.
        """
        mode = self["auth-mode"] or self.environ.get("SANDBOX_AUTH_MODE") or "static"
        if mode.lower() not in ("static", "pool"):
            raise usage.UsageError(f"SANDBOX_AUTH_MODE (--auth-mode): {mode!r} is neither static nor pool")
        secret, file = self["secret"], self["secret-file"]
        if secret is None and file is None:
            secret = self.environ.get("SANDBOX_SECRET") or None
            file = self.environ.get("SANDBOX_SECRET_FILE") or None
        credential = Path(self.environ.get("CREDENTIALS_DIRECTORY", "/nowhere"), "sandbox-secret")
        if secret is None and file is None and credential.exists():
            file = credential
        if mode.lower() == "pool":
            if secret is not None or file is not None:
                raise usage.UsageError(
                    "SANDBOX_AUTH_MODE=pool takes the first token that is sent;"
                    " unset SANDBOX_SECRET, SANDBOX_SECRET_FILE and the credential sandbox-secret"
                )
            path = Path(self["secret-path"] or self.environ.get("SANDBOX_SECRET_PATH") or SECRET_PATH).absolute()
            return Credentials(stored_tokens(path), path, pool=True)
        if secret is not None and file is not None:
            raise usage.UsageError("SANDBOX_SECRET and SANDBOX_SECRET_FILE are both set; unset one")
        if file is not None:
            path = Path(file).absolute()
            return Credentials(read_tokens(path), path)
        if not secret:
            raise usage.UsageError(
                "SANDBOX_SECRET is required: set it, or give --secret, to the token that clients send"
                " (or SANDBOX_SECRET_FILE to a file that has it)"
            )
        try:
            return Credentials((check_token(secret),))
        except ValueError as error:
            raise usage.UsageError(f"SANDBOX_SECRET (--secret) {error}") from None

    def _limit(self, option: str) -> int | None:
        variable = _variable(option)
        given = self[option]
        if given is None:
            given = self.environ.get(variable) or getattr(Settings, _field(option))
        if given is None:
            return None
        text = str(given)
        if len(text) > 18:
            raise usage.UsageError(f"{variable} (--{option}): {text[:18]}... is too large")
        least = 0 if option == "drain" else 1
        if text.isascii() and text.isdigit() and int(text) >= least:
            return int(text)
        raise usage.UsageError(f"{variable} (--{option}): {text!r} is not a number of {least} or more")

    def _port(self, option: str, variable: str, default: int) -> int:
        text = self[option] if self[option] is not None else self.environ.get(variable) or str(default)
        if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535:
            return int(text)
        raise usage.UsageError(f"{variable} (--{option}): {text!r} is not a port; give a number from 0 to 65535")
