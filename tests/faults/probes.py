"""The faults: each a name, what users complain about, and a probe for it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import statistics
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.faults.server import (
    PATIENCE,
    Failed,
    NotApplicable,
    Server,
    Stream,
    check,
    differences,
    hang_up,
    received,
)


class Fault(NamedTuple):
    """
    Something that a server may do wrong.

    :ivar probe: given the server and a directory on it; raises ``Failed`` or ``NotApplicable``, or returns a remark.
    :ivar limit: seconds that the probe may take.
    """

    name: str
    complaint: str
    probe: Callable[[Server, str], str | None]
    limit: float


FAULTS: list[Fault] = []


def fault(name: str, complaint: str, limit: float = 10) -> Callable[[Callable[[Server, str], str | None]], None]:
    """Add a fault to the suite."""

    def add(probe: Callable[[Server, str], str | None]) -> None:
        FAULTS.append(Fault(name, complaint, probe, limit))

    return add


@fault("unauthenticated", "Whoever can reach the port can run commands.")
def _unauthenticated(server: Server, folder: str) -> None:
    check(server.call("GET", "/health", token="").status == 200, "/health asks for a token")
    for path in (
        *("/run", "/run_streaming", "/start_process", "/kill_process", "/write_file", "/read_file", "/delete_file"),
        *("/make_dir", "/delete_dir", "/list_dir", "/bind_port", "/unbind_port"),
    ):
        for token in ("", "wrong", server.secret + "x"):
            status = server.call("POST", path, {}, token).status
            check(status == 401, f"POST {path} with the token {token[:5]!r} is answered with {status}")
    for path in ("/list_processes", "/process_logs_streaming?id=x"):
        status = server.call("GET", path, token="").status
        check(status == 401, f"GET {path} without a token is answered with {status}")


@fault("errors-in-json", "The client cannot parse the error: it is a page of text.")
def _errors_in_json(server: Server, folder: str) -> None:
    for method, path, body, status in (
        ("GET", "/no-such-route", None, 404),
        ("GET", "/run", None, 405),
        ("POST", "/run", b"{not json", 400),
        ("POST", "/run", b'{"cmd": 7}', 400),
        ("POST", "/write_file", b"[]", 400),
    ):
        reply = server.call(method, path, body)
        what = f"{method} {path} is answered with {reply.status}"
        check(reply.status == status, what)
        check(reply.type.startswith("application/json"), f"{what} and Content-Type {reply.type!r}")
        check(json.loads(reply.body).get("error"), f"{what} and no error text")


@fault("port-abc", "A port that is none is accepted, and the proxy fails later without a word.")
def _port_abc(server: Server, folder: str) -> None:
    server.post("/unbind_port")
    try:
        for port in ("abc", "0", "65536", "-1", "80x"):
            status = server.call("POST", "/bind_port", {"port": port}).status
            check(status == 400, f"port {port!r} is answered with {status}")
    finally:
        server.post("/unbind_port")


@fault("secret-in-environment", "Any command can read the server's token from its own environment.")
def _secret_in_environment(server: Server, folder: str) -> None:
    check(server.secret not in server.run("env")["stdout"], "env prints the token")


@fault("secret-in-proc", "Any command can read the server's token from /proc.")
def _secret_in_proc(server: Server, folder: str) -> None:
    for file in ("environ", "cmdline"):
        text = server.run(f"cat /proc/$PPID/{file} 2>/dev/null | tr '\\0' '\\n'")["stdout"]
        check(server.secret not in text, f"/proc/<server>/{file} shows the token")


@fault("stderr-first", "A command that writes more than 64 KiB to stderr before its stdout ends hangs for ever.")
def _stderr_first(server: Server, folder: str) -> None:
    reply = server.run("head -c 300000 /dev/zero | tr '\\0' e >&2; echo done")
    check(reply["stdout"] == "done\n", f"stdout is {reply['stdout'][:20]!r}")
    check(reply["stderr"] == "e" * 300000, f"{len(reply['stderr'])} of 300000 bytes of stderr")


@fault("held-reply", "`server & echo started` does not return before the server that it starts has ended.")
def _held_reply(server: Server, folder: str) -> str:
    began = time.monotonic()
    file = f"{folder}/pids"
    cmd = f"sleep 30 & echo $! >> {file}; echo hi"
    try:
        check(server.run(cmd)["stdout"] == "hi\n", "the output is lost")
        events = list(server.stream(cmd))
        check([event.name for event in events] == ["output", "complete"], f"/run_streaming sent {events}")
        return f"{time.monotonic() - began:.1f} s for two"
    finally:
        server.end(server.pids(file, 1))


#: Two processes below sh that tell their pids and wait.
LONG = "sh -c 'echo $$ >> {0}; exec sleep 60' & sh -c 'echo $$ >> {0}; sleep 60' & echo begun; wait"


@fault("hang-up-run", "The client of /run goes away, and its command runs on.")
def _hang_up_run(server: Server, folder: str) -> None:
    file = f"{folder}/pids"
    connection = server.send("POST", "/run", {"cmd": LONG.format(file)})
    pids = server.pids(file, 2)
    try:
        hang_up(connection)
        left = server.left(pids)
        check(not left, f"{len(left)} of {len(pids)} processes still run 4 s later")
    finally:
        server.end(pids)


@fault("hang-up-streaming", "The client of /run_streaming goes away, and what its command has started runs on.")
def _hang_up_streaming(server: Server, folder: str) -> None:
    file = f"{folder}/pids"
    stream = server.stream(LONG.format(file))
    pids = server.pids(file, 2)
    try:
        stream.hang_up()
        left = server.left(pids)
        check(not left, f"{len(left)} of {len(pids)} processes still run 4 s later")
    finally:
        server.end(pids)


#: Ways to start a grandchild, which ``{0}`` is; ``{1}`` is the file of its pid.
GRANDCHILDREN = {
    "plain": "sh -c '{0}' & wait",
    "setsid": "setsid sh -c '{0}' & wait",
    "double-fork": "(setsid sh -c '{0}' > /dev/null 2>&1 &); sleep 60",
    "ignoring-term": "sh -c 'trap \"\" TERM HUP INT; {0}' & wait",
    "stopped": "sh -c 'sleep 60 & echo $! >> {1}; kill -STOP $!; wait' & wait",
    "env-i": "(env -i PATH=\"$PATH\" setsid sh -c '{0}' > /dev/null 2>&1 &); sleep 60",
}


def _kill_leaves(name: str, cmd: str) -> None:
    @fault(f"kill-leaves-{name}", f"kill_process says success, and a grandchild lives on ({name}).")
    def _kill(server: Server, folder: str) -> None:
        file = f"{folder}/pids"
        id = server.start(cmd.format(f"echo $$ >> {file}; exec sleep 60", file))
        pids = server.pids(file, 1)
        try:
            reply = server.post("/kill_process", id=id)
            check(reply.get("success"), f"/kill_process replied {reply}")
            left = server.left(pids, 2)
            check(not left, "the grandchild still runs 2 s after the reply")
        finally:
            server.end(pids)


for _name, _cmd in GRANDCHILDREN.items():
    _kill_leaves(_name, _cmd)


@fault("one-complete", "A stream ends without its complete event, or has two of them, or a wrong code.")
def _one_complete(server: Server, folder: str) -> None:
    for cmd, code in (
        ("true", 0),
        ("exit 3", 3),
        ("echo out; echo err >&2; exit 1", 1),
        ("printf unfinished", 0),
        ("kill -9 $$", -1),
        ("no-such-command-here", 127),
    ):
        events = list(server.stream(cmd))
        complete = [event.data for event in events if event.name == "complete"]
        check(len(complete) == 1, f"{cmd!r}: {len(complete)} complete events")
        check(events[-1].name == "complete", f"{cmd!r}: complete is not the last event")
        check(complete[0]["code"] == code, f"{cmd!r}: code {complete[0]['code']}, not {code}")
        check(complete[0]["error"] is (code != 0), f"{cmd!r}: error is {complete[0]['error']}")


@fault("multibyte", "Characters beyond ASCII arrive broken, or break the client's lines.")
def _multibyte(server: Server, folder: str) -> None:
    line = "é€\U0001f600\u2028\u2029\x85 end"
    sent = [line, "€" * 50_000, "\\n\\u2028 \"quoted\" 'too'"]
    path = f"{folder}/text"
    server.post("/write_file", path=path, content="\n".join(sent) + "\n")
    stream = server.stream(f"cat {path}")
    # Python's clients split lines as str.splitlines does: at U+2028 and U+0085 too.
    text = b"".join(stream.chunks()).decode()
    try:
        output = [json.loads(line[5:]) for line in text.splitlines() if line.startswith("data:")][:-1]
    except ValueError as error:
        raise Failed(f"str.splitlines() cuts through the data: {error}") from None
    found = "".join(event["data"] + ("" if event.get("partial") else "\n") for event in output)
    check(found == "\n".join(sent) + "\n", f"{len(output)} events, which do not make up the text that was sent")


@fault("fifo", "read_file of a FIFO never returns.")
def _fifo(server: Server, folder: str) -> str:
    path = f"{folder}/fifo"
    server.run(f"mkfifo {path}")
    try:
        reply = server.post("/read_file", path=path)
        return str(reply.get("error") or "read as empty")
    finally:
        # O_RDWR does not wait; a reader that hangs gets its end of file.
        server.run(f"timeout 1 sh -c ': 1<> {path}'")


@fault("half-a-file", "The disk is full, and write_file has destroyed the old file.")
def _half_a_file(server: Server, folder: str) -> str:
    disk = server.full_disk
    if disk is None:
        raise NotApplicable("needs --full-disk DIR")
    free = int(server.run(f"df -Pk {disk} | tail -n 1")["stdout"].split()[3]) * 1024
    if free > 32 << 20:
        raise NotApplicable(f"{disk} has {free >> 20} MB left; more than 32 MB are not written")
    path = f"{disk}/half-a-file"
    old = "the old text\n"
    try:
        check(server.post("/write_file", path=path, content=old).get("success"), "not even a small file can be written")
        before = server.post("/list_dir", path=disk)
        reply = server.post("/write_file", path=path, content="x" * (free + (1 << 20)))
        check(reply.get("error"), f"no error, but {reply}")
        found = server.post("/read_file", path=path).get("content", "")
        check(found == old, f"{len(found)} bytes of the new text in place of the old")
        check(server.post("/list_dir", path=disk) == before, "litter is left in the directory")
        return str(reply["error"])
    finally:
        server.post("/delete_file", path=path)


@fault("half-close", "The reply to a client of the proxy that has closed its sending half is lost.")
def _half_close(server: Server, folder: str) -> None:
    if server.proxy_port is None:
        raise NotApplicable("needs --proxy-port")
    network = server.run("readlink /proc/self/ns/net")["stdout"].strip()
    if not network or network != os.readlink("/proc/self/ns/net"):
        raise NotApplicable("needs the server on this machine, in this network namespace")
    answer = b"answer" * 50_000
    with socket.create_server(("127.0.0.1", 0)) as target:
        target.settimeout(PATIENCE / 2)

        def reply() -> None:
            sock = target.accept()[0]
            with sock:
                sock.settimeout(PATIENCE / 2)
                while sock.recv(65536):
                    pass
                time.sleep(0.2)
                sock.sendall(answer)

        server.post("/unbind_port")
        server.post("/bind_port", port=str(target.getsockname()[1]))
        replying = threading.Thread(target=_quietly(reply), daemon=True)
        replying.start()
        try:
            with socket.create_connection((server.host, server.proxy_port), PATIENCE / 2) as sock:
                sock.sendall(b"question")
                sock.shutdown(socket.SHUT_WR)
                found = b"".join(iter(lambda: sock.recv(65536), b""))
        finally:
            server.post("/unbind_port")
        check(found == answer, f"{len(found)} of {len(answer)} bytes of the reply")


def _quietly(work: Callable[[], None]) -> Callable[[], None]:
    def quiet() -> None:
        with contextlib.suppress(OSError):  # the other side tells
            work()

    return quiet


@fault("health-under-load", "Health checks fail while many commands run.", limit=30)
def _health_under_load(server: Server, folder: str) -> str:
    waiting = [server.send("POST", "/run", {"cmd": "sleep 1; seq 1 200"}) for _ in range(200)]
    times: list[float] = []
    for _ in range(50):
        began = time.monotonic()
        check(server.healthy(), "/health does not answer")
        times.append(time.monotonic() - began)
        time.sleep(0.02)
    replies = [received(connection).json() for connection in waiting]
    wrong = sum(reply.get("code") != 0 for reply in replies)
    check(not wrong, f"{wrong} of 200 commands failed")
    text = f"median {statistics.median(times) * 1000:.0f} ms, most {max(times) * 1000:.0f} ms"
    check(max(times) < 1, text)
    return text


@fault("million-lines", "A command with much output is slowed down by its stream.", limit=90)
def _million_lines(server: Server, folder: str) -> str:
    cmd = "seq 1 1000000"
    began = time.monotonic()
    server.run(f"{cmd} | cat > /dev/null")
    into_pipe = time.monotonic() - began
    began = time.monotonic()
    body = b"".join(server.stream(cmd).chunks())
    streamed = time.monotonic() - began
    lines = body.count(b'"data":')
    check(lines == 1_000_000, f"{lines} lines arrived")
    return f"{streamed:.1f} s, {streamed / into_pipe:.0f} times as long as into a pipe (informational)"


# What follows is about the logs of background processes. It comes last because it can end a server.


@fault("replay-order", "The log of a finished process shows all of stdout, then all of stderr.")
def _replay_order(server: Server, folder: str) -> None:
    id = server.start("for i in 1 2 3 4 5 6 7 8; do echo o$i; sleep 0.05; echo e$i >&2; sleep 0.05; done")
    server.finished(id)
    found = server.lines(id)
    expected = [f"{stream}{number}" for number in range(1, 9) for stream in "oe"]
    check(found == expected, " ".join(found))


@fault("long-line", "The log of a background process stops for good at a line over 1 MiB.")
def _long_line(server: Server, folder: str) -> None:
    id = server.start("head -c 2000000 /dev/zero | tr '\\0' x; echo; echo after")
    server.finished(id)
    events = [event.data for event in server.logs(id) if event.name == "log"]
    text = "".join(event["data"] + ("" if event.get("partial") else "\n") for event in events)
    check(text.endswith("\nafter\n"), f"the line behind it is lost; {len(text)} bytes are there")
    check(len(text) == 2_000_007, f"{len(text)} of 2000007 bytes")


@fault("hand-over", "Who joins a running process's log loses the lines between history and live, or gets them twice.")
def _hand_over(server: Server, folder: str) -> str:
    id = server.start("i=0; while [ $i -lt 600 ]; do i=$((i+1)); echo $i; [ $((i % 10)) = 0 ] && sleep 0.02; done")
    expected = [str(number) for number in range(1, 601)]

    def join(after: float) -> list[str]:
        time.sleep(after)
        return server.lines(id)

    with ThreadPoolExecutor(24) as threads:
        for found in threads.map(join, [0.05 * number for number in range(24)]):
            check(sorted(found) == sorted(expected), f"{dict(differences(found, expected))}")
            check(found == expected, "the lines are out of order")
    return "24 readers"


@fault("lost-lines", "The log of a background process lacks lines.")
def _lost_lines(server: Server, folder: str) -> None:
    expected = [str(number) for number in range(1, 5001)]
    with ThreadPoolExecutor(10) as threads:
        ids = list(threads.map(server.start, ["seq 1 5000"] * 10))
    for id in ids:
        server.finished(id)
        found = server.lines(id)
        check(found == expected, f"{len(found)} of 5000 lines: {dict(differences(found, expected))}")


@fault("slow-reader", "A slow reader of a finished process's log crashes the server.", limit=20)
def _slow_reader(server: Server, folder: str) -> str:
    id = server.start('line=$(head -c 2000 /dev/zero | tr "\\0" x); yes $line | head -n 5000')
    server.finished(id)
    stream: Stream = server.logs(id, receive_buffer=65536)
    time.sleep(2)
    check(server.healthy(), "/health does not answer")
    names = [event.name for event in stream]
    check(names == ["log"] * 5000 + ["complete"], f"{len(names)} events, the last is {names[-1:]}")
    return "all lines arrived"


@fault("parent-stopped", "A command that stops its parent process stops all commands.", limit=20)
def _parent_stopped(server: Server, folder: str) -> None:
    cmds = [f"kill -STOP $PPID; (sleep 8; kill -CONT $PPID) > {folder}/log 2>&1 & echo on", *["echo on"] * 4]
    for cmd in cmds:  # the sleeper is for a server that is the parent itself
        began = time.monotonic()
        reply = server.run(cmd)
        check(reply.get("stdout") == "on\n", f"the next command's output is {reply.get('stdout')!r}")
        check(time.monotonic() - began < 6, f"the next command took {time.monotonic() - began:.1f} s")


@fault("parent-starved", "A command that lowers the limits of its parent process makes all commands fail.", limit=20)
def _parent_starved(server: Server, folder: str) -> None:
    shown = "ulimit -n; ulimit -c; ulimit -f"
    before = server.run(shown)["stdout"]
    if server.run("command -v prlimit")["code"] != 0:
        raise NotApplicable("there is no prlimit")
    for limit in ("--nofile=3:3", "--core=0:0", "--fsize=0:0"):
        server.post("/run", cmd=f"prlimit --pid $PPID {limit}")  # that itself may fail
        for _ in range(6):
            after = server.run(shown)["stdout"]
            check(after == before, f"after prlimit {limit} a command's limits are {after!r}")


@fault("left-behind", "What `server &` has left cannot be ended through the API, as the command has completed.")
def _left_behind(server: Server, folder: str) -> None:
    id = server.post("/start_process", cmd=f"sleep 30 & echo $! > {folder}/pid; sleep 0.3")["id"]
    deadline = time.monotonic() + PATIENCE
    while server.run(f"cat {folder}/pid 2>/dev/null")["stdout"] == "" or _status(server, id) == "running":
        check(time.monotonic() < deadline, "the command does not end")
        time.sleep(0.1)
    pid = server.run(f"cat {folder}/pid")["stdout"].strip()
    status = server.call("POST", "/kill_process", {"id": id}).status
    check(status == 200, f"/kill_process is answered with {status}")
    alive = server.run(f"kill -0 {pid} 2>/dev/null && grep -L '^State:.Z' /proc/{pid}/status")["stdout"]
    check(not alive, "the process lives on")


def _status(server: Server, id: str) -> str:
    processes = server.call("GET", "/list_processes").json()["processes"]
    (status,) = (process["status"] for process in processes if process["id"] == id)
    return str(status)
