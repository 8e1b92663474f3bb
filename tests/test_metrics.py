"""The daemon in numbers, after traffic that is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from sandboxd.reactor.lag import Histogram
from tests.client import Api
from tests.daemon import SECRET, Daemon
from tests.waiting import Gate


class Scrape:
    """The samples of a scrape."""

    def __init__(self, samples: dict[tuple[str, frozenset[tuple[str, str]]], float]) -> None:
        self._samples = samples

    def __call__(self, name: str, **labels: str) -> float:
        return self._samples[name, frozenset(labels.items())]

    def all(self, name: str) -> dict[frozenset[tuple[str, str]], float]:
        """The values of a name, by labels."""
        return {labels: value for (found, labels), value in self._samples.items() if found == name}


async def scraped(api: Api, parse: Any = parse_text, accept: str = "*/*") -> Scrape:
    """The daemon's metrics, parsed by Prometheus's own client."""
    response = await api.get("/metrics", {"Accept": accept})
    assert response.status == 200, response
    families = list(parse(response.body.decode()))
    assert all(family.documentation for family in families)
    return Scrape({(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples})


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """Where commands of a test wait."""
    gate = Gate(tmp_path)
    yield gate
    gate.close()


@pytest.mark.parametrize("version", ["abc", "", "1.x", "1..0", "9" * 30])
async def test_a_version_of_openmetrics_that_is_none_is_answered_as_text(api: Api, version: str) -> None:
    response = await api.get("/metrics", {"Accept": f"application/openmetrics-text; version={version}"})
    assert response.status == 200
    assert b"sandboxd_build_info" in response.body


async def test_what_was_done_is_counted(start_daemon: Callable[..., Daemon], gate: Gate) -> None:
    daemon = start_daemon("--max-executions=2")
    api = Api(daemon.url, SECRET)
    for _ in range(3):
        await api.run("printf hello")
    await api.run("printf oops >&2; exit 3")
    id = await api.start(f"seq 1000; {gate.wait}")
    assert (await api.post("/run", {"cmd": 1})).status == 400
    assert (await Api(daemon.url, "wrong").get("/list_processes")).status == 401
    assert (await api.get("/nope")).status == 404
    assert (await api.call("BREW", "/run")).status == 405
    assert (await api.get(f"/koyeb-sandbox/processes/{id}")).status == 200
    assert (await api.get("/processes/no-such-id")).status == 404

    busy = await scraped(api)
    assert busy.all("sandboxd_http_requests_total") == {
        frozenset({"method": method, "route": route, "code": code}.items()): number
        for method, route, code, number in [
            ("POST", "/run", "200", 4),
            ("POST", "/run", "400", 1),
            ("POST", "/start_process", "201", 1),
            ("GET", "/processes/<id>", "200", 1),
            ("GET", "/processes/<id>", "404", 1),
            ("", "", "401", 1),
            ("", "", "404", 1),
            ("", "", "405", 1),
        ]
    }
    assert busy("sandboxd_http_request_latency_seconds_count", route="/run") == 5
    assert busy("sandboxd_http_request_latency_seconds_bucket", route="/run", le="+Inf") == 5
    assert 0 < busy("sandboxd_http_request_latency_seconds_sum", route="/run") < 60
    assert busy("sandboxd_executions_running") == 1
    assert busy("sandboxd_executions_started_total", kind="foreground") == 4
    assert busy("sandboxd_executions_started_total", kind="background") == 1
    assert busy("sandboxd_executions_ended_total", status="completed") == 3
    assert busy("sandboxd_executions_ended_total", status="failed") == 1
    assert busy("sandboxd_executions_ended_total", status="killed") == 0
    assert busy("sandboxd_idle_seconds") == 0
    assert busy("sandboxd_ready") == 1
    assert busy("sandboxd_http_requests_open") == 0
    assert busy("process_open_fds") > 5
    assert busy("process_resident_memory_bytes") > 1e6
    assert busy("process_threads") >= 2

    second = await api.start("sleep 300")
    assert (await scraped(api))("sandboxd_ready") == 0
    full = await Api(daemon.url, None).get("/ready")
    assert (full.status, full.json()["ready"]) == (503, False)
    assert full.headers.getRawHeaders("Retry-After")
    await api.post("/kill_process", {"id": second})
    assert (await Api(daemon.url, None).get("/ready")).json() == {"ready": True}

    gate.open()
    await api.post(f"/processes/{id}/wait")
    after, later = await scraped(api), await scraped(api)
    assert after("sandboxd_executions_ended_total", status="completed") == 4
    assert after("sandboxd_executions_ended_total", status="killed") == 1
    assert after("sandboxd_output_bytes_total") == 3 * 5 + 4 + len("".join(f"{n}\n" for n in range(1, 1001)))
    assert 0 < after("sandboxd_idle_seconds") < later("sandboxd_idle_seconds")  # looking is not using
    assert later("sandboxd_http_requests_total", method="GET", route="/metrics", code="200") >= 3
    assert (await api.get("/status")).json()["idle"] > 0
    assert after("sandboxd_reactor_delay_seconds_count") > 0
    assert after("sandboxd_reactor_delay_longest_seconds") >= 0


async def test_a_slow_stream_shows(start_daemon: Callable[..., Daemon]) -> None:
    api = Api(start_daemon().url, SECRET)
    stream = await api.stream("yes 0123456789012345678901234567890123456789")
    stream.pause()

    async def behind() -> Scrape:
        while True:
            found = await scraped(api)
            if found("sandboxd_streams_paused"):
                return found

    found = await behind()
    assert found("sandboxd_streams") == 1
    assert found("sandboxd_stream_lag_records") >= 0
    assert found("sandboxd_http_requests_open") == 1
    assert found("sandboxd_http_connections") >= 2
    stream.close()
    hung_up = {"method": "POST", "route": "/run_streaming", "code": "499"}
    while not (found := await scraped(api)).all("sandboxd_http_requests_total").get(frozenset(hung_up.items())):
        pass
    assert found("sandboxd_streams") == 0
    assert found("sandboxd_http_requests_open") == 0


async def test_a_scraper_may_ask_for_openmetrics(api: Api) -> None:
    found = await scraped(api, parse_openmetrics, "application/openmetrics-text; version=1.0.0; charset=utf-8")
    assert found("sandboxd_ready") == 1


async def test_the_same_comes_as_json(api: Api) -> None:
    metrics = {metric["name"]: metric for metric in (await api.get("/metrics.json")).json()["metrics"]}
    assert metrics["sandboxd_ready"]["samples"] == [{"name": "sandboxd_ready", "labels": {}, "value": 1.0}]
    assert metrics["sandboxd_http_requests"]["type"] == "counter"


@pytest.mark.parametrize("path", ["/metrics", "/metrics.json"])
async def test_metrics_need_the_token(daemon: Daemon, path: str) -> None:
    assert (await Api(daemon.url, None).get(path)).status == 401


def test_a_histogram_counts_at_most() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.0, 1.0, 1.5, 2.0, 2.5):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 2, 1], 7.0)
