# SPDX-License-Identifier: GPL-2.0-or-later
"""Gives guests the pCPUs that they need for themselves: keeps what they have, fills what they lack. Pure.

What is kept is asked before what is new, and a guest gets all that it lacks or nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from rtpind.core.allocate import choose
from rtpind.core.claims import NOBODY
from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.model import Role
from rtpind.core.needs import Inputs, Item, Slot, unshared
from rtpind.core.policy import Numa, Siblings
from rtpind.core.reuse import Books


class Seats:
    """The pCPUs given out so far: kept in ``books``. ``fenced``: guest UUID → what a cpuset holds its helpers to."""

    def __init__(self, inputs: Inputs, books: Books, fenced: dict[str, CpuSet]) -> None:
        self._inputs = inputs
        self._claims = books.claims
        self._given = books.given
        self._fenced = fenced
        self._crowded: set[tuple[str, str]] = set()  # those of them whose siblings are not as the pool says

    def cpu(self, item: Item, slot: Slot) -> int | None:
        """Return the pCPU of a slot; None when it has none."""
        return self._given.get((item.guest.uuid, slot.label))

    def crowding(self, item: Item) -> str:
        """Return which of a guest's pCPUs have siblings that are not as their pool wants them; "" for none."""
        crowded = [slot for slot in item.slots if (item.guest.uuid, slot.label) in self._crowded]
        if not crowded:
            return ""
        pool = crowded[0].entry.pool
        idle = self._inputs.options(pool).siblings is Siblings.IDLE
        what = "no core with idle siblings" if idle else "no core of its own"
        return f"{what} in '{pool}' for {', '.join(slot.label for slot in crowded)}: others may run beside it"

    def distance(self, item: Item) -> str:
        """Return which of a guest's pCPUs are away from its memory, though their pool is strict; "" for none."""
        away = self._away(item)
        if not away:
            return ""
        what = f"away from its memory (NUMA node {item.guest.memory_nodes}): {', '.join(slot.label for slot in away)}"
        return f"{what}; '{away[0].entry.pool}' has no room for all of it there"

    def _away(self, item: Item) -> list[Slot]:
        near = self._inputs.near(item.guest)
        if not near:
            return []
        strict = (slot for slot in item.slots if self._inputs.choice(slot)[1].numa is Numa.STRICT)
        return [slot for slot in strict if (cpu := self.cpu(item, slot)) is not None and cpu not in near]

    def keep(self, items: list[Item]) -> None:
        """Keep valid places: first those this daemon decided, then those the kernel shows; oldest guest first.

        Those with siblings as their pool asks come first, then the others. Away from its memory a guest keeps what
        rtpind gave it, before it was known where that is or before it moved.
        """
        slots = [(item, slot) for item in items for slot in item.slots]
        for item, slot in slots:
            self._claims.expect(self._former(slot), item.guest.uuid)
        for strict in (True, False):
            for remembered in (True, False):
                for item, slot in slots:
                    if not self._has(item, slot):
                        self._keep_slot(item, slot, strict=strict, remembered=remembered)
        self._claims.expect_no_more()

    def improve(self, items: list[Item]) -> None:
        """Give guests whose siblings are in use a core of their own, and who are away from their memory pCPUs near it.

        Now that there may be room; for all of it, as half a step forward is only a move.
        """
        for item in items:
            amiss = [slot for slot in item.slots if (item.guest.uuid, slot.label) in self._crowded]
            amiss += [slot for slot in self._away(item) if slot not in amiss]
            if not amiss:
                continue
            had = self._take_back(item)
            kept = {slot: place for slot, place in had.items() if slot not in amiss}
            self._give_all(item, kept)
            for slot in amiss:  # its siblings may have become as they should be where it is
                if self._usable(item, slot, strict=True, beside=NOBODY) & CpuSet([had[slot][0]]):
                    self._give(item, slot, had[slot][0], strict=True)
            if self._try(item) or self.crowding(item) or self._away(item):
                self._take_back(item)
                self._give_all(item, had)
                self._mark(item)

    def _mark(self, item: Item) -> None:
        """Keep for crowded places the siblings that are, where they are, as their pool wants them."""
        for slot, (cpu, strict) in self._places(item).items():
            siblings = self._siblings(slot)
            if not strict and self._claims.alone(CpuSet([cpu]), item.guest.uuid, siblings, beside=NOBODY):
                self._give(item, slot, cpu, strict=True)

    def _try(self, item: Item) -> str:
        """Give a guest all that it lacks, its siblings as the pools want them, or nothing. Return why not."""
        had = self._places(item)
        short = self._fill(item, strict=True)
        if short and self._inputs.degrades(item.class_):
            self._take_back(item)
            self._give_all(item, had)
        return short

    def fit(self, item: Item) -> str:
        """Give a guest the places it lacks: all of them, or (but for one placed before) none. Return why not."""
        kept = any(
            self._inputs.placed(thread) if self._has(item, slot) else self._former(slot)
            for slot in item.slots
            for thread in slot.threads
        )  # then a thread plugged into the guest takes no place from the others
        short = unshared(item)
        if not short:
            short = self._try(item)
            if short and self._inputs.degrades(item.class_):
                short = self._fill(item, strict=False) and self._squeeze(item)
        if short and not kept:
            self._take_back(item)
        elif self._crowded:
            self.improve([item])
        return "" if kept else short

    def _squeeze(self, item: Item) -> str:
        """Have the siblings that are kept idle for a guest do for what it still lacks. Return what it lacks then.

        As they do where all its threads are there from the first: who came last makes no difference.
        """
        had = self._places(item)
        self._take_back(item)
        for slot, (cpu, strict) in had.items():
            self._give(item, slot, cpu, strict=strict and self._siblings(slot) is not Siblings.IDLE)
        return self._fill(item, strict=False)

    def _siblings(self, slot: Slot) -> Siblings:
        return self._inputs.choice(slot)[1].siblings

    def _keep_slot(self, item: Item, slot: Slot, *, strict: bool, remembered: bool) -> None:
        for thread in slot.threads:
            place = self._inputs.memory.places.get(thread.id) if remembered else thread.now
            if place is None or len(place.cpus) != 1 or not thread.settled:
                continue
            ours = self._inputs.placed(thread)
            if not (strict or ours or self._inputs.degrades(item.class_)):
                continue
            # A foreign thread that comes to where a vCPU runs is an intruder; moving away from each is no steady state.
            beside = NOBODY if ours else None
            if self._usable(item, slot, strict=strict, beside=beside, away=ours) & place.cpus:
                self._give(item, slot, place.cpus.first(), strict=strict)
                return

    def _usable(self, item: Item, slot: Slot, *, strict: bool, beside: str | None = None, away: bool = False) -> CpuSet:
        """Return the pCPUs that a guest may take for ``slot``; ``strict``: with the siblings as the pool wants them.

        ``away``: from its memory too, where the pool is strict. A vCPU is not put where a cpuset holds a helper of its
        guest, if there is another pCPU: it could never be FIFO.
        """
        uuid = item.guest.uuid
        pool, traits = self._inputs.choice(slot)
        cpus = self._claims.free(pool, uuid, beside=beside)
        if slot.allowed is not None:
            cpus &= slot.allowed
        near = self._inputs.near(item.guest) if traits.numa is Numa.STRICT else NO_CPUS
        if near and not away:
            cpus &= near
        if strict:
            cpus = self._claims.alone(cpus, uuid, traits.siblings, beside=beside)
        fenced = self._fenced.get(uuid, NO_CPUS) if slot.alone else NO_CPUS
        return (cpus - fenced) or cpus

    def _give(self, item: Item, slot: Slot, cpu: int, *, strict: bool) -> None:
        siblings = self._siblings(slot)
        key = (item.guest.uuid, slot.label)
        self._crowded.discard(key)
        if not strict and siblings is not Siblings.IGNORE:
            self._crowded.add(key)
            siblings = Siblings.IGNORE
        self._claims.give(cpu, item.guest.uuid, slot.label, siblings)
        self._given[key] = cpu

    def _places(self, item: Item) -> dict[Slot, tuple[int, bool]]:
        """Return the pCPU of each slot that has one, and whether its siblings are as its pool wants them."""
        return {
            slot: (cpu, (item.guest.uuid, slot.label) not in self._crowded)
            for slot in item.slots
            if (cpu := self.cpu(item, slot)) is not None
        }

    def _take_back(self, item: Item) -> dict[Slot, tuple[int, bool]]:
        """Take a guest's places back; return them."""
        had = self._places(item)
        for slot in had:
            del self._given[(item.guest.uuid, slot.label)]
            self._crowded.discard((item.guest.uuid, slot.label))
        self._claims.take_back(item.guest.uuid)
        return had

    def _give_all(self, item: Item, places: Mapping[Slot, tuple[int, bool]]) -> None:
        for slot, (cpu, strict) in places.items():
            self._give(item, slot, cpu, strict=strict)

    def _has(self, item: Item, slot: Slot) -> bool:
        return (item.guest.uuid, slot.label) in self._given

    def _fill(self, item: Item, *, strict: bool) -> str:
        """Give a guest what it lacks, as far as there is room. Return what there was none for."""
        short = ""
        lacking = [slot for slot in item.slots if not self._has(item, slot)]
        for slot in sorted(
            (slot for slot in lacking if slot.allowed is not None), key=lambda slot: len(slot.allowed or ())
        ):
            free = self._usable(item, slot, strict=strict)
            cpus = free or self._former(slot)
            if cpus:  # with a former place its siblings may be others'
                self._give(item, slot, cpus.first(), strict=strict and bool(free))
            elif not slot.pinned:  # one vCPU whose <cputune> cannot be kept takes nothing from the others
                short = short or self._lack(item, slot, strict=strict)
        groups: dict[tuple[str, bool, bool], list[Slot]] = {}
        for slot in lacking:
            if slot.allowed is None:
                groups.setdefault((slot.entry.pool, slot.role is Role.VCPU, slot.alone), []).append(slot)
        for slots in groups.values():
            short = self._fill_group(item, slots, strict=strict) or short
        return short

    def _fill_group(self, item: Item, slots: list[Slot], *, strict: bool) -> str:
        """Give slots of one pool pCPUs that are close to each other.

        Where a strict pool does not know a guest's nodes, those of one node: its memory will lie where it runs.
        """
        pool = slots[0].entry.pool
        traits, threads = self._inputs.options(pool), item.guest.traits.threads if item.guest.traits is not None else 1
        siblings = traits.siblings if strict else Siblings.IGNORE
        free, topology = self._usable(item, slots[0], strict=strict), self._inputs.host.topology
        one_node = traits.numa is Numa.STRICT and not self._inputs.near(item.guest)
        if one_node:
            free &= self._nodes_for(item, pool, free, siblings)
        areas = self._areas(item, pool)
        for count in range(len(slots), 0, -1):
            chosen = choose(count, free, topology, areas, siblings, threads, one_node=one_node)
            if chosen:
                break
        else:
            chosen = ()
        for slot, cpu in zip(slots, chosen, strict=False):
            self._give(item, slot, cpu, strict=strict)
        short = ""
        for slot in slots[len(chosen) :]:
            former = self._former(slot)
            if former:
                self._give(item, slot, former.first(), strict=False)
            else:
                short = short or self._lack(item, slot, strict=strict)
        return short

    def _nodes_for(self, item: Item, pool: str, free: CpuSet, siblings: Siblings) -> CpuSet:
        """Return the pCPUs of nodes for a guest without memory: those it is on or, at first, with room for it all."""
        topology = self._inputs.host.topology
        nodes = topology.nodes_of(CpuSet(cpu for cpu, _ in self._places(item).values()))
        if not nodes:
            rooms = free - topology.above(free) if siblings is Siblings.IDLE else free
            total = sum(slot.entry.pool == pool and slot.allowed is None for slot in item.slots)
            nodes = CpuSet(node for node, cpus in topology.nodes.items() if len(rooms & cpus) >= total)
        return topology.of_nodes(nodes) or free

    def _areas(self, item: Item, pool: str) -> list[CpuSet]:
        """Return where to look for pCPUs, the best first: close to the guest's others, then to its memory."""
        found: list[CpuSet] = []
        numa, near = self._inputs.options(pool).numa, self._inputs.near(item.guest)
        others = CpuSet(cpu for slot in item.slots if (cpu := self.cpu(item, slot)) is not None)
        if others:
            found += [domain for kind in self._inputs.host.topology.domains for domain in kind if domain & others]
        if numa is not Numa.IGNORE and near:
            found = [area & near for area in found] + [near]
        return [*found, self._inputs.pool(pool)]

    def _lack(self, item: Item, slot: Slot, *, strict: bool) -> str:
        """Return what a slot found no room for."""
        where, options = f"in '{slot.entry.pool}'", self._inputs.options(slot.entry.pool)
        if slot.allowed is not None:
            where = f"among {slot.allowed} of {where[3:]}"
        if options.numa is Numa.STRICT and len(self._inputs.host.topology.nodes) > 1:
            near = self._inputs.near(item.guest)
            where += f" near its memory (NUMA node {item.guest.memory_nodes})" if near else " on one NUMA node"
        what = "core" if strict and options.siblings is not Siblings.IGNORE else "pCPU"
        pool = self._inputs.pool(slot.entry.pool)
        busy = [f"{cpu} {who}" for cpu, who in self._claims.blocked().items() if cpu in pool]
        held = f" (held by others: {', '.join(busy[:3])}{', …' if len(busy) > 3 else ''})" if busy else ""
        return f"no free {what} {where} for {slot.label}{held}"

    def _former(self, slot: Slot) -> CpuSet:
        """Return the place rtpind gave a slot, though somebody is narrowed to it now: better than none (promise 6)."""
        for thread in slot.threads:
            touched = thread.now if thread.id in self._inputs.ledger.originals else None
            place = self._inputs.memory.places.get(thread.id) or touched
            if place is not None and len(place.cpus) == 1:
                return (place.cpus & self._inputs.choice(slot)[0]) - self._claims.taken
        return NO_CPUS
