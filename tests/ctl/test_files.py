"""``ls``, ``cat``, ``edit``, ``cp`` and ``sync``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest

from sandboxd.client import Sandbox
from sandboxd.ctl import progress, syncing
from tests.clients.cutting import CuttingProxy
from tests.clients.test_transfers import digest, listing, make_tree
from tests.ctl.conftest import PROGRAM, Ctl
from tests.daemon import Daemon
from tests.waiting import wait_for

MIB = 1024 * 1024


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A directory of the sandbox, which is on this machine too."""
    path = tmp_path / "sandbox"
    path.mkdir()
    return path


@pytest.mark.slow
def test_ls_and_cat(ctl: Ctl, there: Path) -> None:
    (there / "a").write_text("text\n")
    (there / "a").chmod(0o751)
    (there / ".hidden").touch()
    (there / "d/e").mkdir(parents=True)
    (there / "l").symlink_to("a")
    (there / "evil\x1b[31m").touch()
    listed = ctl("ls", str(there)).stdout.split("\n")
    assert listed == ["a", "d/", "evil\\x1b[31m", "l", ""]
    assert ".hidden" in ctl("ls", "-a", f":{there}").stdout
    assert "d/e/" in ctl("ls", "-R", str(there)).stdout.splitlines()
    long = ctl("ls", "-l", str(there)).stdout.splitlines()
    assert long[0].startswith("-rwxr-x--x  root")
    assert long[3].endswith("l -> a")
    assert {each["name"] for each in json.loads(ctl("ls", "--json", str(there)).stdout)} >= {"a", "d", "l"}
    assert ctl("ls", f"{there}/a").stdout == f"{there}/a\n"
    assert ctl("cat", f"{there}/a", f":{there}/a").stdout == "text\ntext\n"


def editor(tmp_path: Path, script: str) -> dict[str, str]:
    path = tmp_path / "editor"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return {"VISUAL": "", "EDITOR": f"{path} -x", "TMPDIR": str(tmp_path)}


def left(tmp_path: Path) -> list[Path]:
    return list(tmp_path.glob("sandboxctl-*/*"))


def test_edit(ctl: Ctl, there: Path, tmp_path: Path) -> None:
    (there / "f.py").write_text("old\n")
    ctl("edit", f":{there}/f.py", env=editor(tmp_path, 'case $2 in *f.py) sed -i s/old/new/ "$2" ;; esac'))
    assert (there / "f.py").read_text() == "new\n"
    ctl("edit", f"{there}/made", env=editor(tmp_path, 'echo made > "$2"'))
    assert (there / "made").read_text() == "made\n"
    assert "nothing was changed" in ctl("edit", f"{there}/made", env=editor(tmp_path, "true")).stderr
    assert left(tmp_path) == []


def test_edit_keeps_a_text_that_cannot_be_saved(ctl: Ctl, there: Path, tmp_path: Path) -> None:
    (there / "f").write_text("old\n")
    script = f'echo mine > "$2"; echo theirs > {there}/f'
    done = ctl("edit", f"{there}/f", env=editor(tmp_path, script), code=125)
    assert "somebody else" in done.stderr
    (kept,) = left(tmp_path)
    assert str(kept) in done.stderr
    assert (kept.read_text(), (there / "f").read_text()) == ("mine\n", "theirs\n")
    assert "code 3" in ctl("edit", f"{there}/f", env=editor(tmp_path, "exit 3"), code=125).stderr


