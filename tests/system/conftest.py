"""Fixtures: the images, built once; a booted machine with the daemon installed as a unit."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.lab import (
    ROOT,
    SECRET,
    Container,
    Machine,
    Podman,
    base_system,
    booting_system,
    ca_bundle,
    inside,
    need,
    run,
)

#: What the Dockerfile builds on if it is not told otherwise; here it is what debootstrap has made.
BASE = "docker.io/library/ubuntu:22.04"


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    """Podman, with the base image in its storage."""
    podman = Podman(tmp_path_factory.mktemp("podman"))
    podman.import_base(base_system(), BASE)
    yield podman
    podman("rm", "-f", "-a", "-t", "0")


@pytest.fixture(scope="session")
def image(podman: Podman) -> str:
    """The image that the Dockerfile makes by default."""
    run(sys.executable, ROOT / "deploy/console/fetch.py")  # inside of the build, what this machine trusts is unknown
    return podman.build(ROOT, "localhost/sandboxd:test", "--build-arg=VERSION=1.2.3", "--build-arg=REVISION=abcdef")


@pytest.fixture(scope="session")
def nonroot(podman: Podman, image: str) -> str:
    """The one that runs as user 1000."""
    return podman.build(ROOT, "localhost/sandboxd:test-nonroot", "--target=nonroot")


@pytest.fixture(scope="session")
def injected(podman: Podman, image: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The slim one, copied into an image that has a static busybox and nothing else: no Python, no C library."""
    need("busybox")
    podman.build(ROOT, "localhost/sandboxd:test-slim", "--target=slim")
    folder = tmp_path_factory.mktemp("injected")
    shutil.copy(shutil.which("busybox") or "", folder / "busybox")
    (folder / "Dockerfile").write_text(
        "FROM scratch\n"
        "COPY busybox /bin/busybox\n"
        'RUN ["/bin/busybox", "--install", "-s", "/bin"]\n'
        "COPY --from=localhost/sandboxd:test-slim /opt/sandboxd /opt/sandboxd\n"
        'ENTRYPOINT ["/opt/sandboxd/bin/twistd", "--nodaemon", "--pidfile=", "sandboxd"]\n'
    )
    return podman.build(folder, "localhost/sandboxd:test-injected")


@pytest.fixture
def start(podman: Podman) -> Iterator[Callable[..., Container]]:
    """Starts containers, which are removed after the test: as :class:`Container` is made, less podman."""
    started: list[Container] = []

    def start(image: str, *options: str, command: tuple[str, ...] = ()) -> Container:
        started.append(Container(podman, image, *options, command=command))
        return started[-1]

    yield start
    for container in started:
        container.remove()


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root of a system with the daemon installed as ``make install-systemd`` does it."""
    need("debootstrap", "systemd-nspawn", "systemd-analyze")
    folder = tmp_path_factory.mktemp("machine") / "root"
    run("cp", "-a", booting_system(), folder)
    source = folder / "usr/src/sandboxd"
    names = run("git", "-C", ROOT, "ls-files", "--cached", "--others", "--exclude-standard").stdout.split("\n")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = []
    if (bundle := ca_bundle()) is not None:
        shutil.copy(bundle, folder / "root/ca-bundle.crt")
        pip = ["PIP_CERT=/root/ca-bundle.crt"]
    for name in ("resolv.conf", "hosts"):
        shutil.copy(f"/etc/{name}", folder / "etc" / name)
    inside(folder, "env", *pip, "make", "-C", "/usr/src/sandboxd", "install-systemd", seconds=300)
    secret = folder / "etc/sandboxd/sandboxd.secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    assert len(secret.read_text().strip()) >= 32
    secret.write_text(SECRET)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def booted(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """That system, booted."""
    machine = Machine(installed, tmp_path_factory.mktemp("boot") / "log")
    yield machine
    machine.off()


@pytest.fixture
def machine(booted: Machine) -> Iterator[Machine]:
    """The same with no unit of ours active and no drop-in, before the test and after."""
    reset(booted)
    yield booted
    reset(booted)


def reset(machine: Machine) -> None:
    units = machine("systemctl", "list-units", "--all", "--plain", "--no-legend", "sandboxd*").stdout
    names = [line.split()[0] for line in units.splitlines() if ".slice" not in line]
    if names:
        machine("systemctl", "stop", *sorted(names, key=lambda name: not name.endswith(".socket")))
        machine("systemctl", "reset-failed", *names, check=False)
    for dropin in (machine.folder / "etc/systemd/system").glob("sandboxd*.d"):
        shutil.rmtree(dropin)
    machine("systemctl", "daemon-reload")
