"""Terminals and ``/processes/<id>/attach``: real programs, drawn by a terminal emulator, over real WebSockets."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from threading import Thread
from types import SimpleNamespace
from typing import Any, cast
from urllib.request import ProxyHandler, Request, build_opener

import pyte
import pytest
from twisted.internet import reactor
from twisted.internet.threads import deferToThread
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from sandboxd.daemon.sockets import ListeningSocket
from sandboxd.service import Sandboxd
from sandboxd.web.tokens import Credentials
from tests.daemon import Daemon, alive
from tests.waiting import wait_for

V5, V4 = Subprotocol("v5.channel.k8s.io"), Subprotocol("v4.channel.k8s.io")
MIB = 1024 * 1024


def call(daemon: Daemon, method: str, path: str, body: Any = None) -> Any:
    """The JSON of a reply, whatever its status, with ``http`` as its status."""
    data = None if body is None else json.dumps(body).encode()
    request = Request(daemon.url + path, data, {"Authorization": f"Bearer {daemon.secret}"}, method=method)
    opener = build_opener(ProxyHandler({}))
    opener.handlers = [each for each in opener.handlers if type(each).__name__ != "HTTPErrorProcessor"]
    opener.process_response = {}
    with opener.open(request, timeout=30) as response:
        return {**json.load(response), "http": response.status}


def start(daemon: Daemon, cmd: str | None = None, **fields: Any) -> str:
    """The id of a new process."""
    reply = call(daemon, "POST", "/start_process", {**({} if cmd is None else {"cmd": cmd}), **fields})
    assert reply["http"] == 201, reply
    return str(reply["id"])


def kill(daemon: Daemon, id: str) -> None:
    call(daemon, "POST", "/kill_process", {"id": id})


def described(daemon: Daemon, id: str) -> Any:
    return call(daemon, "GET", f"/processes/{id}")


class Attached:
    """A client on a process; its terminal, if it has one, is drawn by an emulator."""

    def __init__(self, daemon: Daemon, id: str, query: str = "", cols: int = 80, rows: int = 24, **options: Any):
        options.setdefault("subprotocols", [V5])
        options.setdefault("close_timeout", 10)
        self._connecting = connect(
            f"ws://127.0.0.1:{daemon.port}/processes/{id}/attach{query}",
            additional_headers={"Authorization": f"Bearer {daemon.secret}"},
            open_timeout=10,
            proxy=None,
            compression=None,
            max_size=None,
            **options,
        )
        self.output = {1: b"", 2: b""}
        self.events: list[Any] = []
        self.draws = True
        self.status: Any = None
        self.code: int | None = None
        self.screen = pyte.Screen(cols, rows)
        self._stream = pyte.ByteStream(self.screen)

    def __enter__(self) -> Attached:
        self.socket: ClientConnection = self._connecting.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._connecting.__exit__(None, None, None)

    def type(self, text: str | bytes) -> None:
        """Send to channel 0."""
        self.socket.send(b"\0" + (text.encode() if isinstance(text, str) else text))

    def resize(self, cols: int, rows: int) -> None:
        self.socket.send(b"\4" + json.dumps({"Width": cols, "Height": rows}).encode())
        self.screen.resize(rows, cols)

    def step(self, timeout: float = 10) -> bool:
        """Take one message; False once the WebSocket is closed."""
        try:
            message = self.socket.recv(timeout=timeout)
        except ConnectionClosed as closed:
            self.code = None if closed.rcvd is None else closed.rcvd.code
            return False
        if isinstance(message, str):
            self.events.append(json.loads(message))
        elif message[0] == 3:
            self.status = json.loads(message[1:])
        else:
            self.output[message[0]] += message[1:]
            if message[0] == 1 and self.draws:
                self._stream.feed(message[1:])
        return True

    def until(self, fact: Callable[[], object], seconds: float = 15) -> None:
        """Take messages until something holds."""
        deadline = time.monotonic() + seconds
        while not fact():
            assert time.monotonic() < deadline, (self.text, self.output)
            with suppress(TimeoutError):
                assert self.step(0.2) or fact(), (self.code, self.output)

    def to_the_end(self) -> None:
        """Take messages until the WebSocket is closed."""
        while self.step(30):
            pass

    @property
    def text(self) -> str:
        """What the terminal shows."""
        return "\n".join(line.rstrip() for line in self.screen.display).rstrip()

    @property
    def lines(self) -> list[str]:
        """The lines that the terminal shows."""
        return self.text.split("\n")

    def shows(self, text: str) -> None:
        """Wait until the terminal shows a text."""
        self.until(lambda: text in self.text)


@pytest.fixture
def shell(daemon: Daemon) -> Iterator[str]:
    """An interactive bash in a terminal."""
    id = start(daemon, argv=["bash", "--norc", "--noprofile", "-i"], tty=True, env={"PS1": "$ "})
    yield id
    kill(daemon, id)


# A terminal


def test_a_shell_has_job_control_and_a_prompt(daemon: Daemon, shell: str) -> None:
    with Attached(daemon, shell) as client:
        client.shows("$")
        client.type("tty; echo $TERM; stty size; ps -o tpgid= -p $$\r")
        client.shows("24 80")
        assert "/dev/pts/" in client.text
        assert "xterm-256color" in client.text
        assert "job control" not in client.text
        assert "cannot set" not in client.text


def test_keys_that_mean_signals_and_the_end_of_file(daemon: Daemon, shell: str) -> None:
    with Attached(daemon, shell) as client:
        client.shows("$")
        client.type("sleep 1000; echo code=$?\r")
        client.shows("sleep 1000")
        pids = "pgrep -f 'sleep 100[0]' || true"
        client.until(lambda: call(daemon, "POST", "/run", {"cmd": pids})["stdout"])
        client.type("\x03")
        client.until(lambda: client.lines[-1] == "$")
        client.type("cat\r")
        client.until(lambda: client.lines[-1] == "$ cat")
        client.type("typed\r")
        client.until(lambda: client.text.count("typed") == 2)
        client.type("\x1a")
        client.until(lambda: "Stopped" in client.text and client.lines[-1] == "$")
        client.type("fg\r")
        client.until(lambda: client.lines[-1] == "cat")
        client.type("again\r")
        client.until(lambda: client.text.count("again") == 2)
        client.type("\x04")
        client.until(lambda: client.lines[-1] == "$")
        client.type("exit 7\r")
        client.to_the_end()
        assert client.status["status"] == "Failure"
        assert client.status["details"] == {"causes": [{"reason": "ExitCode", "message": "7"}]}
        assert client.code == 1000


@pytest.mark.parametrize("program", ["vim -u NONE -N", "less"])
def test_a_full_screen_program_is_drawn_and_redrawn_when_resized(daemon: Daemon, tmp_path: Path, program: str) -> None:
    name = program.split()[0]
    if call(daemon, "POST", "/run", {"cmd": f"command -v {name}"})["code"] != 0:
        pytest.skip(f"NOT TESTED: {name} is not installed")
    page = tmp_path / "page.txt"
    page.write_text("".join(f"line {number}\n" for number in range(1, 201)))
    id = start(daemon, f"exec {program} {page}", tty={"cols": 120, "rows": 40, "term": "linux"})
    stat = Path(f"/proc/{described(daemon, id)['pid']}/stat")
    with Attached(daemon, id, cols=120, rows=40) as client:
        client.until(lambda: "line 39" in client.screen.display[38] and client.screen.display[39].strip())
        # less forgets a signal that comes between its last output and its wait for keys.
        client.until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "S")
        assert client.screen.display[0].startswith("line 1 ")
        client.resize(100, 20)
        client.until(lambda: "line 18" in client.text and "line 21" not in client.text)
        assert described(daemon, id)["tty"] == {"cols": 100, "rows": 20}
        client.type("G")
        client.shows("line 200")
        client.type("\x1b:q\r" if name == "vim" else "q")
        client.to_the_end()
        assert client.status["status"] == "Success"


def test_resize_by_its_route(daemon: Daemon, shell: str) -> None:
    with Attached(daemon, shell) as client:
        client.shows("$")
        reply = call(daemon, "POST", f"/processes/{shell}/resize", {"cols": 132, "rows": 50})
        assert reply == {"success": True, "http": 200}
        client.type("stty size\r")
        client.shows("50 132")
    plain = start(daemon, "sleep 60")
    assert call(daemon, "POST", f"/processes/{plain}/resize", {"cols": 1, "rows": 1})["http"] == 409
    assert call(daemon, "POST", f"/processes/{shell}/resize", {"cols": 0, "rows": 1})["http"] == 400
    kill(daemon, plain)


def test_a_terminal_that_its_processes_have_closed_has_no_size(daemon: Daemon) -> None:
    id = start(daemon, "exec <&- >&- 2>&-; exec sleep 60", tty=True)
    body = {"cols": 120, "rows": 40}
    wait_for(lambda: call(daemon, "POST", f"/processes/{id}/resize", body)["http"] == 409)
    with Attached(daemon, id) as client:
        client.resize(120, 40)
        assert client.socket.ping().wait(10)  # the resize is carried out before the pong is sent
        kill(daemon, id)
        client.to_the_end()
        assert client.status["details"]["causes"][0]["message"] == "137"


def test_without_a_command_a_terminal_gets_the_login_shell(daemon: Daemon) -> None:
    id = start(daemon, tty=True)
    with Attached(daemon, id) as client:
        client.type("echo $0-$-\r")
        client.until(lambda: b"sh-" in client.output[1])
        client.type("exit\r")
        client.to_the_end()
    assert described(daemon, id)["command"].startswith("/")
    assert call(daemon, "POST", "/start_process", {})["http"] == 400
    assert call(daemon, "POST", "/run", {"tty": True})["http"] == 400


def test_a_terminal_of_a_user_is_that_users(daemon: Daemon) -> None:
    reply = call(
        daemon, "POST", "/run", {"cmd": "stat -c %U $(tty); test -w $(tty) && id -un", "user": "nobody", "tty": True}
    )
    assert reply["stdout"].split() == ["nobody", "nobody"]


def test_run_in_a_terminal(daemon: Daemon) -> None:
    reply = call(daemon, "POST", "/run", {"cmd": "test -t 0 && echo out; echo err >&2", "tty": True})
    assert (reply["stdout"], reply["stderr"], reply["code"]) == ("out\r\nerr\r\n", "", 0)
    reply = call(daemon, "POST", "/run", {"cmd": "read x; echo got $x", "tty": {"term": "dumb"}, "input": "typed\r"})
    assert reply["stdout"].endswith("got typed\r\n")


def test_the_last_output_of_a_terminal_is_not_lost(daemon: Daemon) -> None:
    for _ in range(20):
        reply = call(daemon, "POST", "/run", {"cmd": "seq 1 2000", "tty": True})
        assert reply["stdout"].split() == [str(number) for number in range(1, 2001)]


def test_a_prompt_is_a_partial_record_soon(daemon: Daemon) -> None:
    id = start(daemon, "printf 'name? '; read name; echo hello $name", tty=True)
    found = call(daemon, "POST", f"/processes/{id}/wait", {"output": "name?", "timeout": 10})
    assert found["reason"] == "output"
    (record,) = call(daemon, "GET", f"/processes/{id}/logs")["records"]
    assert (record["stream"], record["data"], record["partial"]) == ("stdout", "name? ", True)
    kill(daemon, id)


def test_killing_a_terminal_kills_its_jobs(daemon: Daemon, shell: str) -> None:
    with Attached(daemon, shell) as client:
        client.shows("$")
        client.type("sleep 1234 & echo pid=$!.\r")
        client.until(lambda: re.search(r"pid=\d+\.", client.text))
        pid = int(re.findall(r"pid=(\d+)\.", client.text)[0])
        assert alive(pid)
        kill(daemon, shell)
        client.to_the_end()
        assert client.status["details"]["causes"][0]["message"] == "137"
    assert not alive(pid)


def test_a_stop_hangs_terminals_up(start_daemon: Callable[..., Daemon], tmp_path: Path) -> None:
    daemon = start_daemon()
    mark = tmp_path / "hung-up"
    id = start(
        daemon,
        f"trap 'echo hup > {mark}; exit 0' HUP; trap '' TERM; echo ready; while :; do sleep 0.05; done",
        tty=True,
    )
    with Attached(daemon, id) as client:
        client.until(lambda: b"ready" in client.output[1])
        assert daemon.stop() == 0
        with suppress(ConnectionClosed, TimeoutError, AssertionError):
            client.to_the_end()
    assert mark.read_text() == "hup\n"


# Attach


def test_output_is_exact_and_in_its_channels(daemon: Daemon) -> None:
    id = start(daemon, "printf 'a\\r\\nb\\0\\377'; printf 'err' >&2; exit 3")
    with Attached(daemon, id, "?events=true") as client:
        assert client.socket.subprotocol == V5
        client.to_the_end()
        assert client.output == {1: b"a\r\nb\0\xff", 2: b"err"}
        assert client.status["reason"] == "NonZeroExitCode"
        assert client.events == [{"event": "started", "id": id, "pid": described(daemon, id)["pid"], "tty": None}]
    for subprotocols in ([V4], None):
        with Attached(daemon, id, subprotocols=subprotocols) as client:
            assert client.socket.subprotocol == (subprotocols and V4)
            client.to_the_end()
            assert (client.output[1], client.code) == (b"a\r\nb\0\xff", 1000)


def test_success_and_a_signal(daemon: Daemon) -> None:
    for cmd, expected in (("true", None), ("kill -SEGV $$", "139")):
        id = start(daemon, cmd)
        with Attached(daemon, id) as client:
            client.to_the_end()
        if expected is None:
            assert client.status == {"metadata": {}, "status": "Success"}
        else:
            assert client.status["details"]["causes"][0]["message"] == expected


def test_an_unfinished_line_is_seen_at_once(daemon: Daemon) -> None:
    id = start(daemon, "printf unfinished; read x", stdin=True)
    with Attached(daemon, id) as client:
        client.until(lambda: client.output[1] == b"unfinished")
        with Attached(daemon, id, "?tail=0") as late:
            client.type("\n")
            late.to_the_end()
            assert late.output[1] == b""


def test_after_and_tail_choose_where_it_begins(daemon: Daemon) -> None:
    id = start(daemon, "seq 1 100; printf end")
    call(daemon, "POST", f"/processes/{id}/wait", {})
    for query, first in (("", "1"), ("?after=90", "91"), ("?tail=3", "99"), ("?tail=0", None), ("?tail=1000", "1")):
        with Attached(daemon, id, query) as client:
            client.to_the_end()
            assert client.output[1].split()[:1] == ([first.encode()] if first else [])


@pytest.mark.slow
def test_64_mb_both_ways_are_byte_complete(daemon: Daemon) -> None:
    blob = os.urandom(64 * MIB)
    expected = hashlib.sha256(blob).hexdigest()
    id = start(daemon, "tee >(sha256sum >&2)", shell="/bin/bash", stdin=True)
    found = hashlib.sha256()
    size = 0
    with Attached(daemon, id) as client:
        client.draws = False

        def step() -> bool:
            nonlocal size
            more = client.step(30)
            found.update(client.output[1])
            size += len(client.output[1])
            client.output[1] = b""
            return more

        for begin in range(0, len(blob), MIB // 2):
            client.type(blob[begin : begin + MIB // 2])
            while size < begin - 4 * MIB:  # a client that falls behind by more than the log keeps would get gaps
                assert step()
        client.socket.send(b"\xff\0")
        while step():
            pass
        assert client.output[2].split()[:1] == [expected.encode()]
        assert (size, found.hexdigest()) == (64 * MIB, expected)


def test_v4_has_no_closing_of_channels_and_none_asked_for_is_v5(daemon: Daemon) -> None:
    id = start(daemon, "cat", stdin=True)
    with Attached(daemon, id, subprotocols=[V4]) as client:
        client.socket.send(b"\xff\0")
        client.to_the_end()
        assert client.code == 1003
    with Attached(daemon, id, subprotocols=None) as client:
        client.socket.send("\0text")
        client.socket.send(b"\xff\0")
        client.to_the_end()
        assert (client.output[1], client.status["status"]) == (b"text", "Success")


def test_channel_0_without_stdin_closes_with_1008(daemon: Daemon) -> None:
    id = start(daemon, "sleep 60")
    with Attached(daemon, id) as client:
        client.type("x")
        client.to_the_end()
        assert client.code == 1008
    assert described(daemon, id)["status"] == "running"
    kill(daemon, id)


@pytest.mark.parametrize("message", [b"\x01x", b"\x07", b"\x04{}", b"\x04nonsense", b'\x04{"Width":0,"Height":1}'])
def test_a_malformed_message_closes_with_1003(daemon: Daemon, shell: str, message: bytes) -> None:
    with Attached(daemon, shell) as client:
        client.socket.send(message)
        client.to_the_end()
        assert client.code == 1003
    assert described(daemon, shell)["status"] == "running"


@pytest.mark.slow
def test_a_stalled_client_does_not_hold_up_another(daemon: Daemon) -> None:
    id = start(daemon, "read x; seq 1 1000000; echo done", tty=True)
    with Attached(daemon, id, max_queue=1) as stalled, Attached(daemon, id, "?events=true") as quick:
        quick.draws = False
        quick.type("\r")
        while quick.step(30):
            quick.output[1] = quick.output[1][-100:]
        assert b"done" in quick.output[1]
        assert quick.status["status"] == "Success"
        with suppress(TimeoutError):
            stalled.step(1)
        with suppress(OSError):
            stalled.socket.socket.shutdown(socket.SHUT_RDWR)
        stalled.socket.socket.close()


def test_a_client_that_was_stalled_is_told_what_it_has_missed(daemon: Daemon) -> None:
    size = 32 * MIB
    id = start(daemon, f"read x; yes 123456789012345 | head -c {size}", stdin=True)

    def bytes_to_the_end(client: Attached) -> int:
        """The number of bytes that a client gets."""
        client.draws = False
        found = 0
        while client.step(30):
            found += len(client.output[1])
            client.output[1] = b""
        assert client.status["status"] == "Success"
        return found

    small = socket.socket()  # so that the kernel cannot hold all that the client does not read
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * 1024)
    small.connect(("127.0.0.1", daemon.port))
    with Attached(daemon, id, "?events=true", sock=small, max_queue=1, ping_interval=None) as client:
        client.type("\n")
        call(daemon, "POST", f"/processes/{id}/wait", {"timeout": 60})
        found = bytes_to_the_end(client)
    gaps = [event["dropped"] for event in client.events if event["event"] == "gap"]
    assert gaps
    assert sum(gaps) * 16 + found == size


def test_reattaching_replays_what_is_kept_and_tells_the_gap(daemon: Daemon) -> None:
    id = start(daemon, "seq 1 50000; exec sleep 60")
    call(daemon, "POST", f"/processes/{id}/wait", {"output": "50000", "timeout": 20})
    with Attached(daemon, id, "?events=true&after=0") as client:
        client.until(lambda: client.output[1].endswith(b"50000\n"))
        gaps = [event for event in client.events if event["event"] == "gap"]
        assert gaps == [{"event": "gap", "dropped": 40000}]
        assert client.output[1].split()[0] == b"40001"
    assert described(daemon, id)["status"] == "running"
    kill(daemon, id)


@pytest.mark.slow
def test_a_client_that_comes_back_gets_what_it_has_missed_to_the_byte(daemon: Daemon) -> None:
    id = start(
        daemon, "stty -echo -onlcr; printf 'one\\ntw'; read x; printf 'o\\nthree'; read x; seq 50000; read x", tty=True
    )
    with Attached(daemon, id, "?events=true&offset=0") as client:
        client.until(lambda: client.output[1] == b"one\ntw")
        client.type("\r")
        client.until(lambda: client.output[1] == b"one\ntwo\nthree")
    for offset in range(14):
        with Attached(daemon, id, f"?events=true&offset={offset}") as client:
            client.until(lambda: client.events and client.output[1] == b"one\ntwo\nthree"[offset:])  # noqa: B023
            (started,) = client.events
            assert started["bytes"] == 13
    with Attached(daemon, id, "?events=true&offset=13") as client:
        client.type("\r")
        client.until(lambda: client.output[1].endswith(b"\n50000\n"))
        whole = b"one\ntwo\nthree" + client.output[1]
    with Attached(daemon, id, "?events=true&offset=9") as client:
        client.until(lambda: client.output[1].endswith(b"\n50000\n"))
        gap = client.events[1]
        assert client.output[1] == whole[gap["offset"] :]
        assert gap["dropped"] > 40_000
    offset = len(whole) - 100
    with Attached(daemon, id, f"?events=true&offset={offset}") as client:
        client.until(lambda: client.output[1] == whole[offset:])
        assert [event["event"] for event in client.events] == ["started"]
    kill(daemon, id)


def test_an_offset_is_for_terminals_and_stands_alone(daemon: Daemon, shell: str) -> None:
    id = start(daemon, "exec sleep 60")
    for which, query in ((id, "?offset=1"), (shell, "?offset=1&tail=1")):
        with pytest.raises(InvalidStatus) as caught, Attached(daemon, which, query):
            pass
        assert caught.value.response.status_code == 400
    kill(daemon, id)


def test_an_unknown_process_is_404_before_the_upgrade(daemon: Daemon) -> None:
    with pytest.raises(InvalidStatus) as caught, Attached(daemon, "no-such-id"):
        pass
    assert caught.value.response.status_code == 404
    assert call(daemon, "GET", "/processes/no-such-id/attach")["http"] == 404


def test_tail_and_after_together_are_refused(daemon: Daemon, shell: str) -> None:
    with pytest.raises(InvalidStatus) as caught, Attached(daemon, shell, "?tail=1&after=1"):
        pass
    assert caught.value.response.status_code == 400


def test_closing_does_not_end_the_process_nor_keep_a_cursor(daemon: Daemon, shell: str) -> None:
    for _ in range(3):
        with Attached(daemon, shell) as client:
            client.shows("$")
    deadline = time.monotonic() + 10
    while described(daemon, shell)["output"]["followers"]:
        assert time.monotonic() < deadline
    assert described(daemon, shell)["status"] == "running"


def test_closing_lets_the_process_have_all_that_was_sent(daemon: Daemon, tmp_path: Path) -> None:
    size, file, gate = 240_000, tmp_path / "file", tmp_path / "gate"
    os.mkfifo(gate)
    id = start(daemon, f"read x < {gate}; exec tee {file}", stdin=True)
    with Attached(daemon, id, "?events=true") as client:
        for _ in range(size // 1000):
            client.type(bytes(1000))
        closing = Thread(target=client.socket.close)
        closing.start()
        wait_for(lambda: client.socket.protocol.close_rcvd)  # the rest waits in the daemon
        gate.write_text("\n")
        closing.join(20)
    wait_for(lambda: file.stat().st_size == size)
    kill(daemon, id)


async def test_input_that_nobody_reads_does_not_keep_a_closed_connection_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandboxd.web.websocket.CLOSE_TIMEOUT", 0.1)
    http, proxy = (ListeningSocket(socket.create_server(("127.0.0.1", 0))) for _ in range(2))
    service = Sandboxd(cast(Any, reactor), [http], [proxy], Credentials(("secret",)), os.environ)
    port = http.port
    local = cast(Daemon, SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, secret="secret"))

    def attach() -> None:
        id = start(local, "exec sleep 60", stdin=True)
        with Attached(local, id, close_timeout=None) as client:
            for _ in range(4):
                client.type(bytes(60_000))
        assert client.socket.protocol.close_rcvd is not None
        kill(local, id)

    service.startService()
    try:
        await deferToThread(attach).addTimeout(10, cast(Any, reactor))
    finally:
        await service.stopService()


def test_the_official_kubernetes_client_reads_and_writes(daemon: Daemon) -> None:
    ws_client = pytest.importorskip("kubernetes.stream.ws_client", reason="NOT TESTED: kubernetes is not installed")
    configuration = pytest.importorskip("kubernetes.client").Configuration()
    id = start(daemon, "read line; echo got $line; echo err >&2; exit 5", stdin=True)
    client = ws_client.WSClient(
        configuration,
        f"ws://127.0.0.1:{daemon.port}/processes/{id}/attach",
        {"authorization": f"Bearer {daemon.secret}"},
        capture_all=True,
    )
    assert client.subprotocol == V5
    client.write_stdin("hello\n")
    client.run_forever(timeout=10)
    assert client.read_stdout() == "got hello\n"
    assert client.read_stderr() == "err\n"
    assert client.returncode == 5
    client.sock.shutdown()
