"""``/console/``: its files need no token and may load nothing from elsewhere."""

from __future__ import annotations

import http.client
from collections.abc import Callable

import pytest

from tests.daemon import Daemon


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
    for name, media_type in (("", "text/html"), ("console.js", "text/javascript"), ("console.css", "text/css")):
        response, body = get(daemon.port, f"{prefix}/console/{name}")
        assert (response.status, bool(body)) == (200, True), name
        assert (response.getheader("Content-Type") or "").startswith(media_type)
        assert "default-src 'none'" in (response.getheader("Content-Security-Policy") or "")
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        assert response.getheader("Referrer-Policy") == "no-referrer"
        tag = response.getheader("ETag") or ""
        again, nothing = get(daemon.port, f"{prefix}/console/{name}", {"If-None-Match": tag})
        assert (again.status, nothing) == (304, b"")


def test_other_paths_below_it_need_a_token(daemon: Daemon) -> None:
    assert get(daemon.port, "/console/../options.py")[0].status == 401
    assert get(daemon.port, "/console/nothing.js")[0].status == 401


@pytest.mark.slow
@pytest.mark.parametrize(("options", "environ"), [(["--no-console"], {}), ([], {"SANDBOX_CONSOLE": "0"})])
def test_it_can_be_turned_off(start_daemon: Callable[..., Daemon], options: list[str], environ: dict[str, str]) -> None:
    assert get(start_daemon(*options, **environ).port, "/console/")[0].status == 401
