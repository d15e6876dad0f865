# SPDX-License-Identifier: GPL-2.0-or-later
"""The difference between where threads should be and where they are → an ordered Plan. Pure and deterministic.

The order is promise 2, host-wide: FIFO off → helpers and floaters leave → vCPU affinity → (read back) → FIFO →
floaters widen. Carrying it out, and asking the law before each step, is :mod:`rtpind.daemon.apply`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum, StrEnum
from types import MappingProxyType
from typing import Any

from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import Decision, GuestDecision
from rtpind.core.law import may_share
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory, Wanted
from rtpind.core.model import OTHER, Guest, Host, Placement, Role, Sched, Scheduling, Snapshot, Thread, ThreadId
from rtpind.core.policy import Drift

#: Two looks, this far apart, must find a guest's vCPUs and iothreads in place before FIFO (promise 7; measured:
#: 2 ms apart, 0 of 34 starts failed).
LOOK_APART_S = 0.002
#: … and so many times as long as a look takes: rtpind is realtime, and what it waits for, that libvirt is done with the
#: threads, needs the same pCPUs. On a slow host 2 ms of them may be none.
LOOKS_APART = 3
_LOOK_APART_MAX_S = 0.1


class Phase(IntEnum):
    """The host-wide order of steps."""

    DEMOTE = 1
    LEAVE = 2
    ENTER = 3
    PROMOTE = 5
    WIDEN = 6


class Reason(StrEnum):
    """Why a step is taken."""

    PLACE = "place"  # not on its place yet
    POLICY = "policy"  # its place changed
    DRIFT = "drift"  # it was verified there, and somebody moved it
    SAFETY = "safety"  # FIFO where promise 1 or 7 does not allow it
    RELEASE = "release"  # back to what it had


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One system call on one thread: ``cpus`` for sched_setaffinity, else ``scheduling`` for sched_setscheduler.

    ``gated``: FIFO that waits for the second look. ``guarded``: the law is asked first.
    """

    phase: Phase
    thread: Thread
    reason: Reason
    rule: str = ""
    cpus: CpuSet | None = None
    scheduling: Scheduling | None = None
    gated: bool = False
    guarded: bool = True

    @property
    def order(self) -> tuple[int, int, str, str, int, ThreadId]:
        """Sort key: phase, then guest, role and index, so that equal input gives an equal plan.

        FIFO is taken from the lowest priority first and given to the highest first: a thread that may be beside a
        FIFO vCPU, because it is above it, must not be seen there without FIFO.
        """
        rank = 0
        if self.phase is Phase.DEMOTE:
            rank = self.thread.now.scheduling.priority
        elif self.phase is Phase.PROMOTE and self.scheduling is not None:
            rank = -self.scheduling.priority
        return (self.phase, rank, self.thread.guest, self.thread.role, self.thread.index or 0, self.thread.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Steps in the order in which they are taken; ``again``: UUIDs of guests to look at again in a moment."""

    steps: tuple[Step, ...] = ()
    drifted: tuple[tuple[Thread, Wanted], ...] = ()  # found off their place; not repaired when drift: says so
    fighters: tuple[Thread, ...] = ()  # would be repaired once too often
    again: tuple[str, ...] = ()


def make(decision: Decision, snapshot: Snapshot, memory: Memory) -> Plan:
    """Return the minimal ordered steps from what is to what should be; nothing for what is right."""
    steps: list[Step] = []
    drifted: list[tuple[Thread, Wanted]] = []
    fighters: list[Thread] = []
    again = {found.guest.uuid for found in decision.guests if found.guest.doubtful or found.unsettled}
    strangers = [thread for found in decision.guests for thread in found.strangers]
    for guest in decision.guests:
        if not guest.state.managed or guest.at_rest:
            continue
        planner = _Guest(guest, snapshot, memory, strangers)
        planner.run()
        steps += planner.steps
        drifted += planner.drifted
        fighters += planner.fighters
        if any(step.gated for step in planner.steps):
            again.add(guest.guest.uuid)
    return Plan(
        steps=tuple(sorted(steps, key=lambda step: step.order)),
        drifted=tuple(drifted),
        fighters=tuple(fighters),
        again=tuple(sorted(again)),
    )


def look_apart(took: float) -> float:
    """Return how long after a guest was read back in place a second look may begin, if one takes ``took`` seconds."""
    return max(LOOK_APART_S, min(LOOKS_APART * took, _LOOK_APART_MAX_S))


def in_place(
    guest: GuestDecision, memory: Memory, host: Host, after: Mapping[ThreadId, Placement] = MappingProxyType({})
) -> bool:
    """Return whether every vCPU and iothread is in its own cgroup and has the right affinity (promise 7).

    ``after``: where threads were read back that have been moved since. One that a cpuset keeps from its place is as
    right as it can be: libvirt is done with it, which is the point.
    """
    return all(
        thread.settled
        and (wanted := guest.wanted.get(thread.id)) is not None
        and (wanted.affine(now := after.get(thread.id, thread.now)) or _fenced(thread, now, wanted, memory, host))
        for thread in guest.guest.threads
        if thread.role in (Role.VCPU, Role.IOTHREAD)
    )


def _fenced(thread: Thread, now: Placement, wanted: Wanted, memory: Memory, host: Host) -> bool:
    return memory.refusal(replace(thread, now=now), wanted, host, affinity=True) is not None


def is_drift(thread: Thread, wanted: Wanted, memory: Memory) -> bool:
    """Return whether somebody took the thread off a place on which it was verified and that is still wanted.

    A thread in place that lacks FIFO which rtpind itself took away is not drift.
    """
    seen = thread.id in memory.verified and memory.places.get(thread.id) == wanted
    return seen and not (wanted.affine(thread.now) and thread.id in memory.owed)


def release(guests: Iterable[Guest], ledger: Ledger) -> Plan:
    """Return the steps that put back what the threads of ``guests`` had before rtpind touched them.

    A helper that began later has no original: it gets its main thread's, which it would have inherited (not so an
    iothread, which libvirt places). Unguarded: exactly what was there comes back, even where the law would not allow
    it (promise 8).
    """
    steps: list[Step] = []
    for guest in guests:
        main = ledger.originals.get(main_thread(guest))
        for thread in guest.threads:
            entry = ledger.originals.get(thread.id) or (main if follows_main(thread) else None)
            if entry is None:
                continue
            old, now = entry.placement, thread.now
            moves, changes = old.cpus != now.cpus, old.scheduling != now.scheduling
            calm = OTHER if old.scheduling.realtime or old.scheduling.sched is Sched.DEADLINE else old.scheduling
            common: dict[str, Any] = {"thread": thread, "reason": Reason.RELEASE, "guarded": False}
            falls = now.scheduling.realtime and (moves or changes)
            if falls or (changes and not old.scheduling.realtime and calm != now.scheduling):
                steps.append(Step(phase=Phase.DEMOTE, scheduling=calm, **common))
            if moves:
                steps.append(Step(phase=Phase.LEAVE, cpus=old.cpus, **common))
            if old.scheduling.realtime and (moves or changes):
                steps.append(Step(phase=Phase.PROMOTE, scheduling=old.scheduling, **common))
    return Plan(steps=tuple(sorted(steps, key=lambda step: step.order)))


def main_thread(guest: Guest) -> ThreadId:
    """Return the id of the thread that every helper of a guest descends from."""
    return ThreadId(guest.pid, guest.pid_start, guest.pid, guest.pid_start)


def follows_main(thread: Thread) -> bool:
    """Return whether a thread without an original is released to what its main thread had."""
    return thread.helper and thread.index is None and thread.movable


class _Guest:
    """The steps of one guest."""

    def __init__(self, guest: GuestDecision, snapshot: Snapshot, memory: Memory, strangers: Sequence[Thread]) -> None:
        self.guest = guest
        self.memory = memory
        self.strangers = strangers  # realtime threads that are not for rtpind to move
        self.time = snapshot.time
        since = memory.right_since.get(guest.guest.process)
        self.host = snapshot.host
        self.looked = (
            in_place(guest, memory, snapshot.host)
            and since is not None
            and snapshot.time - snapshot.took - since >= look_apart(snapshot.took)
        )
        self.steps: list[Step] = []
        self.drifted: list[tuple[Thread, Wanted]] = []
        self.fighters: list[Thread] = []
        self.threads = sorted(guest.guest.threads, key=lambda thread: thread.id)
        self.planned = {thread.id: thread.now for thread in self.threads}  # where the steps so far lead
        self.demoted: set[ThreadId] = set()
        self.promotable: list[tuple[Thread, Wanted, Reason]] = []

    def run(self) -> None:
        wanted = self.guest.wanted
        for thread in self.threads:
            if thread.id in wanted and not wanted[thread.id].holds(thread.now):
                self.thread(thread, wanted[thread.id])
        # The highest priority first: what is FIFO above a vCPU may be beside it.
        for thread, place, reason in sorted(self.promotable, key=lambda item: -item[1].priority):
            self.promote(thread, place, reason)
        for thread in self.threads:
            if thread.role is Role.VCPU and thread.id in wanted:
                self.guard(thread, wanted[thread.id])

    def thread(self, thread: Thread, wanted: Wanted) -> None:
        """Plan for one thread that is not where it should be: what lets it leave and move."""
        reason = self.reason(thread, wanted)
        affine = wanted.affine(thread.now)
        if self.held_back(thread, wanted, reason):
            if thread.now.scheduling.realtime and not (affine and wanted.priority):
                self.demote(thread, wanted, Reason.SAFETY)  # it stays off its place, but not with FIFO
            return
        falls = thread.now.scheduling.realtime and (not affine or not wanted.priority)
        if falls and not self.demote(thread, wanted, reason):
            return
        if not affine:
            self.step(thread, reason, self.move_phase(thread, wanted), cpus=wanted.cpus)
        if wanted.priority and (falls or not wanted.scheduled(thread.now)):
            self.promotable.append((thread, wanted, reason))

    def held_back(self, thread: Thread, wanted: Wanted, reason: Reason) -> bool:
        """Return whether a thread is not to be put on its place now; note drift and fights."""
        if self.memory.fighting(thread.id, self.time):
            return True
        if reason is Reason.DRIFT:
            self.drifted.append((thread, wanted))
            if self.guest.drift is not Drift.REPAIR:
                return True
        owed = wanted.affine(thread.now) and thread.id in self.memory.owed  # giving that is no repair
        if not owed and self.memory.tired(thread.id, self.time):
            self.fighters.append(thread)
            return True
        return not wanted.affine(thread.now) and not self.may_move(thread, wanted)

    def reason(self, thread: Thread, wanted: Wanted) -> Reason:
        before = self.memory.places.get(thread.id)
        if before is not None and before != wanted:
            return Reason.POLICY
        return Reason.DRIFT if is_drift(thread, wanted, self.memory) else Reason.PLACE

    def may_move(self, thread: Thread, wanted: Wanted) -> bool:
        """Return whether to ask the kernel: not for what it forbids, nor again what it refused unchanged."""
        return thread.movable and self.memory.refusal(thread, wanted, self.host, affinity=True) is None

    def demote(self, thread: Thread, wanted: Wanted, reason: Reason) -> bool:
        """Take FIFO from a thread; return False where that was refused, or would leave it below a FIFO vCPU."""
        if self.keeps_fifo(thread, wanted):
            return False
        for vcpu in self.threads:
            below = vcpu.role is Role.VCPU and vcpu.now.scheduling.realtime and vcpu.now.cpus & thread.now.cpus
            if below and may_share(vcpu, vcpu.now, thread, thread.now):
                place = self.guest.wanted.get(vcpu.id)
                if place is None or self.keeps_fifo(vcpu, place):
                    return False
        self.step(thread, reason, Phase.DEMOTE, scheduling=OTHER)
        self.demoted.add(thread.id)
        return True

    def keeps_fifo(self, thread: Thread, wanted: Wanted) -> bool:
        """Return whether the kernel refused to take FIFO from the thread as it is now."""
        refusal = self.memory.refusal(thread, wanted, self.host, affinity=False)
        return refusal is not None and refusal.observed == thread.now

    def promote(self, thread: Thread, wanted: Wanted, reason: Reason) -> None:
        if thread.role is Role.VCPU and self.beside(thread, wanted):
            return
        if self.memory.refusal(thread, wanted, self.host, affinity=False) is not None:
            return
        scheduling = Scheduling(Sched.FIFO, wanted.priority, reset_on_fork=True)
        self.step(thread, reason, Phase.PROMOTE, scheduling=scheduling, gated=not self.looked)

    def beside(self, vcpu: Thread, wanted: Wanted) -> bool:
        """Return whether a thread would still be, unlawfully, where a vCPU is to be FIFO (promise 1)."""
        place = Placement(wanted.cpus, Scheduling(Sched.FIFO, wanted.priority))
        own = any(
            self.planned[other.id].cpus & wanted.cpus and not may_share(vcpu, place, other, self.planned[other.id])
            for other in self.threads
            if other.id != vcpu.id
        )
        return own or any(
            stranger.now.cpus & wanted.cpus for stranger in self.strangers if stranger.guest != vcpu.guest
        )

    def guard(self, vcpu: Thread, wanted: Wanted) -> None:
        """Take FIFO from a vCPU in place beside which a thread of its guest stays, or passes without FIFO."""
        if not vcpu.now.scheduling.realtime or not wanted.affine(vcpu.now) or vcpu.id in self.demoted:
            return
        others = [other for other in self.threads if other.id != vcpu.id]
        if any(self.stays(vcpu, other) for other in others):
            self.steps = [step for step in self.steps if step.thread.id != vcpu.id]
            self.demote(vcpu, wanted, Reason.SAFETY)
        elif any(self.passes(vcpu, other) for other in others):
            fell = self.demote(vcpu, wanted, Reason.SAFETY)
            if fell and wanted.scheduled(vcpu.now):
                self.promote(vcpu, wanted, Reason.SAFETY)

    def stays(self, vcpu: Thread, other: Thread) -> bool:
        now, planned = vcpu.now, self.planned[other.id]
        return bool(planned.cpus & now.cpus) and not may_share(vcpu, now, other, planned)

    def passes(self, vcpu: Thread, other: Thread) -> bool:
        """Return whether ``other``, which may be beside the vCPU before or after, will not be above it in between."""
        arrives = bool((self.planned[other.id].cpus - other.now.cpus) & vcpu.now.cpus)
        falls = other.id in self.demoted and may_share(vcpu, vcpu.now, other, other.now)
        return arrives or (falls and bool(other.now.cpus & vcpu.now.cpus))

    def move_phase(self, thread: Thread, wanted: Wanted) -> Phase:
        if thread.now.cpus < wanted.cpus:
            return Phase.WIDEN
        return Phase.ENTER if thread.role is Role.VCPU and wanted.exclusive else Phase.LEAVE

    def step(
        self,
        thread: Thread,
        reason: Reason,
        phase: Phase,
        *,
        cpus: CpuSet | None = None,
        scheduling: Scheduling | None = None,
        gated: bool = False,
    ) -> None:
        now = self.planned[thread.id]
        self.planned[thread.id] = Placement(cpus or now.cpus, scheduling or now.scheduling)
        self.steps.append(
            Step(
                phase=phase,
                thread=thread,
                reason=reason,
                rule=self.guest.rule,
                cpus=cpus,
                scheduling=scheduling,
                gated=gated,
            )
        )
