"""``POST /upload``: files in a form."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from twisted.internet.threads import deferToThread

from tests.client import Api
from tests.file_transfers import DATA, at, curl
from tests.waiting import within


def form(*files: tuple[str, bytes], end: bool = True) -> tuple[bytes, dict[str, str]]:
    """A form's body and headers."""
    parts = [
        f'--xyz\r\nContent-Disposition: form-data; name="f"; filename="{name}"\r\n\r\n'.encode() + data + b"\r\n"
        for name, data in files
    ]
    return b"".join(parts) + (b"--xyz--\r\n" if end else b""), {"Content-Type": "multipart/form-data; boundary=xyz"}


async def test_a_form_writes_its_files(api: Api, tmp_path: Path) -> None:
    body, headers = form(("a", DATA), ("b \u20ac", b""), ('c\\"', b"\r\n--xy\r\n"))
    response = await within(10, api.call("POST", at(tmp_path / "new", parents="true", mode="600"), body, headers))
    assert response.status == 201
    assert [(file["path"], file["size"]) for file in response.json()["files"]] == [
        (f"{tmp_path}/new/a", len(DATA)),
        (f"{tmp_path}/new/b \u20ac", 0),
        (f'{tmp_path}/new/c"', 8),
    ]
    assert (tmp_path / "new/a").read_bytes() == DATA
    assert (tmp_path / 'new/c"').read_bytes() == b"\r\n--xy\r\n"
    assert len(os.listdir(tmp_path / "new")) == 3
    assert stat.S_IMODE((tmp_path / "new/a").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "../x", "/etc/x"])
async def test_a_form_cannot_leave_the_directory(api: Api, tmp_path: Path, name: str) -> None:
    body, headers = form(("first", b"1"), (name, b"2"), ("third", b"3"))
    response = await within(5, api.call("POST", at(tmp_path), body, headers))
    assert response.status == 400
    assert [file["path"] for file in response.json()["files"]] == [f"{tmp_path}/first"]
    assert os.listdir(tmp_path) == ["first"]


async def test_malformed_forms(api: Api, tmp_path: Path) -> None:
    body, headers = form(("a", b"1"), ("b", DATA), end=False)
    for data, more in (
        (body, headers),
        (b"nonsense", headers),
        (b"", headers),
        (b'--xyz\r\nContent-Disposition: form-data; name="n"\r\n\r\nvalue\r\n--xyz--\r\n', headers),
        (b"--xyz\r\n" + b"X-A: b\r\n" * 1000 + b"\r\n\r\n--xyz--\r\n", headers),
        (body, {"Content-Type": "application/json"}),
        (body, {}),
        (body, {"Content-Type": "multipart/form-data; boundary=" + "x" * 300}),
    ):
        response = await within(5, api.call("POST", at(tmp_path), data, more))
        assert (response.status, bool(response.json()["error"])) == (400, True)
    assert os.listdir(tmp_path) == ["a"]


async def test_curl_sends_a_form(api: Api, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(DATA)
    (tmp_path / "to").mkdir()
    files = [argument for name in ("one", "two") for argument in ("-F", f"file=@{tmp_path}/{name}")]
    await deferToThread(curl, api, *files, api.url + at(tmp_path / "to"))
    assert sorted(os.listdir(tmp_path / "to")) == ["one", "two"]
    assert (tmp_path / "to/two").read_bytes() == DATA
