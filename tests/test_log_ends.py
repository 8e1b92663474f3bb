"""``tail`` and ``stream``: the last records of a log, and those of one stream."""

from __future__ import annotations

from typing import Any

import pytest

from tests.client import Api

LINES = "for i in 1 2 3 4 5 6; do echo o$i; echo e$i >&2; done"


async def ended(api: Api, cmd: str) -> str:
    """The id of a process that has ended, its output in the order of writing as far as that can be."""
    id = await api.start(cmd)
    await api.post(f"/processes/{id}/wait", {})
    return id


async def read(api: Api, id: str, query: str) -> list[str]:
    """What both routes answer, which must be the same."""
    reply = (await api.get(f"/processes/{id}/logs?x=1{query}")).json()
    data = [record["data"] for record in reply["records"]]
    events = await (await api.logs(id, f"&follow=false{query}")).all()
    if "limit" not in query:
        assert [event.data["data"] for event in events if event.name == "log"] == data
    return data


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("&tail=2&stream=stdout", ["o5", "o6"]),
        ("&tail=2&stream=stderr", ["e5", "e6"]),
        ("&stream=stderr", ["e1", "e2", "e3", "e4", "e5", "e6"]),
        ("&tail=100&stream=stdout", ["o1", "o2", "o3", "o4", "o5", "o6"]),
        ("&tail=0", []),
        ("&tail=0&stream=stdout", []),
        ("&tail=4&stream=stdout&limit=2", ["o3", "o4"]),
    ],
)
async def test_the_last_records_of_a_stream(api: Api, query: str, expected: list[str]) -> None:
    assert await read(api, await ended(api, LINES), query) == expected


async def test_the_last_records_of_all(api: Api) -> None:
    id = await ended(api, "seq 1 20000")
    assert await read(api, id, "&tail=3") == ["19998", "19999", "20000"]
    assert (await read(api, id, "&tail=10000"))[0] == "10001"
    assert (await read(api, id, "&tail=10000&stream=stderr")) == []


async def test_following_goes_on_behind_the_tail(api: Api) -> None:
    id = await api.start("seq 1 9; read x; echo new; echo other >&2", stdin=True)
    await api.post(f"/processes/{id}/wait", {"output": "9", "timeout": 10})
    streams = [await api.logs(id, query) for query in ("&tail=0", "&tail=1", "&tail=1&stream=stdout")]
    await api.post(f"/processes/{id}/stdin", b"\n")
    found = [[event.data["data"] for event in await stream.all() if event.name == "log"] for stream in streams]
    assert sorted(found[0]) == ["new", "other"]
    assert sorted(found[1]) == ["9", "new", "other"]
    assert found[2] == ["9", "new"]


async def test_tail_does_not_go_with_another_place_to_begin(api: Api) -> None:
    id = await ended(api, "true")
    refusals: list[Any] = [
        await api.get(f"/processes/{id}/logs?tail=1&after=0"),
        await api.get(f"/process_logs_streaming?id={id}&tail=1&after=1"),
        await api.get(f"/process_logs_streaming?id={id}&tail=1", headers={"Last-Event-ID": "1"}),
        await api.get(f"/processes/{id}/logs?tail=-1"),
        await api.get(f"/processes/{id}/logs?stream=both"),
    ]
    assert [response.status for response in refusals] == [400] * 5


async def test_the_metrics_count_what_reaches_in(api: Api) -> None:
    text = (await api.get("/metrics")).body.decode()
    for name in ('sandboxd_websockets{kind="attach"}', 'sandboxd_websockets_opened_total{kind="tunnel"}'):
        assert name in text
    assert "sandboxd_previews " in text
    assert "sandboxd_previews_forwarded_total" in text
