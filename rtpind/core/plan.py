# SPDX-License-Identifier: GPL-2.0-or-later
"""The difference between where threads should be and where they are → an ordered Plan. Pure and deterministic.

The order is promise 2, host-wide: FIFO off → helpers and floaters leave → vCPU affinity → (read back) → FIFO →
floaters widen. Carrying it out, and asking the law before each step, is :mod:`rtpind.daemon.apply`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Any

from rtpind.core.cpuset import CpuSet
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory, Wanted
from rtpind.core.model import OTHER, Guest, Host, Role, Sched, Scheduling, Snapshot, Thread, ThreadId
from rtpind.core.placement import Decision, GuestDecision
from rtpind.core.policy import Drift

#: Two looks, this far apart, must find a guest's vCPUs and iothreads in place before FIFO (promise 7; measured:
#: 2 ms apart, 0 of 34 starts failed).
LOOK_APART_S = 0.002


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
    def order(self) -> tuple[int, str, str, int, ThreadId]:
        """Sort key: phase, then guest, role and index, so that equal input gives an equal plan."""
        return (self.phase, self.thread.guest, self.thread.role, self.thread.index or 0, self.thread.id)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Steps in the order in which they are taken; ``again``: UUIDs of guests to look at again in a moment."""

    steps: tuple[Step, ...] = ()
    drifted: tuple[tuple[Thread, Wanted], ...] = ()  # found off their place; not repaired when drift: says so
    fighters: tuple[Thread, ...] = ()  # would be repaired once too often
    again: frozenset[str] = frozenset()


def make(decision: Decision, snapshot: Snapshot, memory: Memory, drift: Drift) -> Plan:
    """Return the minimal ordered steps from what is to what should be; nothing for what is right."""
    steps: list[Step] = []
    drifted: list[tuple[Thread, Wanted]] = []
    fighters: list[Thread] = []
    again = {guest.uuid for guest in snapshot.guests if guest.doubtful or _unsettled(guest)}
    for guest in decision.guests:
        if not guest.state.managed:
            continue
        planner = _Guest(guest, snapshot, memory, drift)
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
        again=frozenset(again),
    )


def in_place(guest: GuestDecision, memory: Memory, host: Host) -> bool:
    """Return whether every vCPU and iothread is in its own cgroup and has the right affinity (promise 7).

    One that a cpuset keeps from its place is as right as it can be: libvirt is done with it, which is the point.
    """
    return all(
        thread.settled
        and (wanted := guest.wanted.get(thread.id)) is not None
        and (wanted.affine(thread.now) or memory.refusal(thread, wanted, host, affinity=True) is not None)
        for thread in guest.guest.threads
        if thread.role in (Role.VCPU, Role.IOTHREAD)
    )


def release(guests: Iterable[Guest], ledger: Ledger) -> Plan:
    """Return the steps that put back what the threads of ``guests`` had before rtpind touched them.

    A helper that began later has no original: it gets its main thread's, which it would have inherited. Unguarded:
    exactly what was there comes back, even where the law would not allow it (promise 8).
    """
    steps: list[Step] = []
    for guest in guests:
        main = ledger.originals.get(ThreadId(guest.pid, guest.pid_start, guest.pid, guest.pid_start))
        for thread in guest.threads:
            entry = ledger.originals.get(thread.id) or (main if thread.helper and thread.movable else None)
            if entry is None:
                continue
            old, now = entry.placement, thread.now
            moves = old.cpus != now.cpus
            common: dict[str, Any] = {"thread": thread, "reason": Reason.RELEASE, "guarded": False}
            if now.scheduling.realtime and (moves or now.scheduling != old.scheduling):
                calm = OTHER if old.scheduling.realtime else old.scheduling
                steps.append(Step(phase=Phase.DEMOTE, scheduling=calm, **common))
            if moves:
                steps.append(Step(phase=Phase.LEAVE, cpus=old.cpus, **common))
            if old.scheduling.realtime and (moves or now.scheduling != old.scheduling):
                steps.append(Step(phase=Phase.PROMOTE, scheduling=old.scheduling, **common))
    return Plan(steps=tuple(sorted(steps, key=lambda step: step.order)))


