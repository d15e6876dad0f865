# SPDX-License-Identifier: GPL-2.0-or-later
"""What a decision rests on, and which pCPUs a guest needs for itself by its class. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import Guest, Role, Snapshot, Thread, ThreadId
from rtpind.core.policy import (
    CpuList,
    Entry,
    Exclusive,
    GuestClass,
    Policy,
    Pool,
    Rule,
    Share,
    WhenFull,
)

_UNWRITTEN = Pool(cpus=CpuList(()))  # housekeeping, where the policy does not name it


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

    def pool(self, name: str) -> CpuSet:
        """Return the online pCPUs of a pool."""
        if name not in self._pools:
            self._pools[name] = self.policy.pool(name, self.host)
        return self._pools[name]

    def options(self, name: str) -> Pool:
        """Return how the pCPUs of a pool are chosen."""
        return self.policy.pools.get(name, _UNWRITTEN)

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

    def narrowed(self, thread: Thread) -> CpuSet:
        """Return what a thread is narrowed to: nothing when it has one of the masks that nobody chose."""
        cpus = thread.now.cpus & self.host.online
        return NO_CPUS if cpus in (self.host.online, self.host.online - self.host.isolated) else cpus

    def near(self, guest: Guest) -> CpuSet:
        """Return the pCPUs of the nodes of a guest's memory: where it is bound to, else where it lies."""
        nodes = guest.traits.nodes if guest.traits is not None and guest.traits.nodes else guest.nodes
        return self.host.topology.of_nodes(nodes) if nodes else NO_CPUS

    def placed(self, thread: Thread) -> bool:
        """Return whether rtpind gave this thread a place before: in this run, or in one that touched it."""
        place = self.memory.places.get(thread.id)
        return thread.id in self.ledger.originals or (place is not None and place.exclusive)


def needs(inputs: Inputs, item: Item, pinned: Iterable[ThreadId]) -> tuple[Slot, ...]:
    """Return the pCPUs that a guest needs for itself, vCPUs first."""
    found: dict[str, Slot] = {}
    fixed = iter(item.rule.pcpus)
    for role in Role:
        members = sorted(
            (thread for thread in item.guest.threads if thread.role is role),  # unsettled ones need room too
            key=lambda thread: (thread.index or 0, not thread.settled, thread.id),
        )
        for thread in members:
            entry = item.class_.entry(role, thread.index)
            if entry is None or entry.exclusive is None or thread.id in pinned:
                continue
            label = _label(item.class_, entry, thread)
            slot = found.get(label)
            if slot is None:  # one for each vCPU, however many threads claim to be it
                allowed = _allowed(inputs, thread, entry, next(fixed, None) if role is Role.VCPU else None)
                found[label] = Slot(label, role, entry, (thread,), allowed)
            elif entry.exclusive is Exclusive.GUEST:
                found[label] = replace(slot, threads=(*slot.threads, thread))
    return tuple(found.values())


def _label(class_: GuestClass, entry: Entry, thread: Thread) -> str:
    """Return whose pCPU a thread has: its own, or its role's; the emulator's, if its role follows emulator."""
    if entry.exclusive is Exclusive.GUEST:
        role = class_.follows(thread.role)
        return str(role) if entry.ids is None else f"{role} {entry.ids}"
    return thread.label if thread.index is not None else f"{thread.role} tid {thread.id.tid}"


def _allowed(inputs: Inputs, thread: Thread, entry: Entry, fixed: int | None) -> CpuSet | None:
    """Return where a rule's ``pcpus``, or the cpuset that refused the thread another place, wants it."""
    if fixed is not None:
        return CpuSet([fixed])
    limits = thread.limits
    if limits is None or limits.fence is None:
        return None
    return (limits.fence & inputs.pool(entry.pool)) or None


def unshared(item: Item) -> str:
    """Return why a ``share_with`` cannot be met: the guest has no such thread."""
    have = {Share(thread.role, thread.index) for thread in item.guest.threads}
    for role, entry in item.class_.every():
        share = entry.share_with
        if share is not None and share.index is not None and share not in have:
            return f"{role} is to share with {share}, which the guest does not have"
    return ""
