# SPDX-License-Identifier: GPL-2.0-or-later
"""Prints: tables of at most 100 columns for people, plain when piped, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

_WIDTH = 100
_STYLES = {"ok": "green", "unmanaged": "dim", "released": "dim", "pending": "yellow", "paused": "yellow"}


def as_json(document: Mapping[str, Any]) -> None:
    """Print a document."""
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def console() -> Console:
    """Return the console for tables: the terminal's width up to 100; piped always 100, without colours."""
    made = Console(highlight=False)
    made.width = min(made.width, _WIDTH) if made.is_terminal else _WIDTH
    return made


def line(text: str) -> None:
    """Print a line of text; it folds at the width of the tables."""
    console().print(text, markup=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, title: str = "") -> None:
    """Print rows under column names; the last column folds first. Piped: plain columns, no lines, no padding."""
    out = console()
    box = SIMPLE_HEAD if out.is_terminal else None
    made = Table(box=box, pad_edge=False, show_edge=False)
    for name in columns[:-1]:
        made.add_column(name, no_wrap=True)
    made.add_column(columns[-1], overflow="fold")
    for row in rows:
        made.add_row(*row)
    if title:
        line(title)
    if out.is_terminal:
        out.print(made)
        return
    with out.capture() as captured:
        out.print(made)
    sys.stdout.writelines(text.rstrip() + "\n" for text in captured.get().splitlines())


def verdict(word: str | None) -> Text:
    """Return a verdict in its colour."""
    return Text(word or "", style=_STYLES.get(word or "", "red" if word else ""))


def error(text: str) -> None:
    """Print what went wrong."""
    print(f"rtpinctl: {text}", file=sys.stderr)


def where(cpus: str, scheduling: str) -> str:
    """Return ``1 fifo:1``: pCPUs and, where it is not the default, scheduling."""
    return cpus if scheduling == "other" else f"{cpus} {scheduling}"


def thread_name(thread: Mapping[str, Any]) -> str:
    """Return ``vcpu 0``."""
    return thread["role"] if thread["index"] is None else f"{thread['role']} {thread['index']}"
