"""The client's one description of the API against the daemon's OpenAPI document, and the clients against each other."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any, cast, get_type_hints

import msgspec
import pytest

from sandboxd.client import AsyncSandbox, Sandbox, replies
from sandboxd.client.operations import OPERATIONS, CommandOptions
from tests.client import Api
from tests.daemon import Daemon

#: Operations that the client does not call, and why.
NOT_CALLED = {
    "POST /write_file": "PUT /files does the same for any bytes, with a real status",
    "POST /delete_file": "DELETE /files",
    "POST /list_dir": "GET /files/list",
    "POST /stat_file": "GET /files/stat",
    "POST /files": "a form, for browsers; PUT /files",
    "GET /metrics": "for Prometheus; GET /metrics.json",
    "GET /console/console.css": "a part of that page",
    "GET /console/console.js": "a part of that page",
    "POST /mcp": "for MCP clients, which speak it themselves",
    "GET /mcp": "for MCP clients, which speak it themselves",
    "DELETE /mcp": "for MCP clients, which speak it themselves",
    "GET /console/": "a page, for browsers",
    "POST /execute": "for agent-sandbox's client; POST /run",
    "POST /upload": "for agent-sandbox's client; PUT /files",
    "GET /download/{path}": "for agent-sandbox's client; GET /files",
    "GET /list/{path}": "for agent-sandbox's client; GET /files/list",
    "GET /exists/{path}": "for agent-sandbox's client; GET /files/stat",
}

#: Any method, any path: for HTTP clients of what runs in the sandbox.
PROXY = "/proxy/"

#: Fields of requests that the client leaves out, by operation, and why.
NOT_SENT = {
    "GET /processes/{id}/attach": {"offset"},  # chosen by the attachment itself, when it connects again
    "PUT /archive": {"max_size", "max_entries", "owner", "parents"},  # bounds are for sources of others
    "GET /archive": {"unreadable", "format"},  # half a tree is no tree; the format follows from compress
    "PUT /files": {"offset", "size"},  # chosen by the upload itself
}


@pytest.fixture(scope="module")
def document(daemon: Daemon) -> Any:
    with Sandbox(daemon.url, daemon.secret) as sandbox:
        return sandbox.openapi()


def operations(document: Any) -> dict[str, Any]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method in ("get", "head", "put", "post", "delete", "patch")
    }


def test_every_operation_is_called_or_named(document: Any) -> None:
    there = {name for name in operations(document) if PROXY not in name}
    assert there - set(OPERATIONS) - set(NOT_CALLED) == set()


def schema_of(document: Any, content: Any) -> list[Any]:
    """The object schemas that a JSON body or an event may have."""
    schema = content["schema"]
    found = []
    for each in schema.get("oneOf", schema.get("anyOf", [schema])):
        if "$ref" in each:
            each = document["components"]["schemas"][each["$ref"].rpartition("/")[2]]
        found.append(each)
    return found


def test_every_field_of_a_reply_is_known(document: Any) -> None:
    missing = {}
    for name, operation in operations(document).items():
        _, reply = OPERATIONS.get(name, (None, None))
        if not isinstance(reply, type) or not issubclass(reply, msgspec.Struct):
            continue
        known = {field.encode_name for field in msgspec.structs.fields(reply)}
        for status, answer in operation["responses"].items():
            content = answer.get("content", {}).get("application/json")
            if status.startswith("2") and content is not None:
                for schema in schema_of(document, content):
                    fields = set(schema.get("properties", {})) - {"error"}
                    if "content" in fields and name == "POST /read_file":
                        continue  # without offset and limit, which the client always sends
                    if fields - known:
                        missing[name] = fields - known
    assert missing == {}


def test_what_the_client_expects_of_a_reply_is_there(document: Any) -> None:
    """A field without a default in the client is one that the document requires."""
    for name, operation in operations(document).items():
        _, reply = OPERATIONS.get(name, (None, None))
        if not isinstance(reply, type) or name == "POST /read_file" or not issubclass(reply, msgspec.Struct):
            continue
        needed = {field.encode_name for field in msgspec.structs.fields(cast(Any, reply)) if field.required}
        for status, answer in operation["responses"].items():
            content = answer.get("content", {}).get("application/json")
            if status.startswith("2") and content is not None:
                first = schema_of(document, content)[0]
                assert needed <= set(first.get("required", [])), name


def accepted(name: str) -> set[str]:
    """What an operation's description takes, by the names of the fields."""
    describe, _ = OPERATIONS[name]
    names = set(inspect.signature(describe).parameters)
    names |= {"from"} if "source" in names else set()
    names |= {"base64"} if name == "POST /files/append" else set()
    names |= {"edits"}
    # Pages, which are followed to the end.
    return names | {"limit", "after"}


COMMANDS = ("POST /run", "POST /run_streaming", "POST /start_process")

#: Fields of their bodies that are not options of the same name.
COMMAND_FIELDS = ("cmd", "argv", "input_base64", "max_output", "detach")


def test_every_field_of_a_command_can_be_given(document: Any) -> None:
    options = set(get_type_hints(CommandOptions))
    for name in COMMANDS:
        (schema,) = schema_of(document, operations(document)[name]["requestBody"]["content"]["application/json"])
        assert set(schema["properties"]) - options - set(COMMAND_FIELDS) == set(), name


def test_every_field_of_a_request_can_be_given(document: Any) -> None:
    missing = {}
    for name, operation in operations(document).items():
        if name in NOT_CALLED or name in COMMANDS or PROXY in name:
            continue
        given = {each["name"] for each in operation.get("parameters", []) if each["in"] == "query"}
        content = operation.get("requestBody", {}).get("content", {}).get("application/json")
        for schema in schema_of(document, content) if content is not None else []:
            given |= set(schema.get("properties", {}))
        left = given - accepted(name) - NOT_SENT.get(name, set())
        if left:
            missing[name] = left
    assert missing == {}


def public(client: type) -> dict[str, Any]:
    return {name: value for name, value in vars(client).items() if not name.startswith("_") and callable(value)}


def test_both_clients_have_the_same_methods() -> None:
    blocking, asynchronous = public(Sandbox), public(AsyncSandbox)
    assert set(blocking) == set(asynchronous)
    for name, method in blocking.items():
        if name != "open_stream":
            ours, theirs = inspect.signature(method), inspect.signature(asynchronous[name])
            assert list(ours.parameters.values())[1:] == list(theirs.parameters.values())[1:], name
            assert method.__doc__, name


def test_names_of_replies_can_be_imported() -> None:
    for _, reply in OPERATIONS.values():
        if isinstance(reply, type):
            assert getattr(replies, reply.__name__) is reply


PROGRAM = """
import sys
for name in ("twisted", "klein", "zope", "prometheus_client", "rich", "click"):
    sys.modules[name] = None
import sandboxd.client
from sandboxd.client import AsyncSandbox, Sandbox
assert "sandboxd.settings" not in sys.modules
import httpx
assert httpx.main
"""


def test_it_needs_nothing_of_the_daemon() -> None:
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, timeout=30)


async def test_the_document_is_that_of_the_daemon(api: Api, document: Any) -> None:
    assert (await api.get("/openapi.json")).json() == document
