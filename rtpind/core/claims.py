# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has which pCPU: given out exclusively, kept idle beside one that is, or blocked by who is narrowed to it.

Kept up to date while one decision is made; asked by :mod:`rtpind.core.placement` for what is free.
"""

from __future__ import annotations

from collections.abc import Mapping

from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.policy import Siblings
from rtpind.core.topology import Topology

#: In place of a guest's UUID: somebody who is no guest.
NOBODY = ""


class Claims:
    """The books of one decision. ``shared``: pCPUs of pools in which threads float; a core with one is never idle."""

    def __init__(self, topology: Topology, shared: CpuSet = NO_CPUS) -> None:
        self._topology = topology
        self._shared = shared
        self._held: dict[str, CpuSet] = {}  # UUID → what is given to it or kept beside that
        self._mates: dict[str, CpuSet] = {}  # UUID → siblings kept for its own other threads
        self._given = NO_CPUS
        self._blocked: dict[int, dict[str, str]] = {}  # pCPU → UUIDs of the guests narrowed to it, and their texts
        self._own_blocks: dict[str, CpuSet] = {}
        self._foreign = NO_CPUS  # every blocked pCPU
        self.owners: dict[int, str] = {}  # pCPU → ``UUID: vcpu 0``
        self._had: dict[str, CpuSet] = {}  # UUID → places given before that are still to be asked for
        self._all_had = NO_CPUS
        self.taken = NO_CPUS  # all that is given out, and the siblings kept idle

    def copy(self) -> Claims:
        """Return books that start from these."""
        other = Claims(self._topology, self._shared)
        other._held, other._mates, other._given = dict(self._held), dict(self._mates), self._given
        other._blocked = {cpu: dict(who) for cpu, who in self._blocked.items()}
        other._own_blocks, other._foreign = dict(self._own_blocks), self._foreign
        other.owners, other.taken = dict(self.owners), self.taken
        return other

    def give(self, cpu: int, uuid: str, label: str, siblings: Siblings) -> None:
        """Give ``cpu`` to a guest's ``label``, and its siblings with it unless they are to be ignored."""
        self.owners[cpu] = f"{uuid}: {label}"
        kept = CpuSet([cpu]) if siblings is Siblings.IGNORE else self._topology.siblings(cpu)
        self._held[uuid] = self._held.get(uuid, NO_CPUS) | kept
        if siblings is Siblings.SAME_GUEST:
            self._mates[uuid] = self._mates.get(uuid, NO_CPUS) | kept
        self._given |= CpuSet([cpu])
        self.taken |= kept

    def expect(self, cpus: CpuSet, uuid: str) -> None:
        """Keep others from having ``cpus`` as idle siblings: a guest was given them before, and is about to ask."""
        self._had[uuid] = self._had.get(uuid, NO_CPUS) | cpus
        self._all_had |= cpus

    def expect_no_more(self) -> None:
        """Forget what was expected: who was to ask has."""
        self._had.clear()
        self._all_had = NO_CPUS

    def take_back(self, uuid: str) -> None:
        """Take back all that a guest was given."""
        held = self._held.pop(uuid, NO_CPUS)
        self._mates.pop(uuid, None)
        for cpu in held & self._given:
            del self.owners[cpu]
        self._given -= held
        self.taken -= held

    def block(self, cpus: CpuSet, uuid: str, text: str) -> None:
        """Keep what is given to other guests off ``cpus``; the first text for a guest stands."""
        for cpu in cpus:
            self._blocked.setdefault(cpu, {}).setdefault(uuid, text)
        self._own_blocks[uuid] = self._own_blocks.get(uuid, NO_CPUS) | cpus
        self._foreign |= cpus

    def blocks_for(self, uuid: str) -> CpuSet:
        """Return what is kept off because a guest is narrowed to it."""
        return self._own_blocks.get(uuid, NO_CPUS)

    def blocks_alike(self, other: Claims) -> bool:
        """Return whether the same is kept off for the same guests."""
        return self._own_blocks == other._own_blocks

    def blocked(self) -> Mapping[int, str]:
        """Return pCPU → who is narrowed to it."""
        return {cpu: "; ".join(who.values()) for cpu, who in sorted(self._blocked.items())}

    def free(self, cpus: CpuSet, uuid: str, *, beside: str | None = None) -> CpuSet:
        """Return those of ``cpus`` that a guest may be given; ``beside``: whose narrowed threads it may join."""
        kept = (cpus & self._mates.get(uuid, NO_CPUS)) - self._given
        return ((cpus - self.taken) | kept) - self._blocks(uuid, beside)

    def _blocks(self, uuid: str, beside: str | None = None) -> CpuSet:
        """Return what others than ``uuid`` and ``beside`` are narrowed to."""
        own = self._own_blocks.get(uuid, NO_CPUS)
        if beside is not None:
            own |= self._own_blocks.get(beside, NO_CPUS)
        return self._foreign - CpuSet(cpu for cpu in own if self._blocked[cpu].keys() <= {uuid, beside})

    def alone(self, cpus: CpuSet, uuid: str, siblings: Siblings, *, beside: str | None = None) -> CpuSet:
        """Return those of ``cpus`` whose siblings can be kept as asked: idle, or for the same guest."""
        if siblings is Siblings.IGNORE:
            return cpus
        others = self._shared | self._blocks(uuid, beside) | (self.taken - self._held.get(uuid, NO_CPUS))
        others |= self._all_had - self._had.get(uuid, NO_CPUS)
        if siblings is Siblings.IDLE:
            others |= self._given | self._had.get(uuid, NO_CPUS)
        return cpus - self._topology.beside(others)
