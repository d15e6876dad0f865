# SPDX-License-Identifier: GPL-2.0-or-later
"""Where every thread should be: (policy, snapshot, memory, ledger) → Decision. Pure and deterministic.

In set equations, of pCPUs: ``held`` = what is given out exclusively, or was given to a guest that rtpind now leaves
alone, or carries its FIFO; a floating thread's mask = its pool − held; an exclusive pool's free pCPUs = pool − held −
``blocked``, where blocked = what the threads of guests that are not placed are narrowed to (promise 6).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.ledger import HandsOff, Ledger
from rtpind.core.memory import Memory, Wanted
from rtpind.core.model import Guest, Host, Role, Snapshot, Thread, ThreadId
from rtpind.core.policy import HOUSEKEEPING, Entry, Exclusive, GuestClass, Policy, Rule, WhenFull


class State(StrEnum):
    """What the policy makes of a guest."""

    PLACED = "placed"
    DEGRADED = "degraded"  # no room: floats in housekeeping without FIFO
    LEFT = "left"  # no room: as it is
    UNMANAGED = "unmanaged"  # no rule
    UNCLAIMED = "unclaimed"  # its rule is gone
    RELEASED = "released"
    PAUSED = "paused"

    @property
    def managed(self) -> bool:
        """Whether rtpind acts on the guest's threads."""
        return self in (State.PLACED, State.DEGRADED)


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDecision:
    """One guest: by which rule, in which state and why, and where each of its threads should be."""

    guest: Guest
    state: State
    rule: str = ""
    class_name: str = ""
    reason: str = ""
    wanted: Mapping[ThreadId, Wanted] = field(default_factory=dict)
    roomless: frozenset[ThreadId] = frozenset()  # of a placed guest (hot-plugged, say): they stay with the helpers


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """All guests, and who holds which pCPU exclusively (``guest: vcpu 0``)."""

    guests: tuple[GuestDecision, ...]
    owners: Mapping[int, str] = field(default_factory=dict)
    blocked: Mapping[int, str] = field(default_factory=dict)

    def wanted(self) -> dict[ThreadId, Wanted]:
        """Return the wanted placement of every managed thread."""
        return {id_: wanted for guest in self.guests for id_, wanted in guest.wanted.items()}


@dataclass(frozen=True, slots=True)
class _Slot:
    """One pCPU to be given out: to one thread, or to a role of a guest; ``threads`` are those that will sit there."""

    label: str
    pool: str
    threads: tuple[Thread, ...]
    alone: bool = False  # it is for a FIFO vCPU


def place(policy: Policy, snapshot: Snapshot, memory: Memory, ledger: Ledger, clock: float = 0.0) -> Decision:
    """Decide the placement of every thread.

    ``clock``: wall-clock seconds, for pauses that end. Places that the daemon gave out before, then places that
    are valid in the kernel, are kept (promise 10); conflicts go to the oldest process, then by UUID (promise 6).
    """
    return _Placing(policy, snapshot, memory, ledger, clock).decide()


def fifo_withheld(host: Host, cpus: CpuSet, priority: int, housekeeping: CpuSet, *, unsafe: bool) -> str:
    """Return why promise 7 withholds FIFO ``priority`` on ``cpus``; "" when it may be given."""
    if cpus & housekeeping:
        return f"pCPU {cpus & housekeeping} is housekeeping"
    if unsafe:
        return ""
    for cpu in cpus:
        lowest = None if host.guards is None else host.guards.get(cpu)
        if unprotected(host, cpu) and lowest is not None and lowest <= priority:
            return (
                f"nothing protects the host on pCPU {cpu}: RT throttling is off, there is no fair server, and its "
                f"ksoftirqd, ktimers or rcuc is at FIFO {lowest}, not above {priority} (raise them, or give back "
                "kernel.sched_rt_runtime_us, or say unsafe: true in the class)"
            )
    return ""


def unprotected(host: Host, cpu: int) -> bool:
    """Return whether neither RT throttling nor the fair server protects ``cpu``; what is unknown protects."""
    throttled = host.throttles is not False and host.rt_runtime_us != -1
    served = host.fair_server is None or cpu in host.fair_server
    return not throttled and not served


