"""The command ``context``: the addresses of several sandboxes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sandboxd.ctl.config import load_contexts, save_contexts
from sandboxd.ctl.output import as_json, colour, print_json, table


@click.group()
def context() -> None:
    """Keep the addresses of several sandboxes, in a file of your own."""


@context.command()
@click.argument("name")
@click.option("--url", required=True, metavar="URL", help="Where the sandbox's API is.")
@click.option("--secret-file", metavar="FILE", help="A file with its secret, which is read each time.")
@click.option("--secret-stdin", is_flag=True, help="Read the secret from standard input, and keep it.")
def add(name: str, url: str, secret_file: str | None, secret_stdin: bool) -> None:
    """Add a context, or replace one; the first one is used from then on."""
    from sandboxd.client.http import check_url

    if secret_file and secret_stdin:
        raise click.UsageError("give --secret-file or --secret-stdin, not both")
    try:
        entry: dict[str, Any] = {"url": check_url(url)}
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if secret_file:
        entry["secret_file"] = str(Path(secret_file).expanduser().absolute())
    elif secret_stdin:
        entry["secret"] = sys.stdin.read().strip()
    contexts = load_contexts()
    contexts["contexts"][name] = entry
    contexts["current"] = contexts["current"] or name
    save_contexts(contexts)


@context.command()
@click.argument("name")
def use(name: str) -> None:
    """Use a context from now on."""
    contexts = load_contexts()
    _check(contexts, name)
    contexts["current"] = name
    save_contexts(contexts)


@context.command()
@click.argument("name")
def remove(name: str) -> None:
    """Forget a context."""
    contexts = load_contexts()
    _check(contexts, name)
    del contexts["contexts"][name]
    if contexts["current"] == name:
        contexts["current"] = None
    save_contexts(contexts)


@context.command("list")
@as_json
def list_contexts(as_json: bool) -> None:
    """List the contexts. Secrets are not shown."""
    contexts = load_contexts()
    found = [
        {"name": name, "url": entry["url"], "current": name == contexts["current"]}
        for name, entry in sorted(contexts["contexts"].items())
    ]
    if as_json:
        print_json(found)
    elif found:
        rows = [
            ["*" if each["current"] else "", colour(each["name"], None, bold=each["current"]), each["url"]]
            for each in found
        ]
        click.echo(table(["", "NAME", "URL"], rows))


def _check(contexts: dict[str, Any], name: str) -> None:
    if name not in contexts["contexts"]:
        known = ", ".join(sorted(contexts["contexts"])) or "none"
        raise click.ClickException(f"there is no context {name!r}; there are: {known}")
