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
        "sandboxd.api.file_operations",
        "sandboxd.api.uploads",
        "sandboxd.api.watch",
    },
    {"sandboxd.api.commands", "sandboxd.api.preconditions", "sandboxd.metrics"},
    {"sandboxd.api.routing"},
    {"sandboxd.api.dispatch", "sandboxd.api.operations"},
    {"sandboxd.messages.file_operations", "sandboxd.change_replies"},
    {"sandboxd.messages.raw_files", "sandboxd.messages.archive"},
    {"sandboxd.files.edit", "sandboxd.files.search"},
    {
        "sandboxd.files.copying",
        "sandboxd.files.download",
        "sandboxd.files.form",
        "sandboxd.files.grep",
        "sandboxd.files.listing",
        "sandboxd.files.archive.pack",
        "sandboxd.files.permissions",
        "sandboxd.files.text",
        "sandboxd.files.archive.unpack",
        "sandboxd.files.writing",
        "sandboxd.messages.decoding",
        "sandboxd.proxy.portforward",
        "sandboxd.web.site",
        "sandboxd.web.sse",
        "sandboxd.tree_replies",
    },
    {"sandboxd.files.renames", "sandboxd.files.upload", "sandboxd.web.request"},
    {
        "sandboxd.web.body",
        "sandboxd.files.removal",
        "sandboxd.files.below",
        "sandboxd.files.archive.compression",
        "sandboxd.files.patterns",
        "sandboxd.files.root",
        "sandboxd.files.archive.tar",
        "sandboxd.files.walk",
        "sandboxd.daemon.hardening",
        "sandboxd.web.idempotency",
        "sandboxd.web.ascii_json",
        "sandboxd.daemon.logs",
        "sandboxd.files.filesystem_threads",
        "sandboxd.options",
        "sandboxd.daemon.reload",
        "sandboxd.replies",
        "sandboxd.requestid",
        "sandboxd.web.response",
        "sandboxd.daemon.sockets",
        "sandboxd.proxy.splicing",
        "sandboxd.reactor.lag",
        "sandboxd.daemon.systemd",
        "sandboxd.watch.watches",
    },
    {"sandboxd.watch.watcher"},
    {"sandboxd.watch.changes", "sandboxd.watch.inotify"},
    {"sandboxd.execution.table"},
    {"sandboxd.execution.execution"},
    {"sandboxd.processes.companion", "sandboxd.execution.protocol", "sandboxd.processes.child"},
    {
        "sandboxd.web.auth",
        "sandboxd.processes.environment",
        "sandboxd.processes.spawn_client",
        "sandboxd.execution.log",
        "sandboxd.processes.reaper",
        "sandboxd.processes.trees",
    },
    {"sandboxd.processes.pipes", "sandboxd.processes.spawn_server"},
    {
        "sandboxd.execution.lines",
        "sandboxd.processes.marks",
        "sandboxd.processes.command",
        "sandboxd.processes.cgroup",
        "sandboxd.processes.limits",
        "sandboxd.web.conditions",
        "sandboxd.files.digests",
        "sandboxd.reactor.oneshot",
        "sandboxd.files.owners",
        "sandboxd.files.swaps",
        "sandboxd.web.ranges",
        "sandboxd.files.errors",
        "sandboxd.settings",
        "sandboxd.web.request_stats",
        "sandboxd.web.tokens",
        "sandboxd.files.mounts",
        "sandboxd.reactor.threads",
        "sandboxd.reactor.turn_budget",
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
