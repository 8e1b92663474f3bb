"""Imports point downwards only: which module may use which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import sandboxd

ROOT = Path(sandboxd.__file__).parent

#: From top to bottom. A module may import from the layers below its own, not from its own or from above.
LAYERS = [
    {"sandboxd.tap"},
    {"sandboxd.service"},
    {
        "sandboxd.api.downloads",
        "sandboxd.api.archive",
        "sandboxd.api.executions",
        "sandboxd.api.files",
        "sandboxd.api.health",
        "sandboxd.api.metrics",
        "sandboxd.api.openapi",
        "sandboxd.api.ports",
        "sandboxd.api.processes",
        "sandboxd.api.status",
        "sandboxd.api.trees",
        "sandboxd.api.uploads",
        "sandboxd.api.watch",
    },
    {"sandboxd.api.commands", "sandboxd.api.exchange", "sandboxd.metrics"},
    {"sandboxd.api.routing"},
    {"sandboxd.api.dispatch", "sandboxd.api.operations"},
    {"sandboxd.change_messages", "sandboxd.change_replies"},
    {"sandboxd.file_messages", "sandboxd.tree_messages"},
    {"sandboxd.files.edit", "sandboxd.files.search"},
    {
        "sandboxd.files.copying",
        "sandboxd.files.download",
        "sandboxd.files.form",
        "sandboxd.files.grep",
        "sandboxd.files.listing",
        "sandboxd.files.pack",
        "sandboxd.files.permissions",
        "sandboxd.files.text",
        "sandboxd.files.unpack",
        "sandboxd.files.writing",
        "sandboxd.messages",
        "sandboxd.portforward",
        "sandboxd.site",
        "sandboxd.sse",
        "sandboxd.tree_replies",
    },
    {"sandboxd.files.renames", "sandboxd.files.upload", "sandboxd.requests"},
    {
        "sandboxd.bodies",
        "sandboxd.files.removal",
        "sandboxd.files.below",
        "sandboxd.files.compression",
        "sandboxd.files.patterns",
        "sandboxd.files.root",
        "sandboxd.files.tar",
        "sandboxd.files.walk",
        "sandboxd.hardening",
        "sandboxd.idempotency",
        "sandboxd.jsontext",
        "sandboxd.logs",
        "sandboxd.lanes",
        "sandboxd.options",
        "sandboxd.reload",
        "sandboxd.replies",
        "sandboxd.requestid",
        "sandboxd.responses",
        "sandboxd.sockets",
        "sandboxd.splicing",
        "sandboxd.stalls",
        "sandboxd.systemd",
        "sandboxd.watch.watches",
    },
    {"sandboxd.watch.watcher"},
    {"sandboxd.watch.changes", "sandboxd.watch.inotify"},
    {"sandboxd.execution.table"},
    {"sandboxd.execution.execution"},
    {"sandboxd.execution.companion", "sandboxd.execution.protocol", "sandboxd.execution.spawn"},
    {
        "sandboxd.auth",
        "sandboxd.execution.environment",
        "sandboxd.execution.launcher",
        "sandboxd.execution.log",
        "sandboxd.execution.orphans",
        "sandboxd.execution.tree",
    },
    {"sandboxd.execution.pipes", "sandboxd.execution.spawner"},
    {
        "sandboxd.execution.lines",
        "sandboxd.execution.marks",
        "sandboxd.execution.command",
        "sandboxd.execution.cgroup",
        "sandboxd.execution.limits",
        "sandboxd.conditions",
        "sandboxd.digests",
        "sandboxd.execution.oneshot",
        "sandboxd.files.owners",
        "sandboxd.files.swaps",
        "sandboxd.ranges",
        "sandboxd.files.errors",
        "sandboxd.settings",
        "sandboxd.tally",
        "sandboxd.tokens",
        "sandboxd.mounts",
        "sandboxd.workers",
        "sandboxd.turns",
    },
    {"sandboxd", "sandboxd.api", "sandboxd.execution", "sandboxd.files", "sandboxd.watch"},
]
LAYER = {module: depth for depth, layer in enumerate(LAYERS) for module in layer}
LOWEST = len(LAYERS)


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


@pytest.fixture(params=MODULES)
def module(request: pytest.FixtureRequest) -> str:
    """Each module's name."""
    return request.param


def test_every_module_has_its_layer() -> None:
    assert set(MODULES) == set(LAYER)


def test_no_arrow_points_upwards(module: str) -> None:
    used = {name for imported in imports(MODULES[module]) if (name := own_module(imported))}
    assert {name for name in used if LAYER.get(name, LOWEST) <= LAYER.get(module, -1)} == set()


@pytest.mark.parametrize("other", ["sandboxd.api", "klein", "twisted.web"])
def test_executions_know_nothing_of_http(module: str, other: str) -> None:
    if is_within(module, "sandboxd.execution"):
        assert [imported for imported in imports(MODULES[module]) if is_within(imported, other)] == []


def test_only_the_command_line_names_the_reactor(module: str) -> None:
    if module != "sandboxd.tap":
        assert "twisted.internet.reactor" not in set(imports(MODULES[module]))


def test_only_the_command_line_reads_the_environment(module: str) -> None:
    if module != "sandboxd.tap":
        environment = {"os.environ", "os.environb", "os.getenv", "os.getenvb"}
        assert environment.isdisjoint({*imports(MODULES[module]), *names(MODULES[module])})