class _Placing:
    def __init__(self, policy: Policy, snapshot: Snapshot, memory: Memory, ledger: Ledger, clock: float) -> None:
        self.policy = policy
        self.host = snapshot.host
        self.snapshot = snapshot
        self.memory = memory
        self.managed = ledger.managed()
        self.ledger = ledger
        self.clock = clock
        self.owners: dict[int, str] = {}  # pCPU → who holds it exclusively
        self.blocked: dict[int, dict[str, str]] = {}  # pCPU → UUIDs of the guests narrowed to it, and their names
        self.held = NO_CPUS  # what floaters keep off
        self.fenced: dict[str, CpuSet] = {}  # guest uuid → what a cpuset holds its helpers to
        self.given: dict[tuple[str, str], int] = {}  # (guest uuid, slot label) → pCPU
        self.housekeeping = policy.pool(HOUSEKEEPING, self.host)

    def decide(self) -> Decision:
        ordered = sorted(self.snapshot.guests, key=lambda guest: (guest.pid_start, guest.uuid))
        placing: list[tuple[Guest, Rule, GuestClass]] = []
        done: dict[str, GuestDecision] = {}
        for guest in ordered:
            rule = self.policy.rule_for(guest)
            class_ = self.policy.class_of(rule)
            left = self.leave(guest, rule, class_)
            if left is not None:
                done[guest.uuid] = left
                self.block(guest)
            else:
                assert rule is not None
                assert class_ is not None
                placing.append((guest, rule, class_))
        self.block_fenced(placing)
        slots = {guest.uuid: self.slots(guest, class_) for guest, _, class_ in placing}
        self.keep(slots)
        # A thread that libvirt has not moved yet has only its name to show: what it needs comes last (promise 5).
        filling = sorted(placing, key=lambda item: not all(thread.settled for thread in item[0].threads))
        fits = {guest.uuid: self.fit(guest, class_, slots[guest.uuid]) for guest, _, class_ in filling}
        for guest, rule, class_ in placing:
            done[guest.uuid] = self.settle(guest, rule, class_, slots[guest.uuid], fits[guest.uuid])
        decided = tuple(done[guest.uuid] for guest in sorted(ordered, key=lambda guest: (guest.name, guest.uuid)))
        return Decision(guests=decided, owners=dict(sorted(self.owners.items())), blocked=self.blocking())

    def blocking(self) -> dict[int, str]:
        return {cpu: "; ".join(who.values()) for cpu, who in sorted(self.blocked.items())}

    def leave(self, guest: Guest, rule: Rule | None, class_: GuestClass | None) -> GuestDecision | None:
        """Return the decision for a guest that is not touched; None for one to place."""
        off = self.ledger.off(guest, self.clock)
        text = str(rule) if rule else ""
        if off is not None:
            state = State.RELEASED if off.kind is HandsOff.RELEASED else State.PAUSED
            return GuestDecision(guest=guest, state=state, rule=text, reason=f"rtpinctl {off.kind}")
        if class_ is None:
            if guest.process in self.managed:
                reason = "its rule is gone; rtpinctl release puts it back"
                return GuestDecision(guest=guest, state=State.UNCLAIMED, rule=text, reason=reason)
            return GuestDecision(
                guest=guest, state=State.UNMANAGED, rule=text, reason="" if rule else "no rule matches"
            )
        if guest.starting:
            reason = "it is starting: libvirt has not moved its vCPUs yet"
            return GuestDecision(guest=guest, state=State.PLACED, rule=text, class_name=class_.name, reason=reason)
        return None

    def block(self, guest: Guest) -> None:
        """Keep exclusive places off what a guest that is left alone is narrowed to.

        Floaters keep off its FIFO threads, and off the pCPUs that rtpind gave its vCPUs before.
        """
        for thread in guest.threads:
            narrowed = self.narrowed(thread)
            for cpu in narrowed:
                self.blocked.setdefault(cpu, {}).setdefault(guest.uuid, f"{guest.name}: {thread.label}")
            alone = not thread.helper and len(narrowed) == 1 and not narrowed <= self.housekeeping
            if thread.now.scheduling.realtime or (alone and guest.process in self.managed):
                self.held |= narrowed

    def narrowed(self, thread: Thread) -> CpuSet:
        """Return what a thread is narrowed to: nothing when it has one of the masks that nobody chose."""
        cpus = thread.now.cpus & self.host.online
        return NO_CPUS if cpus in (self.host.online, self.host.online - self.host.isolated) else cpus

    def block_fenced(self, placing: list[tuple[Guest, Rule, GuestClass]]) -> None:
        """Keep places of other guests off what a cpuset holds a thread to, and vCPUs off their own guest's helpers."""
        for guest, _, class_ in placing:
            for thread in guest.threads:
                if any(refusal.affinity for refusal in self.memory.refused.get(thread.id, ())):
                    if thread.helper and class_.entries[thread.role].share_with is None:
                        self.fenced[guest.uuid] = self.fenced.get(guest.uuid, NO_CPUS) | thread.now.cpus
                    for cpu in self.narrowed(thread):
                        text = f"{guest.name}: {thread.label} (fenced)"
                        self.blocked.setdefault(cpu, {}).setdefault(guest.uuid, text)

    def slots(self, guest: Guest, class_: GuestClass) -> list[_Slot]:
        """Return the pCPUs that a guest needs for itself, vCPUs first."""
        found: list[_Slot] = []
        for role in Role:
            entry = class_.entries[role]
            members = sorted(
                (thread for thread in guest.threads if thread.role is role),  # unsettled ones need room too
                key=lambda thread: (thread.index or 0, not thread.settled, thread.id),
            )
            if entry.exclusive is Exclusive.THREAD:
                own: dict[str, _Slot] = {}  # one for each vCPU, however many claim to be it
                for thread in members:
                    label = thread.label if thread.index is not None else f"{role} tid {thread.id.tid}"
                    fifo = role is Role.VCPU and entry.priority > 0
                    own.setdefault(label, _Slot(label, entry.pool, (thread,), alone=fifo))
                found += own.values()
            elif entry.exclusive is Exclusive.GUEST and members:
                shared = self.slot_label(class_, role)
                earlier = next((slot for slot in found if slot.label == shared), None)
                if earlier is not None:  # a role that follows emulator shares the emulator's pCPU
                    found[found.index(earlier)] = _Slot(shared, entry.pool, (*earlier.threads, *members))
                else:
                    found.append(_Slot(shared, entry.pool, tuple(members)))
        return found

    def slot_label(self, class_: GuestClass, role: Role) -> str:
        """Return whose pCPU a role of ``exclusive: guest`` uses: the emulator's, if it follows emulator."""
        follows = class_.entries[role] is class_.entries[Role.EMULATOR]
        return str(Role.EMULATOR) if follows else str(role)

    def keep(self, slots: Mapping[str, list[_Slot]]) -> None:
        """Keep valid places: first those this daemon decided, then those the kernel shows; oldest guest first."""
        for remembered in (True, False):
            for uuid, wanted in slots.items():
                for slot in wanted:
                    if (uuid, slot.label) in self.given:
                        continue
                    for thread in slot.threads:
                        place = self.memory.places.get(thread.id) if remembered else thread.now
                        if place is None or len(place.cpus) != 1 or not thread.settled:
                            continue
                        if self.free(slot, uuid) & place.cpus:
                            self.give(uuid, slot, place.cpus.first())
                            break

    def free(self, slot: _Slot, uuid: str) -> CpuSet:
        """Return the pCPUs that ``uuid`` may take for ``slot``.

        A vCPU is not put where a cpuset holds a helper of its guest, if there is another pCPU: it could never be FIFO.
        """
        foreign = (cpu for cpu, who in self.blocked.items() if who.keys() - {uuid})
        cpus = self.policy.pool(slot.pool, self.host) - CpuSet(self.owners) - CpuSet(foreign)
        beside = self.fenced.get(uuid, NO_CPUS) if slot.alone else NO_CPUS
        return (cpus - beside) or cpus

    def give(self, uuid: str, slot: _Slot, cpu: int) -> None:
        self.owners[cpu] = f"{slot.threads[0].guest}: {slot.label}"
        self.given[(uuid, slot.label)] = cpu

    def fit(self, guest: Guest, class_: GuestClass, slots: list[_Slot]) -> str:
        """Give a guest the places it lacks: all of them, or (but for one placed before) none. Return why not."""
        short = self.unshared(guest, class_) or self.fill(guest, slots)
        if short:
            for slot in slots:
                cpu = self.given.pop((guest.uuid, slot.label), None)
                if cpu is not None:
                    del self.owners[cpu]
            if self.policy.when_full is WhenFull.LEAVE:
                self.block(guest)
        return short

    def fill(self, guest: Guest, slots: list[_Slot]) -> str:
        lacking = [slot for slot in slots if (guest.uuid, slot.label) not in self.given]
        kept = any(self.placed(thread) for slot in slots if slot not in lacking for thread in slot.threads)
        short = ""
        for slot in lacking:
            free, former = self.free(slot, guest.uuid), self.former(slot)
            if free or former:
                self.give(guest.uuid, slot, (free or former).first())
                kept = kept or bool(former)
            else:
                short = short or f"no free pCPU in '{slot.pool}' for {slot.label}"
        return "" if kept else short  # kept: a thread plugged into a placed guest takes no place from the others

    def placed(self, thread: Thread) -> bool:
        """Return whether rtpind gave this thread a place before: in this run, or in one that touched it."""
        place = self.memory.places.get(thread.id)
        return thread.id in self.ledger.originals or (place is not None and place.exclusive)

    def former(self, slot: _Slot) -> CpuSet:
        """Return the place rtpind gave a slot, though somebody is narrowed to it now: better than none (promise 6)."""
        for thread in slot.threads:
            touched = thread.now if thread.id in self.ledger.originals else None
            place = self.memory.places.get(thread.id) or touched
            if place is not None and len(place.cpus) == 1:
                return (place.cpus & self.policy.pool(slot.pool, self.host)) - CpuSet(self.owners)
        return NO_CPUS

    def settle(self, guest: Guest, rule: Rule, class_: GuestClass, slots: list[_Slot], short: str) -> GuestDecision:
        """Turn the given places of one guest into the wanted placement of each of its threads."""
        common: dict[str, Any] = {"guest": guest, "rule": str(rule), "class_name": class_.name, "reason": short}
        if short and self.policy.when_full is WhenFull.LEAVE:
            return GuestDecision(state=State.LEFT, **common)
        cpu_of = {
            thread.id: CpuSet([self.given[(guest.uuid, slot.label)]])
            for slot in slots
            if (guest.uuid, slot.label) in self.given
            for thread in slot.threads
        }
        wanted: dict[ThreadId, Wanted] = {}
        roomless: set[ThreadId] = set()
        vcpu_places = {t.index: cpu_of[t.id] for t in guest.threads if t.role is Role.VCPU and t.id in cpu_of}
        for thread in guest.threads:
            if not thread.settled:
                continue  # libvirt is about to move it, and will reset its affinity
            entry = class_.entries[thread.role]
            if thread.id in cpu_of:
                wanted[thread.id] = self.at(cpu_of[thread.id], entry, class_)
            elif entry.share_with in vcpu_places:
                wanted[thread.id] = self.at(vcpu_places[entry.share_with], entry, class_)
            elif not short and (entry.exclusive or entry.share_with is not None):
                roomless.add(thread.id)
                cpus = self.afloat(class_.entries[Role.EMULATOR])
                wanted[thread.id] = Wanted(cpus, withheld="no free pCPU")
            else:
                cpus = self.afloat(entry)
                wanted[thread.id] = Wanted(cpus, withheld=short if entry.priority else "")
        wanted = {id_: place for id_, place in wanted.items() if place.cpus}
        state = State.DEGRADED if short else State.PLACED
        return GuestDecision(state=state, wanted=wanted, roomless=frozenset(roomless), **common)

    def at(self, cpus: CpuSet, entry: Entry, class_: GuestClass) -> Wanted:
        """Return an exclusive place, with FIFO where the class says so and promise 7 allows."""
        if not entry.priority:
            return Wanted(cpus, exclusive=True)
        why = fifo_withheld(self.host, cpus, entry.priority, self.housekeeping, unsafe=class_.unsafe)
        return Wanted(cpus, 0 if why else entry.priority, exclusive=True, withheld=why)

    def afloat(self, entry: Entry) -> CpuSet:
        """Return the mask of a thread without a pCPU of its own; empty where there is nowhere to be."""
        pool = HOUSEKEEPING if entry.exclusive else entry.pool
        for name in (pool, HOUSEKEEPING):
            cpus = self.policy.pool(name, self.host) - CpuSet(self.owners) - self.held
            if cpus:
                return cpus
        return NO_CPUS

    def unshared(self, guest: Guest, class_: GuestClass) -> str:
        """Return why a ``share_with`` cannot be met: the guest has no such vCPU."""
        have = {thread.index for thread in guest.threads if thread.role is Role.VCPU}
        for role in Role:
            vcpu = class_.entries[role].share_with
            if vcpu is not None and vcpu not in have:
                return f"{role} is to share with vcpu {vcpu}, which the guest does not have"
        return ""
