"""``/ports``, ``/ports/wait`` and ``/processes/<id>/wait``: to know when a server is ready."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import Deferred, succeed

from sandboxd.processes import listeners
from tests.client import Api
from tests.daemon import Daemon
from tests.waiting import Gate

PYTHON = sys.executable

SERVER = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        status = int(self.path.rpartition("/")[2] or 200)
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args): pass
time.sleep(float(sys.argv[2]))
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(port: int, after: float = 0) -> str:
    """A command that answers ``/<status>`` with that status, from some seconds after its start."""
    return f"exec {PYTHON} -c '{SERVER}' {port} {after}"


@pytest.fixture
def port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.close()


async def wait(api: Api, id: str, **body: Any) -> Any:
    response = await api.post(f"/processes/{id}/wait", body)
    assert response.status == 200, response
    return response.json()


async def kill(api: Api, id: str) -> None:
    assert (await api.post("/kill_process", {"id": id})).status == 200


# The list


async def test_ports_that_are_listened_on_are_listed_with_whose_they_are(api: Api, daemon: Daemon, port: int) -> None:
    id = await api.start(server(port))
    await wait(api, id, port=port, timeout=20)
    pid = (await api.process(id))["pid"]
    with (
        socket.create_server(("::1", port), family=socket.AF_INET6),
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as other,
    ):
        assert (await api.post("/bind_port", {"port": str(port)})).status in (200, 409)
        bound = (await api.get("/port_status")).json()["port"]
        found = (await api.get("/ports")).json()["ports"]
        numbers = [each["port"] for each in found]
        assert numbers == sorted(set(numbers))
        assert daemon.port not in numbers
        assert daemon.proxy_port not in numbers
        assert {
            "port": port,
            "addresses": ["127.0.0.1", "::1"],
            "pid": pid,
            "execution": id,
            "bound": bound == str(port),
        } in found
        (foreign,) = [each for each in found if each["port"] == other.getsockname()[1]]
        assert foreign["addresses"] == ["::"]
        assert foreign["execution"] is None
        assert foreign["pid"] is not None
    await api.post("/unbind_port", {})
    await kill(api, id)
    assert port not in [each["port"] for each in (await api.get("/ports")).json()["ports"]]


def test_netlink_and_proc_tell_the_same() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)),
        socket.create_server(("::1", 0), family=socket.AF_INET6),
        socket.create_server(("0.0.0.0", 0)) as four,
        socket.create_connection(four.getsockname()),
    ):
        for _ in range(100):  # until nobody else on this machine has begun or ceased to listen meanwhile
            before = set(listeners._from_proc())
            found = set(listeners.listeners())
            after = set(listeners._from_proc())
            if before == after:
                break
        assert found == after
        assert len(found) >= 3
        assert (four.getsockname()[1], "0.0.0.0") in {(each.port, each.address) for each in found}


# Ports


@pytest.mark.slow
async def test_waiting_for_a_port_answers_when_anybody_listens(api: Api, port: int) -> None:
    id = await api.start(server(port, 0.5))
    started = time.monotonic()
    assert (await api.post("/ports/wait", {"port": port, "timeout": 20})).json() == {"ready": True, "reason": "port"}
    assert time.monotonic() - started > 0.3
    socket.create_connection(("127.0.0.1", port), 5).close()
    assert (await api.post("/ports/wait", {"port": port, "timeout": 0})).json()["ready"] in (True, False)
    await kill(api, id)


@pytest.mark.slow
async def test_waiting_for_a_port_that_nobody_opens_ends_with_the_timeout(api: Api, port: int) -> None:
    started = time.monotonic()
    reply = await api.post("/ports/wait", {"port": port, "timeout": 0.5})
    assert reply.json() == {"ready": False, "reason": "timeout"}
    assert 0.4 < time.monotonic() - started < 5


@pytest.mark.slow
@pytest.mark.parametrize(("path", "ready"), [("/200", True), ("/302", True), ("/404", False), ("/500", False)])
async def test_an_http_answer_is_ready_if_it_is_2xx_or_3xx(api: Api, port: int, path: str, ready: bool) -> None:
    id = await api.start(server(port))
    await wait(api, id, port=port, timeout=20)
    expected = {"ready": ready, "reason": "http" if ready else "timeout"}
    reply = await api.post("/ports/wait", {"port": port, "http": path, "timeout": 5 if ready else 0.5})
    assert reply.json() == expected
    reason = (await wait(api, id, port=port, http=path, timeout=5 if ready else 0.5))["reason"]
    assert reason == expected["reason"]
    await kill(api, id)


@pytest.mark.slow
async def test_a_server_that_does_not_answer_is_not_ready(api: Api) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        reply = await api.post("/ports/wait", {"port": silent.getsockname()[1], "http": "/", "timeout": 0.5})
    assert reply.json() == {"ready": False, "reason": "timeout"}


async def test_all_who_wait_share_a_look_and_nobody_costs_none() -> None:
    looks: list[float] = []

    class Clock:
        now = 0.0

        def __init__(self) -> None:
            self.calls: list[tuple[float, Callable[[], None]]] = []

        def seconds(self) -> float:
            return self.now

        def callLater(self, delay: float, call: Callable[[], None]) -> None:
            self.calls.append((delay, call))

    class Immediately:
        def __call__(self, function: Any) -> Any:
            looks.append(clock.now)
            return succeed([])

    clock = Clock()
    poll = listeners.ListenerPoll(clock, Immediately())  # type: ignore[arg-type]
    waiting = [poll.when_looked() for _ in range(100)]
    assert [delay for delay, _ in clock.calls] == [0]
    clock.calls.pop()[1]()
    assert all(deferred.called for deferred in waiting)
    assert looks == [0]
    assert clock.calls == []
    clock.now = 0.04
    again = poll.when_looked()
    again.addErrback(lambda _: None)
    assert clock.calls[0][0] == pytest.approx(0.06)
    again.cancel()
    clock.calls.pop()[1]()
    assert looks == [0]
    assert clock.calls == []


@pytest.mark.parametrize(
    "body",
    [{}, {"port": 0}, {"port": 65536}, {"port": "http"}, {"port": 1, "http": "x"}, {"port": 1, "http": "/a b"}],
)
async def test_what_cannot_be_waited_for_is_refused(api: Api, body: Any) -> None:
    assert (await api.post("/ports/wait", body)).status == 400


# Processes


@pytest.mark.slow
async def test_a_process_is_ready_when_it_listens_and_not_when_another_does(api: Api, port: int) -> None:
    other = await api.start(server(port))
    await wait(api, other, port=port, timeout=20)
    idle = await api.start("sleep 60")
    assert (await wait(api, idle, port=port, timeout=0.5))["reason"] == "timeout"
    found = await wait(api, other, port=port, timeout=0)
    assert found["reason"] == "port"
    assert found["id"] == other
    assert found["status"] == "running"
    await kill(api, idle)
    await kill(api, other)


@pytest.mark.slow
async def test_the_first_reason_in_the_order_of_the_document_is_told(api: Api, port: int) -> None:
    id = await api.start(f"echo ready; {server(port)}")
    await wait(api, id, port=port, timeout=20)
    asked = {"output": "ready", "port": port, "http": "/200", "timeout": 20}
    assert (await wait(api, id, **asked))["reason"] == "output"
    assert (await wait(api, id, **{**asked, "output": "never"}))["reason"] == "http"
    assert (await wait(api, id, port=port, http="/404", timeout=0.5))["reason"] == "timeout"
    await kill(api, id)


@pytest.mark.slow
async def test_a_grandchild_that_listens_counts(api: Api, port: int, tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER)
    id = await api.start(f"setsid {PYTHON} {script} {port} 0.3 & wait")
    assert (await wait(api, id, port=port, timeout=20))["reason"] == "port"
    await kill(api, id)


async def test_output_that_is_there_already_is_found(api: Api) -> None:
    id = await api.start("printf 'one\\nServer ready on 80\\nthree\\n'; sleep 60")
    found = await wait(api, id, output="three", timeout=20)
    assert (found["reason"], found["seq"], found["line"]) == ("output", 3, "three")
    found = await wait(api, id, output="ready on", timeout=0)
    assert (found["reason"], found["seq"], found["line"]) == ("output", 2, "Server ready on 80")
    await kill(api, id)


async def test_output_that_comes_later_is_found(api: Api, gate: Gate) -> None:
    id = await api.start(f"echo begin; {gate.wait}; echo 'é is ready' >&2; sleep 60")
    waiting = api.post(f"/processes/{id}/wait", {"output": "é is", "timeout": 20})
    pending = Deferred.fromCoroutine(waiting)
    await wait(api, id, output="begin", timeout=20)
    assert not pending.called
    gate.open()
    assert (await pending).json()["line"] == "é is ready"
    await kill(api, id)


async def test_a_line_in_pieces_counts_as_one(api: Api) -> None:
    # A record has 10,240 bytes at most: the text lies across the border of two.
    id = await api.start("head -c 10237 /dev/zero | tr '\\0' x; printf 'needle'; head -c 30000 /dev/zero; sleep 60")
    found = await wait(api, id, output="xneedle", timeout=20)
    assert (found["reason"], found["seq"]) == ("output", 2)
    assert "xxxneedle" in found["line"]
    await kill(api, id)


async def test_output_before_the_end_wins_over_the_end(api: Api) -> None:
    id = await api.start("echo last words; exit 3")
    found = await wait(api, id, output="last words", timeout=20)
    assert found["reason"] == "output"
    found = await wait(api, id, output="no such words", timeout=20)
    assert (found["reason"], found["exit_code"]) == ("exit", 3)
    assert "seq" not in found


async def test_nothing_but_the_end(api: Api) -> None:
    id = await api.start("exit 3")
    assert (await wait(api, id))["reason"] == "exit"
    id = await api.start("sleep 60")
    assert (await wait(api, id, timeout=0.1))["reason"] == "timeout"
    await kill(api, id)


@pytest.mark.parametrize(
    "body", [{"http": "/"}, {"output": ""}, {"output": "a\nb"}, {"output": "a\n"}, {"output": 1}, {"port": "80"}]
)
async def test_a_process_cannot_be_waited_for_with_what_makes_no_sense(api: Api, body: Any) -> None:
    id = await api.start("sleep 60")
    assert (await api.post(f"/processes/{id}/wait", body)).status == 400
    await kill(api, id)


async def test_a_waiter_that_hangs_up_leaves_nothing(api: Api, port: int) -> None:
    id = await api.start("sleep 60")
    pending = api.request("POST", f"/processes/{id}/wait", {"port": port, "output": "never"})
    followed = time.monotonic() + 10
    while (await api.get(f"/processes/{id}")).json()["output"]["followers"] == 0:
        assert time.monotonic() < followed
    pending.addErrback(lambda _: None)
    pending.cancel()
    while (await api.get(f"/processes/{id}")).json()["output"]["followers"]:
        assert time.monotonic() < followed
    await kill(api, id)
