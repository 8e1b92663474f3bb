"""The configuration of ``sandboxctl``: which sandbox to use, from options, the environment or the user's contexts."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class Target:
    """
    The address of a sandbox, and its token.

    :ivar origin: where the URL is from, for error messages.
    """

    url: str
    secret: str | None
    origin: str


def config_path() -> Path:
    """Return the path of the file that holds the contexts."""
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return Path(base) / "sandboxctl/contexts.json"


def load_contexts() -> dict[str, Any]:
    """
    Return the contexts: ``{"current": name or None, "contexts": {name: {"url", "secret"?, "secret_file"?}}}``.

    :raise ClickException: if the file cannot be read.
    """
    path = config_path()
    try:
        found = json.loads(path.read_text("utf-8"))
        if not isinstance(found["contexts"], dict):
            raise TypeError("contexts is not an object")
    except FileNotFoundError:
        return {"current": None, "contexts": {}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise click.ClickException(f"{path} cannot be read: {error}; mend it, or remove it") from None
    return {"current": found.get("current"), "contexts": found["contexts"]}


def save_contexts(contexts: dict[str, Any]) -> None:
    """Write the contexts atomically, with mode 0600."""
    path = config_path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    new = path.with_suffix(f".{os.getpid()}")
    with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(contexts, file, indent=2)
        file.write("\n")
    os.replace(new, path)


def read_secret(path: str) -> str:
    """
    Return the secret in a file, without white space around it.

    :raise ClickException: if it cannot be read.
    """
    try:
        return Path(path).expanduser().read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"the secret cannot be read: {error}") from None


def find_target(url: str | None, secret_file: str | None, context: str | None) -> Target:
    """
    Return the sandbox that the options, the environment or the contexts select.

    An option wins over the environment, and that over the current context. A secret from the environment is not sent to
    the URL of a context, nor the other way round, unless an option says so.

    :raise ClickException: if none is named.
    """
    if context is None and (url or os.environ.get("SANDBOX_URL")):
        secret = read_secret(secret_file) if secret_file else os.environ.get("SANDBOX_SECRET") or None
        where = "--url" if url else "SANDBOX_URL"
        return Target(url or os.environ["SANDBOX_URL"], secret, where)
    contexts = load_contexts()
    name = context or contexts["current"]
    if name is None:
        raise click.ClickException(
            "which sandbox? Set SANDBOX_URL and SANDBOX_SECRET, or give --url and --secret-file, or make a context:"
            " sandboxctl context add NAME --url URL --secret-file FILE"
        )
    entry = contexts["contexts"].get(name)
    if entry is None:
        known = ", ".join(sorted(contexts["contexts"])) or "none"
        raise click.ClickException(f"there is no context {name!r}; there are: {known}")
    secret_file = secret_file or entry.get("secret_file")
    secret = read_secret(secret_file) if secret_file else entry.get("secret")
    return Target(url or entry["url"], secret, f"context {name}")


def use_colours(is_terminal: bool) -> bool:
    """Return whether to colour the output: on a terminal, unless ``NO_COLOR`` (no-color.org) is set."""
    return is_terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def editor() -> str:
    """Return the command line of the user's editor."""
    return os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"


def variable(name: str) -> str | None:
    """Return the value of an environment variable."""
    return os.environ.get(name)
