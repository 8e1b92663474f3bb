"""What Schemathesis is kept from: nothing that it makes up is executed, and nobody that it makes up is asked for."""

from __future__ import annotations

from typing import Any

import schemathesis

#: What stands for whatever text was made up for a field. Users and directories that are there cannot be made up.
INSTEAD = {"cmd": "true", "command": "true", "user": "root", "cwd": ".", "shell": "/bin/sh", "input_base64": "YQ=="}

#: Limits that need a cgroup, or under which nothing can start.
LIMITS = "limits"


def tame(value: Any) -> Any:
    """A body in which every command is ``true``."""
    if isinstance(value, dict):
        return {
            key: INSTEAD[key] if key in INSTEAD and isinstance(item, str) else tame(item)
            for key, item in value.items()
            if not (key == LIMITS and isinstance(item, dict))
        }
    if isinstance(value, float) and value.is_integer():  # an integer to JSON Schema
        return int(value)
    return [tame(item) for item in value] if isinstance(value, list) else value


def fitting(body: Any) -> Any:
    """A body of a command without the fields that do not go together, each of which is right by itself."""
    if not isinstance(body, dict):
        return body
    if isinstance(body.get("argv"), list) and all(isinstance(item, str) for item in body["argv"]) and body["argv"]:
        body["argv"] = ["true"]
        if isinstance(body.get("cmd"), str):
            del body["argv"]
        else:
            for field, type in (("shell", str), ("login", bool)):
                if isinstance(body.get(field), type):
                    del body[field]
    if isinstance(body.get("user"), int) and not isinstance(body["user"], bool) and body["user"] >= 0:
        body["user"] = 0
    if isinstance(body.get("input"), str) and isinstance(body.get("input_base64"), str):
        del body["input_base64"]
    return body


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Send this instead."""
    case.body = fitting(tame(case.body))
    if case.path == "/execute" and isinstance(case.body, dict):
        timeout = case.body.get("timeout_seconds")
        if isinstance(timeout, (int, float)) and 0 < timeout < 1:
            case.body["timeout_seconds"] = 1  # else it may be over before the command has started, which is 503
    if case.path.endswith("/wait") and isinstance(case.body, dict):
        timeout = case.body.get("timeout")
        if timeout is None or (isinstance(timeout, (int, float)) and timeout > 0):
            case.body["timeout"] = 0.05  # what was made up would be waited for for ever


@schemathesis.serializer("application/x-tar", "application/gzip", "application/zstd")
def archive(context: Any, value: Any) -> Any:
    """A made-up archive is any bytes."""
    return value if isinstance(value, bytes) else str(value).encode()
