# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of the free pCPUs a guest gets: close to each other, close to its memory, and so that large guests still fit.

The smallest part of the host that has enough room is taken (an L3 cache before a die, a NUMA node, a socket), among
equals the fullest, among those the lowest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from rtpind.core.cpuset import CpuSet
from rtpind.core.policy import Siblings
from rtpind.core.topology import Topology


def choose(
    count: int,
    free: CpuSet,
    topology: Topology,
    areas: Sequence[CpuSet],
    siblings: Siblings,
    threads: int = 1,
    *,
    one_node: bool = False,
) -> tuple[int, ...]:
    """Return ``count`` of the ``free`` pCPUs in the order of the guest's vCPUs; empty when they are too few.

    ``areas``: where to look, the best first. ``threads``: of each of the guest's own cores; a guest that has them
    gets pCPUs of one core for vCPUs of one core, as far as there are. ``one_node``: all of them on one NUMA node.
    """
    if siblings is Siblings.IDLE:
        free -= topology.above(free)  # one of each core
    paired = threads > 1 or siblings is Siblings.SAME_GUEST
    for area in areas:
        for kind in (*topology.domains, (area,)):
            rooms = [
                room
                for domain in kind
                if len(room := domain & area & free) >= count and not (one_node and len(topology.nodes_of(room)) > 1)
            ]
            if rooms:
                best = min(rooms, key=lambda room: (len(room), room.first()))
                return tuple(islice((_paired if paired else _spread)(best, topology), count))
    return ()


def _paired(cpus: CpuSet, topology: Topology) -> Iterator[int]:
    """Return pCPUs core by core, whole cores first."""
    halves = cpus & topology.beside(topology.known - cpus)
    parts = (cpus - halves, halves)
    return (mate for part in parts for cpu in part - topology.above(part) for mate in topology.siblings(cpu) & part)


def _spread(cpus: CpuSet, topology: Topology) -> Iterator[int]:
    """Yield pCPUs so that idle cores come before the siblings of pCPUs that are in use."""
    crowded = cpus & (topology.above(cpus) | topology.beside(topology.known - cpus))
    yield from cpus - crowded
    yield from crowded
