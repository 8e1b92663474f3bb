"""
Limits of a whole process tree: a cgroup (version 2) for each command that asks for them.

The daemon needs a cgroup that was delegated to it, as by systemd's ``Delegate=yes``. It moves itself into a leaf of
it, since a cgroup with processes cannot enable controllers for its children ("No Internal Process Constraint" in the
kernel's admin-guide/cgroup-v2).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

#: The controller of each limit of a tree.
CONTROLLERS = {"memory": "memory", "pids": "pids", "cpus": "cpu"}

#: Microseconds of one period of ``cpu.max``.
_CPU_PERIOD = 100_000


class CgroupError(Exception):
    """A cgroup could not be made or set up."""


class Cgroup:
    """
    The cgroup of one command.

    :ivar path: its directory.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def join(self, pid: int) -> None:
        """
        Move a process into the cgroup.

        :raise OSError: if that cannot be done.
        """
        (self.path / "cgroup.procs").write_text(str(pid))

    def kill(self) -> None:
        """Kill all processes in the cgroup."""
        with suppress(OSError):
            (self.path / "cgroup.kill").write_text("1")

    @property
    def oom_killed(self) -> bool:
        """Whether the kernel has killed a process in the cgroup for lack of memory."""
        try:
            events = (self.path / "memory.events").read_text()
        except OSError:
            return False
        return re.search(r"^oom_kill [1-9]", events, re.MULTILINE) is not None

    def remove(self) -> bool:
        """Remove the cgroup; return False while a process is in it."""
        try:
            self.path.rmdir()
        except FileNotFoundError:
            pass
        except OSError:
            return False
        return True


class Cgroups:
    """
    The maker of commands' cgroups, in the one that was delegated to the daemon.

    :param root: the directory of a cgroup (version 2) that was delegated to this process.
    :raise CgroupError: if it is not.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._retired: list[Cgroup] = []
        own = root / "sandboxd"
        try:
            own.mkdir(exist_ok=True)
            (own / "cgroup.procs").write_text(str(os.getpid()))
            available = (root / "cgroup.controllers").read_text().split()
            for controller in CONTROLLERS.values():
                if controller in available:
                    (root / "cgroup.subtree_control").write_text(f"+{controller}")
            self.controllers = frozenset((root / "cgroup.subtree_control").read_text().split())
        except OSError as error:
            raise CgroupError(f"{root}: {error.strerror}") from None

    def retire(self, cgroup: Cgroup) -> None:
        """Remove the cgroup of a command that has ended, once the last process has left it."""
        if not cgroup.remove():
            self._retired.append(cgroup)

    def remove_retired(self) -> None:
        """Remove the retired cgroups that have become empty."""
        self._retired = [cgroup for cgroup in self._retired if not cgroup.remove()]

    def make(self, name: str, limits: Mapping[str, float]) -> Cgroup:
        """
        Make a cgroup. Blocks.

        :param limits: ``memory`` in bytes, ``pids`` as a count, ``cpus`` as a number of processors.
        :raise CgroupError: if a limit cannot be set.
        """
        for limit in limits:
            if CONTROLLERS[limit] not in self.controllers:
                raise CgroupError(f"limits.{limit}: the daemon's cgroup has no {CONTROLLERS[limit]} controller")
        cgroup = Cgroup(self._root / name)
        try:
            cgroup.path.mkdir()
            for file, text in _settings(limits):
                if (cgroup.path / file).exists():  # memory.swap.max is not, where swap is not accounted for
                    (cgroup.path / file).write_text(text)
        except OSError as error:
            cgroup.remove()
            raise CgroupError(f"limits: the cgroup could not be set up: {error.strerror}") from None
        return cgroup


def _settings(limits: Mapping[str, float]) -> list[tuple[str, str]]:
    """Return the files of a cgroup to write, with the text for each."""
    settings: list[tuple[str, str]] = []
    if "memory" in limits:
        # memory.oom.group: the tree dies as a whole, so that "oom_killed" holds for all of it.
        settings += [("memory.max", str(int(limits["memory"]))), ("memory.swap.max", "0"), ("memory.oom.group", "1")]
    if "pids" in limits:
        settings.append(("pids.max", str(int(limits["pids"]))))
    if "cpus" in limits:
        settings.append(("cpu.max", f"{max(int(limits['cpus'] * _CPU_PERIOD), 1000)} {_CPU_PERIOD}"))
    return settings


def delegated() -> Path | None:
    """Return the cgroup of this process if systemd has delegated it, or None."""
    try:
        own = re.search(r"^0::(/.*)$", Path("/proc/self/cgroup").read_text(), re.MULTILINE)
        mount = re.search(
            r"^\d+ \d+ \S+ (\S+) (\S+) .* - cgroup2 ", Path("/proc/self/mountinfo").read_text(), re.MULTILINE
        )
    except OSError:
        return None
    if own is None or mount is None:
        return None
    root = Path(mount[2]) / own[1].removeprefix(mount[1]).lstrip("/")
    for name in ("user.delegate", "trusted.delegate"):  # systemd.exec(5) marks the cgroup so
        with suppress(OSError):
            if os.getxattr(root, name) == b"1":
                return root
    return None
