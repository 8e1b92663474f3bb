"""
The import rules: imports between packages point downwards only, and none goes in a circle.

A room is a folder of ``sandboxd/``, or a module that stands beside the folders.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import sandboxd

ROOT = Path(sandboxd.__file__).parent

#: From top to bottom. A room may import from those below it.
ROOMS = (
    "tap",
    "service",
    "options",
    "mcp",
    "api",
    "messages",
    "execution",
    "web",
    "watch",
    "files",
    "processes",
    "proxy",
    "daemon",
    "reactor",
    "settings",
)

#: Rooms that stand beside those of the daemon, for programs that talk to one; each may import from those that follow.
CLIENTS = ("ctl", "integrations", "client")

#: Modules that read the environment.
COMMAND_LINES = ("sandboxd.tap", "sandboxd.ctl.config")

#: What knows nothing of HTTP.
NO_HTTP = ("execution", "processes", "files", "watch")

#: Programs that run as processes of their own, and start in milliseconds: they import the standard library only.
PROGRAMS = ("sandboxd.processes.spawn_server", "sandboxd.files.grep")


def modules() -> dict[str, ast.Module]:
    """Every module of the package, parsed."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


MODULES = modules()


def imports(tree: ast.Module) -> Iterator[str]:
    """What a module imports, wherever in its text: ``a.b`` for ``import a.b`` and for ``from a import b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_module(imported: str) -> str | None:
    """The module of ours that an import takes something from, or None."""
    while imported and imported not in MODULES:
        imported = imported.rpartition(".")[0]
    return imported or None


def names(tree: ast.Module) -> set[str]:
    """The dotted names in a module's code, such as ``os.environ``."""
    return {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def is_within(imported: str, package: str) -> bool:
    return imported == package or imported.startswith(f"{package}.")


def room(module: str) -> str:
    """The room that a module is in; empty for the package itself."""
    return f"{module}.".split(".")[1]


def own_imports(module: str) -> set[str]:
    """The modules of ours that a module imports."""
    return {name for imported in imports(MODULES[module]) if (name := own_module(imported))} - {"sandboxd"}


def reached(module: str) -> set[str]:
    """All modules of ours that importing a module imports."""
    found, left = set(), {module}
    while left:
        found |= left
        left = {name for each in left for name in own_imports(each)} - found
    return found


def test_every_room_has_its_place() -> None:
    assert {room(name) for name in MODULES} - {""} == {*ROOMS, *CLIENTS}


def test_the_daemon_and_its_clients_know_nothing_of_each_other() -> None:
    for module, tree in MODULES.items():
        allowed = set(CLIENTS[CLIENTS.index(room(module)) :] if room(module) in CLIENTS else ROOMS)
        assert {room(name) for name in own_imports(module)} <= allowed, module
        if room(module) in CLIENTS:
            tops = {imported.partition(".")[0] for imported in imports(tree)}
            assert tops.isdisjoint({"twisted", "zope", "klein"}), module


def test_no_arrow_points_upwards() -> None:
    rank = {name: depth for depth, name in enumerate((*CLIENTS, *ROOMS))}
    upwards = [
        (module, name)
        for module in MODULES
        for name in own_imports(module)
        if room(name) != room(module) and rank[room(name)] < rank.get(room(module), -1)
    ]
    assert upwards == []


def test_no_arrows_go_in_a_circle() -> None:
    TopologicalSorter({name: own_imports(name) - {name} for name in MODULES}).prepare()  # raises CycleError


def imports_of(importers: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Which modules of some rooms import something of some packages, each with what it imports."""
    return [
        (module, imported)
        for module in MODULES
        if room(module) in importers
        for imported in imports(MODULES[module])
        if any(is_within(imported, other) for other in others)
    ]


def test_rooms_that_know_nothing_of_http() -> None:
    assert imports_of(NO_HTTP, ["sandboxd.api", "sandboxd.web", "klein", "twisted.web"]) == []


def test_the_http_server_knows_neither_files_nor_executions() -> None:
    others = ["sandboxd.files", "sandboxd.execution", "sandboxd.processes", "sandboxd.watch"]
    assert imports_of(["web"], others) == []


def test_adapters_are_imported_by_nothing_else() -> None:
    assert imports_of({*ROOMS, *CLIENTS, ""} - {"integrations"}, ["sandboxd.integrations"]) == []


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_import_the_standard_library_only(program: str) -> None:
    tops = {imported.partition(".")[0] for name in reached(program) for imported in imports(MODULES[name])}
    assert tops - {"sandboxd"} <= sys.stdlib_module_names


def test_only_the_command_line_names_the_reactor() -> None:
    named = {module for module, tree in MODULES.items() if "twisted.internet.reactor" in set(imports(tree))}
    assert named == {"sandboxd.tap"}


def test_only_the_command_lines_read_the_environment() -> None:
    environment = {"os.environ", "os.environb", "os.getenv", "os.getenvb"}
    reading = {module for module, tree in MODULES.items() if environment & {*imports(tree), *names(tree)}}
    assert reading == set(COMMAND_LINES)
