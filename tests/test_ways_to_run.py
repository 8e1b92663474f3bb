"""The fields that say how a command is run: argument lists, shells, input, users, long scripts."""

from __future__ import annotations

import base64
import os
import pwd
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.client import Api, Events
from tests.daemon import Daemon

MIB = 1024 * 1024
ROUTES = ("/run", "/run_streaming", "/start_process")


async def refused(api: Api, route: str, body: dict[str, Any]) -> str:
    response = await api.post(route, body)
    assert response.status == 400, response
    return str(response.json()["error"])


# argv


async def test_an_argument_list_is_executed_without_a_shell(api: Api) -> None:
    argv = ["printf", "%s|", "$HOME", "a b", "", "*", "it's", "né"]
    response = await api.post("/run", {"argv": argv})
    assert response.json() == {"stdout": "$HOME|a b||*|it's|né|", "stderr": "", "code": 0}


async def test_a_program_is_found_by_the_path_of_the_commands_own_environment(api: Api, tmp_path: Path) -> None:
    program = tmp_path / "greet"
    program.write_text("#!/bin/sh\necho hello $1\n")
    program.chmod(0o755)
    for extra in ({"env": {"PATH": f"{tmp_path}:/usr/bin"}}, {"cwd": str(tmp_path), "env": {"PATH": "."}}):
        response = await api.post("/run", {"argv": ["greet", "you"], **extra})
        assert response.json()["stdout"] == "hello you\n", response
    response = await api.post("/run", {"argv": ["./greet", "you"], "cwd": str(tmp_path)})
    assert response.json()["stdout"] == "hello you\n"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("extra", [{}, {"cwd": "/"}])
async def test_what_cannot_be_executed_is_400_on_all_routes(
    api: Api, tmp_path: Path, route: str, extra: dict[str, str]
) -> None:
    data = tmp_path / "data"
    data.write_text("x")
    for argv, why in (
        (["no-such-program"], "no-such-program: no such file or directory"),
        (["/no/such/program"], "/no/such/program: no such file or directory"),
        ([str(data)], f"{data}: permission denied"),
    ):
        assert await refused(api, route, {"argv": argv, **extra}) == f"argv: cannot execute {why}"
    shell = await refused(api, route, {"cmd": "true", "shell": "/no/such/shell", **extra})
    assert shell == "shell: cannot execute /no/such/shell: no such file or directory"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "cmd"),
        ({"cmd": "true", "argv": ["true"]}, "argv"),
        ({"cmd": "", "argv": ["true"]}, "argv"),
        ({"argv": []}, "argv"),
        ({"argv": "true"}, "argv"),
        ({"argv": [""]}, "argv"),
        ({"argv": [1]}, "argv"),
        ({"argv": ["a\0b"]}, "argv"),
        ({"argv": ["true"], "shell": "/bin/sh"}, "shell"),
        ({"argv": ["true"], "login": True}, "login"),
        ({"cmd": "true", "shell": "bash"}, "shell"),
        ({"cmd": "true", "shell": "/bin/\0"}, "shell"),
        ({"cmd": "true", "input": "a", "input_base64": "YQ=="}, "input"),
        ({"cmd": "true", "input_base64": "not base64"}, "input_base64"),
        ({"cmd": "true", "flush_after": 0}, "flush_after"),
        ({"cmd": "true", "tty": {"cols": 0}}, "tty"),
        ({"cmd": "true", "tty": {"rows": 65536}}, "tty"),
        ({"cmd": "true", "tty": {"term": ""}}, "tty"),
        ({"cmd": "true", "user": "no-such-user"}, "user"),
        ({"cmd": "true", "user": "root:no-such-group"}, "user"),
        ({"cmd": "true", "user": 1 << 32}, "user"),
        ({"cmd": "true", "user": -1}, "user"),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
async def test_what_does_not_fit_together_is_refused(api: Api, route: str, body: dict[str, Any], field: str) -> None:
    assert (await refused(api, route, body)).startswith(field)


async def test_an_argument_list_is_shown_as_a_shell_would_have_it(api: Api) -> None:
    id = (await api.post("/start_process", {"argv": ["sh", "-c", "exit 4", "it's"]})).json()["id"]
    found = (await api.post(f"/processes/{id}/wait", {})).json()
    assert found["command"] == """sh -c 'exit 4' 'it'"'"'s'"""
    assert found["argv"] == ["sh", "-c", "exit 4", "it's"]
    assert (found["exit_code"], found["tty"]) == (4, None)
    assert (await api.process(id))["command"] == found["command"]
    id = await api.start("true")
    assert (await api.get(f"/processes/{id}")).json()["argv"] is None


