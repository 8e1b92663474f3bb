"""Commands and background processes."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from sandboxd.client import (
    AsyncSandbox,
    BadRequest,
    CommandFailed,
    CommandTimeout,
    Conflict,
    NotFound,
    ProtocolError,
    Sandbox,
    SandboxGone,
    Unauthorized,
)
from sandboxd.client.replies import Gap, Output, Record
from tests.clients.cutting import CuttingProxy
from tests.daemon import Daemon, alive
from tests.waiting import wait_for

Connect = Callable[..., Sandbox]


def test_run_returns_output_and_code(sandbox: Sandbox) -> None:
    result = sandbox.run("echo out; echo err >&2; exit 3", env={"A": "b"}, cwd="/")
    assert (result.stdout, result.stderr, result.code) == ("out\n", "err\n", 3)


def test_run_with_check_raises(sandbox: Sandbox) -> None:
    with pytest.raises(CommandFailed, match="code 3: why") as caught:
        sandbox.run("echo why >&2; exit 3", check=True)
    assert caught.value.result.code == 3


@pytest.mark.slow
def test_a_timeout_raises_with_the_output_until_then(sandbox: Sandbox) -> None:
    with pytest.raises(CommandTimeout) as caught:
        sandbox.run("echo before; sleep 60", timeout=0.3)
    assert caught.value.result.stdout == "before\n"
    with pytest.raises(CommandTimeout):
        sandbox.run("echo before; sleep 60", timeout=0.3, on_stdout=lambda text: None)


def test_run_with_callbacks(sandbox: Sandbox) -> None:
    out: list[str] = []
    err: list[str] = []
    result = sandbox.run("echo a; echo b >&2; echo c", on_stdout=out.append, on_stderr=err.append)
    assert (out, err, result.code) == (["a\n", "c\n"], ["b\n"], 0)


def test_a_stream_has_numbered_lines_and_a_result(sandbox: Sandbox) -> None:
    with sandbox.stream("echo a; echo b >&2; exit 4") as stream:
        found = {(output.stream, output.data) for output in stream if isinstance(output, Output)}
    assert found == {("stdout", "a"), ("stderr", "b")}
    assert stream.id is not None
    assert stream.result is not None
    assert stream.result.code == 4
    assert sandbox.process(stream.id).exit_code == 4


@pytest.mark.slow
def test_a_stream_that_is_cut_loses_and_doubles_no_line(connect: Connect, proxy: CuttingProxy) -> None:
    sandbox = connect(proxy.url)
    proxy.cuts = [1500, 20_000, 700, 1, 150_000]
    with sandbox.stream("seq 1 9000") as stream:
        lines = [output.data for output in stream if isinstance(output, Output)]
    assert lines == [str(number) for number in range(1, 9001)]
    assert stream.result is not None
    assert stream.result.code == 0
    assert proxy.connections > 5


def test_more_than_is_kept_while_the_connection_is_broken_is_reported(connect: Connect, proxy: CuttingProxy) -> None:
    sandbox = connect(proxy.url)
    proxy.cuts = [1500]
    with sandbox.stream("seq 1 30000") as stream:
        found = list(stream)
    lost = sum(each.dropped for each in found if isinstance(each, Gap))
    assert lost > 0
    assert lost + sum(isinstance(each, Output) for each in found) == 30_000


def test_without_reconnect_a_cut_ends_the_command(connect: Connect, proxy: CuttingProxy, tmp_path: Path) -> None:
    sandbox = connect(proxy.url)
    stream = sandbox.stream(f"echo $$ > {tmp_path}/pid; echo on; exec sleep 300", reconnect=False)
    next(stream)
    proxy.cut()
    with pytest.raises(SandboxGone):
        next(stream)
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not alive(pid))


def test_leaving_a_stream_kills_the_command(sandbox: Sandbox, tmp_path: Path) -> None:
    with sandbox.stream(f"echo $$ > {tmp_path}/pid; echo on; sleep 300") as stream:
        next(stream)
    pid = int((tmp_path / "pid").read_text())
    assert not alive(pid)
    assert stream.id is not None
    assert sandbox.process(stream.id).status == "killed"


def test_background_processes(sandbox: Sandbox) -> None:
    started = sandbox.start("read line; echo got $line; sleep 300", stdin=True)
    assert sandbox.write_stdin(started.id, "this\n") == 5
    for record in sandbox.logs(started.id):
        assert isinstance(record, Record)
        assert record.data == "got this"
        break
    assert started.id in [process.id for process in sandbox.processes()]
    assert sandbox.process(started.id).status == "running"
    sandbox.signal(started.id, "CONT")
    sandbox.kill(started.id, "TERM", grace=5)
    assert sandbox.wait(started.id).status == "killed"
    with pytest.raises(BadRequest, match="not running"):
        sandbox.kill(started.id)
    with pytest.raises(Conflict):
        sandbox.signal(started.id, "TERM")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # the socket may be finalized before what closes it
def test_an_abandoned_stream_is_collected_at_any_time(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    with Sandbox(daemon.url, daemon.secret) as sandbox:
        id = sandbox.start("echo on; sleep 300").id
        abandoned: list[object] = [sandbox.logs(id)]
        next(abandoned[0])  # type: ignore[call-overload]
        abandoned.append(abandoned)
        pool = sandbox._http._transport._pool
        assign = pool._assign_requests_to_connections

        def assign_and_collect() -> object:
            gc.collect()
            return assign()

        monkeypatch.setattr(pool, "_assign_requests_to_connections", assign_and_collect)
        del abandoned
        assert sandbox.process(id).status == "running"
        sandbox.kill(id)


def test_waiting_is_bounded(sandbox: Sandbox) -> None:
    started = sandbox.start("sleep 300")
    assert sandbox.wait(started.id, 0.05).status == "running"
    sandbox.kill(started.id)


@pytest.mark.slow
def test_logs_follow_through_cuts(connect: Connect, proxy: CuttingProxy) -> None:
    sandbox = connect(proxy.url)
    id = sandbox.start("for i in $(seq 1 200); do echo $i; sleep 0.005; done").id
    proxy.cut()
    proxy.cuts = [900, 3000, 400]
    with sandbox.logs(id) as logs:
        records = list(logs)
    assert [record.data for record in records if isinstance(record, Record)] == [str(n) for n in range(1, 201)]
    assert [record.seq for record in records if isinstance(record, Record)] == list(range(1, 201))


def test_logs_without_follow_and_from_a_position(sandbox: Sandbox) -> None:
    id = sandbox.start("seq 1 10; sleep 300").id
    wait_for(lambda: sandbox.process(id).output.records == 10)
    found = [record.data for record in sandbox.logs(id, after=7, follow=False) if not isinstance(record, Gap)]
    assert found == ["8", "9", "10"]
    assert [record.data for record in sandbox.records(id, after=8).records] == ["9", "10"]
    sandbox.kill(id)


@pytest.mark.slow
def test_only_what_is_new_though_the_connection_breaks_before_it_comes(
    connect: Connect, proxy: CuttingProxy, daemon: Daemon, tmp_path: Path
) -> None:
    sandbox = connect(proxy.url)
    id = sandbox.start(f"seq 1 10; while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; echo new; sleep 0.5").id
    wait_for(lambda: sandbox.process(id).output.records == 10)

    def cut() -> None:
        wait_for(lambda: sandbox_seen.process(id).output.followers == 1)
        proxy.cuts = [1] * 5
        proxy.cut()
        (tmp_path / "go").touch()

    with Sandbox(daemon.url, daemon.secret) as sandbox_seen:
        thread = threading.Thread(target=cut)
        thread.start()
        records = [record.data for record in sandbox.logs(id, tail=0) if isinstance(record, Record)]
        thread.join()
    assert records == ["new"]
    assert [record.data for record in sandbox.logs(id, tail=2) if isinstance(record, Record)] == ["10", "new"]


def test_lost_lines_are_reported(sandbox: Sandbox) -> None:
    id = sandbox.start("seq 1 30000").id
    sandbox.wait(id)
    first = next(iter(logs := sandbox.logs(id)))
    logs.close()
    assert isinstance(first, Gap)
    assert first.dropped == 20_000


def test_logs_of_an_unknown_process(sandbox: Sandbox) -> None:
    with pytest.raises(NotFound):
        list(sandbox.logs("no-such-id"))
    with pytest.raises(NotFound):
        sandbox.process("no/such?id")


def test_a_wrong_token(connect: Connect) -> None:
    with pytest.raises(Unauthorized):
        connect(secret="wrong").run("true")
    with pytest.raises(Unauthorized):
        list(connect(secret=None).stream("true"))


def test_a_secret_that_cannot_be_sent_is_not_in_the_error(daemon: Daemon) -> None:
    with pytest.raises(ValueError, match="secret") as caught:
        Sandbox(daemon.url, "two\nlines")
    assert "two" not in str(caught.value)


def test_a_password_in_a_url_is_not_in_the_error() -> None:
    with pytest.raises(ValueError, match="apart") as caught:
        Sandbox("http://user:hidden@127.0.0.1")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("url", ["", "127.0.0.1:80", "ftp://x", "http://", "http://x?y"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        Sandbox(url)


def test_the_prefix(connect: Connect, daemon: Daemon) -> None:
    assert connect(f"{daemon.url}/koyeb-sandbox/").run("echo hi").stdout == "hi\n"


@pytest.mark.slow
def test_nobody_there(connect: Connect) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    sandbox = connect(f"http://127.0.0.1:{port}", patience=0.2)
    with pytest.raises(SandboxGone, match="cannot be reached"):
        sandbox.run("true")
    with pytest.raises(SandboxGone, match="cannot be reached"):
        list(sandbox.stream("true"))


def test_something_else_there(connect: Connect) -> None:
    def answer(server: socket.socket) -> None:
        connection, _ = server.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,))
        thread.start()
        with pytest.raises(ProtocolError):
            connect(f"http://127.0.0.1:{server.getsockname()[1]}").run("true")
        thread.join(5)


def keeps_alive(port: int) -> bool:
    """Whether the keep-alive timer of a connection to a local port runs, see proc_net_tcp in the kernel's documents."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    return any(row[2].endswith(f":{port:04X}") and row[3] == "01" and row[5].startswith("02:") for row in rows)


