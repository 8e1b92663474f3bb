"""
The entry point of ``twistd sandboxd``: parse the options, open the sockets, and build the daemon.

The only module that imports the global reactor, and the daemon's only reader of the environment; for ``sandboxctl``,
``ctl/config.py`` reads it.
"""

from __future__ import annotations

import atexit
import errno
import gc
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from twisted.internet.error import ReactorNotRunning
from twisted.logger import ILogObserver, Logger, LogLevel

from sandboxd.daemon import logs
from sandboxd.daemon.hardening import become_subreaper, environment_at_exec, erase, forbid_inspection
from sandboxd.daemon.logs import LogWriter, RotatedFile, to_descriptor
from sandboxd.daemon.reload import Reloads
from sandboxd.daemon.sockets import ListeningSocket, listen_at, listen_on_port
from sandboxd.daemon.systemd import ActivationError, ServiceManager, inherited_sockets
from sandboxd.files.root import Root
from sandboxd.options import ServiceOptions
from sandboxd.processes.cgroup import CgroupError, Cgroups, delegated
from sandboxd.processes.environment import MANAGER
from sandboxd.processes.limits import prepare_process
from sandboxd.reactor.clock import RunningTime
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.polling import replace_poll
from sandboxd.reactor.threads import SWITCH_INTERVAL

if TYPE_CHECKING:  # see _import_service
    from sandboxd.service import Sandboxd

#: Signals that mean something to a companion only.
FORWARDED = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGQUIT, signal.SIGWINCH)


#: Rotated log files, of 1 MB each, that are kept beside the current one.
MAX_ROTATED = 9


class Options(ServiceOptions):
    """The options of ``twistd sandboxd``, with this process's environment."""

    environ = os.environ

    def postOptions(self) -> None:
        """Fill in defaults from the environment; set the log observer of ``twistd``."""
        super().postOptions()
        twistd = getattr(self, "parent", None)
        if twistd is not None and not twistd.get("logger"):
            # twistd takes the name of a function, calls it before any service exists, and passes nothing.
            file = twistd.get("logfile") or ("-" if twistd.get("nodaemon") else "twistd.log")
            _logging.update(options=self, file=file)
            twistd["logger"] = "sandboxd.tap.log_observer"


_logging: dict[str, Any] = {"outlet": None}


def log_observer() -> ILogObserver:
    """Return the observer that writes the log, to the destination that ``twistd`` was given."""
    options, file = _logging["options"], _logging["file"]
    to_stdout = file == "-"
    outlet = LogWriter(to_descriptor(1) if to_stdout else RotatedFile(file, MAX_ROTATED).write)
    _logging["outlet"] = outlet
    return logs.log_observer(
        outlet,
        options["log-level"],
        as_json=options["log-format"] == "json",
        to_journal=to_stdout and _is_journal(os.environ.get("JOURNAL_STREAM", ""), 1),
    )


def _log_in_thread(reactor: Reactor) -> None:
    """Write the log in a thread while the reactor runs. Not before, as a thread would not survive twistd's fork."""
    if (outlet := _logging["outlet"]) is not None:
        outlet.start()
        reactor.addSystemEventTrigger("after", "shutdown", outlet.stop)


def _is_journal(stream: str, fd: int) -> bool:
    """Return whether a descriptor leads to systemd's journal, which ``JOURNAL_STREAM`` identifies (systemd.exec(5))."""
    with suppress(OSError):
        found = os.fstat(fd)
        return stream == f"{found.st_dev}:{found.st_ino}"
    return False


def _log_access(options: Options) -> Callable[..., None] | None:
    """Return the function that logs requests, or None."""
    log = Logger("sandboxd.access")
    if options["access-log"]:
        return log.info
    return log.debug if options["log-level"] == LogLevel.debug else None


def _open_sockets(options: Options) -> tuple[list[ListeningSocket], list[ListeningSocket]]:
    """
    Return the listening sockets of the HTTP API and of the proxy: those that systemd has opened, else those of the
    options.

    Opened before ``twistd`` becomes a daemon, so that the reason of a failure reaches the caller of ``twistd``.

    :raise SystemExit: if one cannot be had.
    """
    try:
        # Twisted takes LISTEN_FDS out of os.environ when its endpoints are imported, in case one of them asks for it.
        given = inherited_sockets(environment_at_exec(), ["http", "proxy"])
    except ActivationError as error:
        raise SystemExit(f"twistd sandboxd: {error}") from None
    except OSError as error:
        raise SystemExit(f"twistd sandboxd: /proc has to be mounted: {error.strerror}: {error.filename}") from None
    http, proxy = (list(map(ListeningSocket, given[name])) for name in ("http", "proxy"))
    if not http:
        path, port = options["socket"], options["port"]
        if path is not None:
            http.append(_listen("SANDBOX_SOCKET", path, lambda: listen_at(Path(path).absolute())))
        if port is not None:
            http.append(_listen("PORT", port, lambda: listen_on_port(port)))
    if not proxy:
        proxy.append(_listen("PROXY_PORT", options["proxy-port"], lambda: listen_on_port(options["proxy-port"])))
    return http, proxy


def _listen(variable: str, value: object, opened: Callable[[], ListeningSocket]) -> ListeningSocket:
    try:
        return opened()
    except OSError as error:
        raise SystemExit(f"twistd sandboxd: cannot listen on {variable} {value}: {error.strerror or error}") from None


