"""
Route ``/openapi.json``: the API as an OpenAPI 3.1 document, made from the routes and the types of their messages.

OpenAPI 3.1 has no schema for event streams; the types of their events are in ``x-events``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from functools import cache
from http import HTTPStatus
from typing import Any

import msgspec

from sandboxd import __version__
from sandboxd.api.operations import Events, Operation, RawBody
from sandboxd.api.routing import Reply, Routes
from sandboxd.messages.decoding import Error, Failure
from sandboxd.reactor.threads import ThreadPool
from sandboxd.web.request import Request
from sandboxd.web.route_table import PREFIX

_REFERENCE = "#/components/schemas/{name}"

_DESCRIPTION = """\
Run commands, keep background processes, read and write files, and expose a port, inside a sandbox.

Bodies are JSON whatever their `Content-Type` says. Unknown fields and parameters are ignored, except in `limits`, where
they are refused; with `Prefer: handling=strict` (RFC 7240) all are refused. Every error is JSON with an `error` for
people. 503 is answered only when no command was executed. Every reply has an `X-Request-Id`: the request's own, or a
new one."""

#: The schemas of headers that are not just text.
_HEADERS = {"Last-Event-ID": {"type": "string", "pattern": "^[0-9]{0,18}$"}}

#: The error statuses of every route.
_ANY_ERROR = (401, 500, 503)


def _parts(body: Any) -> tuple[Any, ...]:
    """Return the alternative types of a body."""
    return body if isinstance(body, tuple) else () if body is None else (body,)


def _types(operation: Operation) -> Iterator[Any]:
    """Return the types whose JSON schemas an operation needs."""
    for part in (*_parts(operation.body), *_parts(operation.reply), *_parts(operation.query)):
        if isinstance(part, Events):
            yield from part.types.values()
        elif not isinstance(part, RawBody):
            yield part


def _path(path: str) -> str:
    """Return a path in OpenAPI's notation."""
    return re.sub("<(?:[a-z]+:)?([a-z]+)>", r"{\1}", path)


class _Writer:
    """
    The writer of a document's operations and of the components that they refer to.

    :param operations: all of them.
    :ivar components: the schemas that they refer to, by name.
    :ivar responses: the responses that they refer to, by name.
    """

    def __init__(self, operations: Iterable[Operation]) -> None:
        types = list({Error, Failure} | {type for operation in operations for type in _types(operation)})
        schemas, self.components = msgspec.json.schema_components(types, ref_template=_REFERENCE)
        self.responses: dict[str, object] = {}
        self._schemas = dict(zip(types, schemas, strict=True))
        for schema in self.components.values():
            if "description" in schema:
                schema["description"] = _prose(schema["description"])

    def operation(self, operation: Operation) -> dict[str, object]:
        """Return the Operation Object of a route."""
        summary, _, description = _prose(inspect.getdoc(operation.route) or "").partition("\n\n")
        statuses = {*_ANY_ERROR, *operation.errors} - ({401} if operation.is_open else set())
        if operation.body is not None:
            statuses |= {400, 413}
        if operation.query is not None:
            statuses.add(400)
        if "<" in operation.path:
            statuses.add(404)
        responses = {
            str(operation.status): {
                "description": HTTPStatus(operation.status).phrase,
                **({} if operation.reply is None else {"content": self._content(operation.reply)}),
            },
            **{str(status): self._other(status, operation.success) for status in sorted(statuses)},
        }
        found: dict[str, object] = {
            "operationId": re.sub("[^a-z]+", "_", f"{operation.method.lower()} {operation.path}").strip("_"),
            "tags": [operation.route.__module__.rpartition(".")[2]],
            "summary": " ".join(summary.split()),
            "parameters": list(self._parameters(operation)),
            "responses": responses,
        }
        if description:
            found["description"] = description
        if operation.body is not None:
            found["requestBody"] = {
                "content": self._content(operation.body),
                "required": isinstance(operation.body, RawBody) or bool(_required(operation.body)),
            }
        if operation.is_open:
            found["security"] = []
        return found

    def _other(self, status: int, success: bool) -> dict[str, object]:
        """Return a reference to the response of a status without a reply of its own."""
        name = f"{status}{'Failure' if success and status >= 400 else ''}"
        content = {"application/json": {"schema": self._schemas[Failure if success else Error]}}
        phrase = {"description": HTTPStatus(status).phrase}
        self.responses[name] = phrase if status < 400 else {**phrase, "content": content}
        return {"$ref": f"#/components/responses/{name}"}

    def _content(self, body: Any) -> dict[str, object]:
        """Return the ``content`` of a body, by media type."""
        content: dict[str, object] = {}
        json = []
        for part in _parts(body):
            if isinstance(part, RawBody):
                content[part.media_type] = {}
            elif isinstance(part, Events):
                events = {name: self._schemas[type] for name, type in part.types.items()}
                content["text/event-stream"] = {"x-events": events}
            else:
                json.append(self._schemas[part])
        if json:
            content["application/json"] = {"schema": json[0] if len(json) == 1 else {"anyOf": json}}
        return content

    def _parameters(self, operation: Operation) -> Iterator[dict[str, object]]:
        for name in re.findall("<(?:[a-z]+:)?([a-z]+)>", operation.path):
            yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in operation.headers:
            yield {"name": name, "in": "header", "schema": _HEADERS.get(name, {"type": "string"})}
        if operation.query is None:
            return
        name = self._schemas[operation.query]["$ref"].rpartition("/")[2]
        schema = self.components[name]
        for name, field in schema["properties"].items():
            field = dict(field)
            if "anyOf" in field:  # a parameter that is null is one that is absent
                field.update(*(choice for choice in field.pop("anyOf") if choice != {"type": "null"}))
            if field.get("default", ...) is None:
                del field["default"]
            description = {"description": field.pop("description")} if "description" in field else {}
            yield {
                "name": name,
                "in": "query",
                **description,
                **({"required": True} if name in schema.get("required", ()) else {}),
                "schema": field,
            }


def _required(type: Any) -> list[str]:
    """Return the names of a struct's required fields."""
    return [field.encode_name for field in msgspec.structs.fields(type) if field.required]


def _prose(docstring: str) -> str:
    """Return a docstring without its field list, with Markdown's code marks."""
    return re.split(r"\n\n?:(?:param|ivar|raise|return)", docstring)[0].strip().replace("``", "`")


def document(operations: Iterable[Operation]) -> dict[str, object]:
    """
    Return the OpenAPI document of the routes.

    :param operations: the descriptions of the routes.
    """
    operations = list(operations)
    writer = _Writer(operations)
    paths: dict[str, dict[str, object]] = {}
    for operation in operations:
        paths.setdefault(_path(operation.path), {})[operation.method.lower()] = writer.operation(operation)
    queries = {operation.query.__name__ for operation in operations if operation.query is not None}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "sandboxd",
            "version": __version__,
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}, {"url": PREFIX.decode("ascii")}],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "responses": writer.responses,
            "schemas": {name: schema for name, schema in writer.components.items() if name not in queries},
        },
    }


def add_openapi_route(routes: Routes, threads: ThreadPool) -> None:
    """
    Add ``GET /openapi.json`` to the API.

    :param threads: makes the document, which takes some tens of milliseconds.
    """

    @cache
    def made() -> dict[str, object]:
        return document(routes.operations)

    @routes.get("/openapi.json", reply=dict, observes=True)
    async def openapi(request: Request) -> Reply:
        """Return this API as an OpenAPI 3.1 document."""
        return Reply(await threads(made))
