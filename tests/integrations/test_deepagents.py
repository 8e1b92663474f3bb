"""The adapter to LangChain's Deep Agents: LangChain's own tests of sandboxes, and the framework's own results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deepagents.backends.protocol import SandboxBackendProtocol
from deepagents.backends.sandbox import BaseSandbox
from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage
from langchain_tests.integration_tests import SandboxIntegrationTests

from sandboxd.client import Sandbox
from sandboxd.integrations.deepagents import MAX_READ, SandboxdBackend
from tests.daemon import Daemon


@pytest.fixture(scope="session")
def client(daemon: Daemon) -> Iterator[Sandbox]:
    with Sandbox(daemon.url, daemon.secret) as client:
        yield client


class TestSandboxdBackend(SandboxIntegrationTests):
    """All of LangChain's tests. They are of May 2026, when write() and glob() were still as ``legacy`` has them."""

    @property
    def sandbox_root_dir(self) -> str:
        return self.root

    @pytest.fixture(autouse=True)
    def _root(self, tmp_path: Path) -> None:
        self.root = str(tmp_path)

    @pytest.fixture(scope="class")
    def sandbox(self, client: Sandbox) -> SandboxBackendProtocol:
        return SandboxdBackend(client, legacy=True)


class ByShell(SandboxdBackend):
    """The framework's own way: scripts that run in the sandbox."""

    ls = BaseSandbox.ls
    read = BaseSandbox.read
    write = BaseSandbox.write
    edit = BaseSandbox.edit
    delete = BaseSandbox.delete
    grep = BaseSandbox.grep
    glob = BaseSandbox.glob


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in ("a.py", "b.txt", "src/c.py", "src/deep/d.py", ".env", ".git/config.py", ".github/e.py", "src/.f.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"first\nneedle in {name}\n\tlast (needle)\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "crlf").write_bytes(b"one\r\ntwo\r\nthree")
    (tmp_path / "nothing").write_bytes(b"")
    (tmp_path / "binary").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "long").write_text("x" * 100_000 + "\n" + "y\n" * 10)
    return tmp_path


def same(client: Sandbox, tree: Path, call: Callable[[SandboxdBackend], Any]) -> Any:
    """Make a call in both ways; return the result, which is to be the same."""
    native, by_shell = (normal(call(backend(client, cwd=str(tree)))) for backend in (SandboxdBackend, ByShell))
    assert native == by_shell
    return native


def normal(result: Any) -> Any:
    """A result without the order and the optional fields, in which the backends of the framework differ too."""
    for name in ("entries", "matches"):
        found = getattr(result, name, None)
        if found is not None:
            kept = ("path", "is_dir", "line", "text")
            found[:] = sorted(({key: one[key] for key in kept if key in one} for one in found), key=str)
    return result


