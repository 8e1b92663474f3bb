"""A text on the terminal that is shown again and again, such as that of ``top``."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable

#: Seconds between two pictures.
INTERVAL = 1.0


def is_terminal() -> bool:
    """Return whether standard output is a terminal."""
    return sys.stdout.isatty()


def width() -> int:
    """Return the width of the terminal, in characters."""
    return shutil.get_terminal_size().columns


def height() -> int:
    """Return the height of the terminal, in lines."""
    return shutil.get_terminal_size().lines


def repeat(picture: Callable[[], str], interval: float = INTERVAL) -> None:
    """
    Show a text, made again every ``interval`` seconds, until Ctrl-C.

    On a terminal it takes the place of the one before, line by line, so that nothing flickers; lines that do not fit
    are left out. Elsewhere each is printed below the one before.
    """
    terminal = is_terminal()
    try:
        if terminal:
            sys.stdout.write("\x1b[?1049h\x1b[?25l")  # the alternate screen, without a cursor
        while True:
            text = picture()
            if terminal:
                lines = text.splitlines()[: height() - 1]
                text = "\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in lines) + "\x1b[J"
                sys.stdout.write(text)
            else:
                sys.stdout.write(text + "\n\n")
            sys.stdout.flush()
            time.sleep(interval)
    except KeyboardInterrupt:
        pass
    finally:
        if terminal:
            sys.stdout.write("\x1b[?25h\x1b[?1049l")
            sys.stdout.flush()
