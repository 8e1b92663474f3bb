"""``ports``, ``bind`` and ``port-forward``."""

from __future__ import annotations

import click

from sandboxd.ctl.output import as_json, colour, print_json, table
from sandboxd.ctl.session import Session

PORT = click.IntRange(1, 65535)


@click.command()
@as_json
@click.pass_obj
def ports(session: Session, as_json: bool) -> None:
    """List the TCP ports that processes of the sandbox listen on."""
    found = session.sandbox.ports()
    if as_json:
        print_json(found)
    elif found:
        rows = [
            [
                str(each.port),
                ", ".join(each.addresses),
                "" if each.pid is None else str(each.pid),
                "" if each.execution is None else each.execution[:8],
                colour("bound", "green") if each.bound else "",
            ]
            for each in found
        ]
        click.echo(table(["PORT", "ADDRESSES", "PID", "PROCESS", ""], rows, right=(0, 2)))


@click.command()
@click.argument("port", type=PORT, required=False)
@click.option("--none", is_flag=True, help="Forward nothing any more.")
@click.option("--replace", is_flag=True, help="Also if another port is bound.")
@as_json
@click.pass_obj
def bind(session: Session, port: int | None, none: bool, replace: bool, as_json: bool) -> None:
    """Let the sandbox's TCP proxy forward to a port; without one, show which it forwards to."""
    from sandboxd.client import Conflict

    if none:
        session.sandbox.unbind_port()
    elif port is not None:
        if replace:
            session.sandbox.unbind_port()
        try:
            session.sandbox.bind_port(port)
        except Conflict as error:
            if error.fields.get("current_port") != str(port):
                raise click.ClickException(f"{error}: {error.fields.get('current_port')}; give --replace") from None
    status = session.sandbox.port_status()
    if as_json:
        print_json(status)
    elif status.port:
        click.echo(f"The proxy, port {status.proxy_port}, forwards to {status.port}.")
    else:
        click.echo(f"The proxy, port {status.proxy_port}, forwards nothing.")
