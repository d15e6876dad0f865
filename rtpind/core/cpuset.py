# SPDX-License-Identifier: GPL-2.0-or-later
"""CpuSet: an immutable set of pCPUs that reads and prints the kernel's CPU list format."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

#: No Linux build has more (CONFIG_NR_CPUS tops out at 8192); also bounds what a hostile list can cost.
MAX_CPU = 8191

_ITEM = re.compile(r"(\d{1,18})(?:-(\d{1,18})(?::(\d{1,18})/(\d{1,18}))?)?", re.ASCII)


class CpuListError(ValueError):
    """A text that is not a CPU list; the message says which part and why."""


class CpuSet:
    """An immutable set of pCPU numbers, kept as a bit mask."""

    __slots__ = ("mask",)
    mask: int

    def __init__(self, cpus: Iterable[int] = ()) -> None:
        mask = 0
        for cpu in cpus:
            mask |= 1 << cpu
        object.__setattr__(self, "mask", mask)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"CpuSet is immutable: {name}")

    @classmethod
    def of_mask(cls, mask: int) -> CpuSet:
        """Return the set whose member n is bit n of ``mask``."""
        made = cls.__new__(cls)
        object.__setattr__(made, "mask", mask)
        return made

    @classmethod
    def parse(cls, text: str) -> CpuSet:
        """Read a CPU list as the kernel prints it: ``0-3,8``, also ``0-31:1/2``; an empty text is the empty set.

        Raises CpuListError. Source: Documentation/admin-guide/kernel-parameters.rst, "cpu lists".
        """
        mask = 0
        if not text.strip():
            return cls.of_mask(0)
        for item in text.strip().split(","):
            mask |= _item_mask(item.strip())
        return cls.of_mask(mask)

    def __contains__(self, cpu: int) -> bool:
        return bool(self.mask >> cpu & 1)

    def __iter__(self) -> Iterator[int]:
        mask = self.mask
        while mask:
            low = mask & -mask
            yield low.bit_length() - 1
            mask ^= low

    def __len__(self) -> int:
        return self.mask.bit_count()

    def __bool__(self) -> bool:
        return self.mask != 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CpuSet) and self.mask == other.mask

    def __hash__(self) -> int:
        return hash(self.mask)

    def __and__(self, other: CpuSet) -> CpuSet:
        return CpuSet.of_mask(self.mask & other.mask)

    def __or__(self, other: CpuSet) -> CpuSet:
        return CpuSet.of_mask(self.mask | other.mask)

    def __sub__(self, other: CpuSet) -> CpuSet:
        return CpuSet.of_mask(self.mask & ~other.mask)

    def __le__(self, other: CpuSet) -> bool:
        return self.mask & ~other.mask == 0

    def __lt__(self, other: CpuSet) -> bool:
        return self <= other and self.mask != other.mask

    def first(self) -> int:
        """Return the lowest pCPU; ValueError on an empty set."""
        if not self.mask:
            raise ValueError("an empty CpuSet has no first pCPU")
        return (self.mask & -self.mask).bit_length() - 1

    def __str__(self) -> str:
        """Return the kernel's list format; the empty set is the empty text."""
        return _text(self.mask)

    def __repr__(self) -> str:
        return f"CpuSet({str(self)!r})"


NO_CPUS = CpuSet()


@lru_cache(maxsize=1024)  # a pass with thousands of steps names the same few sets
def _text(mask: int) -> str:
    parts: list[str] = []
    start = last = -2
    for cpu in [*CpuSet.of_mask(mask), -2]:
        if cpu == last + 1:
            last = cpu
            continue
        if start >= 0:
            parts.append(str(start) if start == last else f"{start}-{last}")
        start = last = cpu
    return ",".join(parts)


def _item_mask(item: str) -> int:
    match = _ITEM.fullmatch(item)
    if match is None:
        raise CpuListError(f"{item!r} is not a pCPU number or range" if item else "an empty item between commas")
    first, last, used, group = (None if part is None else int(part) for part in match.groups())
    assert first is not None
    last = first if last is None else last
    if last < first:
        raise CpuListError(f"the range {item!r} runs backwards")
    if last > MAX_CPU:
        raise CpuListError(f"{item!r} goes beyond pCPU {MAX_CPU}")
    if used is None or group is None:
        return ((1 << (last - first + 1)) - 1) << first
    if not 0 < used <= group:
        raise CpuListError(f"{item!r}: of USED/GROUP, USED must be 1 to GROUP")
    return sum(1 << cpu for cpu in range(first, last + 1) if (cpu - first) % group < used)
