# SPDX-License-Identifier: GPL-2.0-or-later
"""Off-place time: CPU time that a vCPU spent off its place after its guest was resumed. Pure.

CPU times at each look, and after each step on a vCPU, → what was spent where the vCPU should not have been. Affinity
and scheduling are counted apart.

When a guest was resumed is not seen: libvirt says so only afterwards, when the guest has run for milliseconds. What is
seen is that libvirt has not moved all of its vCPUs into their cgroups; it does that before it resumes the guest
(qemuProcessSetupVcpus comes before qemuProcessStartCPUs). So CPU time counts from the last such look on. An interval
between two readings counts whole where either of them found the vCPU off its place: what comes out is an upper bound.
A start at which there was no such look counts from the beginning of the thread, with what QEMU does there itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from rtpind.core.identify import SETTLE_S
from rtpind.core.ledger import Process
from rtpind.core.model import Guest, Placement, Role, Snapshot, Thread, ThreadId

if TYPE_CHECKING:
    from rtpind.core.decision import Decision, GuestDecision

#: A start is over when every vCPU is found on its place so long after it may have begun to run: the guest is resumed
#: 4 to 25 ms after libvirt moved its vCPUs (measured), and libvirt sets an affinity of its own in between …
WATCHED_S = 1.0
#: … and after this in any case: a cpuset may fence a vCPU, FIFO be refused, or rtpind only observe.
GIVEN_UP_S = 5.0


class Reading(NamedTuple):
    """CPU time of a thread (ns), and its placement when that was read."""

    id: ThreadId
    now: Placement
    ran_ns: int


@dataclass(frozen=True, slots=True)
class OffPlace:
    """One vCPU: its CPU time at the last reading, what was right then, and what it spent off its place (ns), at most.

    ``since``: monotonic seconds of the first look at which it may have run. ``affinity_ns``, ``scheduling_ns``: CPU
    time with another affinity than the wanted one, and with other scheduling.
    """

    since: float
    ran_ns: int
    affine: bool
    scheduled: bool
    affinity_ns: int = 0
    scheduling_ns: int = 0

    @property
    def right(self) -> bool:
        """Whether it was on its place at the last reading."""
        return self.affine and self.scheduled

    def read(self, ran_ns: int, *, affine: bool, scheduled: bool) -> OffPlace:
        """Return what is known after one more reading."""
        used = max(ran_ns - self.ran_ns, 0)
        affinity_ns = self.affinity_ns + (0 if affine and self.affine else used)
        scheduling_ns = self.scheduling_ns + (0 if scheduled and self.scheduled else used)
        return OffPlace(self.since, ran_ns, affine, scheduled, affinity_ns, scheduling_ns)


@dataclass(frozen=True, slots=True)
class Start:
    """What is known of one guest process: vCPUs whose start is not over, and those whose is.

    ``resumed``: all vCPUs were in their cgroups at a look. ``over``: None for what was not measured, as the guest was
    not managed then.
    """

    resumed: bool = False
    open: Mapping[ThreadId, OffPlace] = field(default_factory=dict)
    over: Mapping[ThreadId, OffPlace | None] = field(default_factory=dict)

    def due(self, thread: ThreadId, age_s: float) -> bool:
        """Return whether a vCPU's CPU time is to be read, seconds after its thread began.

        An old one of which nothing is known ran before rtpind did, and its start is not to be seen any more.
        """
        return thread in self.open or (age_s < SETTLE_S and thread not in self.over)

    def spent(self, thread: ThreadId) -> OffPlace | None:
        """Return what is known of a vCPU; None where it is not measured."""
        return self.open.get(thread) or self.over.get(thread)


Starts = Mapping[Process, Start]


def account(before: Starts, snapshot: Snapshot, decision: Decision, readings: Sequence[Reading] = ()) -> Starts:
    """Return what is known after a pass; the same object where no CPU time was read.

    ``snapshot.ran``: CPU times at the look. ``readings``: after each step that was taken since, in their order.
    """
    if not snapshot.ran:
        return before
    steps: dict[Process, list[Reading]] = {(id_.pid, id_.pid_start): [] for id_ in snapshot.ran}
    for reading in readings:
        steps[(reading.id.pid, reading.id.pid_start)].append(reading)
    found = dict(before)
    for guest in decision.guests:
        process = guest.guest.process
        if process in steps:
            found[process] = _stepped(_looked(before.get(process), guest, snapshot), guest, steps[process])
    return found


def ended(before: Starts, after: Starts) -> Iterator[tuple[Process, dict[ThreadId, OffPlace]]]:
    """Yield the guest processes of which vCPUs' starts are over since ``before``, with what was measured of them."""
    if after is before:
        return
    for process, start in after.items():
        old = before.get(process)
        if start is not old:
            known = old.over if old is not None else {}
            new = {id_: spent for id_, spent in start.over.items() if spent is not None and id_ not in known}
            if new:
                yield process, new


