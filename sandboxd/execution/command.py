"""What is to be run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Command:
    """
    A shell command and its surroundings, already checked.

    :ivar cmd: the text that ``sh -c`` is given; may be empty.
    :ivar cwd: the working directory, or None for the daemon's own.
    :ivar env: variables merged over the base environment.
    :ivar timeout: seconds that the command may live, or None for ever.
    """

    cmd: str
    cwd: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
    timeout: float | None = None
