"""Attachments to processes, through both clients."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandboxd.client import NotFound, Sandbox
from sandboxd.client.attaching import Attaching, Chunk, Lost
from sandboxd.client.replies import Gap
from tests.clients.cutting import CuttingProxy

Connect = Callable[..., Sandbox]


def output(attachment: Any) -> bytes:
    return b"".join(each.data for each in attachment if isinstance(each, Chunk))


def test_bytes_and_exit_code(sandbox: Sandbox) -> None:
    id = sandbox.start("printf 'a\\377'; printf b >&2; exit 3").id
    with sandbox.attach(id) as attachment:
        found = {each.stream: each.data for each in attachment if isinstance(each, Chunk)}
        assert attachment.exit_code == 3
    assert found == {"stdout": b"a\xff", "stderr": b"b"}


def test_input(sandbox: Sandbox) -> None:
    id = sandbox.start("echo on; cat; exit 2", stdin=True).id
    got = b""
    with sandbox.attach(id) as attachment:
        for each in attachment:
            assert isinstance(each, Chunk)
            got += each.data
            if got == b"on\n":
                drive(attachment, "write", b"hello\n")
                drive(attachment, "close_stdin")
        assert attachment.exit_code == 2
    assert got == b"on\nhello\n"


def drive(attachment: Any, name: str, *arguments: object) -> None:
    """Call a method of an attachment of either client."""
    result = getattr(attachment, name)(*arguments)
    if result is not None:
        attachment._loop.run_until_complete(result)


def test_a_terminal(sandbox: Sandbox) -> None:
    id = sandbox.start("echo on; read line; stty size", tty={"cols": 70, "rows": 20}).id
    got = b""
    with sandbox.attach(id) as attachment:
        for each in attachment:
            assert isinstance(each, Chunk)
            if not got:
                drive(attachment, "resize", 90, 30)
                drive(attachment, "write", b"\n")
            got += each.data
    assert b"30 90" in got


@pytest.mark.slow
def test_through_cuts(connect: Connect, proxy: CuttingProxy) -> None:
    sandbox = connect(proxy.url)
    id = sandbox.start("for i in $(seq 1 3000); do echo line $i; done; echo end >&2; exit 1").id
    sandbox.wait(id)
    proxy.cut()
    proxy.cuts = [1500, 5000, 100, 20_000]
    with sandbox.attach(id) as attachment:
        chunks = [each for each in attachment if isinstance(each, Chunk)]
        assert attachment.exit_code == 1
    whole = b"".join(each.data for each in chunks if each.stream == "stdout")
    assert whole == b"".join(b"line %d\n" % number for number in range(1, 3001))
    assert proxy.connections > 4


def test_a_terminal_through_cuts_is_whole_also_when_its_log_is_not(connect: Connect, proxy: CuttingProxy) -> None:
    sandbox = connect(proxy.url)
    id = sandbox.start("stty -echo -onlcr; seq 1 12000; read x; echo last", tty=True).id
    found: list[object] = []
    got = b""
    cut = False
    with sandbox.attach(id) as attachment:
        for each in attachment:
            found.append(each)
            got += each.data if isinstance(each, Chunk) else b""
            if got.endswith(b"\n12000\n") and not cut:  # not again when a gap follows
                cut = True
                assert sandbox.process(id).output.truncated
                proxy.cut()
                sandbox.write_stdin(id, b"\n")
    assert [each for each in found if not isinstance(each, (Chunk, Gap))] == []
    assert got.endswith(b"\n12000\nlast\n")


@pytest.mark.slow
def test_what_is_lost_is_reported(connect: Connect, proxy: CuttingProxy, tmp_path: Path) -> None:
    sandbox = connect(proxy.url)
    id = sandbox.start(f"seq 1 30000; while ! [ -e {tmp_path}/go ]; do sleep 0.02; done; echo last").id
    found: list[object] = []
    with sandbox.attach(id, tail=1) as attachment:
        for each in attachment:
            found.append(each)
            if len(found) == 1:
                proxy.cut()
                threading.Timer(0.5, (tmp_path / "go").touch).start()
    assert any(isinstance(each, Lost) for each in found)
    assert isinstance(found[-1], Chunk)
    assert found[-1].data == b"last\n"


def test_an_unknown_process(sandbox: Sandbox) -> None:
    with pytest.raises(NotFound):
        next(sandbox.attach("no-such-id"))


def test_bytes_that_were_seen_are_skipped() -> None:
    attaching = Attaching("id")
    assert list(attaching.feed(b"\x01abc")) == [Chunk("stdout", b"abc")]
    assert list(attaching.feed(b"\x02x")) == [Chunk("stderr", b"x")]
    attaching._skip = dict(attaching._seen)
    assert list(attaching.feed(b"\x01ab")) == []
    assert list(attaching.feed(b"\x02xy")) == [Chunk("stderr", b"y")]
    assert list(attaching.feed(b"\x01cd")) == [Chunk("stdout", b"d")]
    assert list(attaching.feed('{"event":"gap","dropped":3}')) == [Gap(dropped=3)]
    assert list(attaching.feed(b'\x03{"metadata":{},"status":"Success"}')) == []
    assert attaching.exit_code == 0
