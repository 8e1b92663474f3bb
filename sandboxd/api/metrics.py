"""
Routes ``/metrics``, ``/metrics.json`` and ``/status``: the daemon's metrics.

Everything is counted where it happens; here it is only put together, in two steps: what the reactor's objects know is
copied in its thread, and what is made of the copy, or read from ``/proc``, is made in another.
"""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from twisted.internet.interfaces import IReactorTime
from twisted.python.failure import Failure

from sandboxd import __version__
from sandboxd.api.operations import RawBody
from sandboxd.api.preview import Previews
from sandboxd.api.routing import Routes
from sandboxd.execution.table import ProcessTable
from sandboxd.files.errors import FileError
from sandboxd.files.filesystem_threads import FilesystemThreads
from sandboxd.messages import daemon as messages
from sandboxd.messages.daemon import DaemonStatus, MetricsReply
from sandboxd.processes.machine import machine_usage
from sandboxd.proxy.portforward import PortForward
from sandboxd.reactor.lag import Histogram, LagMeter
from sandboxd.reactor.threads import ThreadPool
from sandboxd.web.request import Request
from sandboxd.web.site import Site
from sandboxd.web.sse import Streams
from sandboxd.web.websocket import WebSockets

if TYPE_CHECKING:  # importing it costs more than all the rest of a start
    from prometheus_client.metrics_core import Metric

Labels = tuple[str, ...]


class Family(NamedTuple):
    """
    A metric family: one metric with its values by labels.

    :ivar name: its name, without the ``_total`` of a counter.
    :ivar help: what it counts.
    :ivar kind: ``counter``, ``gauge`` or ``histogram``.
    :ivar labels: the names of its labels.
    :ivar values: its values, by the labels' values.
    """

    name: str
    help: str
    kind: str
    labels: Labels
    values: Mapping[Labels, float | Histogram]


def counter(name: str, help: str, value: float) -> Family:
    """Return a counter, which only grows, without labels."""
    return Family(name, help, "counter", (), {(): value})


def gauge(name: str, help: str, value: float) -> Family:
    """Return a gauge without labels."""
    return Family(name, help, "gauge", (), {(): value})


class DiskMeter:
    """
    The size and the use of the file system that files are kept on.

    It is looked at when it is asked for, and the answer is that of the time before: a file system that hangs must not
    keep the metrics waiting.

    :param threads: call a function in a thread of a path's file system.
    """

    def __init__(self, threads: FilesystemThreads) -> None:
        self._threads = threads
        self._looking = False
        self._last: os.statvfs_result | None = None

    def families(self, directory: str) -> Iterator[Family]:
        """Yield the metrics, unless it is the first time, and look anew."""
        if not self._looking:
            self._looking = True
            self._threads(directory, os.statvfs, directory).addCallbacks(self._looked, self._failed)
        if (last := self._last) is not None:
            size = last.f_frsize
            yield gauge("sandboxd_machine_disk_bytes", "Size of the file system of the files.", last.f_blocks * size)
            used = (last.f_blocks - last.f_bfree) * size
            yield gauge("sandboxd_machine_disk_used_bytes", "Bytes of it that are used.", used)

    def _looked(self, found: os.statvfs_result) -> None:
        self._looking, self._last = False, found

    def _failed(self, failure: Failure) -> None:
        failure.trap(OSError, FileError)
        self._looking, self._last = False, None


