"""A daemon on this machine that a program starts for itself."""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import subprocess
import sys
import tempfile
from contextlib import suppress
from threading import Thread, Timer

from sandboxd.client import SandboxGone

#: Seconds until it must listen, and until it must have stopped.
PATIENCE = 20.0

#: Where commands are found. Nothing of this process's environment is passed on: it may hold keys.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

_log = logging.getLogger("sandboxd")


class LocalDaemon:
    """
    A daemon that listens on a free port, and stops when this process ends, however that ends.

    Its commands run as the user that this process runs as: it is no boundary. All blocks.

    :ivar pid: its process id.
    :ivar url: where its API is.
    :ivar secret: its token.
    :ivar directory: a new directory to work in, which is removed at the end.
    :raise SandboxGone: if it does not start.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="sandboxd-", ignore_cleanup_errors=True)
        self.directory = self._folder.name
        if os.geteuid() == 0:
            os.chmod(self.directory, 0o755)  # commands may run as other users
        self.secret = secrets.token_urlsafe(24)
        options = ["--port=0", "--proxy-port=0", "--log-format=json", "--no-console"]
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", "from twisted.scripts.twistd import run; run()", "--nodaemon", "--pidfile="),
                # It ends with the command behind the dashes, which ends with its stdin: when this process is gone.
                *("sandboxd", *options, "--", "cat"),
            ],
            cwd="/",
            env={"PATH": PATH, "HOME": self.directory, "LANG": "C.UTF-8", "SANDBOX_SECRET": self.secret},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # lest Ctrl-C end it before its user has cleaned up
        )
        self.pid = self._process.pid
        try:
            self.url = f"http://127.0.0.1:{self._port()}"
        except BaseException:
            self.stop()
            self._process.stdout.close()  # type: ignore[union-attr]
            raise
        Thread(target=self._pass_on, name="sandboxd-log", daemon=True).start()

    def stop(self) -> None:
        """End the daemon and all that it has started; remove its directory."""
        self._process.terminate()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        self._folder.cleanup()

    def _port(self) -> int:
        """Return the port that it listens on, once it does: its log says so."""
        assert self._process.stdout is not None
        said = []
        timer = Timer(PATIENCE, self._process.kill)
        timer.start()
        try:
            for line in self._process.stdout:
                said.append(line.decode("utf-8", "replace"))
                with suppress(ValueError):
                    found = re.match(r"port (\d+)", str(json.loads(line).get("http")))
                    if found:
                        return int(found[1])
        finally:
            timer.cancel()
        raise SandboxGone("the daemon does not start: " + "".join(said[-20:]).strip())

    def _pass_on(self) -> None:
        """Write its log to that of this process."""
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                _log.debug("%s", line.decode("utf-8", "replace").rstrip())
