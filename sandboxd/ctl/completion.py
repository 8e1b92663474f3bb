"""The command ``completion``, for bash, zsh and fish."""

from __future__ import annotations

import click


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """
    Print a script that completes commands, options and ids in a shell.

    For bash, put this into ~/.bashrc: eval "$(sandboxctl completion bash)"
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "sandboxctl", "_SANDBOXCTL_COMPLETE").source())
