"""What the tests are done in: a Debian or Ubuntu made from this machine's own package mirror, containers, a machine."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECRET = "a-secret-for-system-tests-77"

#: The Debian package of each program that is needed.
PACKAGES = {
    "debootstrap": "debootstrap",
    "podman": "podman",
    "runc": "runc",
    "iptables": "iptables",
    "busybox": "busybox-static",
    "systemd-nspawn": "systemd-container",
    "systemd-analyze": "systemd",
}

HYBRID = ("/sys/fs/cgroup/unified", "/sys/fs/cgroup/systemd")

T = TypeVar("T")


def need(*programs: str) -> None:
    """Skip, naming what has to be installed; in CI, fail."""
    missing = [PACKAGES[program] for program in programs if shutil.which(program) is None]
    if "busybox" in programs and not missing and run("ldd", shutil.which("busybox") or "", check=False).returncode == 0:
        missing.append("busybox-static")  # and not the one that needs the C library
    if "podman" in programs and not any(
        Path(p, "netavark").exists() for p in ("/usr/lib/podman", "/usr/libexec/podman")
    ):
        missing.append("netavark")
    why = f"needs: apt-get install {' '.join(missing)}" if missing else "needs root" if os.geteuid() != 0 else None
    if why is not None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"NOT TESTED, {why}")


#: A program that has ended.
Ended: TypeAlias = "subprocess.CompletedProcess[str]"


def run(*argv: str | Path, check: bool = True, seconds: float = 60, **keywords: Any) -> Ended:
    """Run a program; its output is shown if it fails."""
    ended = subprocess.run(
        list(map(str, argv)), capture_output=True, text=True, check=False, timeout=seconds, **keywords
    )
    if check and ended.returncode != 0:
        raise AssertionError(f"{argv} exited with {ended.returncode}:\n{ended.stdout[-4000:]}\n{ended.stderr[-4000:]}")
    return ended


def until(fact: Callable[[], T], seconds: float = 20) -> T:
    """The first true value of ``fact()``, for facts that no event tells of. Fails after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not (value := fact()):
        assert time.monotonic() < deadline, f"still {value!r} after {seconds} s"
        time.sleep(0.1)
    return value


def cache() -> Path:
    """Where what takes long to make is kept between runs."""
    given = os.environ.get("SANDBOXD_TEST_CACHE")
    folder = Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sandboxd-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def mirror() -> tuple[str, str]:
    """The package mirror and the release that this machine was installed from."""
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    for file in (*sorted(Path("/etc/apt").glob("sources.list.d/*")), Path("/etc/apt/sources.list")):
        found = file.exists() and re.search(r"^(?:URIs:|deb(?: \[.*?\])?)\s+(http\S+)", file.read_text(), re.M)
        if found:
            return found[1], release["VERSION_CODENAME"].strip('"')
    raise AssertionError("no package mirror in /etc/apt")


def ca_bundle() -> Path | None:
    """The certificates that this machine trusts: pip inside of a build may need them."""
    given = os.environ.get("SANDBOXD_TEST_CA") or ssl.get_default_verify_paths().cafile
    return Path(given) if given and Path(given).exists() else None


def made_once(name: str, make: Callable[[Path], None]) -> Path:
    """A directory that is made if it is not in the cache."""
    folder = cache() / name
    if not folder.exists():
        part = cache() / f"{name}.{os.getpid()}.part"
        try:
            make(part)
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def base_system() -> Path:
    """A minimal system, without Python."""
    need("debootstrap")
    url, release = mirror()

    def make(folder: Path) -> None:
        run("debootstrap", "--variant=minbase", release, folder, url, seconds=600)
        for leftover in (*folder.glob("var/cache/apt/archives/*.deb"), *folder.glob("var/lib/apt/lists/*_*")):
            leftover.unlink()

    return made_once(f"base-{release}", make)


def booting_system() -> Path:
    """A system with systemd and Python."""
    base = base_system()
    packages = "systemd systemd-sysv dbus python3 python3-venv ca-certificates make curl procps"

    def make(folder: Path) -> None:
        run("cp", "-a", base, folder)
        for name in ("resolv.conf", "hosts"):
            shutil.copy(f"/etc/{name}", folder / "etc" / name)
        install = f"apt-get update -q && apt-get install -yq --no-install-recommends {packages} && apt-get clean"
        inside(folder, "sh", "-c", install, seconds=600)

    return made_once(f"booting-{base.name}", make)


def inside(folder: Path, *argv: str, seconds: float = 60) -> None:
    """Run a program with ``folder`` as its root."""
    env = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
    run("chroot", folder, *argv, env=env, seconds=seconds)


