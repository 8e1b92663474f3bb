"""The commands ``shell`` and ``attach``: connect this terminal to a process of the sandbox."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import termios
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import click

from sandboxd.ctl.config import variable
from sandboxd.ctl.processes import Id, full_id
from sandboxd.ctl.running import feed, line, options
from sandboxd.ctl.session import Session, fail

if TYPE_CHECKING:
    from sandboxd.client.async_sockets import AsyncAttachment

#: Bytes that may wait to be sent while the connection is broken, or the process does not read.
TYPED = 1024 * 1024

HELP = b"\r\n~.  leave; the process goes on\r\n~~  send a tilde\r\n~?  this help\r\n"


class Escapes:
    """The parser of escapes in what is typed: a tilde at the beginning of a line, as in ssh(1)."""

    def __init__(self) -> None:
        self._at_start = True
        self._tilde = False
        self.left = False
        self.help = False

    def feed(self, data: bytes) -> bytes:
        """Return the bytes to send. Sets ``left`` if the user leaves, ``help`` if help is asked for."""
        out = bytearray()
        for byte in data:
            if self._tilde:
                self._tilde = False
                if byte == ord("."):
                    self.left = True
                    break
                if byte == ord("?"):
                    self.help = True
                    continue
                out += b"~" if byte == ord("~") else bytes([ord("~"), byte])
            elif self._at_start and byte == ord("~"):
                self._tilde = True
                continue
            else:
                out.append(byte)
            self._at_start = byte in b"\r\n"
        return bytes(out)


@contextmanager
def raw() -> Iterator[None]:
    """Put the terminal into raw mode, and back at the end of the ``with`` statement."""
    before = termios.tcgetattr(0)
    try:
        tty.setraw(0)
        yield
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, before)


class TerminalSession:
    """
    The connection of this terminal to a process.

    :param attachment: the connection.
    :param terminal: whether the process has a terminal; else its output is printed.
    """

    def __init__(self, attachment: AsyncAttachment, terminal: bool) -> None:
        self._attachment = attachment
        self._terminal = terminal
        self._typed = bytearray()
        self._some = asyncio.Event()
        self._escapes = Escapes()
        self._left: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self) -> int | None:
        """
        Return the exit code of the process, or None if the user has left.

        :raise Exception: the error that :meth:`leave` was called with.
        """
        loop = asyncio.get_running_loop()
        tasks = [asyncio.ensure_future(self._output()), self._left]
        if self._terminal:
            tasks.append(asyncio.ensure_future(self._input()))
            loop.add_reader(0, self._read)
            loop.add_signal_handler(signal.SIGWINCH, self._resized)
            await self._resize()
        for signum in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, self.leave)
        try:
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks[:2]:
                if task.done():
                    task.result()
            return self._attachment.exit_code
        finally:
            if self._terminal:
                loop.remove_reader(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def leave(self, error: Exception | None = None) -> None:
        """End :meth:`run`; the process goes on."""
        if self._left.done():
            return
        if error is None:
            self._left.set_result(None)
        else:
            self._left.set_exception(error)

    async def _output(self) -> None:
        from sandboxd.client.attaching import Chunk
        from sandboxd.client.replies import Gap

        async for each in self._attachment:
            if isinstance(each, Chunk):
                stream = (sys.stderr if each.stream == "stderr" else sys.stdout).buffer
                stream.write(each.data)
                stream.flush()
            elif isinstance(each, Gap):
                self._say(f"{each.dropped} lines are no longer kept")
                await self._redraw()
            else:
                self._say("connected again; what was written meanwhile is lost")
                await self._redraw()

    async def _redraw(self) -> None:
        """Have a program that uses the whole screen draw it anew: another size for a moment does that."""
        if self._terminal:
            size = shutil.get_terminal_size()
            await self._attachment.resize(size.columns, max(1, size.lines - 1))
            await self._resize()

    def _say(self, text: str) -> None:
        sys.stderr.write(f"\r\n[sandboxctl: {text}]\r\n" if self._terminal else f"sandboxctl: {text}\n")
        sys.stderr.flush()

    def _read(self) -> None:
        """
        Take what was typed.

        The terminal is always read, as the user may want to leave. What does not fit is dropped, with a bell, as a
        terminal does that has IMAXBEL set.
        """
        try:
            data = os.read(0, 4096)
        except OSError:  # the terminal is gone
            data = b""
        typed = self._escapes.feed(data)
        if self._escapes.help:
            self._escapes.help = False
            os.write(2, HELP)
        if self._escapes.left or not data:
            self.leave()
        if len(self._typed) + len(typed) > TYPED:
            os.write(2, b"\a")
        elif typed:
            self._typed += typed
            self._some.set()

    async def _input(self) -> None:
        from sandboxd.client import SandboxError

        while await self._some.wait():
            self._some.clear()
            data = bytes(self._typed)
            self._typed.clear()
            with suppress(SandboxError):  # typed while the connection was broken
                await self._attachment.write(data)

    def _resized(self) -> None:
        task = asyncio.ensure_future(self._resize())
        task.add_done_callback(lambda task: task.exception())

    async def _resize(self) -> None:
        size = shutil.get_terminal_size()
        await self._attachment.resize(size.columns, size.lines)


async def connect(session: Session, id: str, terminal: bool) -> int | None:
    """Connect this terminal to a process; return its exit code, or None if the user has left."""
    async with session.asynchronous() as sandbox, sandbox.attach(id) as attachment:
        return await TerminalSession(attachment, terminal).run()


async def connect_pipe(session: Session, id: str, close: bool) -> int | None:
    """
    Print a process's output, and pipe standard input to it; return its exit code, or None if the user has left.

    It is read by a thread, as a regular file cannot be waited for, and sent by requests of their own, which are
    answered: what is lost with a broken connection would not be noticed otherwise.

    :param close: whether the end of standard input ends that of the process.
    :raise ClickException: if not all of it could be sent.
    """
    from sandboxd.client import SandboxError

    loop, ended = asyncio.get_running_loop(), threading.Event()
    async with session.asynchronous() as sandbox, sandbox.attach(id) as attachment:
        attached = TerminalSession(attachment, False)

        def failed(error: Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed: the process has ended
                loop.call_soon_threadsafe(attached.leave, error)

        async def begin() -> None:
            try:
                await attachment.connected()  # else the log might drop some of its output before it is read
            except SandboxError as error:
                attached.leave(error)
            else:
                threading.Thread(target=feed, args=(session.sandbox, id, ended, failed, close), daemon=True).start()

        beginning = asyncio.ensure_future(begin())
        try:
            return await attached.run()
        finally:
            ended.set()
            beginning.cancel()


def finish(id: str, code: int | None) -> None:
    """Exit with a process's exit code, or print how to come back."""
    if code is None:
        fail(f"left; to come back: sandboxctl attach {id[:8]}; to end it: sandboxctl kill {id[:8]}")
        raise click.exceptions.Exit(0)
    raise click.exceptions.Exit(code)


