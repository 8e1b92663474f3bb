"""``/console/``: its files need no token and may load nothing from elsewhere."""

from __future__ import annotations

import base64
import functools
import hashlib
import http.client
import json
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import sandboxd
from tests.daemon import Daemon

FETCH = Path(__file__).parents[1] / "deploy" / "console" / "fetch.py"
VENDOR = Path(sandboxd.__file__).parent / "console" / "vendor"


def get(port: int, path: str, headers: dict[str, str] | None = None) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
def test_the_page_and_its_files_need_no_token_and_are_cached_by_their_tag(daemon: Daemon, prefix: str) -> None:
    for name, media_type in (("", "text/html"), ("app.js", "text/javascript"), ("console.css", "text/css")):
        response, body = get(daemon.port, f"{prefix}/console/{name}")
        assert (response.status, bool(body)) == (200, True), name
        assert (response.getheader("Content-Type") or "").startswith(media_type)
        policy = response.getheader("Content-Security-Policy") or ""
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        assert response.getheader("Referrer-Policy") == "no-referrer"
        tag = response.getheader("ETag") or ""
        again, nothing = get(daemon.port, f"{prefix}/console/{name}", {"If-None-Match": tag})
        assert (again.status, nothing) == (304, b"")


@pytest.mark.skipif(not VENDOR.exists(), reason="`make console` was not called")
def test_the_files_of_the_terminal_are_served_with_the_same_policy(daemon: Daemon) -> None:
    for name, media_type in (("xterm.mjs", "text/javascript"), ("xterm.css", "text/css")):
        response, body = get(daemon.port, f"/koyeb-sandbox/console/vendor/{name}")
        assert (response.status, body) == (200, (VENDOR / name).read_bytes())
        assert (response.getheader("Content-Type") or "").startswith(media_type)
    assert get(daemon.port, "/console/vendor/package-lock.json")[0].status == 401


@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
def test_without_the_slash_it_is_found_too(daemon: Daemon, prefix: str) -> None:
    response, body = get(daemon.port, f"{prefix}/console")
    assert (response.status, response.getheader("Location"), body) == (308, "console/", b"")


def test_other_paths_below_it_need_a_token(daemon: Daemon) -> None:
    assert get(daemon.port, "/console/../options.py")[0].status == 401
    assert get(daemon.port, "/console/nothing.js")[0].status == 401


@pytest.mark.slow
@pytest.mark.parametrize(("options", "environ"), [(["--no-console"], {}), ([], {"SANDBOX_CONSOLE": "0"})])
def test_it_can_be_turned_off(start_daemon: Callable[..., Daemon], options: list[str], environ: dict[str, str]) -> None:
    assert get(start_daemon(*options, **environ).port, "/console/")[0].status == 401


class Registry:
    """
    A registry of packages with one file each, and a copy of what gets them.

    :ivar vendor: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self._url = ""
        self._script = folder / "deploy/console/fetch.py"
        self._script.parent.mkdir(parents=True)
        shutil.copy(FETCH, self._script)
        self.vendor = folder / "sandboxd/console/vendor"
        self.archives = folder / "registry"
        packages = {}
        for name, files in (
            ("@xterm/xterm", ("lib/xterm.mjs", "css/xterm.css")),
            ("@xterm/addon-fit", ("lib/addon-fit.mjs",)),
            ("@xterm/addon-search", ("lib/addon-search.mjs",)),
        ):
            source = folder / name
            for file in (*files, "LICENSE"):
                (source / file).parent.mkdir(parents=True, exist_ok=True)
                (source / file).write_text(f"{file} of {name}")
            archive = self.archives / name / "-" / f"{name.rpartition('/')[2]}-1.2.3.tgz"
            archive.parent.mkdir(parents=True)
            with tarfile.open(archive, "w:gz") as tar:
                tar.add(source, "package")
            digest = base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
            packages[f"node_modules/{name}"] = {"version": "1.2.3", "integrity": f"sha512-{digest}"}
        (self._script.parent / "package-lock.json").write_text(json.dumps({"packages": packages}))

    def serve(self) -> ThreadingHTTPServer:
        """Start to serve it."""

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=os.fspath(self.archives)))
        self._url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,)).start()
        return server

    def fetch(self) -> subprocess.CompletedProcess[str]:
        """Get the files, as ``make console`` does."""
        return subprocess.run(
            [sys.executable, self._script],
            env={**os.environ, "npm_config_registry": self._url, "no_proxy": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=60,
        )


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    registry = Registry(tmp_path)
    with registry.serve() as server:
        yield registry
        server.shutdown()


def test_the_files_of_the_terminal_come_from_the_registry_once(registry: Registry) -> None:
    assert registry.fetch().returncode == 0
    assert (registry.vendor / "xterm.mjs").read_text() == "lib/xterm.mjs of @xterm/xterm"
    names = {path.name for path in registry.vendor.iterdir()}
    assert names >= {"xterm.css", "addon-fit.mjs", "addon-search.mjs", "xterm.LICENSE"}
    shutil.rmtree(registry.archives)
    assert registry.fetch().returncode == 0


def test_a_package_that_is_not_the_one_that_was_locked_is_refused(registry: Registry) -> None:
    (archive,) = registry.archives.glob("@xterm/xterm/-/*.tgz")
    archive.write_bytes(archive.read_bytes() + b"more")
    ended = registry.fetch()
    assert ended.returncode == 1
    assert "hash" in ended.stderr
    assert list(registry.vendor.parent.iterdir()) == []
