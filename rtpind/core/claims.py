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
        self._holder: dict[int, str] = {}  # pCPU → UUID, of what is given out or kept for its sibling
        self._blocked: dict[int, dict[str, str]] = {}  # pCPU → UUIDs of the guests narrowed to it, and their texts
        self._own_blocks: dict[str, CpuSet] = {}
        self._foreign = NO_CPUS  # every blocked pCPU
        self.owners: dict[int, str] = {}  # pCPU → ``UUID: vcpu 0``
        self.had: dict[int, str] = {}  # pCPU → UUID, of places given before that are still to be asked for
        self.taken = NO_CPUS  # all that is given out, and the siblings kept idle

    def give(self, cpu: int, uuid: str, label: str, siblings: Siblings) -> None:
        """Give ``cpu`` to a guest's ``label``, and its siblings with it unless they are to be ignored."""
        self.owners[cpu] = f"{uuid}: {label}"
        kept = CpuSet([cpu]) if siblings is Siblings.IGNORE else self._topology.siblings(cpu)
        for each in kept:
            self._holder[each] = uuid
        self.taken |= kept

    def take_back(self, uuid: str) -> None:
        """Take back all that a guest was given."""
        if uuid not in self._holder.values():
            return
        self.owners = {cpu: owner for cpu, owner in self.owners.items() if self._holder[cpu] != uuid}
        self._holder = {cpu: holder for cpu, holder in self._holder.items() if holder != uuid}
        self.taken = CpuSet(self._holder)

    def block(self, cpus: CpuSet, uuid: str, text: str) -> None:
        """Keep what is given to other guests off ``cpus``; the first text for a guest stands."""
        for cpu in cpus:
            self._blocked.setdefault(cpu, {}).setdefault(uuid, text)
        self._own_blocks[uuid] = self._own_blocks.get(uuid, NO_CPUS) | cpus
        self._foreign |= cpus

    def blocked(self) -> Mapping[int, str]:
        """Return pCPU → who is narrowed to it."""
        return {cpu: "; ".join(who.values()) for cpu, who in sorted(self._blocked.items())}

    def free(self, cpus: CpuSet, uuid: str, *, beside: str | None = None) -> CpuSet:
        """Return those of ``cpus`` that a guest may be given; ``beside``: whose narrowed threads it may join."""
        kept = CpuSet(cpu for cpu in cpus & self.taken if self._holder[cpu] == uuid and cpu not in self.owners)
        allowed = {uuid, beside}
        own = self._own_blocks.get(uuid, NO_CPUS)
        if beside is not None:
            own |= self._own_blocks.get(beside, NO_CPUS)
        joined = CpuSet(cpu for cpu in cpus & own if self._blocked[cpu].keys() <= allowed)
        return ((cpus - self.taken) | kept) - (self._foreign - joined)

    def alone(self, cpus: CpuSet, uuid: str, siblings: Siblings) -> CpuSet:
        """Return those of ``cpus`` whose siblings can be kept as asked: idle, or for the same guest."""
        if siblings is Siblings.IGNORE:
            return cpus
        return CpuSet(
            cpu for cpu in cpus if self._can_keep(self._topology.siblings(cpu) - CpuSet([cpu]), uuid, siblings)
        )

    def _can_keep(self, beside: CpuSet, uuid: str, siblings: Siblings) -> bool:
        if beside & self._shared:
            return False
        return all(
            not (self._blocked.get(cpu, {}).keys() - {uuid})
            and self._holder.get(cpu, uuid) == uuid
            and self.had.get(cpu, uuid) == uuid
            and not (siblings is Siblings.IDLE and (cpu in self.owners or cpu in self.had))
            for cpu in beside
        )
