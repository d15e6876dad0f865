# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps rtpind's own threads on housekeeping pCPUs, whoever moved them and whatever made them. Touches no other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from rtpind.core.audit import Kind, Level, Record
from rtpind.core.cpuset import CpuSet
from rtpind.host import sched

Tids = Callable[[], Iterable[int]]


class Housekeeper:
    """Looks at each thread of this process; one that the kernel will not have there is left until that changes."""

    def __init__(
        self,
        tids: Tids,
        emit: Callable[[Record], None],
        *,
        affinity: Callable[[int], Iterable[int]] = os.sched_getaffinity,
        set_affinity: Callable[[int, CpuSet], int] = sched.set_affinity,
    ) -> None:
        self._tids = tids
        self._emit = emit
        self._affinity = affinity
        self._set_affinity = set_affinity
        self._narrowed: dict[int, tuple[CpuSet, CpuSet]] = {}  # tid → where it should be, and what came of it
        self._said = ""

    def keep(self, own: CpuSet) -> None:
        """Put every thread on ``own``; a right one is not set again."""
        if not own:
            return
        narrowed: dict[int, tuple[CpuSet, CpuSet]] = {}
        for tid in self._tids():
            try:
                now = CpuSet(self._affinity(tid))
                if now != own and self._narrowed.get(tid) != (own, now):
                    self._set_affinity(tid, own)
                    now = CpuSet(self._affinity(tid))
            except ProcessLookupError:
                continue
            if now != own:
                narrowed[tid] = (own, now)
        self._narrowed = narrowed
        self._say(own, {now for _, now in narrowed.values()})

    def _say(self, own: CpuSet, elsewhere: set[CpuSet]) -> None:
        places = ", ".join(sorted(map(str, elsewhere)))
        text = f"rtpind itself runs on pCPU {places} and not on housekeeping pCPU {own}: see AllowedCPUs= of its slice"
        if elsewhere and text != self._said:
            self._emit(Record(Kind.DAEMON, text, Level.WARNING))
        self._said = text if elsewhere else ""
