"""
The pictures of the documents, made of the console and of ``sandboxctl`` as they are.

``make screenshots`` writes them to ``docs/images``; as a test they are made, and thrown away.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser.page import Console
from tests.browser.visits import PNG, address, ask, start, wait
from tests.daemon import SECRET, Daemon

playwright = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
image = pytest.importorskip("PIL.Image", reason="the pictures need pillow")
expect = playwright.expect

#: Pixels of a picture for each of the page.
SCALE = 1.5

#: Bytes of a picture, at most.
LARGEST = 150_000

LOG = r"""
printf '\033[1m%s\033[0m\n' 'shop: starting'
for step in 'compile 214 modules' 'run 812 tests' 'build the image'; do printf '\033[32m✓\033[0m %s\n' "$step"; done
printf '\033[33m!\033[0m %s\n' 'cache: 3 entries are stale' >&2
printf '\033[36m%s\033[0m is open\n' shop
exec python3 -u -m http.server "$1" --bind 127.0.0.1
"""

PROGRAM = '''\
"""The shop's front page."""

from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

PRICES = {"tea": 3.20, "cake": 4.50}


class Shop(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        lines = [f"{name}: {price:.2f}" for name, price in PRICES.items()]
        body = "\\n".join(lines).encode()
        self.send_response(200)
        self.send_header("Content-Type", "text/plain")
        self.end_headers()
        self.wfile.write(body)


ThreadingHTTPServer(("127.0.0.1", 8123), Shop).serve_forever()
'''


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Where they go."""
    return Path(os.environ.get("SCREENSHOTS") or tmp_path)


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A small project. In a picture for the documents its path is the same everywhere."""
    root = Path(tempfile.gettempdir()) / "demo" if os.environ.get("SCREENSHOTS") else tmp_path / "demo"
    root.mkdir()
    for name, text in {
        "shop/app.py": PROGRAM,
        "shop/serve": LOG,
        "shop/README.md": "# Shop\n\nSells tea and cake.\n",
        "shop/prices.csv": "name,price\ntea,3.20\ncake,4.50\n",
        "shop/tests/test_app.py": "def test_prices() -> None: ...\n",
        "data/orders.jsonl": '{"name": "tea", "count": 2}\n' * 900,
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "shop/logo.png").write_bytes(PNG)
    yield root
    shutil.rmtree(root)


@pytest.fixture
def shop(start_daemon: Callable[..., Daemon], project: Path) -> Daemon:
    """A daemon whose file requests are confined to that project."""
    return start_daemon("--root", str(project))


def shell(daemon: Daemon, folder: Path, cwd: Path) -> str:
    """A shell for people: with ``sandboxctl``, and a short prompt."""
    scripts = sysconfig.get_path("scripts")
    tool = folder / "bin/sandboxctl"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {sys.executable} -m sandboxd.ctl "$@"\n')
    tool.chmod(0o755)
    env = {
        "PS1": r"\[\e[36m\]~/shop\[\e[0m\] $ ",
        "PATH": f"{tool.parent}:{scripts}:{os.environ['PATH']}",
        "SANDBOX_URL": daemon.url,
        "SANDBOX_SECRET": SECRET,
        "COLORTERM": "truecolor",
        "HOME": str(folder),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    body = {"argv": ["bash", "--norc"], "tty": True, "env": env, "cwd": str(cwd)}
    return str(ask(daemon, "start_process", body)["id"])


def screen(page: Any) -> Any:
    return page.locator(".terminal-panel:not([hidden]) .xterm-rows")


def at_prompt(page: Any) -> None:
    """Wait until the last command has ended."""
    expect(screen(page)).to_contain_text(re.compile(r"shop \$\s*$"))


def settled(page: Any) -> None:
    """Wait until nothing is shown that goes away by itself."""
    page.locator(".terminal-size").wait_for(state="hidden")
    page.mouse.move(0, 0)


def take(subject: Any, path: Path) -> None:
    """Take a picture of a page or of an element, with 256 colours: it has a third of the size so."""
    taken = image.open(io.BytesIO(subject.screenshot()))
    taken.convert("RGB").quantize(256, image.Quantize.MAXCOVERAGE, dither=image.Dither.NONE).save(path, optimize=True)
    assert path.stat().st_size < LARGEST, path


def test_the_pictures(
    shop: Daemon, project: Path, open_console: Callable[..., Console], tmp_path: Path, pictures: Path
) -> None:
    wanted = 8123 if os.environ.get("SCREENSHOTS") else 0
    server = start(shop, f"sh serve {wanted}", cwd=str(project / "shop"))
    wait(shop, server, output="Serving")
    (port,) = [each["port"] for each in ask(shop, "ports")["ports"] if each["execution"] == server]
    start(shop, "sleep 1; echo done")
    start(shop, "echo 'orders.jsonl: 900 lines'; exit 1")
    start(shop, "tail -F access.log & echo started")
    start(shop, "sleep 60", timeout=0.3)
    terminal = shell(shop, tmp_path, project / "shop")
    size = {"width": 960, "height": 560}
    console = open_console(shop, viewport=size, color_scheme="light", device_scale_factor=SCALE)
    page = console.page

    console.log_in("processes")
    for text in ("completed", "failed (1)", "timed out", "1 left behind"):
        expect(page.locator(".state").filter(has_text=text).first).to_be_visible()
    take(page, pictures / "console-processes.png")
    page.emulate_media(color_scheme="dark")
    take(page, pictures / "console-processes-dark.png")
    page.emulate_media(color_scheme="light")

    console.show(f"log/{server}")
    expect(page.get_by_text("shop is open")).to_be_visible()
    take(page, pictures / "console-log.png")

    console.show(f"terminal/{terminal}")
    page.keyboard.type("clear; vim -u DEFAULTS -c 'set number' app.py\n")
    expect(screen(page)).to_contain_text("do_GET")
    settled(page)
    take(page, pictures / "console-terminal.png")
    page.keyboard.type(":q\n")
    at_prompt(page)
    page.keyboard.type("clear\n")
    expect(screen(page)).not_to_contain_text("vim")
    for command, shown in (
        ("sandboxctl run 'echo hello from $(uname -s); exit 3'; echo exit code $?", "exit code 3"),
        ("sandboxctl ps", "sh serve"),
        ("sandboxctl ls -l shop", "app.py"),
        (f"sandboxctl ports | grep {port}", f"{port}  127.0.0.1"),
    ):
        page.keyboard.type(f"{command}\n")
        expect(screen(page)).to_contain_text(shown)
        at_prompt(page)
    settled(page)
    take(page.locator(".terminal-panel:not([hidden])"), pictures / "sandboxctl.png")

    console.show(address(project / "shop"))
    expect(page.get_by_role("link", name="app.py")).to_be_visible()
    page.locator("input[type=file]").set_input_files(
        [{"name": "menu.pdf", "mimeType": "application/pdf", "buffer": b"%" * 2_400_000}]
    )
    expect(page.locator(".files-transfers [data-state=done]")).to_be_visible()
    page.get_by_role("treeitem", name="shop", exact=True).focus()
    take(page, pictures / "console-files.png")

    phone = open_console(shop, viewport={"width": 390, "height": 780}, color_scheme="dark", device_scale_factor=SCALE)
    phone.log_in(f"terminal/{terminal}")
    expect(screen(phone.page)).to_contain_text("~/shop")
    phone.page.keyboard.type("clear; ls --color; sandboxctl run 'echo from a phone'\n")
    expect(screen(phone.page)).to_contain_text(re.compile(r"(?<!echo )from a phone"))
    settled(phone.page)
    take(phone.page, pictures / "console-phone.png")


def test_the_picture_of_the_overview(shop: Daemon, open_console: Callable[..., Console], pictures: Path) -> None:
    size = {"width": 1100, "height": 420}
    console = open_console(shop, viewport=size, color_scheme="dark", device_scale_factor=SCALE)
    console.log_in("overview")
    start(shop, "while :; do seq 200000 | md5sum > /dev/null; seq 20000; sleep 1; done")
    expect(console.page.get_by_role("region", name="Processes")).to_contain_text("1 running")
    if os.environ.get("SCREENSHOTS"):
        console.page.wait_for_timeout(40_000)  # its charts are of the past
    take(console.page, pictures / "console-overview.png")
