# SPDX-License-Identifier: GPL-2.0-or-later
"""One reading of one policy document: what was found wrong so far, and the forms that several sections share."""

from __future__ import annotations

import difflib
import re
from typing import Any

from rtpind.core.cpuset import CpuListError, CpuSet
from rtpind.core.document import Document, Path, Problem
from rtpind.core.model import Host
from rtpind.core.policy import HOUSEKEEPING, CpuList, Ids, Pool

_LEADING_ZERO = re.compile(r"(?<!\d)0\d", re.ASCII)


class Reading:
    """A document, the host it is read for, the pools read so far, and the problems."""

    def __init__(self, document: Document, host: Host, *, strict: bool) -> None:
        self.document = document
        self.data: dict[str, Any] = document.data
        self.host = host
        self.strict = strict
        self.problems: list[Problem] = []
        self.pools: dict[str, Pool] = {}

    def add(self, path: Path, message: str, hint: str = "", *, warning: bool = False) -> None:
        """Note a problem at ``path``."""
        self.problems.append(self.document.problem(path, message, hint, warning=warning))

    def section(self, name: str) -> dict[str, Any]:
        """Return a top-level mapping; one that is there but empty (all commented out) is an empty one."""
        return self.data.get(name) or {}

    def known(self, section: str, name: str) -> bool:
        """Return whether ``name`` is written in that section, or the section itself was refused or is misspelt."""
        if section in self.data:
            return self.written(section, name)
        refused = [str(path[0]) for path in self.document.refused if len(path) == 1]
        return bool(difflib.get_close_matches(section, refused, 1))

    def usable(self, pool: str) -> bool:
        """Return whether a pool's pCPUs are known; where not, that has been said."""
        if pool == HOUSEKEEPING and not self.known("pools", pool):
            return True
        return pool in self.pools and bool(self.pools[pool].cpus.terms)

    def sound(self, path: Path) -> bool:
        """Return whether nothing at or below ``path`` was refused; else what follows from it is not worth saying."""
        return not any(bad[: len(path)] == path for bad in self.document.refused)

    def written(self, *path: str | int) -> bool:
        """Return whether the file has that key, even with a value that was refused."""
        return path in self.document.lines


def parse_cpus(value: Any) -> CpuList:
    """Read a CPU list: a number, a text, or a list of both. Raises CpuListError."""
    return CpuList(tuple((added, None if word == "isolated" else CpuSet.parse(word)) for added, word in _words(value)))


def parse_ids(value: Any) -> Ids:
    """Read numbers of vCPUs or iothreads in the form of a CPU list; of only ``^`` it is all others."""
    named, taken = CpuSet(), CpuSet()
    adds = False
    for added, word in _words(value):
        adds = adds or added
        if added:
            named |= CpuSet.parse(word)
        else:
            taken |= CpuSet.parse(word)
    if not adds:
        return Ids(taken, inverted=True)
    if not named - taken:
        raise CpuListError("it names none")
    return Ids(named - taken)


def parse_order(value: Any) -> tuple[int, ...]:
    """Read pCPUs in the order in which they are written. Raises CpuListError."""
    found: list[int] = []
    for added, word in _words(value):
        if not added:
            raise CpuListError(f"'^{word}' takes away, but here each is named in its order")
        found += CpuSet.parse(word)
    if len(set(found)) != len(found):
        raise CpuListError("one pCPU stands there twice")
    return tuple(found)


def _words(value: Any) -> list[tuple[bool, str]]:
    """Return (added, text) of each item between commas."""
    words: list[tuple[bool, str]] = []
    for part in value if isinstance(value, list) else [value]:
        for item in str(part).split(","):
            word = item.strip()
            added = not word.startswith("^")
            word = word.removeprefix("^").strip()
            if not word:
                raise CpuListError("an empty item")
            if _LEADING_ZERO.search(word):
                raise CpuListError(f"{word!r} has a leading zero")
            words.append((added, word))
    if not words:
        raise CpuListError("an empty list")
    return words
