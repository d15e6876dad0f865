# SPDX-License-Identifier: GPL-2.0-or-later
"""How the pCPUs of a host hang together: cores, last-level caches, dies, NUMA nodes, sockets. Values only.

Of a pCPU that the kernel tells nothing about (an offline one, say) each set is the pCPU alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from rtpind.core.cpuset import NO_CPUS, CpuSet


@dataclass(frozen=True, kw_only=True)
class Topology:
    """pCPU → its core's pCPUs (SMT siblings), those of its L3 cache, its die, its socket; node → the pCPUs of it."""

    cores: Mapping[int, CpuSet] = field(default_factory=dict)
    caches: Mapping[int, CpuSet] = field(default_factory=dict)
    dies: Mapping[int, CpuSet] = field(default_factory=dict)
    sockets: Mapping[int, CpuSet] = field(default_factory=dict)
    nodes: Mapping[int, CpuSet] = field(default_factory=dict)

    def siblings(self, cpu: int) -> CpuSet:
        """Return the pCPUs of the core of ``cpu``, itself included."""
        return self.cores.get(cpu) or CpuSet([cpu])

    def beside(self, cpus: CpuSet) -> CpuSet:
        """Return the pCPUs that have a sibling other than themselves in ``cpus``."""
        found = 0
        for distance, lower in self._pairs.items():
            found |= (cpus.mask >> distance) & lower | (cpus.mask & lower) << distance
        return CpuSet.of_mask(found)

    def above(self, cpus: CpuSet) -> CpuSet:
        """Return the pCPUs that have a lower sibling in ``cpus``."""
        found = 0
        for distance, lower in self._pairs.items():
            found |= (cpus.mask & lower) << distance
        return CpuSet.of_mask(found)

    @cached_property
    def known(self) -> CpuSet:
        """The pCPUs whose core the kernel tells."""
        return CpuSet(self.cores)

    @cached_property
    def _pairs(self) -> dict[int, int]:
        """Distance → mask of the lower ones of two siblings so far apart: a few shifts then do for any set of pCPUs."""
        found: dict[int, int] = {}
        for core in set(self.cores.values()):
            members = list(core)
            for number, lower in enumerate(members):
                for upper in members[number + 1 :]:
                    found[upper - lower] = found.get(upper - lower, 0) | 1 << lower
        return found

    def of_nodes(self, nodes: CpuSet) -> CpuSet:
        """Return the pCPUs of NUMA ``nodes``."""
        found = NO_CPUS
        for node in nodes:
            found |= self.nodes.get(node, NO_CPUS)
        return found

    def nodes_of(self, cpus: CpuSet) -> CpuSet:
        """Return the NUMA nodes that some of ``cpus`` are on."""
        return CpuSet(node for node, of_node in self.nodes.items() if of_node & cpus)

    @cached_property
    def domains(self) -> tuple[tuple[CpuSet, ...], ...]:
        """The host cut into pieces, the smallest kind first; of the same size L3 caches, dies, NUMA nodes, sockets.

        Which is smaller differs: a node may be part of an L3 cache (sub-NUMA clustering) or of a die that is a whole
        socket (AMD's NPS4). A piece that is one core is none: cores are not filled up before others are begun.
        """
        found: list[tuple[CpuSet, ...]] = []
        for kind in (self.caches, self.dies, self.nodes, self.sockets):
            parts = {cpus for cpus in kind.values() if cpus and cpus != self.siblings(cpus.first())}
            pieces = tuple(sorted(parts, key=lambda cpus: cpus.first()))
            if pieces and pieces not in found:
                found.append(pieces)
        return tuple(sorted(found, key=lambda pieces: max(len(cpus) for cpus in pieces)))

    @classmethod
    def built(
        cls, sockets: int, cores: int, threads: int = 1, *, caches: int = 1, dies: int = 1, nodes: int = 1
    ) -> Topology:
        """Return a made-up host: ``cores`` of ``threads`` in each socket, which has so many L3 caches, dies and nodes.

        Numbered as the kernel does on x86: first each core's first thread, then the second ones.
        """
        total = sockets * cores
        core_of = {core: CpuSet(core + thread * total for thread in range(threads)) for core in range(total)}
        made: dict[str, dict[int, CpuSet]] = {}
        kinds = {"cores": cores, "caches": caches, "dies": dies, "nodes": nodes, "sockets": 1}
        for kind, number in kinds.items():
            width = max(cores // number, 1)
            for first in range(0, total, width):
                cpus = NO_CPUS
                for core in range(first, first + width):
                    cpus |= core_of[core]
                made.setdefault(kind, {}).update(dict.fromkeys(cpus, cpus))
        numbered = sorted(set(made.pop("nodes").values()), key=lambda cpus: cpus.first())
        return cls(**made, nodes=dict(enumerate(numbered)))
