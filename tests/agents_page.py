"""The blocks of docs/agents.md, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

URL = "http://localhost:3030"
SECRET = "your-secret"


class Block(NamedTuple):
    """
    A block of code.

    :ivar heading: the heading that it stands under.
    :ivar language: what it is written in.
    """

    heading: str
    language: str
    code: str


def blocks() -> list[Block]:
    text = (Path(__file__).parent.parent / "docs/agents.md").read_text()
    found = []
    for section in re.split(r"^##+ ", text, flags=re.M)[1:]:
        heading, _, rest = section.partition("\n")
        found += [Block(heading, *each) for each in re.findall(r"```(\w+)\n(.*?)```", rest, re.S)]
    return found


def python(heading: str) -> str:
    """The Python under a heading."""
    (code,) = [block.code for block in blocks() if (block.heading, block.language) == (heading, "python")]
    return code
