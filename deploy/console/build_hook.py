"""Gets xterm.js before a package is built, so that the console in it has a terminal."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ConsoleHook(BuildHookInterface):
    """A hook of hatchling, called before each build."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Get it. Where it cannot be had, that is reported, and the package is built without it."""
        subprocess.run([sys.executable, os.path.join(self.root, "deploy", "console", "fetch.py")], check=False)
