"""The documents of the code's structure name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/architecture.md").read_text()
SOURCES = {path: path.read_text() for path in (ROOT / "sandboxd").rglob("*.py")}
CODE = "\n".join(SOURCES.values())


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`((?:\w+/)*\w+\.(?:py|md))`", PAGE))))
def test_every_file_exists(name: str) -> None:
    assert (ROOT / name).exists() or (ROOT / "sandboxd" / name).exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Z][a-z]\w*(?:\.\w+)?)`", PAGE))))
def test_every_class_and_method_exists(name: str) -> None:
    owner, _, method = name.partition(".")
    assert re.search(rf"^class {owner}\b", CODE, re.M)
    assert not method or re.search(rf"^    (?:async )?def {method}\(", CODE, re.M)


def test_every_package_is_shown() -> None:
    packages = {path.parent.name for path in SOURCES if path.parent.parent == ROOT / "sandboxd"}
    assert {name for name in packages if f"{name}/:" not in PAGE} == set()


def test_the_words_are_plain() -> None:
    riddle = re.compile(r"\b(told|tells) of\b|what is known of|who has\b.*\bdead", re.I)
    texts = [path for path in (ROOT / "sandboxd").rglob("*") if path.suffix in (".py", ".js", ".css", ".html")]
    assert [str(path) for path in texts if riddle.search(path.read_text()) and "vendor" not in path.parts] == []
