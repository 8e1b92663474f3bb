"""What axe finds in each view of the console, in both schemes, on a screen and on a phone; and the keyboard alone."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import sandboxd
from tests.browser.page import Console
from tests.daemon import Daemon

playwright = pytest.importorskip("playwright.sync_api", reason="the tests in a browser need playwright")
expect = playwright.expect

XTERM = Path(sandboxd.__file__).parent / "console/vendor/xterm.mjs"

#: 16 colours, as text and behind it, and what is made of others.
COLOURS = r"""
for i in 0 1 2 3 4 5 6 7; do
    printf "\033[3${i}mtext \033[9${i}mbright\033[0m \033[4${i}mbehind\033[0m \033[7;3${i}minverse\033[0m "
    printf "\033[2mdim\033[0m\n"
done
printf "\033[38;5;226myellow\033[0m \033[38;2;20;20;20mdark\033[0m\n"
echo error >&2"""


@pytest.fixture(scope="module")
def axe() -> str:
    """The source of axe-core."""
    found = find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("axe-core comes with axe-playwright-python")
    return Path(found.origin).with_name("axe.min.js").read_text()


def findings(page: Any, axe: str) -> list[str]:
    """What axe finds that is serious or critical."""
    page.evaluate(axe)
    found = page.evaluate("axe.run({ resultTypes: ['violations'] })")
    return [
        f"{each['id']}: {each['help']}: {node['html'][:200]} {node['failureSummary'][:300]}"
        for each in found["violations"]
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 400)])
def test_axe_finds_nothing_serious(
    open_console: Callable[..., Console], daemon: Daemon, axe: str, tmp_path: Path, scheme: str, width: int
) -> None:
    console = open_console(
        daemon, viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    page = console.page
    page.goto(console.url)
    page.get_by_label("Token").wait_for()
    problems = {"login": findings(page, axe)}
    page.evaluate("document.querySelector('label').remove()")
    assert findings(page, axe)[0].startswith("label:")  # it does find what is wrong
    page.reload()
    log = console.call("start_process", {"cmd": COLOURS})["id"]
    left = console.call("start_process", {"cmd": "sleep 300 & exit 3"})["id"]
    (tmp_path / "text").write_text("text")
    console.log_in("overview")
    for view, ready in {
        "overview": ".chart .line[d]",
        "processes": ".state.left",
        f"log/{log}": ".row.stderr",
        "terminal": ".root > *",
        f"files{tmp_path.resolve()}": ".files-content table",
        f"files{tmp_path.resolve()}/text": "textarea",
        "ports": ".ports-form",
    }.items():
        console.show(view)
        page.locator(ready).first.wait_for()
        problems[view] = findings(page, axe)
        assert not console.scrolls_sideways, view
    console.call("kill_process", {"id": left})
    assert {view: found for view, found in problems.items() if found} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_in_a_terminal_a_conflict_and_dialogs(
    open_console: Callable[..., Console], daemon: Daemon, axe: str, tmp_path: Path, scheme: str
) -> None:
    console = open_console(daemon, color_scheme=scheme)
    page = console.page
    id = console.call("start_process", {"cmd": f"{COLOURS.strip()}; cat", "tty": True})["id"]
    file = tmp_path / "text"
    file.write_text("text")
    problems = {}
    if XTERM.exists():
        console.log_in(f"terminal/{id}")
        expect(page.locator(".xterm-rows")).to_contain_text("error")
        page.keyboard.press("Control+Shift+F")
        problems["terminal"] = findings(page, axe)
        console.show(f"files{tmp_path}")
    else:
        console.log_in(f"files{tmp_path}")
    page.get_by_role("button", name="Rename text").click()
    problems["rename"] = findings(page, axe)
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Delete text").click()
    problems["delete"] = findings(page, axe)
    page.keyboard.press("Escape")
    page.get_by_role("link", name="text", exact=True).click()
    page.get_by_label("Text of").fill("mine")
    file.write_text("theirs")
    page.keyboard.press("Control+s")
    page.get_by_label("The file as it is now").wait_for()
    problems["conflict"] = findings(page, axe)
    console.call("kill_process", {"id": id})
    assert {view: found for view, found in problems.items() if found} == {}


def test_the_page_by_keyboard_alone(console: Console) -> None:
    page = console.page
    page.reload()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Filter by command, pid or id")).to_be_focused()
    console.call("start_process", {"cmd": "seq 1 500"})
    page.get_by_role("navigation").get_by_role("link", name="Overview").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Overview")).to_be_visible()
    expect(page.get_by_role("navigation").get_by_role("link", name="Overview")).to_have_attribute(
        "aria-current", "page"
    )
    page.keyboard.press("Tab")
    expect(page.get_by_role("navigation").get_by_role("link", name="Processes")).to_be_focused()
    page.keyboard.press("Enter")
    page.get_by_role("link", name="seq 1 500").first.focus()
    page.keyboard.press("Enter")
    page.get_by_role("region", name="Log").focus()
    page.keyboard.press("Home")
    expect(page.locator(".row .text").first).to_have_text("1")
    page.keyboard.press("/")
    page.keyboard.type("499")
    expect(page.locator(".row .text")).to_have_text(["499"])


def test_the_scheme_can_be_chosen_and_stays(console: Console) -> None:
    page = console.page
    page.emulate_media(color_scheme="light")
    colour = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(colour)
    page.get_by_label("Colours").select_option("dark")
    dark = page.evaluate(colour)
    assert dark != light
    page.reload()
    expect(page.get_by_label("Colours")).to_have_value("dark")
    assert page.evaluate(colour) == dark
