"""The session of one command line: the selected sandbox, its clients, and the printing of errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import TYPE_CHECKING

import click

from sandboxd.ctl.config import Target, find_target

if TYPE_CHECKING:
    from sandboxd.client import AsyncSandbox, Sandbox


class Session:
    """
    The global options of a command line, and what is made from them.

    :ivar patience: seconds for which a connection that is lost or refused is tried again.
    """

    def __init__(self) -> None:
        self._options: tuple[str | None, str | None, str | None] = (None, None, None)
        self.patience = 10.0

    def choose(self, url: str | None, secret_file: str | None, context: str | None) -> None:
        """Take the options that select a sandbox."""
        self._options = (url, secret_file, context)

    @cached_property
    def target(self) -> Target:
        """The selected sandbox."""
        return find_target(*self._options)

    @cached_property
    def sandbox(self) -> Sandbox:
        """The blocking client of the sandbox."""
        from sandboxd.client import Sandbox

        with self._bad_values():
            return Sandbox(self.target.url, self.target.secret, patience=self.patience)

    def asynchronous(self) -> AsyncSandbox:
        """Return the asyncio client of the sandbox, for commands that wait for several things at once."""
        from sandboxd.client import AsyncSandbox

        with self._bad_values():
            return AsyncSandbox(self.target.url, self.target.secret, patience=self.patience)

    def close(self) -> None:
        """Close the connections, if there are any."""
        if "sandbox" in vars(self):
            self.sandbox.close()

    @contextmanager
    def _bad_values(self) -> Iterator[None]:
        from sandboxd.client.http import httpx

        try:
            yield
        except (ImportError, httpx.InvalidURL) as error:  # httpx reads the settings of proxies when a client is made
            variables = "ALL_PROXY, HTTP_PROXY, HTTPS_PROXY, NO_PROXY"
            raise click.ClickException(f"a proxy setting ({variables}) cannot be used: {error}") from None
        except ValueError as error:
            raise click.ClickException(f"{error} ({self.target.origin})") from None


def fail(message: str, advice: str = "") -> None:
    """Print an error."""
    with suppress(OSError):
        click.echo(f"sandboxctl: {message}" + (f"\n{advice}" if advice else ""), err=True)
