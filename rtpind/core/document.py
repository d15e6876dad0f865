# SPDX-License-Identifier: GPL-2.0-or-later
"""A policy file as plain data that knows its lines, and a problem of one. Made by :mod:`rtpind.core.yamlform`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Path = tuple[str | int, ...]


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One fault of a policy file: where (line from 1, path of keys), what, and the cure."""

    line: int
    path: str
    message: str
    hint: str = ""
    warning: bool = False

    def text(self, file: str) -> str:
        """Return ``FILE:LINE: path: message (hint)``."""
        where = f"{file}:{self.line}: " + (f"{self.path}: " if self.path else "")
        return where + ("warning: " if self.warning else "") + self.message + (f" ({self.hint})" if self.hint else "")


@dataclass(frozen=True, slots=True)
class Document:
    """Plain data (dict, list, str, int, bool, None), the line on which each path begins, and what was taken out."""

    data: Any
    lines: Mapping[Path, int]
    refused: frozenset[Path] = frozenset()

    def line(self, path: Path) -> int:
        """Return the line of ``path``, or of its nearest ancestor that has one."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)

    def problem(self, path: Path, message: str, hint: str = "", *, warning: bool = False) -> Problem:
        """Return a problem at ``path``."""
        return Problem(self.line(path), dotted(path), message, hint, warning)


def dotted(path: Path) -> str:
    """Return ``classes.realtime.vcpu``, ``guests[0].class``; an empty key is ``''``."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part or show(part)}" for part in path)
    return "".join(parts).removeprefix(".")


def show(value: Any) -> str:
    """Return a value as a message names it: a text in quotes and cut short, a mapping by its kind."""
    match value:
        case None:
            return "nothing"
        case bool():
            return str(value).lower()
        case dict():
            return "a mapping"
        case list():
            return "a list"
        case str():
            return repr(value if len(value) <= 60 else value[:57] + "...")
    return str(value)
