"""The OpenAPI document: valid, complete, and true of what the daemon answers."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from sandboxd.api.openapi import document
from tests import apidoc
from tests.client import Api, Events, Response
from tests.daemon import Daemon

described = cache(apidoc.described)


def at(spec: Any, reference: str) -> Any:
    """What a reference refers to."""
    for name in reference.removeprefix("#/").split("/"):
        spec = spec[name]
    return spec


def template(spec: Any, path: str) -> str:
    """The path of the document that a request's path belongs to."""
    parts = path.partition("?")[0].split("/")
    for found in spec["paths"]:
        names = found.split("/")
        if len(names) == len(parts) and all(
            name == part or name.startswith("{") for name, part in zip(names, parts, strict=True)
        ):
            return str(found)
    raise AssertionError(f"{path} is not in the document")


def conforms(spec: Any, schema: Any, value: Any) -> None:
    """Fails unless ``value`` is what ``schema`` says."""
    Draft202012Validator({**schema, "components": spec["components"]}).validate(value)


def content(spec: Any, method: str, path: str, status: int) -> Any:
    """What the document says of a response's body, by media type."""
    response = spec["paths"][template(spec, path)][method.lower()]["responses"][str(status)]
    return (at(spec, response["$ref"]) if "$ref" in response else response)["content"]


def holds(spec: Any, method: str, path: str, response: Response) -> None:
    """Fails unless a JSON response is as the document says."""
    conforms(spec, content(spec, method, path, response.status)["application/json"]["schema"], response.json())


async def events_hold(spec: Any, method: str, path: str, stream: Events) -> set[str]:
    """Fails unless a stream's events are as the document says; returns their names."""
    assert stream.status == 200
    types = content(spec, method, path, 200)["text/event-stream"]["x-events"]
    events = await stream.all()
    for event in events:
        conforms(spec, types[event.name], event.data)
    return {event.name for event in events}


@pytest.mark.slow
def test_the_document_is_valid(daemon: Daemon) -> None:
    OpenAPIV31SpecValidator(described(daemon)).validate()


def test_an_empty_api_has_a_document_too() -> None:
    OpenAPIV31SpecValidator(document([])).validate()


def test_every_route_says_what_it_does(daemon: Daemon) -> None:
    operations = [
        (f"{method} {path}", operation)
        for path, methods in described(daemon)["paths"].items()
        for method, operation in methods.items()
    ]
    assert len(operations) > 20
    assert [name for name, operation in operations if not operation["summary"]] == []
    silent = [
        name
        for name, operation in operations
        if "content" not in next(iter(operation["responses"].values()))
        and not {"101", "204"} & set(operation["responses"])
    ]
    assert silent == []


def test_every_type_has_a_name_of_its_own(daemon: Daemon) -> None:
    assert [name for name in described(daemon)["components"]["schemas"] if not name.isalnum()] == []


def test_the_reference_has_every_route(daemon: Daemon) -> None:
    paths = described(daemon)["paths"]
    routes = [f"{method.upper()} {path}" for path, methods in paths.items() for method in methods]
    told = re.findall(r"^### `([A-Z]+ /.*)`$", apidoc.PAGE.read_text(), re.M)
    assert sorted(told) == sorted(routes), "run python -m tests.apidoc"


