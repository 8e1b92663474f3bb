"""The commands ``ps``, ``logs``, ``wait`` and ``kill``, for background processes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sandboxd.ctl.output import STATES, age, as_json, colour, print_json, printable, table, write_text
from sandboxd.ctl.running import TIMED_OUT, exit_code
from sandboxd.ctl.session import Session, fail

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from sandboxd.client import Sandbox
    from sandboxd.client.replies import Process

#: Characters of an id that are shown; as many as a unique prefix needs, nearly always.
SHORT = 8


class Id(click.ParamType):  # type: ignore[type-arg,unused-ignore]  # generic since click 8.4
    """The click type of a process id, or a prefix of one."""

    name = "id"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the ids of the background processes."""
        from click.shell_completion import CompletionItem

        session = ctx.ensure_object(Session)
        session.patience = 0.0
        try:
            found = session.sandbox.processes()
        except Exception:  # a completion has nobody to show an error to
            return []
        return [CompletionItem(each.id, help=each.command) for each in found if each.id.startswith(incomplete)]


def full_id(sandbox: Sandbox, prefix: str) -> str:
    """
    Return the only id with a prefix.

    :raise ClickException: if no id or more than one has it.
    """
    if len(prefix) == 36:
        return prefix
    found = [process for process in sandbox.processes() if process.id.startswith(prefix)]
    if len(found) == 1:
        return found[0].id
    if not found:
        raise click.ClickException(f"there is no process {prefix!r}; see: sandboxctl ps")
    names = "\n".join(f"  {process.id}  {printable(process.command)}" for process in found)
    raise click.ClickException(f"{prefix!r} may be any of\n{names}\nGive more of the id.")


def process_table(processes: list[Process], width: int | None) -> str:
    """
    Return a table of processes.

    :param width: characters that a line may have; None for any number.
    """
    rows = []
    for each in processes:
        code = "" if each.exit_code is None else str(each.exit_code)
        command = printable(each.command)
        ran = age(each.started_at, each.completed_at)
        rows.append([each.id[:SHORT], str(each.pid), colour(each.status, STATES.get(each.status)), code, ran, command])
    if width is not None:
        room = max(20, width - 45)
        for row in rows:
            row[-1] = row[-1] if len(row[-1]) <= room else row[-1][: room - 1] + "…"
    return table(["ID", "PID", "STATUS", "CODE", "TIME", "COMMAND"], rows, right=(1, 3))


@click.command()
@click.option("-w", "--watch", is_flag=True, help="Show them again each second, until Ctrl-C.")
@click.option("-r", "--running", is_flag=True, help="Only those that run.")
@as_json
@click.pass_obj
def ps(session: Session, watch: bool, running: bool, as_json: bool) -> None:
    """List the background processes, in the order of their start."""
    from sandboxd.ctl.screen import height, is_terminal, repeat, width

    def found() -> list[Process]:
        processes = session.sandbox.processes()
        return [each for each in processes if each.status == "running"] if running else processes

    if as_json:
        print_json(found())
    elif watch:
        # The newest ones, if there are more than fit.
        repeat(lambda: process_table(found()[-height() + 2 :], width()) or "There are no processes.")
    else:
        text = process_table(found(), width() if is_terminal() else None)
        if text:
            click.echo(text)


@click.command()
@click.argument("id", type=Id())
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until the process has ended.")
@click.option("-n", "--tail", type=click.IntRange(min=0), metavar="N", help="Only the last N lines, and new ones.")
@click.option("-t", "--timestamps", is_flag=True, help="Show when each line came.")
@as_json
@click.pass_obj
def logs(session: Session, id: str, follow: bool, tail: int | None, timestamps: bool, as_json: bool) -> None:
    """
    Print the output of a process: stdout to stdout, stderr to stderr.

    With -f, a connection that breaks is resumed without a lost or doubled line.
    """
    import json

    import msgspec

    from sandboxd.client.replies import Gap

    sandbox = session.sandbox
    id = full_id(sandbox, id)
    continues = {"stdout": False, "stderr": False}
    with sandbox.logs(id, tail=tail, follow=follow) as records:
        for record in records:
            if as_json:
                click.echo(json.dumps(msgspec.to_builtins(record)))
            elif isinstance(record, Gap):
                fail(f"{record.dropped} lines are no longer kept")
            else:
                stamp = f"{record.timestamp} " if timestamps and not continues[record.stream] else ""
                write_text(stamp + record.text, error=record.stream == "stderr")
                continues[record.stream] = record.partial


@click.command()
@click.argument("id", type=Id())
@click.option("-t", "--timeout", type=float, metavar="SECONDS", help="Give up after so long, with exit code 124.")
@as_json
@click.pass_obj
def wait(session: Session, id: str, timeout: float | None, as_json: bool) -> None:
    """Wait until a process has ended; the exit code is its own."""
    from sandboxd.client.replies import Complete

    found = session.sandbox.wait(full_id(session.sandbox, id), timeout)
    if as_json:
        print_json(found)
    if found.exit_code is None:
        raise click.exceptions.Exit(TIMED_OUT)
    code = found.exit_code
    end = Complete(code=code, error=code != 0, signal=found.signal, timed_out=found.timed_out)
    raise click.exceptions.Exit(exit_code(end))


@click.command()
@click.argument("ids", nargs=-1, required=True, type=Id())
@click.option("-s", "--signal", metavar="SIGNAL", help="What is sent first, such as TERM. Default: KILL.")
@click.option("-g", "--grace", type=float, metavar="SECONDS", help="Time until KILL follows another signal.")
@click.pass_obj
def kill(session: Session, ids: tuple[str, ...], signal: str | None, grace: float | None) -> None:
    """End processes and all that they have started; return when they are gone."""
    for id in [full_id(session.sandbox, each) for each in ids]:
        session.sandbox.kill(id, signal, grace)
        click.echo(id)