def _unsettled(guest: Guest) -> bool:
    return any(not thread.settled for thread in guest.threads)


class _Guest:
    """The steps of one guest."""

    def __init__(self, guest: GuestDecision, snapshot: Snapshot, memory: Memory, drift: Drift) -> None:
        self.guest = guest
        self.memory = memory
        self.drift = drift
        self.time = snapshot.time
        since = memory.right_since.get(guest.guest.process)
        self.host = snapshot.host
        self.looked = (
            in_place(guest, memory, snapshot.host) and since is not None and snapshot.time - since >= LOOK_APART_S
        )
        self.steps: list[Step] = []
        self.drifted: list[tuple[Thread, Wanted]] = []
        self.fighters: list[Thread] = []
        self.staying: list[Thread] = []  # helpers that are where they should not be, and will not move now

    def run(self) -> None:
        threads = self.guest.guest.threads
        for thread in sorted(threads, key=lambda thread: (not thread.helper, thread.id)):  # helpers first
            wanted = self.guest.wanted.get(thread.id)
            if wanted is None:
                if thread.helper:
                    self.staying.append(thread)
            elif not wanted.holds(thread.now):
                self.thread(thread, wanted)
            elif wanted.priority and thread.role is Role.VCPU and self.beside(wanted):
                self.step(thread, Reason.SAFETY, Phase.DEMOTE, scheduling=OTHER)  # promise 1

    def thread(self, thread: Thread, wanted: Wanted) -> None:
        """Plan for one thread that is not where it should be."""
        reason = self.reason(thread, wanted)
        if self.memory.fighting(thread.id, self.time):
            self.hold_back(thread, wanted)
            return
        if reason is Reason.DRIFT:
            self.drifted.append((thread, wanted))
            if self.drift is not Drift.REPAIR:
                self.hold_back(thread, wanted)
                return
        if self.memory.tired(thread.id, self.time):
            self.fighters.append(thread)
            self.hold_back(thread, wanted)
            return
        affine = wanted.affine(thread.now)
        realtime = thread.now.scheduling.realtime
        if not affine and not self.may_move(thread, wanted):
            self.hold_back(thread, wanted)
            return
        demoted = realtime and (not affine or not wanted.priority)
        if demoted:
            self.step(thread, reason, Phase.DEMOTE, scheduling=OTHER)
        if not affine:
            self.step(thread, reason, self.move_phase(thread, wanted), cpus=wanted.cpus)
        if wanted.priority and (demoted or not wanted.scheduled(thread.now)):
            self.promote(thread, wanted, reason)

    def reason(self, thread: Thread, wanted: Wanted) -> Reason:
        before = self.memory.places.get(thread.id)
        if before is None:
            return Reason.PLACE
        if before != wanted:
            return Reason.POLICY
        return Reason.DRIFT if thread.id in self.memory.verified else Reason.PLACE

    def may_move(self, thread: Thread, wanted: Wanted) -> bool:
        """Return whether to ask the kernel: not for what it forbids, nor again what it refused unchanged."""
        return thread.movable and self.memory.refusal(thread, wanted, self.host, affinity=True) is None

    def hold_back(self, thread: Thread, wanted: Wanted) -> None:
        """A thread that stays off its place keeps no FIFO there, and takes FIFO from a vCPU it can run beside."""
        if thread.now.scheduling.realtime and not (wanted.affine(thread.now) and wanted.priority):
            self.step(thread, Reason.SAFETY, Phase.DEMOTE, scheduling=OTHER)
        if thread.helper:
            self.staying.append(thread)

    def beside(self, wanted: Wanted) -> bool:
        """Return whether a helper stays where a vCPU is to be FIFO."""
        return any(helper.now.cpus & wanted.cpus for helper in self.staying)

    def promote(self, thread: Thread, wanted: Wanted, reason: Reason) -> None:
        if thread.role is Role.VCPU and self.beside(wanted):
            return
        if self.memory.refusal(thread, wanted, self.host, affinity=False) is not None:
            return
        scheduling = Scheduling(Sched.FIFO, wanted.priority, reset_on_fork=True)
        self.step(thread, reason, Phase.PROMOTE, scheduling=scheduling, gated=not self.looked)

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
