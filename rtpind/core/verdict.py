# SPDX-License-Identifier: GPL-2.0-or-later
"""How well each thread stands: a verdict against the policy, and the hazards that need no policy to see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from rtpind.core.decision import Decision, GuestDecision, State
from rtpind.core.law import State as Law
from rtpind.core.law import may_share
from rtpind.core.memory import Memory, Wanted
from rtpind.core.model import Host, Placement, Role, Sched, Scheduling, Snapshot, Thread
from rtpind.core.plan import is_drift


class Verdict(StrEnum):
    """The words of design.md section 2."""

    OK = "ok"
    DRIFTED = "drifted"
    PENDING = "pending"
    FENCED = "fenced"
    NO_FIFO = "no-fifo"
    NOT_PLACED = "not-placed"
    PAUSED = "paused"
    RELEASED = "released"
    UNCLAIMED = "unclaimed"
    UNMANAGED = "unmanaged"
    INTRUDER = "intruder"


_BY_STATE = {
    State.LEFT: Verdict.NOT_PLACED,
    State.REFUSED: Verdict.NOT_PLACED,
    State.UNMANAGED: Verdict.UNMANAGED,
    State.UNCLAIMED: Verdict.UNCLAIMED,
    State.RELEASED: Verdict.RELEASED,
    State.PAUSED: Verdict.PAUSED,
}


@dataclass(frozen=True, slots=True)
class Hazard:
    """Something dangerous about one thread, whoever made it so."""

    thread: Thread
    text: str


def judge(
    thread: Thread, guest: GuestDecision, decision: Decision, memory: Memory, snapshot: Snapshot
) -> tuple[Verdict, str]:
    """Return the verdict of one thread, and why where it is not ``ok``."""
    verdict, why = _judge(thread, guest, memory, snapshot)
    if verdict in (Verdict.OK, Verdict.DRIFTED, Verdict.PENDING, Verdict.NO_FIFO):
        return verdict, why
    intruded = intrusion(thread, decision)
    return (Verdict.INTRUDER, intruded) if intruded else (verdict, why)


def intrusion(thread: Thread, decision: Decision) -> str:
    """Return on whose exclusive pCPUs a thread may run besides its own; "" for none."""
    found = [
        f"pCPU {cpu} of {_owner_name(decision, owner)}"
        for cpu, owner in decision.owners.items()
        if cpu in thread.now.cpus and not owner.startswith(f"{thread.guest}: ")
    ]
    return f"may run on {', '.join(found)}" if found else ""


def _owner_name(decision: Decision, owner: str) -> str:
    uuid, _, label = owner.partition(": ")
    name = next((guest.guest.name for guest in decision.guests if guest.guest.uuid == uuid), uuid)
    return f"{name}'s {label}"


def _judge(thread: Thread, guest: GuestDecision, memory: Memory, snapshot: Snapshot) -> tuple[Verdict, str]:
    if not guest.state.managed:
        return _BY_STATE[guest.state], guest.reason
    wanted = guest.wanted.get(thread.id)
    if wanted is None:
        if guest.pending:
            return Verdict.PENDING, guest.reason
        if thread.settled:
            return Verdict.NOT_PLACED, "no pCPU for it"
        return Verdict.PENDING, "libvirt has not moved it into its cgroup yet"
    if memory.fighting(thread.id, snapshot.time):
        return Verdict.PAUSED, "something else keeps moving it"
    if wanted.holds(thread.now):
        if thread.id in guest.roomless or (guest.state is State.DEGRADED and wanted.withheld):
            return Verdict.NOT_PLACED, guest.reason or wanted.withheld
        if guest.state in (State.CROWDED, State.REMOTE) and wanted.exclusive:
            return Verdict.NOT_PLACED, guest.reason
        return (Verdict.NO_FIFO, wanted.withheld) if wanted.withheld else (Verdict.OK, "")
    hindered = _hindered(thread, guest, wanted, memory, snapshot)
    if hindered is not None:
        return hindered
    if is_drift(thread, wanted, memory):
        return Verdict.DRIFTED, f"wanted pCPU {wanted.cpus}"
    return Verdict.PENDING, ""


def _hindered(
    thread: Thread, guest: GuestDecision, wanted: Wanted, memory: Memory, snapshot: Snapshot
) -> tuple[Verdict, str] | None:
    """Return what keeps a thread from its place; None when nothing is known to."""
    unscheduled = memory.refusal(thread, wanted, snapshot.host, affinity=False)
    if not wanted.affine(thread.now):
        refusal = memory.refusal(thread, wanted, snapshot.host, affinity=True)
        if refusal is not None:
            return Verdict.FENCED, refusal.text
        if not thread.movable:
            return Verdict.FENCED, "the kernel lets nobody move this thread"
        return (Verdict.PENDING, unscheduled.text) if unscheduled is not None else None
    if unscheduled is not None:
        return Verdict.NO_FIFO, unscheduled.text
    why = _beside(thread, guest, wanted, memory, snapshot) if wanted.priority and not thread.helper else ""
    return (Verdict.NO_FIFO, why) if why else None


def _beside(vcpu: Thread, guest: GuestDecision, wanted: Wanted, memory: Memory, snapshot: Snapshot) -> str:
    """Return who keeps a vCPU in place from FIFO; "" for nobody, or for threads that are about to leave."""
    place = Placement(wanted.cpus, Scheduling(Sched.FIFO, wanted.priority))
    for other in snapshot.threads():
        if other.id == vcpu.id or not other.now.cpus & wanted.cpus or may_share(vcpu, place, other, other.now):
            continue
        if other.guest == vcpu.guest:
            if _judge(other, guest, memory, snapshot)[0] is not Verdict.PENDING:
                return f"its guest's {other.label} ({other.comm}) can run on pCPU {wanted.cpus}"
        elif other.now.scheduling.realtime:
            return f"a realtime {other.label} ({other.comm}) of another guest can run on pCPU {wanted.cpus}"
    return ""


def hazards(threads: Iterable[Thread], host: Host) -> Iterator[Hazard]:
    """Yield what is dangerous about the threads as they are, with or without a policy."""
    threads = tuple(threads)
    law = Law(threads)
    for thread in threads:
        realtime = thread.now.scheduling.realtime
        if thread.role is Role.VCPU and realtime:
            beside = law.shares(thread, thread.now)
            own = sorted({other.comm for other in beside if other.guest == thread.guest and other.helper})
            if own:
                text = (
                    f"FIFO vCPU shares pCPU {thread.now.cpus} with its own helpers ({', '.join(own)}): QEMU can starve"
                )
                yield Hazard(thread, text)
            peers = [other for other in beside if other.now.scheduling.realtime and not other.helper]
            if peers:
                yield Hazard(thread, f"FIFO vCPU shares pCPU {thread.now.cpus} with another FIFO vCPU")
        if thread.role is Role.EMULATOR and realtime:
            yield Hazard(thread, f"{thread.now.scheduling} leaked to {thread.comm}")
        isolated = thread.now.cpus & host.isolated
        if thread.helper and isolated and not realtime:
            yield Hazard(thread, f"helper may run on isolated pCPU {isolated}")
