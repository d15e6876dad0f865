# SPDX-License-Identifier: GPL-2.0-or-later
"""Where every thread should be: (policy, snapshot, memory, ledger) → Decision. Pure and deterministic.

In set equations, of pCPUs: ``held`` = what was given to a guest that rtpind now leaves alone, or carries its FIFO;
a floating thread's mask = its pool − given out − held; an exclusive pool's free pCPUs = pool − given out − blocked,
where blocked = what the threads of guests that are not placed, and of others on this host, are narrowed to (promise 6).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from rtpind.core.claims import NOBODY, Claims
from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.decision import Decision, GuestDecision, State
from rtpind.core.ledger import HandsOff, Ledger
from rtpind.core.memory import Memory, Wanted
from rtpind.core.model import Guest, Role, Snapshot, Thread, ThreadId
from rtpind.core.needs import Inputs, Item, needs
from rtpind.core.policy import HOUSEKEEPING, Entry, Exclusive, GuestClass, Numa, Policy, Rule, Share
from rtpind.core.protection import fifo_withheld
from rtpind.core.reuse import Basis, Books, stale
from rtpind.core.seats import Seats


def place(
    policy: Policy,
    snapshot: Snapshot,
    memory: Memory,
    ledger: Ledger,
    clock: float = 0.0,
    before: Decision | None = None,
) -> Decision:
    """Decide the placement of every thread.

    ``clock``: wall-clock seconds, for pauses that end. Places that the daemon gave out before, then places that
    are valid in the kernel, are kept (promise 10); conflicts go to the oldest process, then by UUID (promise 6).
    ``before``: the decision that ``memory`` is of, if there is one; it changes what this costs, and nothing else.
    """
    inputs, left = Inputs(policy, snapshot, memory, ledger), frozenset[str]()
    continued = _continue(before, inputs, clock) if before is not None else None
    if continued is not None:
        return continued
    while True:
        placing = _Placing(inputs, clock, left)
        placing.heed_others()
        done = placing.decide(snapshot.guests)
        found = left | _left(done)
        if found == left:
            return placing.decision(done)
        left = found  # what these are narrowed to is not given out: decide anew without it


def _continue(before: Decision, inputs: Inputs, clock: float) -> Decision | None:
    """Decide anew only for guests that came or changed; None where that could be another decision."""
    basis = before.basis
    changed = None if basis is None else stale(before, basis, inputs)
    if basis is None or changed is None:
        return None
    if not changed:
        return replace(before, basis=Basis(inputs, basis.books))
    placing = _Placing(inputs, clock, frozenset(), basis.books.without(changed))
    done = placing.decide([guest for guest in inputs.snapshot.guests if guest.uuid in changed])
    if _left(done) or not placing.books.bind_alike(basis.books):
        return None
    kept = {found.guest.uuid: found for found in before.guests if found.guest.uuid not in changed}
    return placing.decision(kept | done)


def _left(done: dict[str, GuestDecision]) -> set[str]:
    return {uuid for uuid, found in done.items() if found.state is State.LEFT}


class _Placing:
    def __init__(self, inputs: Inputs, clock: float, left: frozenset[str], books: Books | None = None) -> None:
        self.inputs = inputs
        self.policy = inputs.policy
        self.host = inputs.host
        self.clock = clock
        self.managed = inputs.ledger.managed()
        self.left = left  # UUIDs of guests that are known to stay as they are, for want of room
        self.housekeeping = inputs.pool(HOUSEKEEPING)
        self.books = books or Books(Claims(self.host.topology, inputs.shared()))
        self.claims = self.books.claims

    def heed_others(self) -> None:
        """Keep what is given out off what threads that are no guest's are narrowed to."""
        for cpu, who in sorted(self.host.busy.items()):
            self.claims.block(CpuSet([cpu]), NOBODY, f"busy: {who}")

    def decide(self, guests: Iterable[Guest]) -> dict[str, GuestDecision]:
        """Decide for some guests, beside what the books say of others; return it by UUID."""
        ordered = sorted(guests, key=lambda guest: (guest.pid_start, guest.uuid))
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
        seats = Seats(self.inputs, self.books, self.fenced(items))
        for item in items:
            self.heed(item)
        items = [replace(item, slots=needs(self.inputs, item)) for item in items]
        seats.keep(items)
        seats.improve(items)
        # A thread that libvirt has not moved yet has only its name to show: what it needs comes last (promise 5).
        short: dict[str, str] = {}
        by_need = sorted(items, key=lambda item: not all(thread.settled for thread in item.guest.threads))
        for item in by_need:
            short[item.guest.uuid] = seats.fit(item)
        for item in by_need:  # what there is no room for, is asked and said when everybody has what they get
            if short[item.guest.uuid]:
                short[item.guest.uuid] = seats.fit(item)
        for item in items:
            done[item.guest.uuid] = self.settle(item, seats, short[item.guest.uuid])
        return done

    def decision(self, done: dict[str, GuestDecision]) -> Decision:
        """Return what was decided for all guests as one."""
        return Decision(
            guests=tuple(sorted(done.values(), key=lambda found: (found.guest.name, found.guest.uuid))),
            owners=dict(sorted(self.claims.owners.items())),
            blocked=self.claims.blocked(),
            basis=Basis(self.inputs, self.books),
        )

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
        if untold and guest.unreadable and not guest.starting:
            reason = f"its definition, which this rule or class asks for, cannot be read: {guest.unreadable}"
            return GuestDecision(state=State.REFUSED, reason=reason, **common)
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
        for thread in sorted(guest.threads, key=_by_id):
            narrowed = self.inputs.narrowed(thread)
            alone = not thread.helper and len(narrowed) == 1 and not narrowed <= self.housekeeping
            ours = alone and guest.process in self.managed
            if ours:  # with the siblings that were kept for it, which its threads do not show
                narrowed |= self.inputs.kept_siblings(narrowed.first())
            self.claims.block(narrowed, guest.uuid, f"{guest.name}: {thread.label}")
            if thread.now.scheduling.realtime or ours:
                self.books.held |= narrowed

    def fenced(self, items: list[Item]) -> dict[str, CpuSet]:
        """Keep other guests off what a cpuset holds a thread to; return what it holds each guest's helpers to."""
        found: dict[str, CpuSet] = {}
        for item in items:
            guest = item.guest
            for thread in sorted(guest.threads, key=_by_id):
                if any(refusal.affinity for refusal in self.inputs.memory.refused.get(thread.id, ())):
                    entry = item.class_.entry(thread.role, thread.index)
                    if thread.helper and (entry is None or entry.share_with is None):
                        found[guest.uuid] = found.get(guest.uuid, NO_CPUS) | thread.now.cpus
                    narrowed = self.inputs.narrowed(thread)
                    self.claims.block(narrowed, guest.uuid, f"{guest.name}: {thread.label} (fenced)")
        return found

    def heed(self, item: Item) -> None:
        """Keep what is newly given out off a guest that stays as it is, and off what <cputune> has a vCPU float on."""
        if item.guest.uuid in self.left:
            self.block(item.guest)
        for thread in sorted(item.guest.threads, key=_by_id):
            entry = item.class_.entry(thread.role, thread.index)
            if entry is not None and entry.cputune and self.inputs.own(item.guest, thread, entry) is None:
                pin = self.inputs.pin(item.guest, thread) - self.inputs.shared()
                self.claims.block(pin, NOBODY, f"{item.guest.name}: {thread.label} (<cputune>)")

    def settle(self, item: Item, seats: Seats, short: str) -> GuestDecision:
        """Turn the given places of one guest into the wanted placement of each of its threads."""
        guest, class_ = item.guest, item.class_
        common: dict[str, Any] = {"guest": guest, "rule": str(item.rule), "class_name": class_.name}
        if short and not self.inputs.degrades(class_):
            return GuestDecision(state=State.LEFT, reason=short, **common)
        own, shared = self.places(item, seats)
        needy = {thread.id for slot in item.slots for thread in slot.threads}
        wanted: dict[ThreadId, Wanted] = {}
        roomless: set[ThreadId] = set()
        for thread in guest.threads:
            if not thread.settled:
                continue  # libvirt is about to move it, and will reset its affinity
            entry = class_.entry(thread.role, thread.index)
            if entry is None:
                place = Wanted(self.afloat(class_.entries[Role.EMULATOR][0], guest), withheld=class_.misfit(guest))
                roomless.add(thread.id)
            elif thread.id in own:
                cpus, priority = own[thread.id]
                place = self.at(cpus, priority, class_)
            elif cpus := shared.get(entry.share_with, NO_CPUS):
                place = self.at(cpus, entry.priority, class_)
            elif entry.cputune:
                place = self.by_cputune(thread, entry, guest, needy=thread.id in needy)
                roomless |= {thread.id} if thread.id in needy else set()
            elif not short and (entry.exclusive or entry.share_with is not None):
                place = Wanted(self.afloat(class_.entries[Role.EMULATOR][0], guest), withheld="no free pCPU")
                roomless.add(thread.id)
            else:
                place = Wanted(self.afloat(entry, guest), withheld=short if entry.priority else "")
            if place.cpus:
                wanted[thread.id] = place
        crowded, remote = ("", "") if short else (seats.crowding(item), seats.distance(item))
        lost = State.REMOTE if remote else State.CROWDED if crowded else State.PLACED
        return GuestDecision(
            state=State.DEGRADED if short else lost,
            reason=short or "; ".join(filter(None, (remote, crowded))),
            wanted=wanted,
            roomless=frozenset(roomless),
            drift=class_.drift or self.policy.drift,
            **common,
        )

    def by_cputune(self, thread: Thread, entry: Entry, guest: Guest, *, needy: bool) -> Wanted:
        """Return the place of a vCPU that <cputune> gives no pCPU of its own, or one that is somebody else's."""
        pin = self.inputs.pin(guest, thread)
        if needy:
            why = f"pCPU {pin}, to which its <cputune> pins it, is somebody else's"
            return Wanted(self.afloat(entry, guest), withheld=why)
        assert guest.traits is not None
        assert thread.index is not None
        why = f"its <cputune> pins it to {f'pCPU {pin}, which it has not to itself' if pin else 'no pCPU'}"
        realtime = guest.traits.realtime.get(thread.index, 0) > 0
        self.books.loose |= pin
        cpus = (pin - self.claims.taken - self.books.held) or self.afloat(entry, guest)
        return Wanted(cpus, withheld=why if realtime else "")

    def places(self, item: Item, seats: Seats) -> tuple[dict[ThreadId, tuple[CpuSet, int]], dict[Share | None, CpuSet]]:
        """Return the pCPU and priority of each thread that has one, and the pCPUs that others may share."""
        own: dict[ThreadId, tuple[CpuSet, int]] = {}
        shared: dict[Share | None, CpuSet] = {}
        for slot in item.slots:
            cpu = seats.cpu(item, slot)
            if cpu is None:
                continue
            for thread in slot.threads:
                entry = item.class_.entry(thread.role, thread.index)
                own[thread.id] = (CpuSet([cpu]), (slot.entry if slot.pinned or entry is None else entry).priority)
            alone = slot.entry.exclusive is Exclusive.THREAD
            share = Share(slot.role, slot.threads[0].index) if alone else Share(item.class_.follows(slot.role))
            shared.setdefault(share, CpuSet([cpu]))
        return own, shared

    def at(self, cpus: CpuSet, priority: int, class_: GuestClass) -> Wanted:
        """Return a place of its own, with FIFO where the class says so and promise 7 allows."""
        if not priority:
            return Wanted(cpus, exclusive=True)
        why = fifo_withheld(self.host, cpus, priority, self.housekeeping, unsafe=class_.unsafe)
        return Wanted(cpus, 0 if why else priority, exclusive=True, withheld=why)

    def afloat(self, entry: Entry, guest: Guest) -> CpuSet:
        """Return the mask of a thread without a pCPU of its own; empty where there is nowhere to be."""
        pool = HOUSEKEEPING if entry.exclusive or entry.share_with else entry.pool
        for name in (pool, HOUSEKEEPING):
            self.books.loose |= self.inputs.pool(name)
            cpus = self.inputs.pool(name) - self.claims.taken - self.books.held
            if self.inputs.options(name).numa is Numa.STRICT:
                cpus = (cpus & self.inputs.near(guest)) or cpus
            if cpus:
                return cpus
        return NO_CPUS


def _by_id(thread: Thread) -> ThreadId:
    """Order threads, whose own order must not matter to what is said of them (promise 10)."""
    return thread.id
