"""``Prefer: handling=strict``: what is not known is refused, where it is ignored else."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandboxd.messages.decoding import BadRequest
from sandboxd.messages.executions import CommandRequest
from sandboxd.messages.file_operations import EditRequest
from sandboxd.messages.strict import check_fields
from sandboxd.web.preferences import prefers_strict
from tests.client import Api

STRICT = {"Prefer": "handling=strict"}


@pytest.mark.parametrize(
    ("header", "strict"),
    [
        (None, False),
        ("handling=strict", True),
        ('respond-async, Handling = "Strict" ; x=y', True),
        ("handling=lenient", False),
        ("handling=lenient, handling=strict", False),
        ("handling", False),
        ("nothandling=strict", False),
    ],
)
def test_the_preference(header: str | None, strict: bool) -> None:
    assert prefers_strict(header) is strict


async def test_an_unknown_field_is_refused_only_if_that_is_preferred(api: Api) -> None:
    body = {"cmd": "echo hi", "timout": 1}
    assert (await api.post("/run", body)).json()["stdout"] == "hi\n"
    response = await api.post("/run", body, STRICT)
    assert response.status == 400
    assert response.json()["error"].startswith("timout: unknown field")
    assert response.headers.getRawHeaders("Preference-Applied") == ["handling=strict"]


async def test_what_is_known_is_taken_and_the_reply_says_that_it_was_checked(api: Api, tmp_path: Path) -> None:
    response = await api.post("/koyeb-sandbox/run", {"cmd": "echo $a", "env": {"a": "b"}}, STRICT)
    assert (response.status, response.json()["stdout"]) == (200, "b\n")
    assert response.headers.getRawHeaders("Preference-Applied") == ["handling=strict"]
    assert (await api.get("/list_processes")).headers.getRawHeaders("Preference-Applied") is None
    assert (await api.get(f"/files/stat?path={tmp_path}", STRICT)).status == 200


@pytest.mark.parametrize(
    "path", ["/list_processes?x=1", "/files/stat?path=/tmp&paht=/", "/health?a;b=1", "/ready?%FF=1"]
)
async def test_an_unknown_parameter_is_refused(api: Api, path: str) -> None:
    assert (await api.get(path)).status == 200
    response = await api.get(path, STRICT)
    assert response.status == 400
    assert "unknown parameter" in response.json()["error"]


@pytest.mark.parametrize(
    ("body", "type", "name"),
    [
        (b'{"cmd": "x", "limits": {"cpu": 1}, "env": {"anything": "goes"}}', CommandRequest, None),
        (
            b'{"path": "x", "edits": [{"old": "a", "new": "b"}, {"old": "a", "new": "b", "y": 1}]}',
            EditRequest,
            "edits[1].y",
        ),
        (b'{"cmd": "\\udc80", "x": 1}', CommandRequest, "x"),
        (b'{"cmd": "\\udc80"}', CommandRequest, None),
        (b'{"cmd": "a\\\\b", "\\u0078": 1}', CommandRequest, "x"),
        (b"", CommandRequest, None),
    ],
)
def test_nested_fields_are_looked_at(body: bytes, type: object, name: str | None) -> None:
    if name is None:
        check_fields(body, type)
    else:
        with pytest.raises(BadRequest) as refused:
            check_fields(body, type)
        assert str(refused.value).startswith(f"{name}: unknown field")
