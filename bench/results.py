# SPDX-License-Identifier: GPL-2.0-or-later
"""What was measured: tables of figures by contender, and how they are summed up."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

#: One figure; None: it did not happen while it was waited for.
Value = float | None


@dataclass(frozen=True, slots=True)
class Column:
    """One kind of figure. ``total``: the sum is what counts, not the median."""

    heading: str
    digits: int = 1
    total: bool = False


@dataclass
class Table:
    """One experiment under one load. ``text`` says how it was measured; the first column is what is plotted."""

    key: str
    title: str
    text: str
    columns: dict[str, Column]
    figures: dict[str, dict[str, list[Value]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    steal: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    remarks: set[str] = field(default_factory=set)

    def add(self, contender: str, **values: Value) -> None:
        """Add one figure to each of some columns."""
        for key, value in values.items():
            assert key in self.columns, key
            self.figures[contender][key].append(value)

    def remark(self, contender: str, error: Exception) -> None:
        """Keep why a start failed, once."""
        self.remarks.add(_reason(contender, error))

    def lose(self, contender: str, error: Exception) -> None:
        """Keep why a turn gave no figure."""
        self.lost.append(_reason(contender, error))

    def rows(self) -> list[tuple[str, ...]]:
        """Return heading and one row for each contender, as text."""
        rows = [("", *(column.heading for column in self.columns.values()))]
        for contender, figures in self.figures.items():
            cells = (summary(figures.get(key, []), column) for key, column in self.columns.items())
            rows.append((contender, *cells))
        return rows

    def circumstances(self) -> str:
        """Return how many turns there were and what the machine did meanwhile."""
        counts = [max((len(values) for values in figures.values()), default=0) for figures in self.figures.values()]
        least, most = min(counts, default=0), max(counts, default=0)
        measured = f"{least}" if least == most else f"{least}–{most}"
        text = (
            f"{measured} measured per contender; host steal {median(self.steal):.1%}, at most {max(self.steal):.1%}; "
        )
        text += f"load average before a turn {median(self.load):.1f} (at most {max(self.load):.1f})."
        lost = [f"{text} ({count})" for text, count in sorted(Counter(self.lost).items())]
        text += f" Turns lost: {'; '.join(lost)}." if self.lost else ""
        return text + (f" Why starts failed: {'; '.join(sorted(self.remarks))}." if self.remarks else "")


def _reason(contender: str, error: Exception) -> str:
    """Numbers, which differ each time, become N."""
    return f"{contender}: {re.sub('[0-9]+', 'N', ' '.join(str(error).split()))}"


def summary(values: Sequence[Value], column: Column) -> str:
    """Return ``median (min–max)``, and how often it never happened."""
    if not values:
        return "–"
    there = [value for value in values if value is not None]
    if column.total:
        return f"{sum(there):.{column.digits}f}"
    missing = len(values) - len(there)
    if not there:
        return f"never ({missing} of {missing})"
    digits = column.digits
    text = f"{median(there):.{digits}f} ({min(there):.{digits}f}–{max(there):.{digits}f})"
    return text + (f", never in {missing} of {len(values)}" if missing else "")


def load_average() -> float:
    """Return the load of the last minute."""
    return os.getloadavg()[0]
