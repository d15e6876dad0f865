# SPDX-License-Identifier: GPL-2.0-or-later
"""Which role a thread has (promise 5): cgroup and name must agree, and nobody takes an id that is taken.

Names are QEMU's (``CPU 0/KVM``, ``IO iothread1``) and can be forged from inside; cgroup directories are libvirt's
and cannot. So a thread is a vCPU or an iothread only where both say the same, one thread for each directory.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rtpind.core.model import Guest, Kind, Placement, Role, Thread, ThreadId

#: A thread that QEMU has named but libvirt has not moved yet is waited for this long (measured: up to 0.4 s at a start,
#: over 10 s on an emulated host without CPU time); after that it is a helper like any other, so that a name alone keeps
#: no thread off the helpers' pool. If it is too short, a guest that starts is taken for one with fewer vCPUs.
SETTLE_S = 30.0

_VCPU = re.compile(r"CPU (\d{1,5})/[A-Z]+", re.ASCII)
_IOTHREAD = re.compile(r"IO iothread(\d{1,5})", re.ASCII)
_LEAF = re.compile(r"(vcpu|iothread)(\d{1,5})", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """One thread as the host showed it. ``leaf``: last part of its cgroup, "" where its cgroups disagree.

    ``age_s``: seconds since the thread began, SETTLE_S from then on. ``worker``: made by the kernel (PF_KTHREAD or
    PF_USER_WORKER). ``ran_ns``: its CPU time, where that was asked for and is known.
    """

    id: ThreadId
    kind: Kind
    comm: str
    now: Placement
    leaf: str = "emulator"
    cgroup: str = ""
    movable: bool = True
    worker: bool = False
    age_s: float = 0.0
    ran_ns: int | None = None


Incumbents = Mapping[tuple[tuple[int, int], str], ThreadId]


def identify(
    *,
    uuid: str,
    name: str,
    process: tuple[int, int],
    sightings: Sequence[Sighting],
    incumbents: Incumbents,
    doubtful: frozenset[tuple[tuple[int, int], str]] = frozenset(),
) -> Guest:
    """Give each sighted thread of one guest its role.

    ``incumbents``: which thread was found to be (process, label) before. ``doubtful``: the (process, label) pairs
    that had two claimants at the last look. A second claimant of a held id is a helper; two claimants of a free
    one wait for a look, then both are helpers and the id is contested.
    """
    claims: dict[str, list[Sighting]] = {}
    for sighting in sightings:
        label = _claim(sighting)
        if label:
            claims.setdefault(label, []).append(sighting)
    winners: dict[ThreadId, str] = {}
    contested: list[str] = []
    fresh: list[str] = []
    waiting: set[ThreadId] = set()
    for label, claimants in claims.items():
        held = incumbents.get((process, label))
        ids = [claimant.id for claimant in claimants]
        if held in ids:
            winners[held] = label
        elif len(ids) == 1:
            winners[ids[0]] = label
        elif (process, label) in doubtful:
            contested.append(label)
        else:
            fresh.append(label)
            waiting.update(ids)
    threads = tuple(
        _thread(uuid, sighting, winners.get(sighting.id, ""), waits=sighting.id in waiting) for sighting in sightings
    )
    return Guest(
        uuid=uuid,
        name=name,
        pid=process[0],
        pid_start=process[1],
        threads=threads,
        young=any(sighting.id.tid == process[0] and sighting.age_s < SETTLE_S for sighting in sightings),
        contested=tuple(sorted(contested)),
        doubtful=tuple(sorted(fresh)),
    )


def settled(guest: Guest, incumbents: Incumbents) -> bool:
    """Return whether :func:`identify` would say the same of the same sightings again.

    It does when nobody's id is in doubt, and everybody who has one has it by right of the last look.
    """
    process = guest.process
    return not (guest.doubtful or guest.contested) and all(
        incumbents.get((process, thread.label)) == thread.id
        for thread in guest.threads
        if thread.index is not None and thread.settled
    )


def _claim(sighting: Sighting) -> str:
    """Return ``vcpu 0`` or ``iothread 1`` where name and cgroup agree on it, else ""."""
    if sighting.kind is not Kind.QEMU:
        return ""
    named, leaf = _named(sighting.comm), _LEAF.fullmatch(sighting.leaf)
    if leaf is None or (leaf[1], int(leaf[2])) != named:
        return ""
    return f"{named[0]} {named[1]}"


def _named(comm: str) -> tuple[str, int] | None:
    for role, pattern in ((Role.VCPU, _VCPU), (Role.IOTHREAD, _IOTHREAD)):
        match = pattern.fullmatch(comm)
        if match:
            return (str(role), int(match[1]))
    return None


def _thread(uuid: str, sighting: Sighting, label: str, *, waits: bool) -> Thread:
    role, index, settled = _helper_role(sighting), None, True
    named = _named(sighting.comm)
    unmoved = sighting.kind is Kind.QEMU and sighting.leaf in ("emulator", "") and sighting.age_s < SETTLE_S
    if label or (named and (waits or unmoved)):
        assert named is not None
        role, index, settled = Role(named[0]), named[1], bool(label)
    return Thread(
        id=sighting.id,
        guest=uuid,
        comm=sighting.comm,
        role=role,
        index=index,
        kind=sighting.kind,
        settled=settled,
        movable=sighting.movable,
        now=sighting.now,
        cgroup=sighting.cgroup,
    )


def _helper_role(sighting: Sighting) -> Role:
    """Return what a thread is that is neither vCPU nor iothread. Only the kernel makes vhost and pit workers."""
    if sighting.worker and sighting.comm == f"vhost-{sighting.id.pid}":
        return Role.VHOST
    if sighting.worker and sighting.comm == f"kvm-pit/{sighting.id.pid}":
        return Role.PIT
    return Role.EMULATOR
