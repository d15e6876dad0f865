# SPDX-License-Identifier: GPL-2.0-or-later
"""What a decision rests on, and which pCPUs a guest needs for itself by its class. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import Guest, Role, Snapshot, Thread
from rtpind.core.policy import (
    HOUSEKEEPING,
    CpuList,
    Entry,
    Exclusive,
    GuestClass,
    Numa,
    Policy,
    Pool,
    Rule,
    Share,
    Siblings,
    WhenFull,
)

_UNWRITTEN = Pool(cpus=CpuList(()))  # housekeeping, where the policy does not name it
#: How a pCPU that the guest's own <cputune> names is chosen: not at all.
_NAMED = Pool(cpus=CpuList(()), siblings=Siblings.IGNORE, numa=Numa.IGNORE)


@dataclass(frozen=True, slots=True)
class Slot:
    """One pCPU to be given out: to one thread, or to a role of a guest; ``threads`` are those that will sit there.

    ``allowed``: where a rule or a cpuset wants it; None where any pCPU of the pool will do.
    """

    label: str
    role: Role
    entry: Entry
    threads: tuple[Thread, ...]
    allowed: CpuSet | None = None

    @property
    def alone(self) -> bool:
        """Whether it is for a FIFO vCPU."""
        return self.role is Role.VCPU and self.entry.priority > 0

    @property
    def pinned(self) -> bool:
        """Whether the guest's own <cputune> says where it is, whatever the pools are."""
        return self.entry.cputune


@dataclass(frozen=True, slots=True)
class Item:
    """One guest to be placed: by which rule and class, and the pCPUs that it needs for itself."""

    guest: Guest
    rule: Rule
    class_: GuestClass
    slots: tuple[Slot, ...] = ()


class Inputs:
    """A policy, what is seen, remembered and recorded; and what several steps of a decision ask of them."""

    def __init__(self, policy: Policy, snapshot: Snapshot, memory: Memory, ledger: Ledger) -> None:
        self.policy = policy
        self.host = snapshot.host
        self.snapshot = snapshot
        self.memory = memory
        self.ledger = ledger
        self._pools: dict[str, CpuSet] = {}
        self._shared: CpuSet | None = None

    def pool(self, name: str) -> CpuSet:
        """Return the online pCPUs of a pool."""
        if name not in self._pools:
            self._pools[name] = self.policy.pool(name, self.host)
        return self._pools[name]

    def options(self, name: str) -> Pool:
        """Return how the pCPUs of a pool are chosen."""
        return self.policy.pools.get(name, _UNWRITTEN)

    def choice(self, slot: Slot) -> tuple[CpuSet, Pool]:
        """Return among which pCPUs a slot has its place, and how it is chosen."""
        if slot.pinned:
            return slot.allowed or NO_CPUS, _NAMED
        return self.pool(slot.entry.pool), self.options(slot.entry.pool)

    def pin(self, guest: Guest, thread: Thread) -> CpuSet:
        """Return where the guest's own <cputune> pins a vCPU; empty where it does not."""
        pins = guest.traits.pins if guest.traits is not None else {}
        return pins.get(-1 if thread.index is None else thread.index, NO_CPUS) & self.host.online

    def own(self, guest: Guest, thread: Thread, entry: Entry | None) -> Entry | None:
        """Return the entry of a thread as what it needs for itself; None where it needs no pCPU of its own.

        Of a vCPU that follows <cputune> it is one pCPU that no helper floats on, with the priority that stands there.
        """
        if entry is not None and entry.cputune and guest.traits is not None:
            pin = self.pin(guest, thread)
            if len(pin) != 1 or pin & self.shared():
                return None
            priority = guest.traits.realtime.get(thread.index or 0, 0)
            return replace(entry, exclusive=Exclusive.THREAD, priority=priority)
        return entry if entry is not None and entry.exclusive is not None else None

    def shared(self) -> CpuSet:
        """Return the pCPUs of housekeeping and of the pools in which helpers float."""
        if self._shared is None:
            self._shared = self.pool(HOUSEKEEPING) | self.helper_pools()
        return self._shared

    def degrades(self, class_: GuestClass) -> bool:
        """Return whether a guest without room is to have what there is; else it is left as it is."""
        return (class_.when_full or self.policy.when_full) is WhenFull.DEGRADE

    def helper_pools(self) -> CpuSet:
        """Return the pCPUs in which helpers may float."""
        cpus = NO_CPUS
        for class_ in self.policy.reached():
            for role, entry in class_.every():
                if role is not Role.VCPU and not entry.exclusive and not entry.share_with:
                    cpus |= self.pool(entry.pool)
        return cpus

    def kept_siblings(self, cpu: int) -> CpuSet:
        """Return the siblings of a pCPU that some pool keeps idle, or for the same guest."""
        keeps = any(
            pool.siblings is not Siblings.IGNORE and cpu in self.pool(name) for name, pool in self.policy.pools.items()
        )
        return self.host.topology.siblings(cpu) & self.host.online if keeps else NO_CPUS

    def narrowed(self, thread: Thread) -> CpuSet:
        """Return what a thread is narrowed to: nothing when it has one of the masks that nobody chose."""
        cpus = thread.now.cpus & self.host.online
        return NO_CPUS if cpus in (self.host.online, self.host.online - self.host.isolated) else cpus

    def near(self, guest: Guest) -> CpuSet:
        """Return the pCPUs near a guest's memory; empty where that is not known, or on a node without any."""
        return self.host.topology.of_nodes(guest.memory_nodes)

    def placed(self, thread: Thread) -> bool:
        """Return whether rtpind gave this thread a place before: in this run, or in one that touched it."""
        place = self.memory.places.get(thread.id)
        return thread.id in self.ledger.originals or (place is not None and place.exclusive)


