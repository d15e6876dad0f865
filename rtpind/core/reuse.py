# SPDX-License-Identifier: GPL-2.0-or-later
"""Which guests an earlier decision still holds for, so that one more guest does not cost a decision of all. Pure.

A decision made this way is the one that would be made from nothing: reuse is given up wherever a guest that is as it
was could get another place. It is for the host at rest: everybody has what its class asks for, and one comes or goes.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from rtpind.core.claims import Claims
from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.decision import Decision, GuestDecision, State
from rtpind.core.model import Role
from rtpind.core.needs import Inputs


@dataclass(slots=True)
class Books:
    """What a decision knows beside the places: who holds what, and what those who float are kept off.

    ``given``: (guest UUID, label) → pCPU. ``held``: what floaters keep off. ``loose``: every pCPU that somebody
    floats on, or would but for ``held`` and what is given out.
    """

    claims: Claims
    given: dict[tuple[str, str], int] = field(default_factory=dict)
    held: CpuSet = NO_CPUS
    loose: CpuSet = NO_CPUS

    def without(self, uuids: frozenset[str]) -> Books:
        """Return a copy in which some guests were given nothing."""
        claims = self.claims.copy()
        for uuid in uuids:
            claims.take_back(uuid)
        given = {key: cpu for key, cpu in self.given.items() if key[0] not in uuids}
        return Books(claims, given, self.held, self.loose)

    def bind_alike(self, other: Books) -> bool:
        """Return whether guests that neither gives a place find the same in both."""
        mine, theirs = (books.claims.taken | books.held for books in (self, other))
        return self.claims.blocks_alike(other.claims) and mine & self.loose == theirs & self.loose


@dataclass(frozen=True, slots=True)
class Basis:
    """What a decision was made from, and its books."""

    inputs: Inputs
    books: Books


def affected(only: Collection[str], before: Decision, now: Decision) -> frozenset[str]:
    """Return of which guests there may be news after a pass that looked at ``only`` some.

    Those that were decided anew as well, and those that may run on a pCPU that has another owner than ``before``.
    """
    decided = {found.guest.uuid: found for found in before.guests}
    fresh = [found.guest.uuid for found in now.guests if decided.get(found.guest.uuid) is not found]
    owned = CpuSet(cpu for cpu, owner in now.owners.items() if before.owners.get(cpu) != owner)
    beside = [
        found.guest.uuid
        for found in (now.guests if owned else ())
        if any(thread.now.cpus & owned for thread in found.guest.threads)
    ]
    return frozenset(only).union(fresh, beside)


def stale(before: Decision, basis: Basis, now: Inputs) -> frozenset[str] | None:
    """Return the UUIDs of guests that came, changed or went since ``before``; None when all must be decided anew."""
    old = basis.inputs
    same = now.policy is old.policy and (now.host is old.host or now.host == old.host)
    if not same or now.ledger.hands_off or old.ledger.hands_off:
        return None
    decided = {found.guest.uuid: found for found in before.guests}
    if not all(_calm(found, now) for found in before.guests):
        return None
    guests = {guest.uuid: guest for guest in now.snapshot.guests}
    fresh = [guest for uuid, guest in guests.items() if uuid not in decided or decided[uuid].guest is not guest]
    changed = {guest.uuid for guest in fresh} | (decided.keys() - guests.keys())
    blocking = any(basis.books.claims.blocks_for(uuid) for uuid in changed)
    if blocking or any(_loose(decided[uuid], now) for uuid in changed & decided.keys()):
        return None
    if any(thread.id in now.memory.refused for guest in fresh for thread in guest.threads):
        return None
    return frozenset(changed)


def _calm(found: GuestDecision, now: Inputs) -> bool:
    """Return whether a guest has all that it may have, and is remembered to: room that others leave changes nothing."""
    if found.state in (State.UNMANAGED, State.UNCLAIMED, State.REFUSED):
        return True
    memory = now.memory
    return (
        found.state is State.PLACED
        and not found.roomless
        and all(memory.places.get(id_) is wanted for id_, wanted in found.wanted.items())
        and (found.pending or all(thread.settled for thread in found.guest.threads))
        and not (memory.refused and any(thread.id in memory.refused for thread in found.guest.threads))
    )


def _loose(found: GuestDecision, now: Inputs) -> bool:
    """Return whether others are kept off what a guest's <cputune> has a vCPU float on: no guest's own block."""
    class_ = now.policy.classes.get(found.class_name)
    if class_ is None or not class_.by_cputune:
        return False
    vcpus = [thread.id for thread in found.guest.threads if thread.role is Role.VCPU]
    return not all(id_ in found.wanted and found.wanted[id_].exclusive for id_ in vcpus)
