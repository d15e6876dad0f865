# SPDX-License-Identifier: GPL-2.0-or-later
"""Keeps rtpind's own threads, and no others, on housekeeping pCPUs, and some realtime, whatever moved or made them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable
from typing import TypeAlias

from rtpind.core.audit import Kind, Level, Record
from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Sched, Scheduling
from rtpind.host import sched
from rtpind.host.proc import Proc

#: Where a thread is allowed, and how it is scheduled.
Place: TypeAlias = tuple[CpuSet, Scheduling]
Tids: TypeAlias = Callable[[], Iterable[int]]


class OwnThreads:
    """What the kernel says of the threads of this process, and what it is asked for. ``tids`` lists them."""

    def __init__(self, proc: Proc, tids: Tids | None = None) -> None:
        self._proc = proc
        self.tids = tids or (lambda: proc.tids(os.getpid()))
        self.set_affinity = sched.set_affinity
        self.set_scheduling = sched.set_scheduling

    def read(self, tid: int) -> Place:
        """Return where a thread is. Raises OSError when it has ended."""
        now = self._proc.placement(tid, self._proc.stat(tid))
        return now.cpus, now.scheduling


class Housekeeper:
    """Looks at each thread of this process; what the kernel refuses is left until it changes."""

    def __init__(self, threads: OwnThreads, emit: Callable[[Record], None]) -> None:
        self._threads = threads
        self._emit = emit
        self._calm: Scheduling | None = None  # what the process began with
        self._refused: dict[int, tuple[Place, Place]] = {}  # tid → where it should be, and what came of it
        self._said: frozenset[str] = frozenset()

    def forget(self) -> None:
        """Ask the kernel again for what it refused."""
        self._refused = {}

    def keep(self, cpus: CpuSet, priority: int = 0, urgent: Collection[int] = ()) -> None:
        """Put every thread on ``cpus``, and those whose tid is ``urgent`` at FIFO ``priority``; 0: no thread.

        All others are as the process was started. What is right is not set again.
        """
        if not cpus:
            return
        refused: dict[int, tuple[Place, Place]] = {}
        for tid in self._threads.tids():
            try:
                now = self._threads.read(tid)
                self._calm = self._calm or now[1]
                realtime = priority and tid in urgent
                own = (cpus, Scheduling(Sched.FIFO, priority, reset_on_fork=True) if realtime else self._calm)
                if now != own and self._refused.get(tid) != (own, now):
                    now = self._set(tid, own, now)
            except OSError:
                continue  # it has ended
            if now != own:
                refused[tid] = (own, now)
        self._refused = refused
        self._say(refused.values())

    def _set(self, tid: int, own: Place, now: Place) -> Place:
        if now[0] != own[0]:
            self._threads.set_affinity(tid, own[0])
        if now[1] != own[1]:
            self._threads.set_scheduling(tid, own[1])
        return self._threads.read(tid)

    def _say(self, refused: Iterable[tuple[Place, Place]]) -> None:
        """Say what cannot be, once."""
        found = set()
        for own, now in refused:
            if now[0] != own[0]:
                text = f"rtpind itself runs on pCPU {now[0]} and not on housekeeping pCPU {own[0]}"
                found.add(f"{text}: see AllowedCPUs= of its slice")
            if now[1] != own[1]:
                text = f"rtpind itself is not {own[1]} but {now[1]}: it may come late where housekeeping pCPUs are busy"
                found.add(f"{text}; it takes CAP_SYS_NICE and, with RT_GROUP_SCHED, a cgroup with realtime budget")
        for text in sorted(found - self._said):
            self._emit(Record(Kind.DAEMON, text, Level.WARNING))
        self._said = frozenset(found)
