"""
Put xterm.js, which the console's terminal is made of, into ``sandboxd/console/vendor/``.

The packages are those of ``package-lock.json``, each checked by its hash. They come from npm's registry, or from the
one that ``npm_config_registry`` or ``~/.npmrc`` names. Needs no Node.js. Does nothing if they are there.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

HERE = Path(__file__).resolve().parent
LOCK = HERE / "package-lock.json"
VENDOR = HERE.parents[1] / "sandboxd" / "console" / "vendor"
NPM = "https://registry.npmjs.org/"

#: The files that are taken, by package; in ``vendor/`` they have these names, without their directories.
FILES = {
    "@xterm/xterm": ("lib/xterm.mjs", "css/xterm.css"),
    "@xterm/addon-fit": ("lib/addon-fit.mjs",),
    "@xterm/addon-search": ("lib/addon-search.mjs",),
}

#: Seconds without a byte from the registry, and bytes of one package.
PATIENCE = 20
LARGEST = 32 * 1024 * 1024


def registry() -> str:
    """Return the URL of the registry that npm is configured to use."""
    environ = {name.lower(): value for name, value in os.environ.items()}  # npm takes both cases
    given: str | None = environ.get("npm_config_registry")
    settings = Path(environ.get("npm_config_userconfig") or Path.home() / ".npmrc")
    if not given and settings.is_file():
        found = re.search(r"^\s*registry\s*=\s*(\S+)", settings.read_text(), re.M)
        given = found[1] if found else None
    return (given or NPM).rstrip("/") + "/"


def download(name: str, package: dict[str, str]) -> bytes:
    """
    Return a package's archive.

    :param package: its entry in the lock file, which has no URL: the registry is whatever npm is configured to use.
    :raise OSError: if it cannot be had.
    :raise ValueError: if it is not what the lock file says.
    """
    url = f"{registry()}{name}/-/{name.rpartition('/')[2]}-{package['version']}.tgz"
    with urllib.request.urlopen(url, timeout=PATIENCE) as response:
        data: bytes = response.read(LARGEST)
    algorithm, _, expected = package["integrity"].partition("-")
    if base64.b64encode(hashlib.new(algorithm, data).digest()).decode("ascii") != expected:
        raise ValueError(f"{url} does not have the hash that {LOCK.name} has")
    return data


def complete() -> bool:
    """Return whether the packages of the lock file are there."""
    stamp = VENDOR / LOCK.name
    names = [name.rpartition("/")[2] for files in FILES.values() for name in files]
    return (
        stamp.is_file() and stamp.read_bytes() == LOCK.read_bytes() and all((VENDOR / name).is_file() for name in names)
    )


def fetch() -> None:
    """Get the packages, and put their files into place when all are there."""
    packages = json.loads(LOCK.read_text())["packages"]
    VENDOR.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=VENDOR.parent, prefix=".vendor-") as folder:
        made = Path(folder) / "vendor"
        made.mkdir()
        for name, files in FILES.items():
            archive = io.BytesIO(download(name, packages[f"node_modules/{name}"]))
            with tarfile.open(fileobj=archive, mode="r:gz") as tar:
                for file in files:
                    member = tar.extractfile(f"package/{file}")
                    assert member is not None
                    (made / Path(file).name).write_bytes(member.read())
                licence = tar.extractfile("package/LICENSE")
                assert licence is not None
                (made / f"{name.rpartition('/')[2]}.LICENSE").write_bytes(licence.read())
        shutil.copy(LOCK, made)
        if VENDOR.exists():
            shutil.rmtree(VENDOR)
        made.rename(VENDOR)


def main() -> int:
    """Return the exit code: 0 if all is there."""
    if complete():
        return 0
    try:
        fetch()
    except (OSError, ValueError) as error:
        sys.stderr.write(f"The console has no terminal without xterm.js, which cannot be had: {error}\n")
        sys.stderr.write("All else works. `make console` tries again.\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
