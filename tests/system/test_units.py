"""The units, under a real systemd."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.system.client import Client
from tests.system.lab import ROOT, SECRET, Machine, lines, run, until

UNITS = ("sandboxd.service", "sandboxd@example.service", "sandboxd.socket", "sandboxd-proxy.socket")
DROPINS = "/etc/systemd/system/sandboxd.service.d"


def client(machine: Machine, port: int = 3030, secret: str = SECRET) -> Client:
    """A client inside of the machine."""

    def ask(method: str, path: str, body: str | None) -> str:
        data = [] if body is None else ["-d", body]
        return machine(
            "curl", "-s", "-m", "30", "-X", method, "-H", f"Authorization: Bearer {secret}", *data,
            f"http://127.0.0.1:{port}{path}",
        ).stdout  # fmt: skip

    return Client(ask)


def started(machine: Machine, unit: str = "sandboxd.service", **keywords: Any) -> Client:
    """A client of a unit that was started just now."""
    machine("systemctl", "start", unit)
    return client(machine, **keywords)


def pid(machine: Machine, unit: str = "sandboxd.service") -> str:
    return machine.show(unit, "MainPID")


def drop_in(machine: Machine, name: str, text: str) -> None:
    machine.write(f"{DROPINS}/{name}.conf", text)
    machine("systemctl", "daemon-reload")


# What can be said without running them


@pytest.mark.parametrize("strict", [False, True], ids=["as installed", "with the strict drop-in"])
def test_systemd_finds_no_fault_in_them(installed: Path, strict: bool) -> None:
    folder = installed / DROPINS.lstrip("/")
    if strict:
        folder.mkdir()
        shutil.copy(ROOT / "deploy/systemd/strict.conf", folder)
    try:
        ended = run("systemd-analyze", "verify", "--man=no", f"--root={installed}", *UNITS)
        assert (ended.stdout, ended.stderr) == ("", "")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_their_exposure_is_what_the_documentation_says(machine: Machine) -> None:
    documented = (ROOT / "docs/operating.md").read_text()

    def exposure() -> str:
        said = machine("systemd-analyze", "security", "--no-pager", "sandboxd.service").stdout
        found = re.search(r"Overall exposure level for sandboxd.service: (\d+\.\d)", said)
        assert found
        return found[1]

    assert f"exposure level {exposure()}" in documented
    drop_in(machine, "strict", (ROOT / "deploy/systemd/strict.conf").read_text())
    assert f"exposure level {exposure()}" in documented


# Start and stop


def test_a_start_returns_when_it_serves(machine: Machine) -> None:
    api = started(machine)
    assert api.health()["status"] == "ok"
    assert api.output("echo hi") == "hi\n"
    assert machine.show("sandboxd.service", "StatusText") == "serving port 3030; proxy on port 3031"
    assert machine.show("sandboxd.service", "Type") == "notify"


def test_without_a_secret_it_does_not_start(machine: Machine) -> None:
    drop_in(machine, "secret", "[Service]\nLoadCredential=\nLoadCredential=sandbox-secret:/nope\n")
    assert machine("systemctl", "start", "sandboxd.service", check=False).returncode != 0
    assert "Failed to set up credentials" in machine.journal("sandboxd.service")


def test_the_credential_is_out_of_the_reach_of_commands(machine: Machine) -> None:
    api = started(machine)
    assert api.run("true")["code"] == 0, "the daemon itself has read it"
    shown = api.run(
        "env; cat /run/credentials/*/* /etc/sandboxd/* /proc/[0-9]*/environ /proc/[0-9]*/cmdline; "
        "find / -name sandbox-secret -not -path '/proc/*' 2>/dev/null"
    )
    assert SECRET not in shown["stdout"]
    assert "sandbox-secret\n" not in shown["stdout"]
    assert "CREDENTIALS_DIRECTORY" not in shown["stdout"]
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "LISTEN_FDS"):
        assert name not in shown["stdout"]


def test_a_stop_leaves_nothing_behind(machine: Machine) -> None:
    api = started(machine)
    api.output("(setsid sleep 3001 &); (setsid sh -c 'trap \"\" TERM; while :; do sleep 3002; done' &)")
    api.post("/start_process", cmd="setsid sleep 3003 & exec sleep 3004")
    assert machine("pgrep", "-c", "-x", "sleep").stdout.strip() == "4"
    cgroup = machine.show("sandboxd.service", "ControlGroup")
    machine("systemctl", "stop", "sandboxd.service")
    assert machine("pgrep", "-x", "sleep", check=False).stdout == ""
    assert machine.show("sandboxd.service", "Result") == "success"
    assert machine.show("sandboxd.service", "ExecMainStatus") == "0"
    assert machine("find", "/sys/fs/cgroup", "-path", f"*{cgroup}*", check=False).stdout == ""
    assert "Traceback" not in machine.journal("sandboxd.service")


def test_a_reload_keeps_what_runs(machine: Machine) -> None:
    api = started(machine)
    before = pid(machine)
    api.post("/start_process", cmd="sleep 300")
    machine("systemctl", "reload", "sandboxd.service")
    until(lambda: "sandboxd reloads" in machine.journal("sandboxd.service"))
    assert pid(machine) == before
    assert machine.show("sandboxd.service", "ActiveState") == "active"
    assert [process["status"] for process in json.loads(api.ask("GET", "/list_processes", None))["processes"]] == [
        "running"
    ]
    assert api.output("echo still") == "still\n"


# Faults


def test_a_daemon_that_was_killed_is_started_again_and_nothing_of_it_is_left(machine: Machine) -> None:
    api = started(machine)
    api.output("(setsid sleep 3005 &)")
    before = pid(machine)
    machine("kill", "-9", before)
    until(lambda: pid(machine) not in ("0", before) and machine.show("sandboxd.service", "ActiveState") == "active")
    assert machine.show("sandboxd.service", "NRestarts") == "1"
    assert machine("pgrep", "-x", "sleep", check=False).stdout == ""
    assert api.output("echo again") == "again\n"


def test_a_daemon_that_is_stuck_is_killed_by_the_watchdog(machine: Machine) -> None:
    drop_in(machine, "watchdog", "[Service]\nWatchdogSec=2\n")
    api = started(machine)
    before = pid(machine)
    machine("kill", "-STOP", before)
    until(lambda: pid(machine) not in ("0", before) and machine.show("sandboxd.service", "ActiveState") == "active", 40)
    assert "Watchdog timeout (limit 2s)!" in machine.journal("sandboxd.service")
    assert api.output("echo again") == "again\n"


def test_a_daemon_that_is_idle_feeds_the_watchdog(machine: Machine) -> None:
    drop_in(machine, "watchdog", "[Service]\nWatchdogSec=1\n")
    api = started(machine)
    before = pid(machine)
    assert api.run("sleep 3")["code"] == 0
    assert (pid(machine), machine.show("sandboxd.service", "NRestarts")) == (before, "0")


# Sockets


def test_the_first_request_starts_it_and_is_served(machine: Machine) -> None:
    machine("systemctl", "start", "sandboxd.socket", "sandboxd-proxy.socket")
    assert machine.show("sandboxd.service", "ActiveState") == "inactive"
    api = client(machine)
    assert api.output("echo first") == "first\n"
    assert machine.show("sandboxd.service", "StatusText") == "serving port 3030; proxy on port 3031"
    machine("systemctl", "stop", "sandboxd.service")
    assert api.output("echo second") == "second\n", "the sockets have outlived it"
    assert json.loads(api.ask("GET", "/port_status", None))["proxy_port"] == "3031"


def test_a_unix_socket_can_be_one_of_them(machine: Machine) -> None:
    machine.write(
        "/etc/systemd/system/sandboxd.socket.d/unix.conf",
        "[Socket]\nListenStream=\nListenStream=/run/sandboxd.sock\nSocketMode=0660\n",
    )
    machine("systemctl", "daemon-reload")
    machine("systemctl", "start", "sandboxd.socket")
    for _ in range(2):
        answer = machine(
            "curl", "-s", "-m", "30", "--unix-socket", "/run/sandboxd.sock", "http://sandbox/health"
        ).stdout
        assert json.loads(answer)["status"] == "ok"
        assert machine("stat", "-c", "%a", "/run/sandboxd.sock").stdout.strip() == "660"
        machine("systemctl", "stop", "sandboxd.service")  # which must leave the socket where it is


# Variants


def test_an_instance_has_its_own_settings_secret_and_state(machine: Machine) -> None:
    machine.write("/etc/sandboxd/sandboxd@two.env", "PORT=4030\nPROXY_PORT=4031\n")
    machine.write("/etc/sandboxd/sandboxd@two.secret", "the-secret-of-the-second-instance", 0o600)
    one = started(machine)
    two = started(machine, "sandboxd@two.service", port=4030, secret="the-secret-of-the-second-instance")
    assert one.output("echo $HOME; id -u") != two.output("echo $HOME; id -u")
    assert "error" in client(machine, 4030).run("true")
    assert one.run(f"ls {two.output('echo $HOME').strip()}/")["code"] != 0


def test_commands_are_confined_as_far_as_the_unit_says(machine: Machine) -> None:
    api = started(machine)
    assert api.output("id -u").strip() != "0"
    assert api.output("touch $HOME/made /tmp/made && pwd").strip() == "/var/lib/private/sandboxd"
    for forbidden in ("touch /etc/made", "ls /root", "ls /home", "cat /etc/shadow", "mount -t tmpfs none /tmp"):
        assert api.run(forbidden)["code"] != 0, forbidden
    assert not (machine.folder / "tmp/made").exists(), "its /tmp is its own"


def test_with_the_strict_drop_in_commands_can_do_less(machine: Machine) -> None:
    api = started(machine)
    code = "import ctypes, mmap; mmap.mmap(-1, 4096, prot=7)"
    assert api.run("unshare --user true")["code"] == 0
    assert api.run(f"python3 -c '{code}'")["code"] == 0
    machine("systemctl", "stop", "sandboxd.service")
    drop_in(machine, "strict", (ROOT / "deploy/systemd/strict.conf").read_text())
    api = started(machine)
    assert api.output("echo hi; python3 -c 'print(6 * 7)'") == "hi\n42\n"
    assert api.run("unshare --user true")["code"] != 0
    assert api.run(f"python3 -c '{code}'")["code"] != 0
    id = api.post("/start_process", cmd="setsid sleep 300 & sleep 300")["id"]
    assert api.post("/kill_process", id=id)["success"]
    machine("systemctl", "stop", "sandboxd.service")
    assert machine.show("sandboxd.service", "Result") == "success"


def test_nothing_was_warned_of(machine: Machine) -> None:
    """Last: systemd has had nothing to say about the units themselves."""
    text = machine("journalctl", "--no-pager", "-o", "cat", "-p", "warning", "_PID=1").stdout
    complaints = [line for line in lines(text) if "/etc/systemd/system/sandboxd" in line]
    assert complaints == []
