# SPDX-License-Identifier: GPL-2.0-or-later
"""What is decided of each guest: its state, and where each of its threads should be. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from typing import TYPE_CHECKING

from rtpind.core.law import may_share
from rtpind.core.memory import Wanted
from rtpind.core.model import Guest, Role, ThreadId
from rtpind.core.policy import Drift

if TYPE_CHECKING:
    from rtpind.core.reuse import Basis


class State(StrEnum):
    """What the policy makes of a guest."""

    PLACED = "placed"
    CROWDED = "crowded"  # placed, but others may run on the SMT siblings: no core of its own was left
    DEGRADED = "degraded"  # no room: floats in housekeeping without FIFO
    LEFT = "left"  # no room: as it is
    REFUSED = "refused"  # not of a shape that its class is for: as it is
    UNMANAGED = "unmanaged"  # no rule
    UNCLAIMED = "unclaimed"  # its rule is gone
    RELEASED = "released"
    PAUSED = "paused"

    @property
    def managed(self) -> bool:
        """Whether rtpind acts on the guest's threads."""
        return self in (State.PLACED, State.CROWDED, State.DEGRADED)


@dataclass(frozen=True, kw_only=True)
class GuestDecision:
    """One guest: by which rule, in which state and why, and where each of its threads should be.

    ``pending``: nothing is decided yet, ``reason`` says what is waited for. ``roomless``: threads of a placed guest
    (hot-plugged ones, say) for which there was no pCPU: they stay with the helpers.
    """

    guest: Guest
    state: State
    rule: str = ""
    class_name: str = ""
    reason: str = ""
    pending: bool = False
    drift: Drift = Drift.WARN
    wanted: Mapping[ThreadId, Wanted] = field(default_factory=dict)
    roomless: frozenset[ThreadId] = frozenset()

    @cached_property
    def unsettled(self) -> bool:
        """Whether the guest is to be looked at again soon: libvirt has yet to move threads, or two claim to be one."""
        guest = self.guest
        return bool(guest.doubtful) or guest.starting or any(not thread.settled for thread in guest.threads)

    @cached_property
    def at_rest(self) -> bool:
        """Whether every thread that has a place is on it, and none of the guest is, unlawfully, beside a FIFO vCPU."""
        threads = self.guest.threads
        if not all(self.wanted[thread.id].holds(thread.now) for thread in threads if thread.id in self.wanted):
            return False
        vcpus = [thread for thread in threads if thread.role is Role.VCPU and thread.now.scheduling.realtime]
        return all(
            vcpu is other or not vcpu.now.cpus & other.now.cpus or may_share(vcpu, vcpu.now, other, other.now)
            for vcpu in vcpus
            for other in threads
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """All guests, who holds which pCPU exclusively (``UUID: vcpu 0``), and whose threads keep others off one.

    ``basis``: what it was made from, for the next one (:mod:`rtpind.core.reuse`).
    """

    guests: tuple[GuestDecision, ...]
    owners: Mapping[int, str] = field(default_factory=dict)
    blocked: Mapping[int, str] = field(default_factory=dict)
    basis: Basis | None = field(default=None, compare=False, repr=False)

    def wanted(self) -> dict[ThreadId, Wanted]:
        """Return the wanted placement of every managed thread."""
        return {id_: wanted for guest in self.guests for id_, wanted in guest.wanted.items()}
