"""Draws the ratios of a table as SVG: a line from 1, where both are as good, to each ratio, on a logarithmic scale."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

#: The colours of each scheme. Both series stand out from the ground, and from each other without colour vision.
SCHEMES: Mapping[str, Mapping[str, str]] = {
    "light": {"ground": "#ffffff", "text": "#1f2328", "faint": "#59636e", "grid": "#d1d9e0", "limit": "#0969da",
              "peer": "#bc4c00"},
    "dark": {"ground": "#0d1117", "text": "#f0f6fc", "faint": "#9198a1", "grid": "#3d444d", "limit": "#4493f8",
             "peer": "#f0883e"},
}  # fmt: skip

#: What lies outside is drawn at the edge; its number says how far it is.
LEAST, MOST = 0.01, 100.0
TICKS = (0.01, 0.1, 1.0, 10.0, 100.0)

#: Pixels: of the titles, the plot, each column of numbers, a row, and what is above the rows.
TITLES, PLOT, NUMBERS, ROW, HEAD = 400, 420, 64, 22, 64
FONT = "-apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"


def write(document: Mapping[str, Any], folder: Path) -> None:
    """Write ``performance-light.svg`` and ``performance-dark.svg`` into a folder, made of what ``--json`` writes."""
    folder.mkdir(parents=True, exist_ok=True)
    for scheme in SCHEMES:
        (folder / f"performance-{scheme}.svg").write_text(svg(document, scheme), encoding="utf-8")


def svg(document: Mapping[str, Any], scheme: str) -> str:
    """Return the chart of the rows that have a ratio."""
    rows = [row for row in document["rows"] if _known(row)]
    peer = any("peer" in dict(_known(row)) for row in rows)
    return "\n".join(_elements(rows, document["servers"], peer, SCHEMES[scheme])) + "\n"


def _known(row: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the ratios that a row has, under the names of their series."""
    found = {"limit": row.get("limit_ratio"), "peer": row.get("peer_ratio")}
    return [(series, ratio) for series, ratio in found.items() if ratio]


def _x(ratio: float) -> float:
    """Return where a ratio is drawn."""
    share = math.log(min(max(ratio, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return round(TITLES + share * PLOT, 1)


def _short(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}" if ratio >= 2 else f"{ratio:.2f}"


def _elements(
    rows: Sequence[Mapping[str, Any]], servers: Sequence[str], peer: bool, colours: Mapping[str, str]
) -> Iterator[str]:
    series = {"limit": "to the limit of the machine"} | ({"peer": f"to {servers[1]}"} if peer else {})
    width, height = TITLES + PLOT + 16 + NUMBERS * len(series), HEAD + ROW * len(rows) + 12
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
        f' role="img" font-family="{FONT}" font-size="12">'
    )
    yield f"<title>{escape(servers[0])}: ratios of its measurements; right of 1 it is ahead</title>"
    yield f'<rect width="{width}" height="{height}" fill="{colours["ground"]}"/>'
    left = 12
    for name, text in series.items():
        yield f'<circle cx="{left + 5}" cy="18" r="5" fill="{colours[name]}"/>'
        yield _text(left + 16, 22, text, colours["text"])
        left += 40 + 7 * len(text)
    for tick in TICKS:
        stroke = colours["faint" if tick == 1 else "grid"]
        yield f'<path d="M{_x(tick)} {HEAD - 8}V{height - 8}" stroke="{stroke}"/>'
        yield _text(_x(tick), HEAD - 14, f"{tick:g}", colours["faint"], "middle")
    for number, row in enumerate(rows):
        middle = HEAD + ROW * number + ROW // 2
        yield _text(TITLES - 14, middle + 4, str(row["title"]), colours["text"], "end")
        ratios = dict(_known(row))
        for column, name in enumerate(series):
            if name not in ratios:
                continue
            y = middle + (0 if len(ratios) == 1 else 8 * column - 4)
            x, colour = _x(ratios[name]), colours[name]
            yield f'<path d="M{_x(1)} {y}H{x}" stroke="{colour}" stroke-width="2"/>'
            yield f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>'
            at = TITLES + PLOT + 8 + NUMBERS * (column + 1)
            yield _text(at, middle + 4, _short(ratios[name]), colour, "end")
    yield "</svg>"


def _text(x: float, y: float, text: str, fill: str, anchor: str = "start") -> str:
    return f'<text x="{x}" y="{y}" fill="{fill}" text-anchor="{anchor}">{escape(text)}</text>'
