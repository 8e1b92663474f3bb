"""The entry point: global options, the commands by name, and the printing of errors."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from typing import Any

import click

from sandboxd.ctl.config import Target
from sandboxd.ctl.session import Session, fail

#: The exit code when sandboxctl itself fails, so that it is not taken for the code of a command: that of docker.
FAILED = 125

#: The commands: the module that each is in, and its summary. A module is imported when its command is called.
COMMANDS = {
    "attach": ("terminal", "Connect to the terminal or the output of a process."),
    "bind": ("ports", "Let the sandbox's TCP proxy forward to a port."),
    "cat": ("files", "Print files."),
    "completion": ("completion", "Print a script that completes commands in a shell."),
    "context": ("contexts", "Keep the addresses of several sandboxes."),
    "cp": ("copying", "Copy files and directories to, from and within the sandbox."),
    "edit": ("files", "Edit a file with your own editor."),
    "health": ("daemon", "Show whether the sandbox answers and takes commands."),
    "kill": ("processes", "End processes and all that they have started."),
    "logs": ("processes", "Print the output of a process."),
    "ls": ("files", "List what is in a directory."),
    "port-forward": ("ports", "Make a port of the sandbox a port of this machine."),
    "ports": ("ports", "List the TCP ports that are listened on."),
    "ps": ("processes", "List the background processes."),
    "run": ("running", "Run a command, with its output and its exit code."),
    "shell": ("terminal", "Open a terminal in the sandbox."),
    "start": ("running", "Start a background process, and print its id."),
    "sync": ("syncing", "Upload what differs between two directories."),
    "top": ("daemon", "Show how the sandbox is doing, live."),
    "wait": ("processes", "Wait until a process has ended; return its exit code."),
}


class Commands(click.Group):
    """A click group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"sandboxd.ctl.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """
        Call the command.

        If nobody reads its output any more, as after head(1) has ended, the exit code is that of SIGPIPE. This is done
        here, as click itself exits with 1.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            # What is still buffered goes nowhere, instead of failing when Python flushes it at its exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            return 128 + signal.SIGPIPE


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="The sandbox is that of --url, of SANDBOX_URL, or of the current context.",
)
@click.option("--url", metavar="URL", help="Where the sandbox's API is. [SANDBOX_URL]")
@click.option("--secret-file", metavar="FILE", help="A file with its secret. [SANDBOX_SECRET is the secret itself]")
@click.option("--context", metavar="NAME", help="The context to use, instead of the current one.")
@click.option("--patience", type=float, default=10.0, metavar="SECONDS", help="How long to try again. Default: 10.")
@click.version_option(package_name="sandboxd", prog_name="sandboxctl")
@click.pass_context
def cli(ctx: click.Context, url: str | None, secret_file: str | None, context: str | None, patience: float) -> None:
    """Run commands, copy files and look at processes in a sandbox."""
    session = ctx.ensure_object(Session)
    session.choose(url, secret_file, context)
    session.patience = patience
    ctx.call_on_close(session.close)


def hint(error: Exception, target: Target) -> str:
    """Return advice for an error, or an empty text."""
    name = type(error).__name__
    where = f" ({target.url}, from {target.origin})"
    return {
        "Unauthorized": f"Check the secret: SANDBOX_SECRET, --secret-file, or that of the context{where}.",
        "ConnectionLost": f"Does it run, and is the address right?{where} Try: sandboxctl health",
        "SandboxGone": f"Does it run, and is the address right?{where} Try: sandboxctl health",
        "ProtocolError": f"Is this the address of a sandbox?{where}",
        "Unavailable": "It is at a limit, starting or stopping; try again later.",
        "NoSpace": "Remove something: sandboxctl run 'df -h'",
    }.get(name, "")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line, and return its exit code."""
    session = Session()
    try:
        code = cli.main(arguments, "sandboxctl", standalone_mode=False, obj=session)
        return code if isinstance(code, int) else 0
    except click.UsageError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        fail(error.format_message())
        return FAILED
    except (KeyboardInterrupt, click.Abort):
        return 130
    except OSError as error:
        fail(str(error))
        return FAILED
    except Exception as error:
        from sandboxd.client.errors import SandboxError

        if not isinstance(error, SandboxError):
            raise
        fail(str(error), hint(error, session.target))
        return FAILED


def script() -> None:
    """Run the command line as the program ``sandboxctl``."""
    sys.exit(main())