@pytest.mark.slow
def test_cp_files(ctl: Ctl, there: Path, tmp_path: Path) -> None:
    local = tmp_path / "local"
    local.write_bytes(os.urandom(MIB))
    ctl("cp", str(local), f":{there}/up")
    ctl("cp", str(local), f":{there}")
    ctl("cp", str(local), f":{there}/new/dir/")
    ctl("cp", f":{there}/up", str(tmp_path / "down"))
    (tmp_path / "d").mkdir()
    ctl("cp", f":{there}/up", str(tmp_path / "d"))
    ctl("cp", f":{there}/up", f":{there}/copy")
    for path in (there / "up", there / "local", there / "new/dir/local", tmp_path / "down", tmp_path / "d/up"):
        assert digest(path) == digest(local)
    assert digest(there / "copy") == digest(local)
    ctl("cp", "-", f":{there}/piped", input="piped\n")
    assert ctl("cp", f":{there}/piped", "-").stdout == "piped\n"
    assert "colon" in ctl("cp", "a", "b", code=2).stderr
    assert "No such file" in ctl("cp", "/none", f":{there}/x", code=125).stderr


@pytest.mark.slow
def test_cp_directories(ctl: Ctl, there: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    make_tree(tree)
    ctl("cp", str(tree), f":{there}/new")
    ctl("cp", str(tree), f":{there}")
    ctl("cp", f":{there}/new", str(tmp_path / "back"))
    ctl("cp", "-z", f":{there}/new", str(tmp_path / "back"))
    for path in (there / "new", there / "tree", tmp_path / "back/new"):
        assert listing(path) == listing(tree)
    (there / "new/out").symlink_to("/etc")
    assert "left out: out" in ctl("cp", "-x", "sub", f":{there}/new", str(tmp_path / "less")).stderr
    assert set(os.listdir(tmp_path / "less")) == set(os.listdir(tree)) - {"sub"}


@pytest.mark.slow
def test_many_small_files(ctl: Ctl, there: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for number in range(10_000):
        if number % 100 == 0:
            (tree / str(number)).mkdir(parents=True)
        (tree / str(number - number % 100) / str(number)).write_text(str(number))
    ctl("cp", str(tree), f":{there}/many")
    ctl("cp", f":{there}/many", str(tmp_path / "back"))
    assert listing(tmp_path / "back") == listing(tree)


@pytest.mark.slow
def test_cp_goes_on_where_it_was_ended(ctl: Ctl, there: Path, tmp_path: Path, proxy: CuttingProxy) -> None:
    local = tmp_path / "local"
    local.write_bytes(os.urandom(MIB) * 30)
    env = {"SANDBOX_URL": proxy.url}
    proxy.cuts = [12 * MIB] + [1] * 50
    ctl("--patience", "0.3", "cp", str(local), f":{there}/up", env=env, code=125)
    proxy.cuts = [25 * MIB] + [1] * 50  # not enough for all of it
    ctl("--patience", "0.3", "cp", str(local), f":{there}/up", env=env)
    assert digest(there / "up") == digest(local)
    proxy.cuts = [12 * MIB] + [1] * 50
    ctl("--patience", "0.3", "cp", f":{there}/up", str(tmp_path / "down"), env=env, code=125)
    proxy.cuts = [25 * MIB] + [1] * 50
    ctl("--patience", "0.3", "cp", f":{there}/up", str(tmp_path / "down"), env=env)
    assert digest(tmp_path / "down") == digest(local)


@pytest.mark.slow
def test_progress_is_shown_on_a_terminal(
    terminal: Callable[..., Any], ctl: Ctl, there: Path, tmp_path: Path, proxy: CuttingProxy
) -> None:
    local = tmp_path / "local"
    with local.open("wb") as file:
        file.truncate(600 * MIB)
    # The proxy is slow enough for several updates.
    child = terminal("cp", str(local), f":{there}/up", env={"SANDBOX_URL": proxy.url})
    child.expect(r"[0-9.]+/[0-9.]+ [MG]iB")
    child.expect(r"iB/s|MB/s")
    child.expect(r"\d:\d\d:\d\d")  # the time that remains
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0
    assert (there / "up").stat().st_size == 600 * MIB
    assert ctl("cp", f":{there}/up", str(tmp_path / "down")).stderr == ""


def test_progress_shows_names_as_they_are(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "DELAY", 0.0)
    bar = progress.Bar("[id]/[/y]/[red]x")
    bar(1, 2)
    bar.close()
    assert "[id]/[/y]/[red]x" in capsys.readouterr().err


@pytest.mark.slow
def test_one_gigabyte_with_flat_memory(environ: dict[str, str], daemon: Daemon, there: Path, tmp_path: Path) -> None:
    local = tmp_path / "local"
    with local.open("wb") as file:
        file.truncate(1024 * MIB)
    measured = (
        "import re, sys; from sandboxd.ctl.main import main; code = main(sys.argv[1:]);"
        " print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1], file=sys.stderr); sys.exit(code)"
    )
    before = daemon.memory()
    daemon.reset_peak()
    for arguments in (("cp", local, f":{there}/up"), ("cp", f":{there}/up", tmp_path / "down")):
        done = subprocess.run(
            [sys.executable, "-c", measured, *map(str, arguments)],
            env=environ,
            capture_output=True,
            text=True,
            timeout=100,
            check=True,
        )
        assert int(done.stderr) < 80 * 1024, "KiB"
    assert daemon.peak_memory() - before < 64 * MIB
    assert (tmp_path / "down").stat().st_size == 1024 * MIB
    for path in (local, there / "up", tmp_path / "down"):
        path.unlink()


@pytest.mark.slow
def test_sync(ctl: Ctl, there: Path, tmp_path: Path) -> None:
    tree, target = tmp_path / "tree", there / "target"
    make_tree(tree)
    ctl("sync", str(tree), f":{target}")
    assert listing(target) == listing(tree)
    assert ctl("sync", str(tree), f":{target}").stdout == ""
    (tree / "a").write_text("b")
    (tree / "sub/new").write_text("new")
    (tree / "sub/run.sh").chmod(0o700)
    (tree / "sub/up").unlink()
    (tree / "sub/up").symlink_to("run.sh")
    (target / "more").write_text("more")
    (target / "skipped").write_text("skipped")
    sent = ctl("sync", "-x", "skipped", str(tree), f":{target}").stdout.splitlines()
    # Another name of "a" is another file to the archive.
    assert set(sent) == {"+ a", "+ hard", "+ sub/new", "+ sub/run.sh", "+ sub/up"}
    assert (target / "more").exists()
    assert ctl("sync", "--delete", "-x", "skipped", str(tree), f":{target}").stdout == "- more\n"
    (target / "skipped").unlink()
    assert listing(target) == listing(tree)
    (tree / "empty").rmdir()
    (tree / "empty").write_text("a file now")
    ctl("sync", str(tree), f":{target}")
    assert listing(target) == listing(tree)


def test_sync_of_files_that_disappear_meanwhile(daemon: Daemon, there: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    make_tree(tree)

    class Meanwhile(Sandbox):
        """The real client; something changes between the look at the local files and the upload."""

        def list_files(self, *arguments: Any, **keywords: Any) -> Any:
            found = super().list_files(*arguments, **keywords)
            (tree / "sub/up").unlink(missing_ok=True)
            (tree / "sub/run.sh").unlink(missing_ok=True)
            return found

    with Meanwhile(daemon.url, daemon.secret) as sandbox:
        sandbox.upload_tree(tree, f"{there}/t")
        (tree / "sub/run.sh").write_text("another")
        seen = syncing._send(sandbox, tree, f"{there}/t", (), True, True)
        assert seen != syncing._look(tree, ())  # so that --watch looks again
        assert syncing._send(sandbox, tree, f"{there}/t", (), True, True) == syncing._look(tree, ())
    assert listing(there / "t") == listing(tree)


@pytest.mark.slow
def test_sync_watch(environ: dict[str, str], there: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a").write_text("1")
    command = [*PROGRAM, "sync", "--watch", "--delete", str(tree), f":{there}/t"]
    with subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL) as process:
        wait_for(lambda: (there / "t/a").exists())
        (tree / "b").write_text("2")
        wait_for(lambda: (there / "t/b").exists())
        (tree / "a").unlink()
        wait_for(lambda: not (there / "t/a").exists())
        process.send_signal(2)
        assert process.wait(10) == 130
