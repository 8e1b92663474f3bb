"""The commands ``ports``, ``bind`` and ``port-forward``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import click

from sandboxd.ctl.output import as_json, colour, print_json, table
from sandboxd.ctl.session import Session, fail

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


def pair(text: str) -> tuple[int, int]:
    """
    Return a local port and a remote one.

    :raise UsageError: if they are not port numbers.
    """
    local, given, remote = text.partition(":")
    try:
        found = int(local or 0), int(remote if given else local)
    except ValueError:
        found = -1, -1
    if not (0 <= found[0] <= 65535 and 1 <= found[1] <= 65535):
        raise click.UsageError(f"{text!r} is not LOCAL[:REMOTE]; give 8080, 8080:80, or :80 for any local port")
    return found


@click.command()
@click.argument("ports", metavar="LOCAL[:REMOTE]...", nargs=-1, required=True)
@click.option("-a", "--address", default="127.0.0.1", metavar="ADDRESS", help="Listen here. Default: 127.0.0.1.")
@click.pass_obj
def port_forward(session: Session, ports: tuple[str, ...], address: str) -> None:
    """Make ports of the sandbox ports of this machine, until Ctrl-C."""
    import asyncio

    with suppress(KeyboardInterrupt):
        asyncio.run(_forward(session, [pair(text) for text in ports], address))


async def _forward(session: Session, ports: Sequence[tuple[int, int]], address: str) -> None:
    import asyncio
    from contextlib import AsyncExitStack

    async with AsyncExitStack() as stack:
        sandbox = await stack.enter_async_context(session.asynchronous())
        await sandbox.status()  # a wrong address or secret is reported now, not by the first connection
        for local, remote in ports:
            forward = sandbox.forward_port(remote, local, address)
            forward.on_error = lambda error: fail(str(error))
            await stack.enter_async_context(forward)
            click.echo(f"{address}:{forward.port} -> {remote}")
        await asyncio.Event().wait()
