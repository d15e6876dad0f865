# SPDX-License-Identifier: GPL-2.0-or-later
"""A table's first column as a picture: each figure a dot on a logarithmic axis, and each contender's median."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape
from statistics import median

from bench.results import Table, Value

_WIDTH, _LEFT, _RIGHT, _TOP, _ROW = 760, 120, 110, 44, 30


def svg(table: Table) -> str:
    """Return the picture. Zero stands at the left edge, what never happened in a column of its own at the right."""
    key, column = next(iter(table.columns.items()))
    rows = {name: figures.get(key, []) for name, figures in table.figures.items()}
    there = [value for values in rows.values() for value in values if value]
    low = math.floor(math.log10(max(min(there, default=1.0), 0.01)))
    high = max(math.ceil(math.log10(max(there, default=10.0))), low + 1)
    height = _TOP + _ROW * len(rows) + 34
    inner = _WIDTH - _LEFT - _RIGHT

    def x(value: Value) -> float:
        if value is None:
            return _WIDTH - _RIGHT / 2
        if value < 10**low:
            return _LEFT
        return _LEFT + 24 + (math.log10(value) - low) / (high - low) * (inner - 24)

    bottom = _TOP + _ROW * len(rows)
    parts = [f'<text x="10" y="20" font-weight="bold">{escape(table.title)}: {escape(column.heading)}</text>']
    parts += [_line(x(10.0**power), bottom, f"{10.0**power:g}") for power in range(low, high + 1)]
    parts.append(_line(_LEFT, bottom, "0" if low > -2 else f"&lt;{10.0**low:g}"))
    if any(value is None for values in rows.values() for value in values):
        parts.append(_line(x(None), bottom, "never"))
    for number, (name, values) in enumerate(rows.items()):
        parts.append(_row(name, values, x, _TOP + _ROW * number + _ROW / 2))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="13" fill="#333">\n'
        f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
    )


def _line(x: float, bottom: float, text: str) -> str:
    return (
        f'<line x1="{x:.1f}" y1="{_TOP - 8}" x2="{x:.1f}" y2="{bottom}" stroke="#ccc"/>'
        f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{text}</text>'
    )


def _row(name: str, values: Sequence[Value], x: Callable[[Value], float], y: float) -> str:
    there = [value for value in values if value is not None]
    dots = [f'<circle cx="{x(value):.1f}" cy="{y}" r="4" fill="#36c" fill-opacity="0.45"/>' for value in values]
    if not values:
        dots.append(f'<text x="{_LEFT + 12}" y="{y + 4}" fill="#888">no figure</text>')
    if there:
        middle = x(median(there))
        dots.append(
            f'<line x1="{middle:.1f}" y1="{y - 10}" x2="{middle:.1f}" y2="{y + 10}" stroke="#c33" stroke-width="2"/>'
        )
    return f'<text x="{_LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(name)}</text>' + "".join(dots)