class Podman:
    """
    Containers with a storage of their own, which is kept in the cache for its layers.

    :param folder: for what is not kept.
    """

    def __init__(self, folder: Path) -> None:
        need("podman", "runc", "iptables")
        files, processes = (
            min(resource.getrlimit(limit)[1] % (1 << 63), 20_000)
            for limit in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC)
        )
        config = folder / "containers.conf"
        config.write_text(
            f'[containers]\ndefault_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n'
            '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        )
        self._env = {**os.environ, "CONTAINERS_CONF": str(config)}
        self._storage = ["--root", str(cache() / "containers"), "--runroot", str(cache() / "run")]
        self._mounts: list[str] = []
        if (bundle := ca_bundle()) is not None:
            (folder / "pip.conf").write_text("[global]\ncert = /run/ca-bundle.crt\n")
            self._mounts = ["-v", f"{bundle}:/run/ca-bundle.crt:ro", "-v", f"{folder}/pip.conf:/etc/pip.conf:ro"]

    def __call__(self, *argv: str | Path, check: bool = True, seconds: float = 60, **keywords: Any) -> Ended:
        """Run ``podman``."""
        return run("podman", *self._storage, *argv, check=check, seconds=seconds, env=self._env, **keywords)

    def import_base(self, folder: Path, tag: str) -> None:
        """Make an image of a directory, unless there is one."""
        if self("image", "exists", tag, check=False).returncode != 0:
            with subprocess.Popen(["tar", "-C", str(folder), "-c", "."], stdout=subprocess.PIPE) as tar:
                self("import", "-q", "-c", 'CMD ["/bin/bash"]', "-", tag, stdin=tar.stdout, seconds=300)

    def build(self, context: Path, tag: str, *options: str) -> str:
        """Build an image as the Dockerfile says; return its name."""
        # The format of Docker, since the other one has no HEALTHCHECK.
        options = ("--pull=never", "--network=host", "--format=docker", *self._mounts, *options)
        self("build", "-q", *options, "-t", tag, context, seconds=900)
        return tag

    def inspect(self, name: str) -> Any:
        """What is known of an image or container."""
        return json.loads(self("inspect", name).stdout)[0]


class Container:
    """
    A container of ``image`` that runs in the background, with both ports published on loopback.

    :param options: those of ``podman run``.
    :param command: what follows the image's name.
    """

    def __init__(self, podman: Podman, image: str, *options: str, command: Sequence[str] = ()) -> None:
        self._podman = podman
        self.id = podman(
            "run", "-d", "-p", "127.0.0.1::3030", "-p", "127.0.0.1::3031", "-e", f"SANDBOX_SECRET={SECRET}",
            *options, image, *command,
        ).stdout.strip()  # fmt: skip

    def port(self, inner: int) -> int:
        """Where a port of it is published."""
        return int(self._podman("port", self.id, str(inner)).stdout.rpartition(":")[2])

    def exec(self, *argv: str) -> str:
        """Run a program in it."""
        return self._podman("exec", self.id, *argv).stdout

    @property
    def log(self) -> str:
        """All that it has written."""
        ended = self._podman("logs", self.id)
        return ended.stdout + ended.stderr

    def kill(self, signum: signal.Signals) -> None:
        """Signal its first process."""
        self._podman("kill", "-s", signum.name, self.id)

    def exit_code(self) -> int:
        """What it exits with, once it has."""
        return int(self._podman("wait", self.id).stdout)

    def stop(self) -> int:
        """Stop it as ``docker stop`` does; return its exit code."""
        self._podman("stop", "-t", "20", self.id)
        return self.exit_code()

    def remove(self) -> None:
        self._podman("rm", "-f", "-t", "0", self.id)


class Machine:
    """
    A booted system with systemd as its first process and a network of its own.

    :param folder: its root file system.
    """

    def __init__(self, folder: Path, log: Path) -> None:
        need("systemd-nspawn")
        self.folder = folder
        # Where version 1 and 2 of cgroups are mixed, which is so where systemd is not the first process.
        hierarchies = [path for path in map(Path, HYBRID) if (path / "cgroup.procs").exists()]
        self._cgroups = [path / f"sandboxd-test-{os.getpid()}" for path in hierarchies]
        steps = []
        for cgroup in self._cgroups:
            cgroup.mkdir()
            steps.append(f"echo $$ > {cgroup}/cgroup.procs")
        argv = [
            "systemd-nspawn", "-q", "--register=no", "-D", str(folder), f"--machine=sandboxd-test-{os.getpid()}",
            "--private-network", "--resolv-conf=off", "--timezone=off", "--link-journal=no", "--console=read-only",
            *(["--keep-unit"] if self._cgroups else []), "--boot",
        ]  # fmt: skip
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                ["sh", "-c", "; ".join([*steps, 'exec "$@"']), "sh", *argv],
                stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )  # fmt: skip
        until(self._booted, 60)

    def _booted(self) -> bool:
        assert self._process.poll() is None, "the machine did not boot"
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children:
            return False
        self._leader = children[0]
        state = self("systemctl", "is-system-running", check=False).stdout.strip()
        return state in ("running", "degraded")

    def __call__(self, *argv: str, check: bool = True, seconds: float = 60) -> Ended:
        """Run a program in it."""
        return run("nsenter", "-t", self._leader, "-a", *argv, check=check, seconds=seconds)

    def show(self, unit: str, field: str) -> str:
        """A property of a unit."""
        return self("systemctl", "show", "-p", field, "--value", unit).stdout.strip()

    def journal(self, unit: str) -> str:
        """What a unit has logged, and systemd of it."""
        return self("journalctl", "--no-pager", "-o", "cat", "-u", unit).stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file in it."""
        file = self.folder / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch(mode)
        file.chmod(mode)
        file.write_text(text)

    def off(self) -> None:
        """Power it off."""
        self("systemctl", "poweroff", check=False)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for cgroup in self._cgroups:
            for folder in sorted([cgroup, *(path for path in cgroup.rglob("*") if path.is_dir())], reverse=True):
                folder.rmdir()


def lines(text: str) -> Iterator[str]:
    """The lines of a text that have something in them."""
    return (line for line in text.splitlines() if line.strip())
