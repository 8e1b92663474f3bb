"""The commands ``health`` and ``top``."""

from __future__ import annotations

from typing import Any

import click

from sandboxd.ctl.output import as_json, colour, print_json, size, table
from sandboxd.ctl.session import Session, fail


@click.command()
@as_json
@click.pass_obj
def health(session: Session, as_json: bool) -> None:
    """Show whether the sandbox answers and takes commands; the exit code is 1 if it does not."""
    from sandboxd.client import SandboxError, Unavailable

    session.patience = 0.0  # what is asked for is how it is now
    try:
        alive = session.sandbox.health()
    except SandboxError as error:
        if as_json:
            print_json({"alive": False, "ready": False, "reason": str(error)})
        else:
            fail(str(error))
        raise click.exceptions.Exit(1) from None
    reason = None
    try:
        session.sandbox.ready()
    except Unavailable as error:
        reason = str(error)
    if as_json:
        found = {"alive": True, "ready": reason is None, "reason": reason}
        print_json({**found, "version": alive.version, "uptime": alive.uptime, "proxy_port": alive.proxy_port})
    else:
        state = colour("ready", "green") if reason is None else colour(f"not ready: {reason}", "red")
        click.echo(f"{session.target.url}: sandboxd {alive.version}, up for {alive.uptime} s, {state}")
    if reason is not None:
        raise click.exceptions.Exit(1)


@click.command()
@click.option("--once", is_flag=True, help="Show it once.")
@as_json
@click.pass_obj
def top(session: Session, once: bool, as_json: bool) -> None:
    """Show how the sandbox is doing, anew each second until Ctrl-C."""
    from sandboxd.ctl.screen import is_terminal, repeat

    picture = Picture(session)
    if as_json:
        print_json(picture.numbers())
    elif once or not is_terminal():
        click.echo(picture.text())
    else:
        repeat(picture.text)


class Picture:
    """A screen of ``top``. Rates are since the screen before."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._before: dict[str, float] = {}

    def numbers(self) -> dict[str, Any]:
        """Return all values of the screen."""
        import msgspec

        values: dict[str, float] = {}
        for metric in self._session.sandbox.metrics():
            for sample in metric.samples:
                values[sample.name] = values.get(sample.name, 0.0) + sample.value
        return {**msgspec.to_builtins(self._session.sandbox.status()), "metrics": values}

    def text(self) -> str:
        """Return the text of the screen."""
        import time

        from sandboxd.ctl.processes import process_table
        from sandboxd.ctl.screen import is_terminal, width

        found = self.numbers()
        values, now = found["metrics"], time.monotonic()
        elapsed = now - self._before["time"] if self._before else 0.0

        def rate(name: str) -> float:
            return (values.get(name, 0.0) - self._before.get(name, 0.0)) / elapsed if elapsed else 0.0

        rows = [
            ["commands", str(found["executions"]), "streams", str(found["streams"])],
            ["requests/s", f"{rate('sandboxd_http_requests_total'):.1f}", "proxied", str(found["proxy_connections"])],
            [
                "cpu",
                f"{rate('process_cpu_seconds_total') * 100:.0f} %",
                "memory",
                size(values.get("process_resident_memory_bytes", 0)),
            ],
            [
                "output",
                f"{size(rate('sandboxd_output_bytes_total'))}/s",
                "sent",
                f"{size(rate('sandboxd_http_sent_bytes_total'))}/s",
            ],
            ["longest stall", f"{found['longest_stall'] * 1000:.0f} ms", "idle", f"{found['idle']:.0f} s"],
        ]
        self._before = {**values, "time": now}
        head = f"{self._session.target.url}: sandboxd {found['version']}, up for {found['uptime']:.0f} s"
        running = [each for each in self._session.sandbox.processes() if each.status == "running"]
        below = process_table(running, width() if is_terminal() else None)
        return f"{colour(head, None, bold=True)}\n\n{table([], rows, right=(1, 3))}\n\n{below}"
