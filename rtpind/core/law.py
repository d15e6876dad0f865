# SPDX-License-Identifier: GPL-2.0-or-later
"""Promise 1 as a function of what the kernel answered: who may share a pCPU with a FIFO vCPU.

    No thread may share a pCPU with a FIFO vCPU, unless it is of the same guest and FIFO at a higher priority.

:class:`State` is kept up to date while a plan is carried out, and asked before each step, so that no prefix of a
plan adds a violation, whatever the steps before it came to (promise 2).
"""

from __future__ import annotations

from collections.abc import Iterable

from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.model import Placement, Role, Sched, Thread, ThreadId


def may_share(vcpu: Thread, vcpu_now: Placement, other: Thread, other_now: Placement) -> bool:
    """Return whether ``other`` may run where the FIFO ``vcpu`` runs."""
    same = other.guest == vcpu.guest
    scheduling = other_now.scheduling
    above = scheduling.sched is Sched.FIFO and scheduling.priority > vcpu_now.scheduling.priority
    return same and above


class State:
    """Where each thread is, as last read; indexed, so that a step costs no walk over all threads.

    By mask, of which there are few: thousands of threads float on the same pCPUs. FIFO vCPUs also by pCPU.
    """

    def __init__(self, threads: Iterable[Thread]) -> None:
        self._threads: dict[ThreadId, Thread] = {}
        self._now: dict[ThreadId, Placement] = {}
        self._on: dict[CpuSet, set[ThreadId]] = {}
        self._fifo: dict[int, set[ThreadId]] = {}  # pCPU → the FIFO vCPUs that may run there, if any
        self._fifo_cpus = NO_CPUS
        for thread in threads:
            self._threads[thread.id] = thread
            self.update(thread.id, thread.now)

    def now(self, thread: ThreadId) -> Placement | None:
        """Return where a thread is; None when it is gone."""
        return self._now.get(thread)

    def update(self, thread: ThreadId, now: Placement | None) -> None:
        """Note what the kernel answered; None: the thread is gone."""
        before = self._now.pop(thread, None)
        vcpu = self._threads[thread].role is Role.VCPU
        if before is not None:
            self._on[before.cpus].discard(thread)
            if vcpu and before.scheduling.realtime:
                for cpu in before.cpus:
                    self._fifo[cpu].discard(thread)
                self._fifo_cpus -= CpuSet(cpu for cpu in before.cpus if not self._fifo[cpu])
        if now is not None:
            self._now[thread] = now
            self._on.setdefault(now.cpus, set()).add(thread)
            if vcpu and now.scheduling.realtime:
                for cpu in now.cpus:
                    self._fifo.setdefault(cpu, set()).add(thread)
                self._fifo_cpus |= now.cpus

    def beside(self, cpus: CpuSet, but: ThreadId) -> list[Thread]:
        """Return the threads other than ``but`` that may run on any of ``cpus``, in a stable order."""
        found = {id_ for mask, ids in self._on.items() if mask & cpus for id_ in ids if id_ != but}
        return [self._threads[id_] for id_ in sorted(found)]

    def shares(self, vcpu: Thread, now: Placement) -> list[Thread]:
        """Return the threads that would break promise 1 if ``vcpu`` were FIFO as in ``now``."""
        return [
            other for other in self.beside(now.cpus, vcpu.id) if not may_share(vcpu, now, other, self._now[other.id])
        ]

    def intrudes(self, thread: Thread, now: Placement) -> list[Thread]:
        """Return the FIFO vCPUs beside which ``thread`` would newly, and unlawfully, run as in ``now``."""
        near = {id_ for cpu in now.cpus & self._fifo_cpus for id_ in self._fifo[cpu] if id_ != thread.id}
        return [
            vcpu
            for vcpu in (self._threads[id_] for id_ in sorted(near))
            if self._breaks(vcpu, thread, now) and not self._breaks(vcpu, thread, self._now.get(thread.id))
        ]

    def _breaks(self, vcpu: Thread, other: Thread, place: Placement | None) -> bool:
        """Return whether promise 1 is broken with ``other`` as in ``place``, and ``vcpu`` as it is."""
        now = self._now[vcpu.id]
        return (
            place is not None
            and vcpu.role is Role.VCPU
            and now.scheduling.realtime
            and bool(place.cpus & now.cpus)
            and not may_share(vcpu, now, other, place)
        )

    def violations(self) -> set[tuple[ThreadId, ThreadId]]:
        """Return every (FIFO vCPU, thread beside it) that breaks promise 1."""
        return {
            (vcpu.id, other.id)
            for vcpu in self._threads.values()
            if (now := self._now.get(vcpu.id)) is not None
            for other in self.beside(now.cpus, vcpu.id)
            if self._breaks(vcpu, other, self._now[other.id])
        }