@click.command(context_settings={"allow_interspersed_args": False})
@click.argument("cmd", nargs=-1, type=click.UNPROCESSED)
@click.option("-e", "--env", multiple=True, metavar="NAME=VALUE", help="Set a variable; NAME alone: as here.")
@click.option("-C", "--cwd", metavar="DIR", help="Working directory.")
@click.option("-u", "--user", metavar="USER", help="Run it as this user.")
@click.pass_obj
def shell(session: Session, cmd: tuple[str, ...], env: tuple[str, ...], cwd: str | None, user: str | None) -> None:
    """
    Open a terminal in the sandbox: with the user's shell, or with a command.

    A connection that breaks is made again, and the terminal goes on. ~. at the beginning of a line leaves it, ~? lists
    what else there is. The exit code is that of the shell.
    """
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise click.UsageError("shell needs a terminal; try: sandboxctl run")
    given = options(env, cwd, None, user)
    size = shutil.get_terminal_size()
    given["tty"] = {"cols": size.columns, "rows": size.lines, "term": variable("TERM") or "xterm-256color"}
    id = session.sandbox.start(line(cmd) if cmd else None, **given).id
    with raw():
        code = asyncio.run(connect(session, id, True))
    finish(id, code)


@click.command()
@click.argument("id", type=Id())
@click.option("-i", "--stdin", is_flag=True, help="Pipe standard input to it; its terminal gets it in any case.")
@click.pass_obj
def attach(session: Session, id: str, stdin: bool) -> None:
    """
    Connect to a process: to its terminal, or else to its output.

    Its output until now comes first, as far as it is kept. ~. at the beginning of a line leaves a terminal, Ctrl-C
    leaves anything else; the process goes on. The exit code is that of the process.
    """
    found = session.sandbox.process(full_id(session.sandbox, id))
    if found.tty is not None and sys.stdin.isatty():
        with raw():
            code = asyncio.run(connect(session, found.id, True))
    elif stdin:
        code = asyncio.run(connect_pipe(session, found.id, found.tty is None))
    else:
        code = asyncio.run(connect(session, found.id, False))
    finish(found.id, code)