PATTERNS = (
    "*.py",
    "**/*.py",
    "src/*.py",
    "/*.py",
    "src/**",
    "*",
    ".*",
    ".git*/*",
    "[ab].*",
    "[!a]*.py",
    "{a,b}.*",
    "none",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_globs_find_what_the_frameworks_own_do(client: Sandbox, tree: Path, pattern: str) -> None:
    found = same(client, tree, lambda backend: backend.glob(pattern, str(tree)))
    assert found.matches or pattern == "none"


@pytest.mark.parametrize("glob", [None, "*.py", "src/*.py", "src/**/*.py"])
@pytest.mark.parametrize("text", ["needle", "(needle)", "no.such"])
def test_greps_find_what_the_frameworks_own_do(client: Sandbox, tree: Path, text: str, glob: str | None) -> None:
    found = same(client, tree, lambda backend: backend.grep(text, str(tree), glob))
    assert found.matches or text == "no.such"


def test_grep_of_one_file_and_with_a_limit(client: Sandbox, tree: Path) -> None:
    same(client, tree, lambda backend: backend.grep("needle", str(tree / "a.py")))
    assert SandboxdBackend(client).grep("needle", str(tree), max_count=3).truncated
    assert not SandboxdBackend(client).grep("needle", str(tree / "a.py"), max_count=2).truncated
    assert SandboxdBackend(client).grep("needle", str(tree / "none")).error


@pytest.mark.parametrize("name", ["a.py", "crlf", "binary", "long"])
@pytest.mark.parametrize(("offset", "limit"), [(0, 2000), (1, 1), (2, 5), (0, 0), (-1, -1)])
def test_reads_are_as_the_frameworks_own(client: Sandbox, tree: Path, name: str, offset: int, limit: int) -> None:
    found = same(client, tree, lambda backend: backend.read(str(tree / name), offset, limit))
    assert found.file_data or name == "binary"


def test_reads_that_fail_do_so_as_the_frameworks_own(client: Sandbox, tree: Path) -> None:
    same(client, tree, lambda backend: backend.read(str(tree / "a.py"), 100))
    same(client, tree, lambda backend: backend.read(str(tree / "none")))
    assert SandboxdBackend(client).read(str(tree)).error == f"File '{tree}': is_directory"


def test_a_page_ends_where_its_bytes_do_and_the_next_goes_on(client: Sandbox, tmp_path: Path) -> None:
    lines = [f"{number} " + "é" * 50_000 for number in range(20)]
    (tmp_path / "long").write_text("\n".join(lines))
    backend, found, offset = SandboxdBackend(client), [], 0
    while True:
        page = backend.read(str(tmp_path / "long"), offset)
        assert len(page.file_data["content"].encode()) <= MAX_READ
        found += page.file_data["content"].split("\n")
        if page.next_offset is None:
            break
        offset = page.next_offset
    assert found == lines


@pytest.mark.parametrize(
    ("old", "new", "everywhere"),
    [
        ("first", "1st", False),
        ("needle", "pin", False),
        ("needle", "pin", True),
        ("none", "x", False),
        ("", "x", False),
    ],
)
def test_edits_do_what_the_frameworks_own_do(client: Sandbox, tree: Path, old: str, new: str, everywhere: bool) -> None:
    results, texts = [], []
    for backend in (SandboxdBackend, ByShell):
        (tree / "a.py").write_text("first\nneedle\nneedle\n")
        results.append(backend(client).edit(str(tree / "a.py"), old, new, everywhere))
        texts.append((tree / "a.py").read_text())
    assert texts[0] == texts[1]
    assert results[0].occurrences == results[1].occurrences
    assert (results[0].error is None) == (results[1].error is None)


def test_edits_keep_the_line_ends_of_a_file(client: Sandbox, tree: Path) -> None:
    assert SandboxdBackend(client).edit(str(tree / "crlf"), "one\ntwo", "1\n2").occurrences == 1
    assert (tree / "crlf").read_bytes() == b"1\r\n2\r\nthree"


def test_lists_and_removals_are_as_the_frameworks_own(client: Sandbox, tree: Path) -> None:
    assert same(client, tree, lambda backend: backend.ls(str(tree))).entries
    assert SandboxdBackend(client).ls(str(tree / "none")).error
    assert SandboxdBackend(client).delete(str(tree / "src")).path == str(tree / "src")
    assert not (tree / "src").exists()
    same(client, tree, lambda backend: backend.delete(str(tree / "src")))


def test_writes_replace_files(client: Sandbox, tree: Path) -> None:
    assert SandboxdBackend(client).write(str(tree / "a.py"), "new").error is None
    assert (tree / "a.py").read_text() == "new"
    assert SandboxdBackend(client).write(str(tree / "src"), "new").error


def test_how_commands_end(client: Sandbox, tree: Path) -> None:
    backend = SandboxdBackend(client, cwd=str(tree), max_output=1000)
    assert backend.execute("pwd").output == f"{tree}\n"
    assert backend.execute("echo out; echo err >&2; exit 3").exit_code == 3
    assert backend.execute("kill -TERM $$").exit_code == 143
    killed = backend.execute("echo begun; sleep 60", timeout=2)
    assert (killed.exit_code, killed.output) == (124, "begun\n\n[killed: it has run for 2 seconds]")
    many = backend.execute("seq 1000")
    assert many.truncated
    assert len(many.output) < 1200
    assert SandboxdBackend(client, cwd="/none").execute("true").exit_code == 1


class Model(GenericFakeChatModel):
    """A model that says what it was given to say."""

    def bind_tools(self, *args: Any, **options: Any) -> Any:
        return self


def test_the_example(example: Callable[[str], str], tmp_path: Path) -> None:
    calls = [
        ("write_file", {"file_path": f"{tmp_path}/made.txt", "content": "by an agent"}),
        ("execute", {"command": f"cat {tmp_path}/made.txt; pwd"}),
    ]
    messages = [
        AIMessage("", tool_calls=[{"name": name, "args": arguments, "id": str(number)}])
        for number, (name, arguments) in enumerate(calls)
    ]
    names: dict[str, Any] = {"model": Model(messages=iter([*messages, AIMessage("done")]))}
    exec(example("sandboxd.integrations.deepagents"), names)
    said = names["agent"].invoke({"messages": [("user", "do it")]})["messages"]
    assert "by an agent/tmp" in said[-2].content
    names["sandbox"].close()
