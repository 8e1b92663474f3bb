"""docs/agents.md: what of it can be run without any framework."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path

import pytest

import sandboxd
from tests.agents_page import SECRET, URL, blocks, python
from tests.daemon import Daemon

ADAPTERS = Path(sandboxd.__file__).parent / "integrations"

#: The modules whose examples are on the page, by their headings.
EXAMPLES = {
    "Deep Agents": "deepagents",
    "Harbor": "harbor",
    "Inspect AI": "inspect_ai",
    "OpenAI Agents SDK": "openai_agents",
}


def examples(module: Path) -> list[str]:
    """The code in a module's docstring."""
    docstring = ast.get_docstring(ast.parse(module.read_text())) or ""
    return [textwrap.dedent(code).strip() for code in re.findall(r"::\n\n((?:    .*\n|\n)+)", docstring + "\n")]


@pytest.mark.parametrize("heading", EXAMPLES)
def test_the_examples_are_those_of_the_adapters(heading: str) -> None:
    """Those are executed by the adapters' own tests."""
    found = [block.code.strip() for block in blocks() if block.heading == heading]
    assert found == examples(ADAPTERS / f"{EXAMPLES[heading]}.py")


def test_every_adapter_is_on_the_page() -> None:
    assert {module.stem for module in ADAPTERS.glob("*.py") if examples(module)} == set(EXAMPLES.values())


def test_the_example_of_the_client(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    exec(python("Without a framework").replace(URL, daemon.url).replace(SECRET, daemon.secret), {})
    assert capsys.readouterr().out == "hello\n\n"


def test_every_block_is_in_a_language_that_is_run() -> None:
    assert {block.language for block in blocks()} == {"bash", "json", "python", "toml"}
