"""``/metrics``, ``/metrics.json`` and ``/ready``: for those who watch the daemon. Not in the Go server."""

from __future__ import annotations

from collections.abc import Callable

from sandboxd.api.operations import Raw
from sandboxd.api.routing import Reply, Routes
from sandboxd.metrics import Metrics, as_json, exposed
from sandboxd.replies import MetricsReply, Readiness
from sandboxd.web.request import Request
from sandboxd.reactor.threads import Workers


def add_metrics_routes(
    routes: Routes, metrics: Metrics, why_not_ready: Callable[[], str | None], in_thread: Workers
) -> None:
    """
    Add them to the API.

    :param why_not_ready: why the daemon would not take a command now, or None.
    :param in_thread: runs a blocking function off the reactor's thread.
    """

    @routes.get("/metrics", reply=Raw("text/plain"))
    async def scrape(request: Request) -> None:
        """The daemon's metrics for Prometheus, in its text format or, by ``Accept``, as OpenMetrics."""
        accept = request.text_header(b"Accept") or ""
        body, content_type = await in_thread(exposed, metrics.families(), accept)
        request.setHeader(b"Content-Type", content_type.encode("ascii"))
        request.setHeader(b"Content-Length", b"%d" % len(body))
        request.write(body)

    @routes.get("/metrics.json", reply=MetricsReply)
    async def metrics_json(request: Request) -> Reply:
        """The same metrics as JSON."""
        return Reply(await in_thread(as_json, metrics.families()))

    @routes.get("/ready", reply=Readiness, errors=(503,))
    async def ready(request: Request) -> Reply:
        """
        Whether the daemon would take a command now. Needs no token.

        Answers 503 while it is stopping, and while as many commands run as may.
        """
        why = why_not_ready()
        return Reply({"ready": True}) if why is None else Reply({"ready": False, "error": why}, 503)
