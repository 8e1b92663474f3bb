"""Background processes: ``/start_process``, ``/list_processes``, ``/kill_process``."""

from __future__ import annotations

import os
import re
import signal
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import gatherResults

from tests.client import Api, Response
from tests.daemon import Daemon, alive
from tests.waiting import HARD, gone, hard_to_end, pids_in, until, within

#: What an entry of the list has from the start, and what it gets.
FIRST_KEYS = {"id", "pid", "status", "command"}
LAST_KEYS = {"exit_code", "started_at", "completed_at"}

RFC_3339_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")


async def ended(api: Api, id: str) -> Any:
    """The entry of a process once its logs have ended, which they do with it."""
    await (await api.logs(id)).all()
    return await api.process(id)


async def kill(api: Api, id: Any, **fields: Any) -> Response:
    return await api.post("/kill_process", {"id": id, **fields})


# Start


async def test_start_tells_id_pid_and_status(api: Api, tmp_path: Path) -> None:
    response = await api.post("/start_process", {"cmd": f"echo $$ > {tmp_path}/pid; sleep 300"})
    reply = response.json()
    assert response.status == 201
    assert reply == {"id": reply["id"], "pid": reply["pid"], "status": "running"}
    assert uuid.UUID(reply["id"]).version == 4
    assert str(uuid.UUID(reply["id"])) == reply["id"]
    assert await pids_in(tmp_path / "pid") == [reply["pid"]]
    await kill(api, reply["id"])


async def test_an_empty_command_is_refused(api: Api) -> None:
    response = await api.post("/start_process", {"cmd": ""})
    assert response.status == 400
    assert response.json() == {"error": "Command is required"}


async def test_surroundings_are_those_of_run(api: Api, tmp_path: Path) -> None:
    id = await api.start("pwd; echo $A; readlink /proc/self/fd/0; cat", cwd=str(tmp_path), env={"A": "b"})
    events = await (await api.logs(id)).all()
    assert [event.data.get("data") for event in events] == [str(tmp_path), "b", "/dev/null", None]


async def test_it_outlives_the_connection_that_started_it(api: Api) -> None:
    id = await api.start("sleep 300")
    process = await api.process(id)
    assert process["status"] == "running"
    assert alive(process["pid"])
    await kill(api, id)


@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
async def test_both_prefixes(api: Api, prefix: str) -> None:
    response = await api.post(f"{prefix}/start_process", {"cmd": "sleep 300"})
    id = response.json()["id"]
    listed = (await api.get(f"{prefix}/list_processes")).json()["processes"]
    assert id in [process["id"] for process in listed]
    assert (await api.post(f"{prefix}/kill_process", {"id": id})).status == 200
    assert (await api.get(f"{prefix}/process_logs_streaming?id={id}")).status == 200


# List and status


async def test_the_list_is_in_start_order(api: Api) -> None:
    ids = [await api.start(cmd) for cmd in ("sleep 300", "true", "sleep 300", "false", "sleep 300")]
    await ended(api, ids[1])
    listed = [process["id"] for process in (await api.get("/list_processes")).json()["processes"]]
    assert [id for id in listed if id in ids] == ids
    await gatherResults([within(10, kill(api, id)) for id in ids])


async def test_a_running_process_has_no_other_keys(api: Api) -> None:
    id = await api.start("echo é; sleep 300")
    process = await api.process(id)
    assert set(process) == FIRST_KEYS | {"started_at"}
    assert process["command"] == "echo é; sleep 300"
    await kill(api, id)


@pytest.mark.parametrize("timeout", [None, 0.2])
@pytest.mark.slow
async def test_an_ended_process_has_no_other_keys(api: Api, timeout: float | None) -> None:
    process = await ended(api, await api.start("echo out; exec sleep 0.5", timeout=timeout, env={"A": "b"}))
    assert set(process) == FIRST_KEYS | LAST_KEYS


@pytest.mark.parametrize(
    ("cmd", "status", "code"),
    [("true", "completed", 0), ("exit 3", "failed", 3), ("kill -9 $$", "failed", -1), ("kill -15 $$", "failed", -1)],
)
async def test_status_and_code_of_what_ended_by_itself(api: Api, cmd: str, status: str, code: int) -> None:
    process = await ended(api, await api.start(cmd))
    assert (process["status"], process["exit_code"]) == (status, code)


async def test_status_of_what_a_stranger_killed_is_failed(api: Api) -> None:
    id = await api.start("exec sleep 300")
    os.kill((await api.process(id))["pid"], signal.SIGKILL)
    assert (await ended(api, id))["status"] == "failed"


async def test_status_of_what_was_killed(api: Api) -> None:
    id = await api.start("sleep 300")
    await kill(api, id)
    process = await api.process(id)
    assert (process["status"], process["exit_code"]) == ("killed", -1)


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [1, 0.3])
async def test_timeout_kills_the_whole_tree(api: Api, tmp_path: Path, timeout: float) -> None:
    cmd, file = hard_to_end(tmp_path)
    process = await within(timeout + 5, ended(api, await api.start(cmd, timeout=timeout)))
    assert (process["status"], process["exit_code"]) == ("killed", -1)
    await gone(await pids_in(file, HARD))


async def test_times_are_utc_and_in_order(api: Api) -> None:
    process = await ended(api, await api.start("sleep 0.1"))
    times = [process["started_at"], process["completed_at"]]
    assert all(RFC_3339_UTC.fullmatch(time) for time in times)
    began, completed = (datetime.fromisoformat(time.replace("Z", "+00:00")) for time in times)
    assert 0.1 <= (completed - began).total_seconds() < 5
    assert abs(began.timestamp() - Path(f"/proc/{os.getpid()}").stat().st_ctime) < 3600


