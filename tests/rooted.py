"""A daemon with a root, which the paths of its clients cannot leave."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tests.client import Api
from tests.daemon import Daemon
from tests.waiting import within


class Rooted:
    """
    A daemon with a root.

    :ivar top: the root.
    :ivar outside: a directory beside it, with a file ``secret``.
    """

    def __init__(self, folder: Path) -> None:
        self.top = folder / "top"
        self.outside = folder / "outside"
        for path in (self.top, self.outside, folder / "daemon"):
            path.mkdir()
        (self.outside / "secret").write_text("secret")
        self.daemon = Daemon(folder / "daemon", SANDBOX_ROOT=str(self.top))
        self.api = Api(self.daemon.url, self.daemon.secret)

    async def done(self, route: str, path: Path | str, **fields: object) -> Any:
        response = await within(5, self.api.post(route, {"path": str(path), **fields}))
        assert response.status == 200, response
        return response.json()

    def untouched(self) -> bool:
        """Whether what is outside is as it was."""
        secret = self.outside / "secret"
        return os.listdir(self.outside) == ["secret"] and (secret.read_text(), secret.stat().st_nlink) == ("secret", 1)

    def stop(self) -> None:
        """Stop the daemon, and look at what it leaves."""
        assert self.untouched()
        assert self.daemon.stop() == 0
        assert "Traceback" not in self.daemon.log.read_text()