# shell, login, long scripts


async def test_another_shell(api: Api) -> None:
    response = await api.run("a=(1 2 3); echo ${a[2]} $0", shell="/bin/bash")
    assert response["stdout"] == "3 /bin/bash\n"


async def test_a_login_shell_reads_its_profile(api: Api, tmp_path: Path) -> None:
    (tmp_path / ".profile").write_text("GREETING=hello\n")
    env = {"HOME": str(tmp_path)}
    for shell in ({}, {"shell": "/bin/bash"}):
        assert (await api.run("echo $GREETING", login=True, env=env, **shell))["stdout"] == "hello\n"
        assert (await api.run("echo $GREETING", env=env, **shell))["stdout"] == "\n"


@pytest.mark.parametrize("size", [131_060, 131_071, 131_072, 2 * MIB])
async def test_a_script_of_any_length_means_what_sh_c_means(api: Api, size: int) -> None:
    body = "cat; echo $0 $# $-; ls /proc/self/fd | tr '\\n' ' '; (exit 7)"
    short = await api.run(body, input="typed")
    assert short["stdout"].startswith("typedsh 0")
    script = f": {'x' * (size - len(body) - 3)}\n{body}"
    assert len(script) == size
    assert await api.run(script, input="typed") == short


async def test_a_long_script_sees_no_descriptor_and_may_end_in_a_here_document(api: Api) -> None:
    script = f": {'x' * 200_000}\ncat <<EOF\n$(exec 9<&0; echo kept)\nEOF\n"
    assert (await api.run(script))["stdout"] == "kept\n"
    unfinished = await api.run(f": {'x' * 200_000}\nif true")
    assert unfinished["code"] == 2
    assert "yntax error" in unfinished["stderr"]


async def test_a_long_script_in_other_shells(api: Api) -> None:
    script = f": {'x' * 200_000}\na=(1 2); echo ${{a[1]}}"
    for extra in ({}, {"cwd": "/"}, {"login": True}):
        assert (await api.run(script, shell="/bin/bash", **extra))["stdout"] == "2\n"
    error = await refused(api, "/run", {"cmd": script, "shell": "/usr/bin/python3"})
    assert error == "cmd: too long for /usr/bin/python3"


# env


async def test_null_takes_a_variable_away(api: Api) -> None:
    response = await api.run("echo ${HOME-unset} ${X-unset}", env={"HOME": None, "X": "1"})
    assert response["stdout"] == "unset 1\n"


# input


async def test_input_is_read_from_stdin_and_ends(api: Api) -> None:
    assert (await api.run("cat", input="né\n"))["stdout"] == "né\n"
    assert (await api.run("wc -c", input=""))["stdout"] == "0\n"
    blob = os.urandom(4 * MIB)
    response = await api.run("cksum; wc -c", input_base64=base64.b64encode(blob).decode())
    assert str(len(blob)) in response["stdout"]
    assert (await api.run("exit 3", input="nobody reads it" * 100_000))["code"] == 3


async def test_with_stdin_it_stays_open_behind_the_input(api: Api) -> None:
    id = await api.start("cat", input="first\n", stdin=True)
    assert (await api.post(f"/processes/{id}/wait", {"output": "first", "timeout": 10})).json()["reason"] == "output"
    assert (await api.post(f"/processes/{id}/stdin?close=true", b"second\n")).status == 200
    assert (await api.post(f"/processes/{id}/wait", {"output": "second"})).json()["reason"] == "output"


# user


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT TESTED: needs root")
@pytest.mark.parametrize(
    ("user", "expected"),
    [
        ("nobody", "nobody"),
        (65534, "nobody"),
        ("65534", "nobody"),
        ("nobody:daemon", "65534 1 1 /nonexistent"),
        ("54323:1000", "54323 1000 1000 /"),
        (54321, "54321 0 0 /"),
        ("54321:54322", "54321 54322 54322 /"),
        ("root:daemon", "0 1 1 /root"),
    ],
)
async def test_users_by_name_and_number(api: Api, user: Any, expected: str) -> None:
    if expected == "nobody":
        entry = pwd.getpwnam("nobody")
        groups = " ".join(map(str, os.getgrouplist("nobody", entry.pw_gid)))
        expected = f"{entry.pw_uid} {entry.pw_gid} {groups} {entry.pw_dir}"
    elif str(user).startswith("root"):
        expected = f"0 1 1 {pwd.getpwnam('root').pw_dir}"
    response = await api.run("echo $(id -u) $(id -g) $(id -G) $HOME", user=user, cwd="/")
    assert response["stdout"] == f"{expected}\n"


