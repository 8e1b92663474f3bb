"""Writes the reference in ``docs/api.md`` from the daemon's OpenAPI document: ``python -m tests.apidoc``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from tests.daemon import Daemon

PAGE = Path(__file__).parent.parent / "docs" / "api.md"
MARK = "<!-- What follows is made by python -m tests.apidoc. -->\n"

#: The families of routes, in the order of the page.
FAMILIES = {
    "commands": "Commands",
    "processes": "Background processes",
    "executions": "Executions",
    "attach": "",
    "files": "Files as text",
    "downloads": "Files as bytes",
    "uploads": "",
    "file_operations": "File operations",
    "archive": "Archives",
    "watch": "Watching",
    "agent_sandbox": "For agent-sandbox's client",
    "ports": "The proxy",
    "listeners": "Ports of the sandbox",
    "tunnel": "",
    "preview": "",
    "health": "The daemon",
    "metrics": "",
    "openapi": "",
    "console": "",
    "route": "The Model Context Protocol",
}


def described(daemon: Daemon) -> Any:
    """A daemon's OpenAPI document."""
    request = Request(f"{daemon.url}/openapi.json", headers={"Authorization": f"Bearer {daemon.secret}"})
    with build_opener(ProxyHandler({})).open(request) as response:
        return json.load(response)


def type_of(schema: Any) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(type_of, schema["anyOf"])))
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    if "enum" in schema and len(schema["enum"]) <= 8:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {type_of(schema.get('items', {}))}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {type_of(schema['additionalProperties'])}"
    return str(schema.get("type", "anything"))


def about(schema: Any, required: bool) -> str:
    """What else is known of a field."""
    text = schema.get("description", "")
    for choice in schema.get("anyOf", ()):
        text = text or choice.get("description", "")
    default = schema.get("default")
    if default not in (None, "", [], {}):
        text += f" Default: `{json.dumps(default)}`."
    return (text if required else f"Optional. {text}").strip().replace("|", "\\|").replace("\n", " ")


def fields(schema: Any) -> Iterator[str]:
    """A table of an object's fields."""
    if properties := schema.get("properties"):
        yield "| Field | Type | |"
        yield "|---|---|---|"
        required = schema.get("required", ())
        for name, field in properties.items():
            yield f"| `{name}` | {type_of(field)} | {about(field, name in required)} |"
        yield ""


def contents(content: Any) -> Iterator[str]:
    """What a body may be."""
    for kind, media in content.items():
        if "x-events" in media:
            yield "events " + ", ".join(f"`{name}` ({type_of(type)})" for name, type in media["x-events"].items())
        elif kind == "application/json":
            yield type_of(media["schema"])
        else:
            yield f"`{kind}`"


def operation(method: str, path: str, found: Any, spec: Any) -> Iterator[str]:
    """A route."""
    yield f"### `{method} {path}`\n"
    yield f"{found['summary']}\n"
    if "description" in found:
        yield f"{found['description']}\n"
    if parameters := found["parameters"]:
        yield "| Parameter | In | Type | |"
        yield "|---|---|---|---|"
        for each in parameters:
            text = about({**each["schema"], **each}, each.get("required", False))
            yield f"| `{each['name']}` | {each['in']} | {type_of(each['schema'])} | {text} |"
        yield ""
    if body := found.get("requestBody"):
        yield f"Body: {' or '.join(contents(body['content']))}.\n"
    errors = []
    for status, response in found["responses"].items():
        if "$ref" in response:
            errors.append(status)
        else:
            yield f"{status}: {' or '.join(contents(response.get('content', {}))) or 'no body'}.\n"
    yield f"Also: {', '.join(errors)}.\n"


def reference(spec: Any) -> str:
    """All routes, then all types."""
    lines: list[str] = []
    tags = {tag for methods in spec["paths"].values() for found in methods.values() for tag in found["tags"]}
    for family in (*FAMILIES, *sorted(tags - set(FAMILIES))):
        if title := FAMILIES.get(family, family.capitalize()):
            lines.append(f"## {title}\n")
        for path, methods in spec["paths"].items():
            for method, found in methods.items():
                if found["tags"] == [family]:
                    lines += operation(method.upper(), path, found, spec)
    lines.append("## Types\n")
    for name, schema in sorted(spec["components"]["schemas"].items()):
        lines.append(f"### {name}\n")
        if "description" in schema:
            lines.append(f"{schema['description']}\n")
        lines += fields(schema)
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Write the page anew, from the mark on."""
    with tempfile.TemporaryDirectory() as folder:
        daemon = Daemon(Path(folder))
        try:
            spec = described(daemon)
        finally:
            daemon.stop()
    head = PAGE.read_text().partition(MARK)[0]
    PAGE.write_text(head + MARK + "\n" + reference(spec))


if __name__ == "__main__":
    main()
