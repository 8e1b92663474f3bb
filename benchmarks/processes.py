"""What the kernel knows of a process, and processes of the load side."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


def cpu(pids: Iterable[int]) -> float:
    """Seconds of processor time that processes have used; one that is gone counts nothing."""
    total = 0
    for pid in pids:
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += int(fields[11]) + int(fields[12])
    return total / _TICK


class Others:
    """
    How busy the machine is beside us: what the processes that are not ours use from now on.

    Those that were started here count as ours once they have been waited for.
    """

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._busy = self._not_ours()

    @staticmethod
    def _not_ours() -> float:
        user, nice, system, _, _, irq, softirq, steal = map(int, Path("/proc/stat").read_text().split()[1:9])
        ours = sum(os.times()[:4])
        return (user + nice + system + irq + softirq + steal) / _TICK - ours

    def cores(self) -> float:
        """Processor time per second."""
        return (self._not_ours() - self._busy) / (time.perf_counter() - self._began)


def memory(pid: int, field: str) -> int:
    """
    A field of /proc/PID/status in bytes: VmRSS is what is resident, VmHWM the most that was; or Pss of smaps_rollup, in
    which what is shared is counted by its share.
    """
    file = "smaps_rollup" if field == "Pss" else "status"
    for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise ValueError(f"/proc/{pid}/{file} has no {field}")


def reset_peak(pid: int) -> None:
    """Let VmHWM begin anew, proc_pid_clear_refs(5); not allowed for the process of another user."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def family(pid: int) -> list[int]:
    """A process, and its children that run the same program: those that it keeps, not what it was told to run."""
    program = os.readlink(f"/proc/{pid}/exe")
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(int(child) for child in children if os.readlink(f"/proc/{child}/exe") == program)]


def descendants(pid: int) -> list[int]:
    """A process, its children, theirs, and so on."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(each for child in children for each in descendants(int(child)))]


class Helper:
    """
    A process of the load side, forked off: it calls ``work`` and is killed when the block is left.

    :ivar pid: its id.
    """

    def __init__(self, work: Callable[[], None]) -> None:
        self.pid = os.fork()
        if not self.pid:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            try:
                work()
            except BrokenPipeError:
                pass
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)

    def cpu(self) -> float:
        """Seconds of processor time that it has used."""
        return cpu([self.pid])

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *exc: object) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
