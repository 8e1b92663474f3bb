"""What the tests of ``/files/...`` call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tests.client import Api, Response
from tests.waiting import within


async def post(api: Api, route: str, **fields: Any) -> Response:
    body = {name.rstrip("_"): str(value) if isinstance(value, Path) else value for name, value in fields.items()}
    return await within(20, api.post(f"/files/{route}", body))


async def done(api: Api, route: str, **fields: Any) -> Any:
    response = await post(api, route, **fields)
    assert response.status in (200, 201), response
    assert response.body.isascii()
    return response.json()


async def get(api: Api, route: str, path: Path, query: str = "") -> Response:
    return await within(20, api.get(f"/files/{route}?path={quote(os.fsencode(path))}{query}"))


async def told(api: Api, route: str, path: Path, query: str = "") -> Any:
    response = await get(api, route, path, query)
    assert response.status == 200, response
    return response.json()


def paths(page: Any) -> list[str]:
    return [entry["path"] for entry in page["entries"]]


def lines(found: Any) -> list[tuple[str, int, str]]:
    return [(match["path"], match["line"], match["text"]) for match in found["matches"]]


def litter(top: Path) -> list[Path]:
    return list(top.rglob(".sandboxd-*"))