class Metrics:
    """
    The metrics of all parts of the daemon.

    :param table: its executions.
    :param streams: its event streams.
    :param forward: its proxy.
    :param lag: measures how long its reactor was kept from its work.
    :param site: its HTTP server.
    :param why_not_ready: why it would not take a command now, or None.
    :param websockets: its WebSockets.
    :param previews: the requests that it forwards.
    :param disk: what of the disk is used.
    :param directory: a directory on that disk.
    """

    def __init__(
        self,
        clock: IReactorTime,
        table: ProcessTable,
        streams: Streams,
        forward: PortForward,
        lag: LagMeter,
        site: Site,
        why_not_ready: Callable[[], str | None],
        websockets: WebSockets,
        previews: Previews,
        disk: DiskMeter,
        directory: str,
    ) -> None:
        self._disk = disk
        self._directory = directory
        self._websockets = websockets
        self._previews = previews
        self._clock = clock
        self._table = table
        self._streams = streams
        self._forward = forward
        self._lag = lag
        self._site = site
        self._why_not_ready = why_not_ready

    async def idle(self) -> float:
        """
        Return the seconds since the last work ended; 0 while there is work.

        Work is a running command, a process that one has left behind, a request with a token, a forwarded connection;
        requests that only look at the daemon are not.
        """
        stats = self._site.stats
        if self._table.live or stats.open or self._forward.connections or await self._table.has_survivors():
            return 0.0
        return max(0.0, self._clock.seconds() - max(stats.last, self._table.last_ended))

    async def families(self) -> list[Family]:
        """Return the current metrics of all parts but those of the process itself. Call in the reactor's thread."""
        idle = await self.idle()
        return [
            Family(
                "sandboxd_build_info",
                "Always 1; the labels tell which daemon this is.",
                "gauge",
                ("version", "python"),
                {(__version__, platform.python_version()): 1.0},
            ),
            gauge("sandboxd_ready", "1 if it would take a command now, else 0.", float(self._why_not_ready() is None)),
            gauge("sandboxd_idle_seconds", "Seconds since it was last used; 0 while anything runs.", idle),
            *self._of_requests(),
            *self._of_executions(),
            *self._of_streams(),
            gauge("sandboxd_proxy_connections", "Clients of the proxy.", len(self._forward.connections)),
            counter("sandboxd_proxy_accepted", "Clients that the proxy has had.", self._forward.accepted),
            counter("sandboxd_proxy_bytes", "Bytes that it has forwarded, both ways.", self._forward.forwarded),
            *self._of_reach(),
            *self._disk.families(self._directory),
            gauge("sandboxd_reactor_delay_longest_seconds", "Longest delay of the reactor.", self._lag.longest),
            Family(
                "sandboxd_reactor_delay_seconds",
                "By how much the reactor was late for a call every 50 ms.",
                "histogram",
                (),
                {(): self._lag.delays.copy()},
            ),
        ]

    def _of_requests(self) -> Iterator[Family]:
        stats = self._site.stats
        yield Family(
            "sandboxd_http_requests",
            "Requests by route and status; 499 if the client hung up. No route: refused before one was asked.",
            "counter",
            ("method", "route", "code"),
            {(answer.method, answer.route, str(answer.code)): number for answer, number in stats.answers.items()},
        )
        yield Family(
            "sandboxd_http_request_latency_seconds",
            "Seconds from the end of a request's headers to the first byte of its answer.",
            "histogram",
            ("route",),
            {(route,): latency.copy() for route, latency in stats.latencies.items()},
        )
        yield gauge(
            "sandboxd_http_requests_open", "Requests that are served; those that only look excepted.", stats.open
        )
        yield gauge("sandboxd_http_connections", "Clients of the HTTP API.", len(self._site.channels))
        yield counter("sandboxd_http_sent_bytes", "Bytes of bodies that were sent.", stats.sent)

    def _of_executions(self) -> Iterator[Family]:
        table = self._table
        yield gauge("sandboxd_executions_running", "Commands that run.", len(table.live))
        yield Family(
            "sandboxd_executions_started",
            "Commands that were started.",
            "counter",
            ("kind",),
            {(kind,): table.started[kind] for kind in ("background", "foreground")},
        )
        yield Family(
            "sandboxd_executions_ended",
            "Commands that have ended, by how; unstarted ones could not be.",
            "counter",
            ("status",),
            {(status,): table.ended[status] for status in ("completed", "failed", "killed", "unstarted")},
        )
        yield counter("sandboxd_output_bytes", "Bytes that commands have written.", table.output_bytes)

    def _of_reach(self) -> Iterator[Family]:
        kinds = ("attach", "tunnel")
        yield Family(
            "sandboxd_websockets",
            "WebSockets that are open: clients attached to processes, and tunnels to ports.",
            "gauge",
            ("kind",),
            {(kind,): self._websockets.count(kind) for kind in kinds},
        )
        yield Family(
            "sandboxd_websockets_opened",
            "WebSockets that were opened.",
            "counter",
            ("kind",),
            {(kind,): self._websockets.opened[kind] for kind in kinds},
        )
        yield gauge("sandboxd_previews", "Requests that are being forwarded to the sandbox.", self._previews.open)
        yield counter("sandboxd_previews_forwarded", "Requests that were forwarded.", self._previews.total)
        pool = self._previews.pool
        yield counter(
            "sandboxd_previews_spliced_bytes",
            "Bytes of theirs that the kernel has moved, without a copy in the daemon.",
            0 if pool is None else pool.moved,
        )

    def _of_streams(self) -> Iterator[Family]:
        lags = [stream.backlog() for stream in self._streams.open_streams]
        yield gauge("sandboxd_streams", "Event streams that are open.", len(lags))
        yield gauge(
            "sandboxd_streams_paused",
            "Those whose client has yet to take what was sent.",
            sum(stream.paused for stream in self._streams.open_streams),
        )
        yield gauge("sandboxd_stream_lag_records", "Records that the slowest is behind.", max(lags, default=0))
        yield counter(
            "sandboxd_stream_dropped_records",
            "Records that were gone when a stream got to them.",
            self._streams.dropped,
        )


