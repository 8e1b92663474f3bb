"""A root, and ``/files/...``: no path, link or race leads out of it."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.file_routes import done, get, lines, paths, post, told
from tests.rooted import Rooted
from tests.waiting import within


@pytest.fixture(scope="module")
def rooted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rooted]:
    """A root with links that lead out of it."""
    rooted = Rooted(tmp_path_factory.mktemp("rooted"))
    (rooted.top / "out").symlink_to(rooted.outside)
    (rooted.top / "up").symlink_to("..")
    (rooted.top / "f").write_text("text")
    yield rooted
    rooted.stop()


@pytest.mark.parametrize("way", ["out", "up/outside", "../outside", "OUTSIDE"])
async def test_nothing_leads_out_of_a_root(rooted: Rooted, way: str) -> None:
    api = rooted.api
    out = Path(str(rooted.outside) if way == "OUTSIDE" else way)
    secret = out / "secret"
    for route, path in (("stat", secret), ("list", out)):
        assert (await get(api, route, path)).status == 403
    for url in (f"/archive?path={out}", f"/watch?path={out}", f"/watch?path={secret}"):
        assert (await within(5, api.get(url))).status == 403
    assert (await within(5, api.call("PUT", f"/archive?path={out}", b""))).status == 403
    for route, fields in (
        ("glob", {"path": out, "pattern": "**"}),
        ("grep", {"path": out, "pattern": "secret"}),
        ("grep", {"path": secret, "pattern": "secret"}),
        ("move", {"from_": secret, "to": "x"}),
        ("move", {"from_": "f", "to": out / "f"}),
        ("copy", {"from_": secret, "to": "x"}),
        ("copy", {"from_": "f", "to": out / "f"}),
        ("copy", {"from_": "f", "to": out / "a/f", "parents": True}),
        ("chmod", {"path": secret, "mode": "0777"}),
        ("append", {"path": secret, "content": "x"}),
        ("append", {"path": out / "new", "content": "x"}),
        ("touch", {"path": out / "new"}),
        ("link", {"path": out / "new", "target": "x"}),
        ("link", {"path": "new", "target": secret, "kind": "hard"}),
        ("edit", {"path": secret, "edits": [{"old": "secret", "new": "x"}]}),
    ):
        response = await post(api, route, **fields)
        assert response.status == 403, (route, response)
        assert "outside of the root" in response.json()["error"]


async def test_links_in_a_root_are_not_followed_by_searches(rooted: Rooted) -> None:
    assert paths(await told(rooted.api, "list", Path(), "&depth=9")) == ["f", "out", "up"]
    found = await done(rooted.api, "grep", path=".", pattern="e")
    assert lines(found) == [("f", 1, "text")]
    await done(rooted.api, "chmod", path=rooted.top, mode="go-w", recursive=True)
    await done(rooted.api, "copy", from_="out", to="out2")
    assert os.readlink(rooted.top / "out2") == str(rooted.outside)
    (rooted.top / "out2").unlink()


@pytest.mark.slow
async def test_links_that_are_swapped_in_a_race_never_lead_out(rooted: Rooted) -> None:
    over = threading.Event()
    d = rooted.top / "d"

    def swap() -> None:
        while not over.is_set():
            d.mkdir(exist_ok=True)
            (d / "secret").write_text("inside")
            d.rename(rooted.top / "away")
            d.symlink_to(rooted.outside)
            d.unlink()
            while (rooted.top / "away").exists():  # a copy may come into it meanwhile
                shutil.rmtree(rooted.top / "away", ignore_errors=True)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        for _ in range(60):
            for route, fields in (
                ("append", {"path": "d/secret", "content": "x"}),
                ("chmod", {"path": "d", "mode": "0777", "recursive": True}),
                ("copy", {"from_": "f", "to": "d/new"}),
                ("edit", {"path": "d/secret", "edits": [{"old": "s", "new": "x"}]}),
            ):
                await post(rooted.api, route, **fields)
    finally:
        over.set()
        thread.join()
        subprocess.run(["rm", "-rf", d, rooted.top / "away"], check=True)
    assert stat.S_IMODE((rooted.outside / "secret").stat().st_mode) == 0o644
