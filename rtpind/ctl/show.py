# SPDX-License-Identifier: GPL-2.0-or-later
"""Prints: tables of at most 100 columns for people, plain when piped, JSON for programs."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rtpind.core.cpuset import CpuSet

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


def plain(text: str) -> str:
    """Return a text without control characters: a thread names itself, and must not steer the reader's terminal."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)


def line(text: str) -> None:
    """Print a line of text; it folds at the width of the tables."""
    _print(console(), Text(plain(text)))


def table(columns: Sequence[str], rows: Iterable[Sequence[str | Text]], *, title: str = "") -> None:
    """Print rows under column names; the last column folds first. Piped: plain columns, no lines, no padding."""
    out = console()
    box = SIMPLE_HEAD if out.is_terminal else None
    made = Table(box=box, pad_edge=False, show_edge=False)
    for name in columns[:-1]:
        made.add_column(name, no_wrap=True)
    made.add_column(columns[-1], overflow="fold")
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(plain(cell)) for cell in row))
    if title:
        line("")
        line(title)
    _print(out, made)


def _print(out: Console, what: Table | Text) -> None:
    if out.is_terminal:
        out.print(what)
        return
    # On paper first: the console pads, which programs do not want, and ends the process where a reader goes away.
    paper = io.StringIO()
    Console(file=paper, width=out.width, force_terminal=False, color_system=None).print(what)
    sys.stdout.writelines(text.rstrip() + "\n" for text in paper.getvalue().split("\n")[:-1])


def verdict(word: str | None) -> Text:
    """Return a verdict in its colour."""
    return Text(word or "", style=_STYLES.get(word or "", "red" if word else ""))


def blocked(found: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (pCPUs, because of whom) of those that are not given out."""
    grouped: dict[str, list[int]] = {}
    for cpu, who in found.items():
        grouped.setdefault(who, []).append(int(cpu))
    return [(f"pCPU {CpuSet(cpus)}", who) for who, cpus in grouped.items()]


def error(text: str) -> None:
    """Print what went wrong."""
    print(f"rtpinctl: {plain(text)}", file=sys.stderr)


def where(cpus: str, scheduling: str) -> str:
    """Return ``1 fifo:1``: pCPUs and, where it is not the default, scheduling."""
    return cpus if scheduling == "other" else f"{cpus} {scheduling}"


def thread_name(thread: Mapping[str, Any]) -> str:
    """Return ``vcpu 0``."""
    return thread["role"] if thread["index"] is None else f"{thread['role']} {thread['index']}"
