"""``POST /run``: a command whose caller waits for its whole output."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from twisted.internet.defer import gatherResults
from twisted.web.client import ResponseNeverReceived

from tests.client import Api
from tests.daemon import Daemon, alive
from tests.waiting import HARD, Gate, gone, hard_to_end, pids_in, until, within

MEGABYTES_100 = 100_000_000

#: What the reply says of a command that a signal ended.
KILLED = {"code": -1, "error": "Non-zero exit code"}


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate(tmp_path)
    yield gate
    gate.close()


# The reply


async def test_success_has_stdout_stderr_and_code_only(api: Api) -> None:
    reply = await api.run("echo out; echo err >&2")
    assert reply == {"stdout": "out\n", "stderr": "err\n", "code": 0}


async def test_failure_has_an_error_too(api: Api) -> None:
    reply = await api.run("echo out; exit 3")
    assert reply == {"stdout": "out\n", "stderr": "", "code": 3, "error": "Non-zero exit code"}


async def test_highest_exit_code(api: Api) -> None:
    assert (await api.run("exit 255"))["code"] == 255


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
async def test_death_by_signal_is_code_minus_one(api: Api, signum: int) -> None:
    reply = await api.run(f"echo out; kill -{int(signum)} $$")
    assert reply == {"stdout": "out\n", "stderr": "", **KILLED, "signal": signal.Signals(signum).name}


async def test_death_of_a_child_by_signal_is_what_sh_makes_of_it(api: Api) -> None:
    assert (await api.run("sh -c 'kill -9 $$'; exit $?"))["code"] == 137


async def test_unknown_command_is_told_by_sh(api: Api) -> None:
    reply = await api.run("no-such-command-8c1f")
    assert reply["code"] == 127
    assert "not found" in reply["stderr"]


async def test_empty_command_is_allowed(api: Api) -> None:
    assert await api.run("") == {"stdout": "", "stderr": "", "code": 0}


async def test_output_is_verbatim(api: Api) -> None:
    assert (await api.run(r"printf 'a\r\nb\rc\n\n  d\t'"))["stdout"] == "a\r\nb\rc\n\n  d\t"


async def test_many_at_once_do_not_mix(api: Api) -> None:
    numbers = range(40)
    replies = await gatherResults([within(30, api.run(f"echo {n}; echo {n} >&2; exit {n}")) for n in numbers])
    assert [(r["stdout"], r["stderr"], r["code"]) for r in replies] == [(f"{n}\n", f"{n}\n", n) for n in numbers]


# The command's surroundings


async def test_the_shell_is_sh_dash_c(api: Api) -> None:
    assert (await api.run("echo $0 $#"))["stdout"] == "sh 0\n"


async def test_stdin_is_dev_null(api: Api) -> None:
    assert (await api.run("readlink /proc/self/fd/0; cat"))["stdout"] == "/dev/null\n"


async def test_no_signal_is_ignored_or_blocked(api: Api) -> None:
    reply = await api.run("grep -E '^Sig(Ign|Blk)' /proc/self/status")
    masks = [int(mask, 16) for mask in re.findall("[0-9a-f]{16}", reply["stdout"])]
    # Signals 32 and 33 are the C library's own: GNU make leaves them ignored, and nobody can reset them.
    assert [mask & ~(0b11 << 31) for mask in masks] == [0, 0]


async def test_no_other_descriptor_is_inherited(api: Api) -> None:
    assert (await api.run("ls /proc/$$/fd"))["stdout"].split() == ["0", "1", "2"]


async def test_cwd(api: Api, tmp_path: Path) -> None:
    assert (await api.run("pwd", cwd=str(tmp_path)))["stdout"] == f"{tmp_path}\n"


@pytest.mark.slow
async def test_each_command_begins_in_its_own_directory(api: Api, daemon: Daemon, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(20)]
    for folder in folders:
        folder.mkdir()
    (tmp_path / "link").symlink_to(folders[0])
    places = [(str(folder), str(folder)) for folder in folders]
    own = daemon.log.parent
    places += [(str(tmp_path / "link"), str(folders[0])), ("/proc", "/proc"), ("..", str(own.parent)), ("", str(own))]
    for argv in ({"cmd": "pwd -P"}, {"argv": ["pwd", "-P"]}, {"cmd": "pwd -P", "stdin": True}):
        replies = [(there, api.post("/run", {**argv, "cwd": cwd})) for cwd, there in places]
        for there, reply in replies:
            assert (await reply).json()["stdout"] == f"{there}\n"


@pytest.mark.parametrize("cwd", [None, ""])
async def test_cwd_is_the_servers_unless_given(api: Api, daemon: Daemon, cwd: str | None) -> None:
    assert (await api.run("pwd", cwd=cwd))["stdout"] == f"{daemon.log.parent}\n"


@pytest.mark.parametrize("route", ["/run", "/run_streaming", "/start_process"])
@pytest.mark.parametrize("cwd", ["/no/such/folder", "/dev/null", "/dossier-é-\u2028"])
async def test_bad_cwd_is_a_400(api: Api, route: str, cwd: str) -> None:
    response = await api.post(route, {"cmd": "echo hi", "cwd": cwd})
    assert response.status == 400
    assert response.json() == {"error": f"Invalid working directory: {cwd}"}
    assert response.body.isascii()


async def test_env_is_merged_over_the_servers_own(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(KEPT="kept", REPLACED="old")
    reply = await Api(daemon.url, daemon.secret).run(
        'echo "$KEPT $REPLACED $ADDED"; command -v ls', env={"REPLACED": "new", "ADDED": "é x"}
    )
    assert reply["stdout"].startswith("kept new é x\n/")
    assert reply["code"] == 0


async def test_env_may_be_null(api: Api) -> None:
    assert (await api.run("echo hi", env=None))["stdout"] == "hi\n"


@pytest.mark.parametrize("options", [(), ("--secret", "sesame-in-the-options-77")])
async def test_a_command_cannot_find_the_secret(start_daemon: Callable[..., Daemon], options: tuple[str, ...]) -> None:
    secret = options[-1] if options else "sesame-in-the-environment-77"
    daemon = start_daemon(*options, SANDBOX_SECRET=secret)
    reply = await Api(daemon.url, secret).run(
        f"env; for pid in {daemon.pid} $PPID $$; do "
        "echo; tr '\\0' '\\n' < /proc/$pid/environ; tr '\\0' '\\n' < /proc/$pid/cmdline; done"
    )
    assert "sandboxd" in reply["stdout"]
    assert "PATH=" in reply["stdout"]
    assert "sesame" not in json.dumps(reply)
    assert "SANDBOX_SECRET" not in reply["stdout"].partition("\n\n")[0]


MESSAGES_LOCALE = 'echo "${LC_ALL:-${LC_MESSAGES:-$LANG}}"'


@pytest.mark.parametrize(
    "environ",
    [
        {"LANG": "fr_FR.UTF-8", "LC_ALL": "", "LANGUAGE": "fr"},
        {"LC_ALL": "fr_FR.UTF-8", "LANGUAGE": "fr"},
        {"LC_MESSAGES": "fr_FR.UTF-8", "LC_ALL": ""},
    ],
)
async def test_messages_are_english_whatever_the_servers_locale(
    start_daemon: Callable[..., Daemon], environ: dict[str, str]
) -> None:
    daemon = start_daemon(**environ)
    api = Api(daemon.url, daemon.secret)
    assert (await api.run(MESSAGES_LOCALE))["stdout"] in ("C\n", "POSIX\n", "C.UTF-8\n", "en_US.UTF-8\n")
    assert "No such file or directory" in (await api.run("ls /nope"))["stderr"]


@pytest.mark.parametrize("name", ["LANG", "LC_ALL", "LC_MESSAGES"])
async def test_the_callers_locale_is_respected(api: Api, name: str) -> None:
    blank = {"LANG": "", "LC_ALL": "", "LC_MESSAGES": ""}
    assert (await api.run(MESSAGES_LOCALE, env={name: "de_DE.UTF-8"}))["stdout"] == "de_DE.UTF-8\n"
    assert (await api.run(MESSAGES_LOCALE, env={**blank, name: "de_DE.UTF-8"}))["stdout"] == "de_DE.UTF-8\n"


# Time


@pytest.mark.slow
@pytest.mark.parametrize("timeout", [2, 1.3])  # long enough for all to start, on a busy machine too
async def test_timeout_kills_the_whole_tree(api: Api, tmp_path: Path, timeout: float) -> None:
    cmd, file = hard_to_end(tmp_path)
    began = time.monotonic()
    reply = await within(timeout + 5, api.run("echo out;" + cmd, timeout=timeout))
    assert time.monotonic() - began >= timeout
    assert reply == {"stdout": "out\n", "stderr": "", **KILLED, "signal": "SIGKILL", "timed_out": True}
    await gone(await pids_in(file, HARD))


@pytest.mark.parametrize("fields", [{}, {"limits": {"nofile": 64}}])
async def test_a_timeout_before_the_command_is_executed_is_answered_as_any_other(
    api: Api, fields: dict[str, Any]
) -> None:
    for number, timeout in enumerate((1e-9, 1e-9, 0.001)):
        body = {"cmd": "sleep 300", "timeout": timeout, **fields}
        for route in ("/run", "/run_streaming"):
            headers = {"Idempotency-Key": f"{route} {fields} {number}"} if number else {}
            response = await within(5, api.post(route, body, headers))
            assert response.status == 200, response
            reply = json.loads(response.body.strip().rpartition(b"data: ")[2])
            assert (reply["code"], reply["timed_out"]) == (-1, True)
        response = await within(5, api.post("/start_process", body))
        if response.status != 201:
            assert response.status == 503
            assert response.json() == {"error": "Failed to start command: its timeout has passed"}


async def test_timeout_that_is_not_reached_changes_nothing(api: Api) -> None:
    assert await api.run("echo hi", timeout=20.5) == {"stdout": "hi\n", "stderr": "", "code": 0}


async def test_answers_when_sh_has_exited_and_lets_its_children_live(api: Api) -> None:
    reply = await within(3, api.run("sleep 300 & echo $!"))
    pid = int(reply["stdout"])
    assert reply["code"] == 0
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
async def test_children_that_are_left_can_go_on_writing(api: Api, tmp_path: Path, gate: Gate) -> None:
    written = tmp_path / "written"
    left = f"({gate.wait}; head -c 1000000 /dev/zero && head -c 1000000 /dev/zero >&2 && touch {written})"
    reply = await within(3, api.run(f"{left} & echo hi"))
    assert reply == {"stdout": "hi\n", "stderr": "", "code": 0}
    gate.open()
    await until(written.exists)


@pytest.mark.slow
async def test_a_child_that_is_left_and_never_falls_silent_holds_nobody_up(api: Api, tmp_path: Path) -> None:
    noisy = f"echo $$ > {tmp_path}/pid; while :; do echo noise; sleep 0.01; done"
    reply = await within(5, api.run(f"sh -c '{noisy}' & echo hi"))
    assert reply["code"] == 0
    (pid,) = await pids_in(tmp_path / "pid")
    assert alive(pid)
    os.kill(pid, signal.SIGKILL)


async def test_disconnect_ends_the_whole_tree(api: Api, tmp_path: Path) -> None:
    cmd, file = hard_to_end(tmp_path)
    call = api.request("POST", "/run", {"cmd": cmd})
    pids = await pids_in(file, HARD)
    assert all(map(alive, pids))
    call.cancel()
    with pytest.raises(ResponseNeverReceived):
        await call
    await gone(pids)


# Much output


async def test_stderr_over_a_pipes_size_before_stdout(api: Api) -> None:
    reply = await within(10, api.run("head -c 1000000 /dev/zero | tr '\\0' e >&2; echo out"))
    assert reply == {"stdout": "out\n", "stderr": "e" * 1_000_000, "code": 0}


async def test_both_streams_at_once(api: Api) -> None:
    reply = await within(10, api.run("seq 1 200000 >&2 & seq 1 200000; wait"))
    expected = "".join(f"{n}\n" for n in range(1, 200_001))
    assert reply["stdout"] == expected
    assert reply["stderr"] == expected


@pytest.mark.slow
async def test_100_megabytes_of_lines(api: Api) -> None:
    line = "0123456789" * 10 + "\n"
    reply = await within(30, api.run(f"yes {line.strip()} | head -c {MEGABYTES_100}"))
    assert reply["stdout"] == (line * (MEGABYTES_100 // len(line) + 1))[:MEGABYTES_100]
    assert set(reply) == {"stdout", "stderr", "code"}


@pytest.mark.slow
async def test_100_megabytes_in_one_line(api: Api) -> None:
    reply = await within(30, api.run(f"head -c {MEGABYTES_100} /dev/zero | tr '\\0' x"))
    assert reply["stdout"] == "x" * MEGABYTES_100
    assert set(reply) == {"stdout", "stderr", "code"}


# Text


async def test_the_reply_is_ascii(api: Api) -> None:
    response = await api.post("/run", {"cmd": r"printf '\302\205 \342\200\250 \360\237\230\200 \377'"})
    assert response.body.isascii()
    assert response.json()["stdout"] == "\u0085 \u2028 \U0001f600 \ufffd"


async def test_a_large_reply_is_ascii_and_whole(api: Api) -> None:
    response = await api.post("/run", {"cmd": "yes '\u2028\U0001f600é' | head -n 100000 | tr -d '\\n'"})
    assert response.body.isascii()
    assert response.json()["stdout"] == "\u2028\U0001f600é" * 100_000


async def test_a_character_that_arrives_in_two_parts(api: Api) -> None:
    reply = await api.run(r"printf '\360\237'; sleep 0.1; printf '\230\200'")
    assert reply["stdout"] == "\U0001f600"


async def test_the_command_may_have_any_text(api: Api) -> None:
    assert (await api.run("printf %s 'é\u2028\U0001f600'"))["stdout"] == "é\u2028\U0001f600"


# The request


@pytest.mark.parametrize("prefix", ["", "/koyeb-sandbox"])
async def test_both_prefixes(api: Api, prefix: str) -> None:
    assert (await api.post(f"{prefix}/run", {"cmd": "echo hi"})).json()["stdout"] == "hi\n"


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", "nonsense"])
async def test_any_content_type(api: Api, content_type: str) -> None:
    response = await api.post("/run", {"cmd": "echo hi"}, {"Content-Type": content_type})
    assert response.json()["stdout"] == "hi\n"


async def test_unknown_fields_are_ignored(api: Api) -> None:
    assert (await api.run("echo hi", recursive=True, nothing=None))["stdout"] == "hi\n"


ROUTES = ["/run", "/run_streaming", "/start_process"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("field", "body"),
    [
        ("cmd", {}),
        ("cmd", {"cmd": 1}),
        ("cmd", {"cmd": None}),
        ("cmd", {"cmd": ["ls"]}),
        ("cmd", {"cmd": "a\0b"}),
        ("cwd", {"cmd": "true", "cwd": 1}),
        ("cwd", {"cmd": "true", "cwd": "/a\0b"}),
        ("env", {"cmd": "true", "env": []}),
        ("env", {"cmd": "true", "env": {"A": 1}}),
        ("env", {"cmd": "true", "env": {"A=B": "x"}}),
        ("env", {"cmd": "true", "env": {"": "x"}}),
        ("env", {"cmd": "true", "env": {"A": "a\0b"}}),
        ("timeout", {"cmd": "true", "timeout": "1"}),
        ("timeout", {"cmd": "true", "timeout": -1}),
        ("timeout", {"cmd": "true", "timeout": True}),
    ],
)
async def test_a_bad_field_is_named(api: Api, route: str, field: str, body: dict[str, Any]) -> None:
    response = await api.post(route, body)
    assert response.status == 400
    assert field in response.json()["error"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "body", [b"", b"{", b'"cmd"', b"[]", b"null", b"\xff", b'{"cmd":"\xff"}', b'{"cmd":"\\ud800"}']
)
async def test_a_body_that_is_no_command_is_a_400(api: Api, route: str, body: bytes) -> None:
    response = await api.post(route, body)
    assert response.status == 400
    assert response.json()["error"]
    assert response.body.isascii()


@pytest.mark.parametrize("timeout", [1e300, 1e18, 10**30])
async def test_an_enormous_timeout_is_no_failure(api: Api, timeout: float) -> None:
    response = await api.post("/run", {"cmd": "echo hi", "timeout": timeout})
    assert response.status == 400 or response.json()["stdout"] == "hi\n"
    assert response.status != 500


async def test_a_command_too_long_for_the_system_is_an_error_without_a_traceback(api: Api) -> None:
    response = await api.post("/run", {"cmd": "true", "env": {"X": "x" * 200_000}})
    assert response.status == 400
    assert "Traceback" not in response.json()["error"]


@pytest.mark.parametrize("route", ["/run", "/run_streaming", "/start_process", "/kill_process"])
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
async def test_post_routes_take_post_only(api: Api, route: str, method: str) -> None:
    response = await api.call(method, route)
    assert response.status == 405
    assert response.headers.getRawHeaders("Allow") == ["POST"]
    assert response.json()["error"]


@pytest.mark.parametrize("route", ["/list_processes", "/process_logs_streaming"])
async def test_get_routes_take_get_only(api: Api, route: str) -> None:
    response = await api.post(route)
    assert response.status == 405
    (allow,) = response.headers.getRawHeaders("Allow")
    assert "GET" in allow
    assert response.json()["error"]


@pytest.mark.parametrize(
    "route", ["/runs", "/run/", "/run/x", "/koyeb-sandbox/nope", "/koyeb-sandbox/koyeb-sandbox/run"]
)
async def test_an_unknown_route_is_a_404(api: Api, route: str) -> None:
    response = await api.post(route, {"cmd": "echo hi"})
    assert response.status == 404
    assert response.json()["error"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("secret", [None, "", "wrong"])
async def test_nothing_is_executed_without_the_token(
    daemon: Daemon, tmp_path: Path, route: str, secret: str | None
) -> None:
    response = await Api(daemon.url, secret).post(route, {"cmd": f"touch {tmp_path}/executed"})
    assert response.status == 401
    assert response.json()["error"]
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("fields", [{}, {"limits": {"nofile": 100}}])
async def test_the_shell_is_found_whatever_the_path(api: Api, fields: dict[str, Any]) -> None:
    reply = await api.run('echo "$0 $PATH"', env={"PATH": "/nonexistent"}, **fields)
    assert reply == {"stdout": "sh /nonexistent\n", "stderr": "", "code": 0}


@pytest.mark.parametrize(("signal", "name"), [(40, "SIGRTMIN+6"), (9, "SIGKILL"), (34, "SIGRTMIN")])
async def test_any_signal_that_ends_it_has_a_name(api: Api, signal: int, name: str) -> None:
    assert (await api.run(f"kill -{signal} $$"))["signal"] == name