def test_only_health_readiness_and_the_files_of_the_console_are_open(daemon: Daemon) -> None:
    paths = described(daemon)["paths"]
    free = {path for path, methods in paths.items() for operation in methods.values() if "security" in operation}
    assert free == {"/health", "/ready", "/console/"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/status", None, 200),
        ("GET", "/port_status", None, 200),
        ("GET", "/list_processes", None, 200),
        ("POST", "/run", {"cmd": "echo out; echo err >&2"}, 200),
        ("POST", "/run", {"cmd": "exit 3"}, 200),
        ("POST", "/run", {"cmd": "kill $$"}, 200),
        ("POST", "/run", {"cmd": "sleep 300", "timeout": 0.1}, 200),
        ("POST", "/run", {"cmd": "sleep 300", "idle_timeout": 0.1}, 200),
        ("POST", "/run", {"cmd": "seq 1000", "max_output": 10}, 200),
        ("POST", "/run", {}, 400),
        ("POST", "/run", {"cmd": "true", "cwd": "/nope"}, 400),
        ("POST", "/start_process", {"cmd": "true"}, 201),
        ("POST", "/start_process", {"cmd": ""}, 400),
        ("POST", "/kill_process", {"id": "nope"}, 400),
        ("POST", "/kill_process", {}, 400),
        ("GET", "/processes/nope", None, 404),
        ("GET", "/processes/nope/logs", None, 404),
        ("GET", "/processes/nope/logs?after=x", None, 400),
        ("POST", "/processes/nope/signal", {"signal": "TERM"}, 404),
        ("POST", "/processes/nope/wait", {}, 404),
        ("GET", "/process_logs_streaming", None, 400),
        ("POST", "/read_file", {"path": "/etc/hostname"}, 200),
        ("POST", "/read_file", {"path": "/nope"}, 200),
        ("POST", "/write_file", {"path": "/nope/x"}, 200),
        ("POST", "/delete_file", {"path": "/nope/x"}, 200),
        ("POST", "/delete_dir", {"path": "/nope/x"}, 200),
        ("POST", "/delete_dir", {"path": "/"}, 200),
        ("POST", "/list_dir", {"path": "/"}, 200),
        ("POST", "/list_dir", {"path": "/nope"}, 200),
        ("POST", "/stat_file", {"path": "/"}, 200),
        ("POST", "/stat_file", {"path": "/nope"}, 200),
        ("POST", "/stat_file", {"path": ""}, 400),
        ("POST", "/bind_port", {"port": "x"}, 400),
        ("POST", "/unbind_port", {}, 200),
        ("POST", "/execute", {"command": "exit 3"}, 200),
        ("POST", "/execute", {}, 400),
        ("GET", "/list/tmp", None, 404),
        ("GET", "/list/.%2F", None, 200),
        ("GET", "/exists/..%2Fx", None, 403),
        ("GET", "/exists/x", None, 200),
        ("GET", "/download/x", None, 404),
    ],
)
async def test_answers_are_as_the_document_says(
    daemon: Daemon, api: Api, method: str, path: str, body: Any, status: int
) -> None:
    response = await api.call(method, path, body)
    assert response.status == status
    holds(described(daemon), method, path, response)


async def test_so_are_those_of_one_execution(daemon: Daemon, api: Api) -> None:
    spec = described(daemon)
    id = await api.start("cat; kill -9 $$", stdin=True, timeout=60, limits={"nofile": 100})
    for method, path, body in [
        ("GET", f"/processes/{id}", None),
        ("POST", f"/processes/{id}/stdin", b"a line\n"),
        ("POST", f"/processes/{id}/signal", {"signal": "WINCH"}),
        ("POST", f"/processes/{id}/wait", {"timeout": 0}),
        ("GET", f"/processes/{id}/logs", None),
        ("POST", f"/processes/{id}/stdin?close=true", b"x" * 20_000),
        ("POST", f"/processes/{id}/wait", {}),
        ("GET", f"/processes/{id}/logs", None),
        ("GET", "/list_processes", None),
    ]:
        response = await api.call(method, path, body)
        assert response.status == 200, response
        holds(spec, method, path, response)
    conflict = await api.call("POST", f"/processes/{id}/stdin", b"")
    assert conflict.status == 409
    holds(spec, "POST", f"/processes/{id}/stdin", conflict)
    names = await events_hold(spec, "GET", "/process_logs_streaming", await api.logs(id))
    assert names == {"log", "complete"}


@pytest.mark.slow
async def test_so_are_events(daemon: Daemon, api: Api) -> None:
    spec = described(daemon)
    stream = await api.stream("echo out; echo err >&2; head -c 20000 /dev/zero; kill -9 $$")
    assert await events_hold(spec, "POST", "/run_streaming", stream) == {"output", "complete"}
    unknown = await api.logs("nope")
    assert await events_hold(spec, "GET", "/process_logs_streaming", unknown) == {"error"}
    id = await api.start("seq 12000")
    await api.post(f"/processes/{id}/wait")
    gap = await api.logs(id, "&after=1")
    assert await events_hold(spec, "GET", "/process_logs_streaming", gap) == {"gap", "log", "complete"}


async def test_so_is_a_taken_port(daemon: Daemon, api: Api) -> None:
    spec = described(daemon)
    for body, status in [({"port": "9"}, 200), ({"port": 9}, 409)]:
        response = await api.post("/bind_port", body)
        assert response.status == status
        holds(spec, "POST", "/bind_port", response)
    response = await api.post("/unbind_port", {"port": 10})
    assert response.status == 409
    holds(spec, "POST", "/unbind_port", response)
    assert (await api.post("/unbind_port")).status == 200


@pytest.mark.parametrize("path", ["/run", "/processes/x", "/health"])
async def test_trace_is_a_method_like_any_other_that_is_not_allowed(api: Api, path: str) -> None:
    assert (await api.call("TRACE", path)).status == 405