# merge_stderr, flush_after


async def test_merged_output_is_in_the_order_of_writing(api: Api) -> None:
    cmd = "for i in $(seq 1 200); do echo o$i; echo e$i >&2; done"
    response = await api.run(cmd, merge_stderr=True)
    assert response["stdout"].split() == [f"{kind}{i}" for i in range(1, 201) for kind in "oe"]
    assert response["stderr"] == ""


async def test_an_unfinished_line_is_sent_after_a_while(api: Api) -> None:
    id = await api.start("printf 'n\\303'; read x; printf '\\251 ok'; read x; echo '!'", stdin=True, flush_after=0.1)

    async def feed() -> None:
        assert (await api.post(f"/processes/{id}/stdin", b"\n")).status == 200

    assert (await api.post(f"/processes/{id}/wait", {"output": "n", "timeout": 10})).json()["reason"] == "output"
    await feed()
    assert (await api.post(f"/processes/{id}/wait", {"output": "né ok", "timeout": 10})).json()["reason"] == "output"
    await feed()
    assert (await api.post(f"/processes/{id}/wait", {"output": "né ok!", "timeout": 10})).json()["reason"] == "output"
    records = (await api.get(f"/processes/{id}/logs")).json()["records"]
    assert [(each["data"], each.get("partial", False)) for each in records] == [
        ("n", True),
        ("é ok", True),
        ("!", False),
    ]


@pytest.mark.slow
async def test_without_it_lines_are_sent_when_they_end(api: Api) -> None:
    id = await api.start("printf prompt; sleep 60")
    assert (await api.post(f"/processes/{id}/wait", {"output": "prompt", "timeout": 0.5})).json()["reason"] == "timeout"
    assert (await api.get(f"/processes/{id}/logs")).json()["records"] == []
    await api.post("/kill_process", {"id": id})


# What a command inherits


async def test_the_daemons_own_settings_are_not_in_the_environment(start_daemon: Callable[..., Daemon]) -> None:
    daemon = start_daemon(SANDBOX_HEARTBEAT="5", LOG_LEVEL="info", LOG_FORMAT="text", MINE="1")
    found = (await Api(daemon.url, daemon.secret).run("env"))["stdout"].split("\n")
    names = {line.partition("=")[0] for line in found}
    assert "MINE" in names
    assert not {name for name in names if name.startswith("SANDBOX_")} | (
        names & {"PORT", "PROXY_PORT", "LOG_LEVEL", "LOG_FORMAT"}
    )
    response = await Api(daemon.url, daemon.secret).run("echo $PORT", env={"PORT": "8080"})
    assert response["stdout"] == "8080\n"


@pytest.mark.parametrize("extra", [{}, {"cwd": "/"}, {"tty": True}])
async def test_signals_and_umask_do_not_depend_on_how_the_daemon_was_started(
    start_daemon: Callable[..., Daemon], extra: dict[str, Any]
) -> None:
    ignoring = (
        "import os, signal, sys\n"
        "for each in signal.valid_signals() - {9, 19, 17}: signal.signal(each, signal.SIG_IGN)\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGINT})\n"
        "os.umask(0o027)\n"
        "os.execv(sys.argv[1], sys.argv[1:])"
    )
    daemon = start_daemon(via=[sys.executable, "-c", ignoring])
    api = Api(daemon.url, daemon.secret)
    response = await api.run("grep -E '^Sig(Blk|Ign)' /proc/self/status; umask", **extra)
    blocked, ignored, umask = response["stdout"].replace("\r", "").strip().split("\n")
    assert int(blocked.split()[1], 16) == 0
    libc_own = 0b11 << 31  # glibc uses signals 32 and 33 itself; posix_spawn(3) lets the child ignore them
    assert int(ignored.split()[1], 16) & ~libc_own == 0
    assert umask == "0027"


@pytest.mark.slow
async def test_a_stream_of_a_terminal_is_stdout_only(api: Api) -> None:
    stream: Events = await api.stream("printf prompt; sleep 0.3; echo err >&2", tty=True)
    events = await stream.all()
    assert {event.data["stream"] for event in events[:-1]} == {"stdout"}
    assert [event.data["data"] for event in events[:-1]] == ["prompt", "err"]
    assert events[0].data["partial"] is True