def _looked(start: Start | None, found: GuestDecision, snapshot: Snapshot) -> Start:
    """Return a guest's start after the look of this pass."""
    guest = found.guest
    vcpus = [thread for thread in guest.threads if thread.role is Role.VCPU and thread.id in snapshot.ran]
    if start is None:  # in a guest that is not young, a thread is a hot-plugged vCPU if others are there already
        there = any(thread.settled for thread in guest.threads if thread.role is Role.VCPU)
        start = Start(resumed=there and not guest.young)
    if not found.state.managed:
        return Start(True, {}, {**{thread.id: None for thread in vcpus}, **start.over})
    resumed = start.resumed or not _before_resume(guest)
    accounts: dict[ThreadId, OffPlace] = {}
    for thread in vcpus:
        if thread.id in start.over:
            continue
        affine, scheduled = _right(thread, thread.now, found)
        ran_ns = snapshot.ran[thread.id]
        before = start.open.get(thread.id)
        if not resumed:
            accounts[thread.id] = OffPlace(snapshot.time, ran_ns, affine, scheduled)
        elif before is None:
            first = OffPlace(snapshot.time, 0, affine, scheduled)
            accounts[thread.id] = first.read(ran_ns, affine=affine, scheduled=scheduled)
        else:
            accounts[thread.id] = before.read(ran_ns, affine=affine, scheduled=scheduled)
    if resumed and _is_over(accounts, snapshot.time):
        return Start(True, {}, {**start.over, **accounts})
    return Start(resumed, accounts, start.over)


def _before_resume(guest: Guest) -> bool:
    """Return whether libvirt has yet to move a vCPU into its cgroup."""
    return guest.starting or any(not thread.settled for thread in guest.threads if thread.role is Role.VCPU)


def _is_over(accounts: Mapping[ThreadId, OffPlace], time: float) -> bool:
    watched = time - max((one.since for one in accounts.values()), default=time)
    right = all(one.right for one in accounts.values())
    return watched >= (WATCHED_S if right else GIVEN_UP_S)


def _stepped(start: Start, found: GuestDecision, readings: Sequence[Reading]) -> Start:
    """Return a guest's start after the steps of this pass."""
    threads = {thread.id: thread for thread in found.guest.threads}
    accounts = dict(start.open)
    for id_, now, ran_ns in readings:
        if id_ in accounts:
            affine, scheduled = _right(threads[id_], now, found)
            accounts[id_] = accounts[id_].read(ran_ns, affine=affine, scheduled=scheduled)
    return replace(start, open=accounts)


def _right(thread: Thread, now: Placement, found: GuestDecision) -> tuple[bool, bool]:
    """Return whether affinity and scheduling are the wanted ones; neither is while nothing is decided yet."""
    wanted = found.wanted.get(thread.id)
    return (False, False) if wanted is None else (wanted.affine(now), wanted.scheduled(now))