@pytest.mark.parametrize("through_proxy", [False, True])
def test_the_host_is_probed_while_a_command_runs(
    connect: Connect, monkeypatch: pytest.MonkeyPatch, through_proxy: bool
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                wait_for(lambda: keeps_alive(port))
                body = b'{"stdout":"","stderr":"","code":7}'
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))

        thread = threading.Thread(target=answer)
        thread.start()
        if through_proxy:
            monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        url = "http://sandbox.invalid" if through_proxy else f"http://127.0.0.1:{port}"
        assert connect(url).run("true").code == 7
        thread.join(5)


def test_a_command_that_may_have_run_is_not_sent_again(connect: Connect, proxy: CuttingProxy, tmp_path: Path) -> None:
    sandbox = connect(proxy.url)
    threading.Timer(0.0, lambda: (wait_for((tmp_path / "written").exists), proxy.cut())).start()
    with pytest.raises(SandboxGone):
        sandbox.run(f"echo x >> {tmp_path}/runs; : > {tmp_path}/written; sleep 300")
    assert (tmp_path / "runs").read_text() == "x\n"


def test_a_start_whose_answer_is_lost_starts_one_process(connect: Connect, proxy: CuttingProxy, tmp_path: Path) -> None:
    sandbox = connect(proxy.url)
    proxy.cuts = [600]  # within the answer
    started = sandbox.start(f"echo x >> {tmp_path}/runs")
    sandbox.wait(started.id)
    assert (tmp_path / "runs").read_text() == "x\n"
    assert proxy.connections == 2


