"""What Schemathesis is kept from: nothing that it makes up is executed, and nobody that it makes up is asked for."""

from __future__ import annotations

from typing import Any

import schemathesis

#: What stands for whatever text was made up for a field. Users and directories that are there cannot be made up.
INSTEAD = {"cmd": "true", "user": "root", "cwd": "."}

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


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Send this instead."""
    case.body = tame(case.body)


@schemathesis.serializer("application/x-tar", "application/gzip", "application/zstd")
def archive(context: Any, value: Any) -> Any:
    """A made-up archive is any bytes."""
    return value if isinstance(value, bytes) else str(value).encode()
