"""The composition root: :class:`Sandboxd`, the daemon as one Twisted service, with its start and its ordered stop."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from twisted.application.service import Service
from twisted.internet.defer import Deferred, maybeDeferred
from twisted.internet.interfaces import IListeningPort
from twisted.logger import Logger

from sandboxd import __version__
from sandboxd.api.agent_sandbox import add_agent_sandbox_routes
from sandboxd.api.archive import add_archive_routes
from sandboxd.api.attach import add_attach_route
from sandboxd.api.commands import CommandStarter, add_command_routes
from sandboxd.api.console import add_console_routes
from sandboxd.api.downloads import add_download_routes
from sandboxd.api.executions import add_execution_routes
from sandboxd.api.file_operations import add_file_operation_routes
from sandboxd.api.files import add_file_routes
from sandboxd.api.health import ReadyCheck, add_health_routes
from sandboxd.api.listeners import add_listener_routes
from sandboxd.api.metrics import DiskMeter, Metrics, add_metrics_routes, add_status_route
from sandboxd.api.openapi import add_openapi_route
from sandboxd.api.ports import add_port_routes
from sandboxd.api.preview import Previews, add_preview_route
from sandboxd.api.probe import HttpProbe
from sandboxd.api.processes import add_process_routes
from sandboxd.api.routing import Routes
from sandboxd.api.tunnel import add_tunnel_route
from sandboxd.api.uploads import add_upload_routes
from sandboxd.api.waits import Waits
from sandboxd.api.watch import add_watch_routes
from sandboxd.daemon.sockets import ListeningSocket
from sandboxd.execution.table import ProcessTable
from sandboxd.files.access import Files
from sandboxd.files.filesystem_threads import FilesystemThreads
from sandboxd.files.root import Root
from sandboxd.mcp.commands import CommandTools
from sandboxd.mcp.files import FileTools
from sandboxd.mcp.route import McpServer, add_mcp_route
from sandboxd.processes.cgroup import Cgroups
from sandboxd.processes.companion import Companion, why_not_started
from sandboxd.processes.listeners import ListenerPoll
from sandboxd.proxy.portforward import PortForward, bare_socket
from sandboxd.reactor.interfaces import Reactor
from sandboxd.reactor.lag import LagMeter
from sandboxd.reactor.memory import MemoryTrimmer
from sandboxd.reactor.threads import ThreadPool
from sandboxd.reactor.turn_budget import TurnBudget
from sandboxd.settings import Settings
from sandboxd.watch.watches import Watches
from sandboxd.web.admission import Admission
from sandboxd.web.auth import DaemonAuth
from sandboxd.web.idempotency import IdempotencyStore
from sandboxd.web.site import Site
from sandboxd.web.sse import Streams
from sandboxd.web.tokens import Credentials
from sandboxd.web.websocket import WebSockets

DEFAULTS = Settings()


class Sandboxd(Service):
    """
    The daemon.

    :param http: the sockets of the HTTP API.
    :param proxy: the sockets of the TCP proxy.
    :param credentials: the tokens that it accepts, and their file.
    :param environ: what children inherit, less the daemon's own secrets.
    :param settings: its limits.
    :param reap: whether it reaps all children of this process; only if the process is the daemon's alone.
    :param cgroups: a cgroup that was delegated to this process, if there is one.
    :param umask: the file mode creation mask to set at the start, or None to leave it.
    :param root: where the paths of requests lead; None for anywhere.
    :param log_access: logs a request, given a format and its fields; None for nothing.
    :param open_metrics: whether the metrics need no token.
    :param console: whether the page ``/console/`` is served.
    :ivar exit_code: None until it has stopped in order, or its companion has ended; then what the process exits with.
    """

    log = Logger()

    def __init__(
        self,
        reactor: Reactor,
        http: Sequence[ListeningSocket],
        proxy: Sequence[ListeningSocket],
        credentials: Credentials,
        environ: Mapping[str, str],
        settings: Settings = DEFAULTS,
        reap: bool = False,
        cgroups: Cgroups | None = None,
        umask: int | None = None,
        root: Root | None = None,
        companion: Sequence[str] = (),
        log_access: Callable[..., None] | None = None,
        open_metrics: bool = False,
        console: bool = True,
    ) -> None:
        self._reactor = reactor
        self._companion_argv = companion
        self._companion: Companion | None = None
        self.exit_code: int | None = None
        self._umask = umask
        self._http, self._proxy = http, proxy
        self.proxy_port: int = next((sock.port for sock in proxy if sock.port is not None), 0)
        self._listening: list[IListeningPort] = []
        # Walks over the process table have threads of their own: file operations that hang must not delay a kill.
        self._walk_threads = ThreadPool(reactor, 2, "walks")
        root = root or Root()
        self._file_threads = FilesystemThreads(reactor, root.directory)
        files = Files(root, self._file_threads)
        cached = files.cached_reader()
        self._search_threads = ThreadPool(reactor, 4, "searches")
        self._general_threads = ThreadPool(reactor, 2, "general")
        self.auth = DaemonAuth(credentials, self._general_threads)
        turns = TurnBudget(reactor)
        self.table = ProcessTable(
            reactor,
            environ,
            self._walk_threads,
            turns,
            reap=reap,
            cgroups=cgroups,
            open_directory=cached.open_directory,
            max_live=settings.max_executions,
            keep_count=settings.keep_finished,
            keep_seconds=settings.keep_seconds,
            drain=settings.drain,
        )
        self.forward = PortForward(reactor)
        self.streams = Streams(reactor, turns, settings.max_streams, settings.heartbeat)
        self.lag = LagMeter(reactor)
        self.memory = MemoryTrimmer(reactor, self._general_threads)
        self.watches = Watches(reactor, settings.max_watches, settings.watch_linger)
        self.websockets = WebSockets(reactor, settings.heartbeat)
        self.previews = Previews()
        own_ports = frozenset(sock.port for sock in (*http, *proxy) if sock.port is not None)
        store = IdempotencyStore(reactor)
        starter = CommandStarter(self.table, files, turns, store)
        self.routes = routes = Routes()
        self.site = Site(
            routes.resource(self._general_threads),
            Admission(self.auth, routes.table, settings),
            settings,
            turns,
            reactor,
            log_access=log_access,
        )
        ready = ReadyCheck(reactor, self.table, lambda: bool(self.running and self._listening))
        metrics = Metrics(
            reactor,
            self.table,
            self.streams,
            self.forward,
            self.lag,
            self.site,
            ready.why_not,
            self.websockets,
            self.previews,
            DiskMeter(self._file_threads),
            root.directory or ".",
        )
        add_health_routes(routes, reactor, self.proxy_port, ready)
        add_status_route(
            routes, reactor, self.table, self.streams, self.forward, self.lag, metrics, files.root.directory
        )
        add_command_routes(routes, starter, self.streams)
        add_process_routes(routes, self.table, starter, self.streams)
        poll = ListenerPoll(reactor, self._general_threads)
        probe = HttpProbe(reactor)
        waits = Waits(reactor, turns, poll, probe, self._general_threads)
        add_execution_routes(routes, self.table, waits)
        add_file_routes(routes, files, store)
        add_file_operation_routes(routes, files, self._search_threads)
        add_archive_routes(routes, files)
        add_watch_routes(routes, files, self.streams, self.watches)
        add_download_routes(routes, files)
        add_upload_routes(routes, files)
        add_agent_sandbox_routes(routes, starter, files)
        add_port_routes(routes, self.forward, [sock.port for sock in proxy if sock.port is not None])
        add_listener_routes(routes, reactor, self.table, self.forward, poll, probe, self._general_threads, own_ports)
        add_attach_route(routes, self.table, self.websockets, turns)
        add_tunnel_route(routes, reactor, self.websockets, own_ports)
        add_preview_route(routes, reactor, self.previews, own_ports)
        tools = [
            *CommandTools(reactor, self.table, starter, waits, poll, probe).tools(),
            *FileTools(files, self._search_threads).tools(),
        ]
        add_mcp_route(routes, McpServer(tools), self.streams)
        if console:
            add_console_routes(routes, Path(__file__).with_name("console"))
        add_openapi_route(routes, self._general_threads)
        add_metrics_routes(routes, metrics, self._general_threads, open_metrics)

    def startService(self) -> None:
        """Listen and serve."""
        super().startService()
        if self._umask is not None:
            os.umask(self._umask)
        self._walk_threads.start()
        self._file_threads.start()
        for part in (self.table, self.streams, self.websockets, self.lag, self.memory, self.watches):
            part.startService()
        self._listening += [sock.serve(self._reactor, self.site) for sock in self._http]
        self._listening += [sock.serve(self._reactor, self.forward, bare_socket) for sock in self._proxy]
        if self._companion_argv:
            self._reactor.callWhenRunning(self._start_companion)
        self._reactor.callWhenRunning(self._log_addresses)  # a reader of that line may send signals at once

    def _log_addresses(self) -> None:
        self.log.info(
            "sandboxd {version} listens on {http}, proxy on {proxy}",
            version=__version__,
            http=", ".join(map(str, self._http)),
            proxy=", ".join(map(str, self._proxy)),
        )

    def stopService(self) -> Deferred[None]:
        """
        Stop accepting, end every process, report to each client how its command ended, and close; fires when done.
        """
        super().stopService()
        return Deferred.fromCoroutine(self._stop())

    async def _stop(self) -> None:
        self.log.info("sandboxd stops")
        if self._companion is not None:
            await self._companion.stop()  # first, as it may need the rest
        for port in self._listening:
            await maybeDeferred(port.stopListening)
        for sock in (*self._http, *self._proxy):
            sock.remove()
        await self.table.stopService()
        self.watches.stopService()
        self.streams.stopService()
        await self.websockets.stopService()
        self.lag.stopService()
        self.memory.stopService()
        self.forward.close_all()
        await self.site.close_all()
        self.previews.close()
        for threads in (self._walk_threads, self._file_threads, self._search_threads, self._general_threads):
            threads.stop()
        if self.exit_code is None:
            self.exit_code = 0
        self.log.info("sandboxd has stopped")

    def forward_signal(self, signum: int, *, to_end: bool = False) -> None:
        """
        Pass a signal on to the companion, if it runs.

        :param to_end: whether that signal means the end.
        """
        if self._companion is not None:
            (self._companion.ask_to_end if to_end else self._companion.signal)(signum)

    def _start_companion(self) -> None:
        try:
            self._companion = companion = self.table.start_companion(self._companion_argv)
        except OSError as error:
            self.log.error("cannot run {name}: {why}", name=self._companion_argv[0], why=error.strerror)
            self._end_with(why_not_started(error))
        except Exception:
            self.log.failure("cannot run {name}", name=self._companion_argv[0])
            self._end_with(1)
        else:
            companion.when_ended().addCallback(lambda _: self._end_with(companion.exit_code or 0))

    def _end_with(self, exit_code: int) -> None:
        self.exit_code = exit_code
        if self.running:
            self._reactor.stop()