def test_a_stream_does_not_run_its_command_again_on_a_daemon_that_was_restarted(
    start_daemon: Callable[..., Daemon], connect: Connect, proxy: CuttingProxy, tmp_path: Path
) -> None:
    restarted, proxy.server_port = proxy.server_port, start_daemon().port
    with connect(proxy.url).stream(f"echo x >> {tmp_path}/runs; echo on; exec sleep 300") as stream:
        next(stream)
        proxy.server_port = restarted
        proxy.cut()
        with pytest.raises(SandboxGone, match="restarted"):
            next(stream)
    assert (tmp_path / "runs").read_text() == "x\n"


def test_a_stream_whose_command_ends_while_the_connection_is_broken_has_its_end(
    connect: Connect, daemon: Daemon, proxy: CuttingProxy, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "go")
    with connect(proxy.url).stream(f"echo on; read line < {tmp_path}/go; exit 3") as stream:
        next(stream)
        assert stream.id is not None
        proxy.cuts = [1]
        proxy.cut()
        (tmp_path / "go").write_text("\n")
        with Sandbox(daemon.url, daemon.secret) as direct:
            direct.wait(stream.id)
        assert list(stream) == []
        assert stream.result is not None
        assert stream.result.code == 3


@pytest.mark.parametrize("streaming", [False, True])
def test_a_task_that_is_cancelled_ends_its_command(daemon: Daemon, tmp_path: Path, streaming: bool) -> None:
    file = tmp_path / "pid"
    cmd = f"echo $$ > {file}.new; mv {file}.new {file}; echo on; exec sleep 300"

    async def follow(sandbox: AsyncSandbox) -> None:
        async with sandbox.stream(cmd) as stream:
            async for _ in stream:
                pass

    async def cancel() -> None:
        async with AsyncSandbox(daemon.url, daemon.secret) as sandbox:
            task = asyncio.ensure_future(follow(sandbox) if streaming else sandbox.run(cmd))
            while not file.exists():
                await asyncio.sleep(0.02)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(cancel(), 20))
    wait_for(lambda: not alive(int(file.read_text())))
