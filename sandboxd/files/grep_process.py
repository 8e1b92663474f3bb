"""
The process that runs a search, :mod:`sandboxd.files.grep`, and is killed at the search's deadline.

Why no thread: Python's ``re`` holds the interpreter while it matches, and nothing can stop it. Why not grep(1): images
have different ones, and its expressions are not those that clients write. Why not RE2: it has no lookaround and no back
references, and would be one more library in C.
"""

from __future__ import annotations

import json
import os
import select
import stat as modes
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from sandboxd.files.errors import os_errors
from sandboxd.files.grep import Search
from sandboxd.files.patterns import PatternError
from sandboxd.files.root import Root

#: The program of the process. It gets no environment, and needs no site-packages.
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from sandboxd.files.grep import main; main()"

_PACKAGES = str(Path(__file__).parent.parent.parent)

#: Bytes of matches that are taken.
MAX_BYTES = 16 * 1024 * 1024


class GrepProcess:
    """
    One search in a process of its own. :meth:`run` blocks, and is called in a thread; :meth:`stop` does not.

    :param path: a directory, or a file.
    """

    def __init__(self, root: Root, path: str, search: Search) -> None:
        self._root = root
        self._path = path
        self._search = search
        self._child: subprocess.Popen[bytes] | None = None
        self._stopped = False

    def run(self) -> dict[str, object]:
        """
        Run the search, and return its result.

        :return: ``matches``; what of the files was not searched; ``truncated`` if there are more matches than are
            wanted, and ``timed_out`` if the time was over before the end.
        :raise FileError: if there is nothing there to search.
        :raise PatternError: if the pattern is no regular expression.
        """
        with os_errors("open", self._path):
            fd = self._root.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            info = os.fstat(fd)
            with os_errors("search", self._path):
                if not modes.S_ISDIR(info.st_mode) and not modes.S_ISREG(info.st_mode):
                    raise FileExistsError(17, "neither a directory nor a file")
            asked = {
                "search": self._search._asdict(),
                "fd": fd,
                "is_dir": modes.S_ISDIR(info.st_mode),
                "name": os.path.basename(self._path.rstrip("/")),
            }
            command = [sys.executable, "-I", "-S", "-c", _PROGRAM, _PACKAGES]
            with os_errors("search", self._path):
                self._child = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    pass_fds=(fd,),
                    env={},
                    cwd="/",
                    start_new_session=True,
                )
        finally:
            os.close(fd)
        with self._child as child:
            try:
                return self._collect(child, json.dumps(asked).encode("ascii"))
            finally:
                child.kill()

    def stop(self) -> None:
        """Kill the process. A :meth:`run` that is waiting returns; its result is to be ignored."""
        self._stopped = True
        child = self._child
        if child is not None:
            with suppress(OSError):
                child.kill()

    def _collect(self, child: subprocess.Popen[bytes], asked: bytes) -> dict[str, object]:
        deadline = time.monotonic() + self._search.timeout
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        with suppress(BrokenPipeError):
            child.stdin.write(asked)
            child.stdin.close()
        poll = select.poll()
        poll.register(child.stdout, select.POLLIN)
        data = bytearray()
        timed_out = False
        while not self._stopped and len(data) <= MAX_BYTES:
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                timed_out = True
                break
            chunk = os.read(child.stdout.fileno(), 256 * 1024)
            if not chunk:
                break
            data += chunk
        lines = bytes(data).split(b"\n")[:-1]
        found = [json.loads(line) for line in lines]
        if found and "malformed" in found[0]:
            raise PatternError(found[0]["malformed"])
        end = found.pop() if found and "done" in found[-1] else None
        if end is not None:
            return {"matches": found, **end["done"], "truncated": end["truncated"], "timed_out": False}
        if not timed_out and len(data) <= MAX_BYTES and not self._stopped:
            child.kill()
            raise RuntimeError(f"a search has failed: {child.stderr.read(4000).decode('utf-8', 'replace')}")
        return {"matches": found, "truncated": len(data) > MAX_BYTES, "timed_out": timed_out}