def needs(inputs: Inputs, item: Item) -> tuple[Slot, ...]:
    """Return the pCPUs that a guest needs for itself, vCPUs first."""
    found: dict[str, Slot] = {}
    for role in Role:
        members = sorted(
            (thread for thread in item.guest.threads if thread.role is role),  # unsettled ones need room too
            key=lambda thread: (thread.index or 0, not thread.settled, thread.id),
        )
        for thread in members:
            entry = inputs.own(item.guest, thread, item.class_.entry(role, thread.index))
            if entry is None:
                continue
            label = _label(item.class_, entry, thread)
            slot = found.get(label)
            if slot is None:  # one for each vCPU, however many threads claim to be it
                found[label] = Slot(label, role, entry, (thread,), _allowed(inputs, item, thread, entry))
            elif entry.exclusive is Exclusive.GUEST:
                found[label] = replace(slot, threads=(*slot.threads, thread))
    return tuple(found.values())


def _label(class_: GuestClass, entry: Entry, thread: Thread) -> str:
    """Return whose pCPU a thread has: its own, or its role's; the emulator's, if its role follows emulator."""
    if entry.exclusive is Exclusive.GUEST:
        role = class_.follows(thread.role)
        return str(role) if entry.ids is None else f"{role} {entry.ids}"
    return thread.label if thread.index is not None else f"{thread.role} tid {thread.id.tid}"


def _allowed(inputs: Inputs, item: Item, thread: Thread, entry: Entry) -> CpuSet | None:
    """Return where <cputune>, a rule's ``pcpus``, or the cpuset that refused the thread another place, wants it."""
    if entry.cputune:
        return inputs.pin(item.guest, thread)
    fixed = _fixed(item, thread)
    if fixed is not None:
        return CpuSet([fixed])
    limits = thread.limits
    if limits is None or limits.fence is None:
        return None
    return (limits.fence & inputs.pool(entry.pool)) or None


def _fixed(item: Item, thread: Thread) -> int | None:
    """Return the pCPU that a rule names for a vCPU: counted by the class's exclusive vCPUs, whether they are there."""
    if not item.rule.pcpus or thread.role is not Role.VCPU or thread.index is None:
        return None
    before = (item.class_.entry(Role.VCPU, index) for index in range(thread.index))
    number = sum(entry is not None and entry.exclusive is not None for entry in before)
    return item.rule.pcpus[number] if number < len(item.rule.pcpus) else None


def unshared(item: Item) -> str:
    """Return why a ``share_with`` cannot be met: the guest has no such thread."""
    have = {Share(thread.role, thread.index) for thread in item.guest.threads}
    have |= {Share(thread.role) for thread in item.guest.threads}
    for role, entry in item.class_.every():
        share = entry.share_with
        if share is not None and share not in have and any(thread.role is role for thread in item.guest.threads):
            return f"{role} is to share with {share}, which the guest does not have"
    return ""