def makeService(options: Options) -> Sandboxd:
    """
    Return the daemon, ready to start.

    :raise SystemExit: if a port cannot be had, or the root or the cgroup cannot be used.
    """
    reactor = _reactor()
    _set_clock(reactor)
    replace_poll(reactor)
    sys.setswitchinterval(SWITCH_INTERVAL)
    root = _root(options["root"])
    http, proxy = _open_sockets(options)
    manager = ServiceManager(os.environ, reactor)
    environ = dict(os.environ)
    for name in MANAGER:
        os.environ.pop(name, None)
    credentials = options["credentials"]
    given = () if credentials.path else credentials.tokens
    for secret in {*given, os.environ.pop("SANDBOX_SECRET", "")} - {""}:
        erase(secret)
    umask = os.umask(0)
    os.umask(umask)
    # twistd sets 0077 when it becomes a daemon, which is not what commands and files should get.
    keep_umask = getattr(options, "parent", {}).get("umask") is None
    status = f"serving {', '.join(map(str, http))}; proxy on {', '.join(map(str, proxy))}"
    reloads = Reloads(manager.reloading, lambda: manager.ready(status))
    # Until the reactor runs. Not sys.exit: the reactor would catch that while it starts, and go on.
    signal.signal(signal.SIGTERM, lambda signum, frame: reactor.callWhenRunning(_stop_now))
    signal.signal(signal.SIGHUP, lambda signum, frame: None)  # likewise; what it would read again was just read
    service = _import_service()(
        reactor,
        http,
        proxy,
        credentials,
        environ,
        settings=options["settings"],
        reap=True,
        cgroups=_cgroups(options["cgroup"]),
        umask=umask if keep_umask else None,
        root=root,
        companion=options["companion"],
        log_access=_log_access(options),
        open_metrics=options["open-metrics"],
        console=options["console"],
    )
    if credentials.path is not None:
        reloads.add("the tokens", service.auth.reload)
    # Right behind the reactor's own handlers, which it installs when it starts.
    reactor.addSystemEventTrigger(
        "during", "startup", _handle_signals, service, reloads, accompanied=bool(options["companion"])
    )
    reactor.callWhenRunning(_set_process_attributes)
    reactor.callWhenRunning(manager.ready, status)
    reactor.callWhenRunning(_log_in_thread, reactor)
    reactor.addSystemEventTrigger("before", "shutdown", manager.stopping, "ending what runs")
    atexit.register(_exit, service)
    return service


def _import_service() -> type[Sandboxd]:
    """
    Import :class:`Sandboxd` when it is needed, which ``--help`` does not.

    Nothing of it is ever garbage, but looking for some would take a third of the time. Frozen, it is not looked at
    later either, when each full collection would stop the reactor for as long as that takes.
    """
    gc.disable()
    try:
        from sandboxd.service import Sandboxd
    finally:
        gc.enable()
    gc.freeze()
    return Sandboxd


def _root(directory: str | None) -> Root:
    """
    Return the root that confines the paths of requests.

    :raise SystemExit: if it cannot be used.
    """
    try:
        return Root(directory or None)
    except OSError as error:
        why = "the kernel has no openat2" if error.errno in (errno.ENOSYS, errno.EPERM) else error.strerror
        raise SystemExit(f"twistd sandboxd: SANDBOX_ROOT (--root): {directory!r}: {why}") from None


def _cgroups(given: str | None) -> Cgroups | None:
    """
    Return the cgroup that the options name, or that systemd has delegated to this process; None if there is none.

    :raise SystemExit: if it cannot be used.
    """
    root = Path(given) if given else delegated()
    try:
        return None if root is None else Cgroups(root)
    except CgroupError as error:
        raise SystemExit(f"twistd sandboxd: SANDBOX_CGROUP (--cgroup): {error}") from None


def _reactor() -> Reactor:
    """
    Return the global reactor. It is imported here, as an earlier import would choose one before ``twistd --reactor``
    can.
    """
    from twisted.internet import reactor

    return cast(Reactor, reactor)


def _set_clock(reactor: Reactor) -> None:
    """Set the reactor's clock to one that neither a change of the wall clock nor a pause of the process affects."""
    cast(Any, reactor).seconds = RunningTime()


def _stop_now() -> None:
    with suppress(ReactorNotRunning):  # it stops already
        _reactor().stop()


def _set_process_attributes() -> None:
    """Set subreaper, RLIMIT_NOFILE, non-dumpable; after twistd's fork and setuid, which reset them."""
    become_subreaper()
    prepare_process()
    forbid_inspection()


def _handle_signals(service: Sandboxd, reloads: Reloads, accompanied: bool) -> None:
    """
    Handle SIGTERM by an exit with 0, or with the companion's code; twistd's own handler would let the signal end the
    process.

    Reload on SIGHUP. The companion gets the others.
    """
    reactor = _reactor()

    def stop(signum: int) -> None:
        try:
            service.forward_signal(signum, to_end=True)
        finally:
            with suppress(ReactorNotRunning):  # it stops already
                reactor.stop()

    for signum in (signal.SIGTERM, *([signal.SIGINT] if accompanied else [])):
        signal.signal(signum, lambda signum, frame: reactor.callFromThread(stop, signum))
    signal.signal(signal.SIGHUP, lambda signum, frame: reactor.callFromThread(reloads.run))
    if accompanied:
        for signum in FORWARDED:
            signal.signal(signum, lambda signum, frame: reactor.callFromThread(service.forward_signal, signum))


def _exit(service: Sandboxd) -> None:
    """
    Exit with the service's code, which ``twistd`` has no way to pass on, if the daemon has stopped in order.

    Runs as the last of what is done at the exit, since it was registered before the rest. The interpreter is not
    finalized: threads may be left, as one that hangs in the kernel is not waited for, and Python would end each that
    comes back meanwhile inside the C library, which can abort. What asks the daemon to end is ignored from here on: it
    would turn an orderly exit into a death by signal.
    """
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    if service.exit_code is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(service.exit_code)