async def test_it_has_ended_when_sh_has_and_its_children_live_on(api: Api) -> None:
    id = await api.start("sleep 300 & echo $!")
    events = await within(3, (await api.logs(id)).all())
    assert (await api.process(id))["status"] == "completed"
    pid = int(events[0].data["data"])
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


async def test_processes_are_not_shared_between_daemons(api: Api, start_daemon: Any) -> None:
    id = await api.start("true")
    other = start_daemon()
    response = await kill(Api(other.url, other.secret), id)
    assert response.json()["error"] == f"process not found: {id}"


async def test_commands_of_run_are_not_listed(api: Api) -> None:
    await api.run("echo not-listed-41c2")
    assert b"not-listed-41c2" not in (await api.get("/list_processes")).body


# Kill


async def test_kill_answers_when_all_descendants_are_gone(api: Api, tmp_path: Path) -> None:
    cmd, file = hard_to_end(tmp_path)
    id = await api.start(cmd)
    pids = await pids_in(file, HARD)
    assert all(map(alive, pids))
    response = await within(5, kill(api, id))
    assert not any(map(alive, pids))
    assert response.status == 200
    assert response.json() == {"success": True, "message": "Process killed successfully"}
    assert (await api.process(id))["status"] == "killed"


async def test_kill_leaves_other_processes_alone(api: Api) -> None:
    other = await api.start("sleep 300")
    await kill(api, await api.start("sleep 300"))
    process = await api.process(other)
    assert process["status"] == "running"
    assert alive(process["pid"])
    await kill(api, other)


async def test_kill_of_an_unknown_id(api: Api) -> None:
    response = await kill(api, "no-such-id-é")
    assert response.status == 400
    assert response.json() == {"success": False, "error": "process not found: no-such-id-é"}
    assert response.body.isascii()


@pytest.mark.parametrize(("cmd", "status"), [("true", "completed"), ("false", "failed")])
async def test_kill_of_what_has_ended(api: Api, cmd: str, status: str) -> None:
    id = await api.start(cmd)
    await ended(api, id)
    response = await kill(api, id)
    assert response.status == 400
    assert response.json() == {"success": False, "error": f"process is not running (status: {status})"}
    assert (await api.process(id))["status"] == status


async def test_kill_of_what_was_killed(api: Api) -> None:
    id = await api.start("sleep 300")
    await kill(api, id)
    response = await kill(api, id)
    assert response.status == 400
    assert response.json() == {"success": False, "error": "process is not running (status: killed)"}


async def test_kill_twice_at_once_does_no_harm(api: Api) -> None:
    id = await api.start("sleep 300")
    responses = await gatherResults([within(10, kill(api, id)) for _ in range(5)])
    assert 200 in [response.status for response in responses]
    assert {response.status for response in responses} <= {200, 400}
    assert (await api.process(id))["status"] == "killed"


async def test_kill_of_a_stopped_process(api: Api) -> None:
    id = await api.start("kill -STOP $$; sleep 300")
    pid = (await api.process(id))["pid"]
    await until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    assert (await within(5, kill(api, id))).status == 200
    assert not alive(pid)


@pytest.mark.parametrize("name", ["TERM", "SIGTERM", "term", 15, "15"])
async def test_kill_with_another_signal(api: Api, tmp_path: Path, name: str | int) -> None:
    ready = tmp_path / "ready"
    id = await api.start(f'trap "echo got TERM; exit 7" TERM; sleep 300 & touch {ready}; while :; do wait; done')
    await until(ready.exists)
    response = await within(5, kill(api, id, signal=name))
    assert response.status == 200
    events = await (await api.logs(id)).all()
    assert events[0].data["data"] == "got TERM"
    process = await api.process(id)
    assert (process["status"], process["exit_code"]) == ("killed", 7)


@pytest.mark.slow
async def test_kill_with_a_signal_that_is_ignored_ends_all_the_same(api: Api, tmp_path: Path) -> None:
    cmd, file = hard_to_end(tmp_path)
    id = await api.start(cmd)
    pids = await pids_in(file, HARD)
    assert (await within(10, kill(api, id, signal="TERM", grace=0.3))).status == 200
    assert not any(map(alive, pids))
    assert (await api.process(id))["status"] == "killed"


@pytest.mark.parametrize("name", ["NOPE", "", 0, -1, 99_999, "²", "SIG", True, 1.5, ["TERM"]])
async def test_kill_with_no_signal_of_that_name(api: Api, name: Any) -> None:
    id = await api.start("sleep 300")
    response = await kill(api, id, signal=name)
    assert response.status == 400
    assert response.json()["success"] is False
    assert "signal" in response.json()["error"]
    assert (await api.process(id))["status"] == "running"
    await kill(api, id)


@pytest.mark.parametrize("body", [{}, {"id": 1}, {"id": None}, {"id": ""}])
async def test_kill_with_a_bad_id_names_it(api: Api, body: dict[str, Any]) -> None:
    response = await api.post("/kill_process", body)
    assert response.status == 400
    assert response.json()["success"] is False
    assert "id" in response.json()["error"]


@pytest.mark.parametrize("secret", [None, "wrong"])
async def test_nothing_is_listed_or_killed_without_the_token(api: Api, daemon: Daemon, secret: str | None) -> None:
    stranger = Api(daemon.url, secret)
    id = await api.start("sleep 300")
    assert (await stranger.get("/list_processes")).status == 401
    assert (await stranger.get(f"/process_logs_streaming?id={id}")).status == 401
    assert (await kill(stranger, id)).status == 401
    assert (await api.process(id))["status"] == "running"
    await kill(api, id)
