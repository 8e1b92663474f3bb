"""The image, run as a user runs it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.system.client import Client, over_tcp
from tests.system.lab import SECRET, Container, Podman, until

Start = Callable[..., Container]


def serving(container: Container) -> Client:
    """A client of it, once it answers."""
    client = over_tcp(container.port(3030))

    def health() -> Any:
        try:
            return client.health()
        except (OSError, ValueError):
            return None

    assert until(health)["status"] == "ok"
    return client


@pytest.fixture(params=["image", "nonroot", "injected"])
def any_image(request: pytest.FixtureRequest) -> str:
    """Each of the images."""
    return str(request.getfixturevalue(request.param))


def test_commands_streams_processes_and_files_work_in_every_image(start: Start, any_image: str) -> None:
    container = start(any_image)
    client = serving(container)
    assert client.run("echo hi; echo no >&2; exit 3") == {
        "stdout": "hi\n", "stderr": "no\n", "code": 3, "error": "Non-zero exit code",
    }  # fmt: skip
    stream = client.ask("POST", "/run_streaming", json.dumps({"cmd": "echo a; echo b >&2; exit 2"}))
    assert '"data":"a"' in stream
    assert '"stream":"stderr","data":"b"' in stream
    assert stream.endswith('event: complete\nid: 2\ndata: {"code":2,"error":true}\n\n')
    assert client.post("/write_file", path="/tmp/file" if "injected" not in any_image else "/file", content="ü")[
        "success"
    ]
    id = client.post("/start_process", cmd="setsid sleep 300 & sleep 300")["id"]
    assert client.post("/kill_process", id=id) == {"success": True, "message": "Process killed successfully"}
    assert SECRET not in client.output("env; cat /proc/1/environ /proc/1/cmdline 2>/dev/null || true")
    assert container.stop() == 0
    assert "sandboxd has stopped" in container.log
    assert "Traceback" not in container.log


def test_a_thread_can_end_without_the_libraries_of_the_image(podman: Podman, injected: str) -> None:
    # What the C library opens for it is missed when the thread ends, not when the program is linked.
    code = (
        "import ctypes, os, threading, time\n"
        "threading.Thread(target=lambda: ctypes.CDLL('libc.so.6').pthread_exit(None), daemon=True).start()\n"
        "while len(os.listdir('/proc/self/task')) > 1: time.sleep(0.01)\n"
        "os._exit(7)"
    )
    python = ("--entrypoint", "/opt/sandboxd/bin/python3", injected, "-I", "-c")
    assert podman("run", "--rm", *python, code, check=False).returncode == 7


def test_the_tools_that_are_promised_are_there_and_no_others_that_build(start: Start, image: str) -> None:
    client = serving(start(image))
    for tool in ("curl", "wget", "git", "python3", "jq"):
        client.output(f"{tool} --version")
    client.output("test -s /etc/ssl/certs/ca-certificates.crt && test -s /licenses/LICENSE")
    client.output("test -s /opt/sandboxd/lib/python3*/site-packages/sandboxd/console/vendor/xterm.mjs")
    left = client.output(
        "for tool in gcc make pip pip3 /opt/sandboxd/bin/pip; do command -v $tool; done; ls /src; true"
    )
    assert left == ""
    assert client.output("find /opt/sandboxd -name '*.pyc' | grep -c twisted/web").strip() != "0", (
        "compiled, for a fast start"
    )


def test_its_labels_and_layers(podman: Podman, image: str) -> None:
    inspected = podman.inspect(image)
    labels = inspected["Config"]["Labels"]
    assert labels["org.opencontainers.image.version"] == "1.2.3"
    assert labels["org.opencontainers.image.revision"] == "abcdef"
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert set(inspected["Config"]["ExposedPorts"]) == {"3030/tcp", "3031/tcp"}
    assert len(inspected["RootFS"]["Layers"]) <= 5
    daemon = podman("run", "--rm", "--entrypoint", "du", image, "-sm", "/opt/sandboxd").stdout.split()[0]
    assert int(daemon) < 60, "megabytes"


def test_the_proxy_is_reached_through_its_published_port(start: Start, image: str) -> None:
    container = start(image)
    client = serving(container)
    client.output("mkdir /tmp/web && echo from inside > /tmp/web/page")
    client.post("/start_process", cmd="exec python3 -m http.server 8000 --bind 127.0.0.1", cwd="/tmp/web")
    until(lambda: client.run("curl -sf http://127.0.0.1:8000/")["code"] == 0)
    assert client.post("/bind_port", port="8000")["success"]
    connection = HTTPConnection("127.0.0.1", container.port(3031), timeout=10)
    connection.request("GET", "/page")
    assert connection.getresponse().read() == b"from inside\n"
    connection.close()


def test_its_health_check_says_healthy(podman: Podman, start: Start, image: str) -> None:
    container = start(image)
    serving(container)
    podman("healthcheck", "run", container.id)
    assert podman.inspect(container.id)["State"]["Health"]["Status"] == "healthy"
    other = start(image, "-e", "PORT=8080")
    until(lambda: "listens on port 8080" in other.log)
    podman("healthcheck", "run", other.id)


def test_as_the_first_process_it_reaps_orphans(podman: Podman, start: Start, image: str) -> None:
    container = start(image)
    client = serving(container)
    assert container.exec("cat", "/proc/1/cmdline").startswith("/opt/sandboxd/bin/python3\0/opt/sandboxd/bin/twistd\0")
    client.output("for n in 1 2 3 4 5; do (setsid sleep 0.2 &); done")
    podman("exec", container.id, "sh", "-c", "(setsid sleep 0.1 &)")  # not even a descendant of the daemon's
    states = "cat /proc/[0-9]*/stat 2>/dev/null | sed 's/.*) //' | cut -c1"

    def at_rest() -> bool:
        ps = container.exec("sh", "-c", f"{states}; cat /proc/[0-9]*/comm")
        return "Z" not in ps.split() and "sleep" not in ps.split()

    until(at_rest)


def test_a_stop_ends_what_runs_and_exits_with_0(start: Start, image: str) -> None:
    container = start(image)
    client = serving(container)
    client.post("/start_process", cmd="setsid sleep 300 & trap '' TERM; while :; do sleep 1; done")
    assert container.stop() == 0
    assert "sandboxd has stopped" in container.log


def test_a_bad_setting_is_one_line_and_no_success(start: Start, image: str) -> None:
    container = start(image, "-e", "PORT=http")
    assert container.exit_code() == 1
    (line,) = container.log.splitlines()
    assert line == "twistd sandboxd: PORT (--port): 'http' is not a port; give a number from 0 to 65535"


# Less than root, less than a writable disk


@pytest.mark.parametrize("options", [["--user=1000"], ["--user=4711:4711"]], ids=str)
def test_it_runs_as_any_user(start: Start, image: str, options: list[str]) -> None:
    client = serving(start(image, *options))
    assert client.output("id -u").strip() == options[0].removeprefix("--user=").partition(":")[0]
    client.output("touch /tmp/made")


def test_the_nonroot_image_has_a_home_and_no_way_to_be_root(start: Start, nonroot: str) -> None:
    client = serving(start(nonroot))
    assert client.output("id -u; pwd; touch made; ls").split() == ["1000", "/home/sandbox", "made"]
    assert client.run("touch /etc/made")["code"] != 0
    id = client.post("/start_process", cmd="setsid sleep 300 & sleep 300")["id"]
    assert client.post("/kill_process", id=id)["success"]


def test_it_runs_with_a_read_only_root_and_no_privilege(start: Start, image: str) -> None:
    container = start(
        image, "--read-only", "--tmpfs=/tmp", "--user=1000", "--cap-drop=all", "--security-opt=no-new-privileges",
        "--pids-limit=256", "--memory=512m",
    )  # fmt: skip
    client = serving(container)
    assert client.output("touch /tmp/made && grep -E '^(CapEff|NoNewPrivs)' /proc/self/status").split() == [
        "CapEff:", "0000000000000000", "NoNewPrivs:", "1",
    ]  # fmt: skip
    assert client.run("touch /opt/sandboxd/made")["code"] != 0
    assert container.stop() == 0
    assert "Traceback" not in container.log
    assert "plugin cache" not in container.log


# A command beside it


def test_the_exit_code_of_a_command_beside_it_is_the_containers(start: Start, image: str) -> None:
    container = start(image, command=("--", "sh", "-c", "echo from beside; exit 7"))
    assert container.exit_code() == 7
    assert "from beside\n" in container.log


def test_signals_reach_the_command_beside_it(start: Start, image: str) -> None:
    script = "trap 'echo got HUP' USR1; trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done"
    container = start(image, command=("--log-level=info", "--", "sh", "-c", script))
    serving(container)
    until(lambda: "ready\n" in container.log)
    container.kill(signal.SIGUSR1)
    until(lambda: "got HUP\n" in container.log)
    assert container.stop() == 5
    assert "bye\n" in container.log


# Into an image of one's own


def test_the_slim_image_has_nothing_but_the_daemon(podman: Podman, injected: str) -> None:
    listed = podman("run", "--rm", "--entrypoint", "/bin/sh", injected, "-c", "echo /* /opt/* /opt/sandboxd/*").stdout
    assert "/usr" not in listed.split()
    assert "/lib" not in listed.split()
    assert {"/opt/sandboxd/bin", "/opt/sandboxd/lib", "/opt/sandboxd/LICENSE"} <= set(listed.split())
