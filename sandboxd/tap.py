"""
``twistd sandboxd``: options, and the daemon built from them.

The only module that reads the environment or imports the global reactor.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TextIO, cast

from twisted.logger import (
    FilteringLogObserver,
    ILogObserver,
    InvalidLogLevelError,
    LogLevel,
    LogLevelFilterPredicate,
    textFileLogObserver,
)
from twisted.python import usage
from twisted.python.logfile import LogFile

from sandboxd.execution.cgroup import CgroupError, Cgroups, delegated
from sandboxd.execution.limits import prepare_process
from sandboxd.hardening import become_subreaper, erase, forbid_inspection
from sandboxd.service import Reactor, Sandboxd
from sandboxd.settings import Settings

#: Connections that may wait to be accepted; the kernel caps it at net.core.somaxconn.
BACKLOG = 4096


#: The limits among the options, and what they say; the fields of :class:`Settings` with dashes.
LIMITS = {
    "max-executions": "Commands that may run at a time.",
    "max-streams": "Event streams that may be open at a time.",
    "max-body": "Bytes of a request's body.",
    "max-header": "Bytes of a request's headers.",
    "request-timeout": "Seconds in which a request must have arrived.",
    "heartbeat": "Seconds of silence after which a stream gets a comment.",
    "keep-finished": "Executions that are remembered after their end.",
    "keep-seconds": "Seconds for which they are.",
}


def _field(option: str) -> str:
    return option.replace("-", "_")


def _variable(option: str) -> str:
    return f"SANDBOX_{_field(option).upper()}"


class Options(usage.Options):
    """What can be set, on the command line or in the environment; the command line wins."""

    synopsis = "[options]"
    longdesc = "An HTTP API to this machine for agents: commands, processes, files, a TCP proxy."

    optParameters: ClassVar[list[list[str | None]]] = [
        ["secret", "s", None, "The bearer token of the API. [SANDBOX_SECRET, required]"],
        ["port", "p", None, "Port of the HTTP API; 0 for any. [PORT, default 3030]"],
        ["proxy-port", None, None, "Port of the TCP proxy; 0 for any. [PROXY_PORT, default 3031]"],
        ["cgroup", None, None, "A cgroup v2 directory for limits of whole commands. [SANDBOX_CGROUP]"],
        ["log-level", None, None, "debug, info, warn, error or critical. [LOG_LEVEL, default info]"],
    ]

    optParameters += [
        [option, None, None, f"{text} [{_variable(option)}, default {getattr(Settings, _field(option))}]"]
        for option, text in LIMITS.items()
    ]

    def parseOptions(self, options: Sequence[str] | None = None) -> None:
        """
        Parse and check.

        :raise SystemExit: if something is wrong; its one line goes to stderr. (``twistd`` would print the whole
            usage text to stdout.)
        """
        try:
            super().parseOptions(options)
        except usage.UsageError as error:
            raise SystemExit(f"twistd sandboxd: {error}") from None

    def postOptions(self) -> None:
        """
        Fill in from the environment what was not given.

        :raise usage.UsageError: if a value is missing or bad.
        """
        self["secret"] = _secret(self["secret"], os.environ.get("SANDBOX_SECRET"))
        self["port"] = _port("--port", self["port"], "PORT", 3030)
        self["proxy-port"] = _port("--proxy-port", self["proxy-port"], "PROXY_PORT", 3031)
        self["settings"] = Settings(**{_field(option): _limit(option, self[option]) for option in LIMITS})
        level = self["log-level"] or os.environ.get("LOG_LEVEL") or "info"
        try:
            self["log-level"] = LogLevel.levelWithName({"warning": "warn"}.get(level.lower(), level.lower()))
        except InvalidLogLevelError:
            raise usage.UsageError(
                f"LOG_LEVEL (--log-level): {level!r} is none of debug, info, warn, error, critical"
            ) from None
        twistd = getattr(self, "parent", None)
        if twistd is not None and not twistd.get("logger"):
            # twistd takes the name of a function, calls it before any service exists, and passes nothing.
            _logging.update(level=self["log-level"], file=twistd.get("logfile"))
            twistd["logger"] = "sandboxd.tap.log_observer"


def _secret(option: str | None, variable: str | None) -> str:
    secret = option if option is not None else variable
    if not secret:
        raise usage.UsageError("SANDBOX_SECRET is required: set it, or give --secret, to the token that clients send")
    if any(character.isspace() or not character.isprintable() for character in secret):
        raise usage.UsageError("SANDBOX_SECRET (--secret) must not have white space or control characters in it")
    return secret


def _limit(option: str, value: str | None) -> int:
    variable = _variable(option)
    text = value if value is not None else os.environ.get(variable) or str(getattr(Settings, _field(option)))
    if len(text) > 18:
        raise usage.UsageError(f"{variable} (--{option}): {text[:18]}... is too large")
    if text.isascii() and text.isdigit() and int(text) >= 1:
        return int(text)
    raise usage.UsageError(f"{variable} (--{option}): {text!r} is not a number of 1 or more")


def _port(option: str, value: str | None, variable: str, default: int) -> int:
    text = value if value is not None else os.environ.get(variable) or str(default)
    if text.isascii() and text.isdigit() and len(text) <= 5 and int(text) <= 65535:
        return int(text)
    raise usage.UsageError(f"{variable} ({option}): {text!r} is not a port; give a number from 0 to 65535")


_logging: dict[str, Any] = {"level": LogLevel.info, "file": None}


def log_observer() -> ILogObserver:
    """Where the log goes: as ``twistd`` has it, less what is below the level."""
    file = _logging["file"]
    out: TextIO = sys.stdout if file in (None, "", "-") else LogFile.fromFullPath(file)
    return FilteringLogObserver(textFileLogObserver(out), [LogLevelFilterPredicate(_logging["level"])])


def _listen(variable: str, port: int) -> socket.socket:
    """
    A listening socket for IPv6 and IPv4, or for IPv4 where that is all there is.

    Opened before ``twistd`` becomes a daemon, so that the reason of a failure reaches whoever started it.

    :raise SystemExit: if the port cannot be had.
    """
    try:
        if socket.has_dualstack_ipv6():
            sock = socket.create_server(("", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
        else:
            sock = socket.create_server(("", port), backlog=BACKLOG)
    except OSError as error:
        raise SystemExit(
            f"twistd sandboxd: cannot listen on {variable} {port}: {os.strerror(error.errno or 0)}"
        ) from None
    sock.setblocking(False)
    return sock


def makeService(options: Options) -> Sandboxd:
    """
    The daemon, ready to start.

    :raise SystemExit: if a port cannot be had.
    """
    reactor = _reactor()
    http = _listen("PORT", options["port"])
    proxy = _listen("PROXY_PORT", options["proxy-port"])
    environ = dict(os.environ)
    for secret in {options["secret"], os.environ.pop("SANDBOX_SECRET", "")} - {""}:
        erase(secret)
    umask = os.umask(0)
    os.umask(umask)
    # twistd sets 0077 when it becomes a daemon, which is not what commands and files should get.
    keep_umask = getattr(options, "parent", {}).get("umask") is None
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(0))  # until the reactor runs
    reactor.callWhenRunning(_settle)
    return Sandboxd(
        reactor,
        http,
        proxy,
        options["secret"],
        environ,
        settings=options["settings"],
        guarded=True,
        cgroups=_cgroups(options["cgroup"] or environ.get("SANDBOX_CGROUP")),
        umask=umask if keep_umask else None,
    )


def _cgroups(given: str | None) -> Cgroups | None:
    """
    The cgroup that was given, or the one that systemd has delegated to us, if any.

    :raise SystemExit: if it is none that we can use.
    """
    root = Path(given) if given else delegated()
    try:
        return None if root is None else Cgroups(root)
    except CgroupError as error:
        raise SystemExit(f"twistd sandboxd: SANDBOX_CGROUP (--cgroup): {error}") from None


def _reactor() -> Reactor:
    """The global reactor. Not imported before it is needed: that would choose one before ``twistd --reactor`` can."""
    from twisted.internet import reactor

    return cast(Reactor, reactor)


def _settle() -> None:
    """What this process is told about itself, once it is the daemon: what fork and setuid undo comes after them."""
    become_subreaper()
    prepare_process()
    forbid_inspection()
    _stop_on_sigterm()


def _stop_on_sigterm() -> None:
    """Exit with 0 on SIGTERM; twistd's own handler makes the process die of the signal once it has stopped."""
    reactor = _reactor()

    def stop() -> None:
        if reactor.running:
            reactor.stop()

    signal.signal(signal.SIGTERM, lambda signum, frame: reactor.callFromThread(stop))
