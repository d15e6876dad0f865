# SPDX-License-Identifier: GPL-2.0-or-later
"""Where every thread should be: (policy, snapshot, memory, ledger) → Decision. Pure and deterministic.

In set equations, of pCPUs: ``held`` = what was given to a guest that rtpind now leaves alone, or carries its FIFO;
a floating thread's mask = its pool − given out − held; an exclusive pool's free pCPUs = pool − given out − blocked,
where blocked = what the threads of guests that are not placed, and of others on this host, are narrowed to (promise 6).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rtpind.core.claims import NOBODY, Claims
from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.decision import Decision, GuestDecision, State
from rtpind.core.ledger import HandsOff, Ledger
from rtpind.core.memory import Memory, Wanted
from rtpind.core.model import Guest, Role, Snapshot, ThreadId
from rtpind.core.needs import Inputs, Item, needs
from rtpind.core.policy import HOUSEKEEPING, Entry, Exclusive, GuestClass, Numa, Policy, Rule, Share, Siblings
from rtpind.core.protection import fifo_withheld
from rtpind.core.seats import Seats


def place(policy: Policy, snapshot: Snapshot, memory: Memory, ledger: Ledger, clock: float = 0.0) -> Decision:
    """Decide the placement of every thread.

    ``clock``: wall-clock seconds, for pauses that end. Places that the daemon gave out before, then places that
    are valid in the kernel, are kept (promise 10); conflicts go to the oldest process, then by UUID (promise 6).
    """
    return _Placing(Inputs(policy, snapshot, memory, ledger), clock).decide()


class _Placing:
    def __init__(self, inputs: Inputs, clock: float) -> None:
        self.inputs = inputs
        self.policy = inputs.policy
        self.host = inputs.host
        self.clock = clock
        self.managed = inputs.ledger.managed()
        self.housekeeping = inputs.pool(HOUSEKEEPING)
        self.claims = Claims(self.host.topology, self.housekeeping | inputs.helper_pools())
        self.held = NO_CPUS  # what floaters keep off
        self.pinned: dict[ThreadId, Wanted] = {}  # by the guest's own <cputune>

    def decide(self) -> Decision:
        ordered = sorted(self.inputs.snapshot.guests, key=lambda guest: (guest.pid_start, guest.uuid))
        for cpu, who in sorted(self.host.busy.items()):
            self.claims.block(CpuSet([cpu]), NOBODY, f"busy: {who}")
        items: list[Item] = []
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
                items.append(Item(guest, rule, class_))
        seats = Seats(self.inputs, self.claims, self.fenced(items))
        for item in items:
            self.pin(item)
        items = [replace(item, slots=needs(self.inputs, item, self.pinned)) for item in items]
        seats.keep(items)
        seats.uncrowd(items)
        # A thread that libvirt has not moved yet has only its name to show: what it needs comes last (promise 5).
        short: dict[str, str] = {}
        for item in sorted(items, key=lambda item: not all(thread.settled for thread in item.guest.threads)):
            short[item.guest.uuid] = seats.fit(item)
            if short[item.guest.uuid] and not self.inputs.degrades(item.class_):
                self.block(item.guest)
        for item in items:
            done[item.guest.uuid] = self.settle(item, seats, short[item.guest.uuid])
        decided = tuple(done[guest.uuid] for guest in sorted(ordered, key=lambda guest: (guest.name, guest.uuid)))
        owners = dict(sorted(self.claims.owners.items()))
        return Decision(guests=decided, owners=owners, blocked=self.claims.blocked())

    def leave(self, guest: Guest, rule: Rule | None, class_: GuestClass | None) -> GuestDecision | None:
        """Return the decision for a guest that is not touched; None for one to place."""
        off = self.inputs.ledger.off(guest, self.clock)
        common: dict[str, Any] = {"guest": guest, "rule": str(rule) if rule else ""}
        if off is not None:
            state = State.RELEASED if off.kind is HandsOff.RELEASED else State.PAUSED
            return GuestDecision(state=state, reason=f"rtpinctl {off.kind}", **common)
        untold = rule is not None and rule.matches(guest) is None
        if class_ is None and not untold:
            if guest.process in self.managed:
                reason = "its rule is gone; rtpinctl release puts it back"
                return GuestDecision(state=State.UNCLAIMED, reason=reason, **common)
            return GuestDecision(state=State.UNMANAGED, reason="" if rule else "no rule matches", **common)
        if class_ is not None:
            common["class_name"] = class_.name
            untold = untold or (guest.traits is None and class_.by_cputune)
        if guest.starting or untold:
            reason = "libvirt has not told its definition yet"
            reason = "it is starting: libvirt has not moved its vCPUs yet" if guest.starting else reason
            return GuestDecision(state=State.PLACED, pending=True, reason=reason, **common)
        assert class_ is not None
        misfit = class_.misfit(guest)
        if misfit and not any(self.inputs.placed(thread) for thread in guest.threads):
            return GuestDecision(state=State.REFUSED, reason=misfit, **common)
        return None

    def block(self, guest: Guest) -> None:
        """Keep exclusive places off what a guest that is left alone is narrowed to.

        Floaters keep off its FIFO threads, and off the pCPUs that rtpind gave its vCPUs before.
        """
        for thread in guest.threads:
            narrowed = self.inputs.narrowed(thread)
            self.claims.block(narrowed, guest.uuid, f"{guest.name}: {thread.label}")
            alone = not thread.helper and len(narrowed) == 1 and not narrowed <= self.housekeeping
            if thread.now.scheduling.realtime or (alone and guest.process in self.managed):
                self.held |= narrowed

    def fenced(self, items: list[Item]) -> dict[str, CpuSet]:
        """Keep other guests off what a cpuset holds a thread to; return what it holds each guest's helpers to."""
        found: dict[str, CpuSet] = {}
        for item in items:
            guest = item.guest
            for thread in guest.threads:
                if any(refusal.affinity for refusal in self.inputs.memory.refused.get(thread.id, ())):
                    entry = item.class_.entry(thread.role, thread.index)
                    if thread.helper and (entry is None or entry.share_with is None):
                        found[guest.uuid] = found.get(guest.uuid, NO_CPUS) | thread.now.cpus
                    narrowed = self.inputs.narrowed(thread)
                    self.claims.block(narrowed, guest.uuid, f"{guest.name}: {thread.label} (fenced)")
        return found

    def pin(self, item: Item) -> None:
        """Note what the guest's own <cputune> says of its vCPUs; one that is alone or realtime there holds it."""
        guest, traits = item.guest, item.guest.traits
        for thread in guest.threads:
            entry = item.class_.entry(thread.role, thread.index)
            if entry is None or not entry.cputune or traits is None or thread.index is None:
                continue
            cpus = traits.pins.get(thread.index, NO_CPUS) & self.host.online
            if not cpus:
                continue
            priority, clash = traits.realtime.get(thread.index, 0), cpus & self.claims.taken
            if priority or len(cpus) == 1:
                for cpu in cpus - self.claims.taken:
                    self.claims.give(cpu, guest.uuid, thread.label, Siblings.IGNORE)
            else:
                self.claims.block(cpus, guest.uuid, f"{guest.name}: {thread.label} (<cputune>)")
            why = f"its <cputune> shares pCPU {clash} with another" if clash else ""
            self.pinned[thread.id] = self.at(cpus, priority, item.class_, why, exclusive=len(cpus) == 1 and not clash)

    def settle(self, item: Item, seats: Seats, short: str) -> GuestDecision:
        """Turn the given places of one guest into the wanted placement of each of its threads."""
        guest, class_ = item.guest, item.class_
        common: dict[str, Any] = {"guest": guest, "rule": str(item.rule), "class_name": class_.name}
        if short and not self.inputs.degrades(class_):
            return GuestDecision(state=State.LEFT, reason=short, **common)
        own, shared = self.places(item, seats)
        wanted: dict[ThreadId, Wanted] = {}
        roomless: set[ThreadId] = set()
        for thread in guest.threads:
            if not thread.settled:
                continue  # libvirt is about to move it, and will reset its affinity
            entry = class_.entry(thread.role, thread.index)
            if thread.id in self.pinned:
                place = self.pinned[thread.id]
            elif entry is None:
                place = Wanted(self.afloat(class_.entries[Role.EMULATOR][0], guest), withheld=class_.misfit(guest))
                roomless.add(thread.id)
            elif cpus := own.get(thread.id) or shared.get(entry.share_with):
                place = self.at(cpus, entry.priority, class_)
            elif not short and (entry.exclusive or entry.share_with is not None):
                place = Wanted(self.afloat(class_.entries[Role.EMULATOR][0], guest), withheld="no free pCPU")
                roomless.add(thread.id)
            else:
                place = Wanted(self.afloat(entry, guest), withheld=short if entry.priority else "")
            if place.cpus:
                wanted[thread.id] = place
        crowded = "" if short else seats.crowding(item)
        return GuestDecision(
            state=State.DEGRADED if short else State.CROWDED if crowded else State.PLACED,
            reason=short or crowded,
            wanted=wanted,
            roomless=frozenset(roomless),
            drift=class_.drift or self.policy.drift,
            **common,
        )

    def places(self, item: Item, seats: Seats) -> tuple[dict[ThreadId, CpuSet], dict[Share | None, CpuSet]]:
        """Return the pCPU of each thread that has one, and of each thread or role that others may share with."""
        own: dict[ThreadId, CpuSet] = {}
        shared: dict[Share | None, CpuSet] = {}
        for slot in item.slots:
            cpu = seats.cpu(item, slot)
            if cpu is not None:
                own |= dict.fromkeys((thread.id for thread in slot.threads), CpuSet([cpu]))
                index = slot.threads[0].index if slot.entry.exclusive is Exclusive.THREAD else None
                shared.setdefault(Share(slot.role, index), CpuSet([cpu]))
        for thread in item.guest.threads:
            if thread.id in self.pinned:
                shared.setdefault(Share(thread.role, thread.index), self.pinned[thread.id].cpus)
        return own, shared

    def at(self, cpus: CpuSet, priority: int, class_: GuestClass, why: str = "", *, exclusive: bool = True) -> Wanted:
        """Return a place of its own, with FIFO where the class says so and promise 7 allows."""
        if not priority:
            return Wanted(cpus, exclusive=exclusive)
        why = why or fifo_withheld(self.host, cpus, priority, self.housekeeping, unsafe=class_.unsafe)
        return Wanted(cpus, 0 if why else priority, exclusive=exclusive, withheld=why)

    def afloat(self, entry: Entry, guest: Guest) -> CpuSet:
        """Return the mask of a thread without a pCPU of its own; empty where there is nowhere to be."""
        pool = HOUSEKEEPING if entry.exclusive or entry.share_with else entry.pool
        for name in (pool, HOUSEKEEPING):
            cpus = self.inputs.pool(name) - self.claims.taken - self.held
            if self.inputs.options(name).numa is Numa.STRICT:
                cpus = (cpus & self.inputs.near(guest)) or cpus
            if cpus:
                return cpus
        return NO_CPUS
