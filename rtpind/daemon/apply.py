# SPDX-License-Identifier: GPL-2.0-or-later
"""Apply: carries a Plan out, step by step, and reads each back. The only caller of :mod:`rtpind.host.sched`.

Before each step: is it still that thread of that guest, and does promise 1 allow the step as things now are? A step
that fails takes with it only those that depend on it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from typing import Protocol

from rtpind.core.audit import Outcome, Result
from rtpind.core.cpuset import CpuSet
from rtpind.core.law import State
from rtpind.core.model import Kind, Limits, Placement, Role, Scheduling, Snapshot, Thread, ThreadId
from rtpind.core.plan import Phase, Plan, Reason, Step
from rtpind.host import sched
from rtpind.host.cgroup import Cgroups
from rtpind.host.proc import Proc


class Kernel(Protocol):
    """What applying needs of the kernel."""

    def is_still(self, thread: Thread) -> bool:
        """Return whether it is, at this moment, that thread of that guest."""

    def set_affinity(self, tid: int, cpus: CpuSet) -> int:
        """Return 0 or the errno."""

    def set_scheduling(self, tid: int, scheduling: Scheduling) -> int:
        """Return 0 or the errno."""

    def read(self, thread: Thread) -> Placement | None:
        """Return where the thread is now; None when it is gone."""

    def limits(self, thread: Thread) -> Limits:
        """Return what keeps it from elsewhere."""


class RealKernel:
    """The kernel of this host."""

    def __init__(self, proc: Proc, cgroups: Cgroups) -> None:
        self._proc = proc
        self._cgroups = cgroups
        self.set_affinity = sched.set_affinity
        self.set_scheduling = sched.set_scheduling

    def is_still(self, thread: Thread) -> bool:
        """Return whether start time, and for a guest's other processes the cgroup, are those that were seen."""
        if not self._proc.is_still(thread.id, thread.kind, thread.comm):
            return False
        if thread.kind is not Kind.PROCESS:
            return True
        try:
            return self._cgroups.of(thread.id.tid, thread.id.tid).path == thread.cgroup
        except OSError:
            return False

    def read(self, thread: Thread) -> Placement | None:
        """Return the placement now."""
        try:
            stat = self._proc.stat(thread.id.tid)
            return self._proc.placement(thread.id.tid, stat) if stat.start == thread.id.start else None
        except OSError:
            return None

    def limits(self, thread: Thread) -> Limits:
        """Return the thread's cpuset and realtime budget."""
        return self._cgroups.limits(thread.id.pid, thread.id.tid, thread.kind)


def apply(plan: Plan, snapshot: Snapshot, kernel: Kernel, on_step: Callable[[Outcome], None]) -> list[Outcome]:
    """Carry out ``plan`` and return an outcome for each step; each is also told to ``on_step`` as it happens."""
    state = State(snapshot.threads())
    failed: set[ThreadId] = set()
    outcomes: list[Outcome] = []
    for step in plan.steps:
        outcome = _defer(step, state, failed) or _take(step, state, kernel)
        if outcome.result is Result.VANISHED:
            state.update(step.thread.id, None)
        elif outcome.after is not None:
            state.update(step.thread.id, outcome.after)
        if not outcome.done:
            failed.add(step.thread.id)
        outcomes.append(outcome)
        on_step(outcome)
    return outcomes


def pretend(plan: Plan) -> list[Outcome]:
    """Return what :func:`apply` would be asked to do, and do nothing."""
    return [Outcome(step=step, result=Result.WOULD, before=step.thread.now) for step in plan.steps]


def _defer(step: Step, state: State, failed: set[ThreadId]) -> Outcome | None:
    """Return the outcome of a step that is not taken; None for one that is to be."""
    thread, before = step.thread, state.now(step.thread.id)
    if before is None:
        return Outcome(step=step, result=Result.VANISHED, before=thread.now)
    if thread.id in failed or step.gated:
        return Outcome(step=step, result=Result.DEFERRED, before=before)
    beside = _forbidden(step, before, state) if step.guarded else []
    if beside:
        names = ", ".join(sorted({f"{other.label} ({other.comm})" for other in beside}))
        return Outcome(step=step, result=Result.BLOCKED, before=before, beside=names)
    return None


def _forbidden(step: Step, before: Placement, state: State) -> Sequence[Thread]:
    """Return beside whom promise 1 forbids the step.

    A foreign thread that is still there when FIFO is due could not be moved: it is an intruder, reported, and not
    a reason to withhold FIFO. One that is FIFO itself is: the two would never yield to each other.
    """
    now = Placement(step.cpus or before.cpus, step.scheduling or before.scheduling)
    intruded = state.intrudes(step.thread, now)
    if step.phase is not Phase.PROMOTE or step.thread.role is not Role.VCPU:
        return intruded
    others = state.shares(step.thread, now)
    return [other for other in others if other.guest == step.thread.guest or _realtime(other, state)]


def _realtime(thread: Thread, state: State) -> bool:
    now = state.now(thread.id)
    return now is not None and now.scheduling.realtime


def _take(step: Step, state: State, kernel: Kernel) -> Outcome:
    thread = step.thread
    before = state.now(thread.id) or thread.now
    if not kernel.is_still(thread):
        return Outcome(step=step, result=Result.VANISHED, before=before)
    if step.cpus is not None:
        error = kernel.set_affinity(thread.id.tid, step.cpus)
    else:
        assert step.scheduling is not None
        error = kernel.set_scheduling(thread.id.tid, step.scheduling)
    after = None if error == errno.ESRCH else kernel.read(thread)
    if after is None:
        return Outcome(step=step, result=Result.VANISHED, before=before, error=error)
    right = after.cpus == step.cpus if step.cpus is not None else after.scheduling == step.scheduling
    if right:
        return Outcome(step=step, result=Result.APPLIED, before=before, after=after)
    if not error and step.reason is not Reason.RELEASE and step.cpus is not None and not after.cpus <= step.cpus:
        # No cpuset widens: somebody set it in between, as libvirt does while a guest starts. The next look tries again.
        return Outcome(step=step, result=Result.OVERTAKEN, before=before, after=after)
    result = Result.REFUSED if error else Result.NARROWED
    return Outcome(step=step, result=result, before=before, after=after, error=error, limits=kernel.limits(thread))