def of_machine() -> Iterator[Family]:
    """Yield what of the processors and the memory is used, if the kernel says so. Blocks."""
    try:
        usage = machine_usage()
    except (OSError, ValueError, LookupError):  # as in a sandbox with a kernel of its own
        return
    yield gauge("sandboxd_machine_processors", "Processors of the container or machine.", usage.processors)
    yield counter("sandboxd_machine_processor_seconds", "Seconds that they have worked.", usage.processor_seconds)
    yield gauge("sandboxd_machine_memory_bytes", "Memory of the container or machine.", usage.memory)
    yield gauge("sandboxd_machine_memory_used_bytes", "Bytes of it that are used, caches excepted.", usage.memory_used)


def measured(families: Iterable[Family]) -> Iterator[Metric]:
    """Yield metrics, and those of the process itself, as objects of ``prometheus_client``. Blocks."""
    from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.process_collector import ProcessCollector

    for family in chain(families, of_machine()):
        if family.kind == "histogram":
            histogram = HistogramMetricFamily(family.name, family.help, labels=family.labels)
            for labels, value in family.values.items():
                assert isinstance(value, Histogram)
                histogram.add_metric(labels, _cumulative(value), value.sum)
            yield histogram
            continue
        kind = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
        metric = kind(family.name, family.help, labels=family.labels)
        for labels, value in family.values.items():
            assert not isinstance(value, Histogram)
            metric.add_metric(labels, value)
        yield metric
    yield GaugeMetricFamily("process_threads", "Threads of Python's.", threading.active_count())
    yield from ProcessCollector(registry=None).collect()


def _cumulative(histogram: Histogram) -> list[tuple[str, float]]:
    """Return, for each bound of a histogram, how many values were at most that."""
    total = 0
    found = []
    for bound, number in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += number
        found.append((bound, float(total)))
    return found


def exposed(families: Iterable[Family], accept: str) -> tuple[bytes, str]:
    """
    Return the body that a Prometheus scraper gets, and its media type. Blocks.

    :param accept: the request's ``Accept``, by which Prometheus's text format or OpenMetrics is chosen.
    :return: the body and its type.
    """
    from prometheus_client.exposition import choose_encoder

    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # it compares a version that is not a number
        encode, content_type = choose_encoder("")
    return encode(_Collected(families)), content_type


class _Collected:
    """Metrics with the interface of a Prometheus registry, for its encoders."""

    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """Return all metrics."""
        return measured(self._families)


def as_json(families: Iterable[Family]) -> MetricsReply:
    """Return metrics as a JSON reply. Blocks."""
    return MetricsReply(
        [
            messages.Metric(
                metric.name,
                cast('Literal["counter", "gauge", "histogram"]', metric.type),
                metric.documentation,
                [messages.Sample(sample.name, sample.labels, float(sample.value)) for sample in metric.samples],
            )
            for metric in measured(families)
        ]
    )


def add_metrics_routes(
    routes: Routes,
    metrics: Metrics,
    threads: ThreadPool,
    open_metrics: bool,
) -> None:
    """
    Add ``GET /metrics`` and ``GET /metrics.json`` to the API.

    :param threads: calls a blocking function in a thread.
    :param open_metrics: whether the metrics need no token.
    """

    @routes.get("/metrics", reply=RawBody("text/plain"), open=open_metrics, observes=True)
    async def scrape(request: Request) -> None:
        """Return the daemon's metrics in Prometheus' text format or, if ``Accept`` prefers it, as OpenMetrics."""
        accept = request.text_header(b"Accept") or ""
        body, content_type = await threads(exposed, await metrics.families(), accept)
        request.setHeader(b"Content-Type", content_type.encode("ascii"))
        request.setHeader(b"Content-Length", b"%d" % len(body))
        request.write(body)

    @routes.get("/metrics.json", reply=MetricsReply, open=open_metrics, observes=True)
    async def metrics_json(request: Request) -> MetricsReply:
        """Return the daemon's metrics as JSON."""
        return await threads(as_json, await metrics.families())


def add_status_route(
    routes: Routes,
    clock: IReactorTime,
    table: ProcessTable,
    streams: Streams,
    forward: PortForward,
    lag: LagMeter,
    metrics: Metrics,
    root: str | None,
) -> None:
    """
    Add ``GET /status`` to the API.

    :param root: the directory that file requests are confined to.
    """
    started = clock.seconds()

    @routes.get("/status", reply=DaemonStatus, observes=True)
    async def status(request: Request) -> DaemonStatus:
        """Return the daemon's version, uptime and load."""
        return DaemonStatus(
            version=__version__,
            uptime=round(clock.seconds() - started, 3),
            executions=len(table.live),
            streams=len(streams),
            proxy_connections=len(forward.connections),
            longest_stall=round(lag.longest, 4),
            idle=round(await metrics.idle(), 3),
            marks=table.marks,
            root=root,
        )
