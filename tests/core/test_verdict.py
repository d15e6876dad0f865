"""What is said of a thread in a host with others: who keeps whom from its place, and who intrudes on whom."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from factories import PID, START, cpus, fifo, find, guest, host, moved, policy, put, snapshot, thread, uuid_of

from rtpind.core.ledger import HandsOff, Ledger, Off, Original
from rtpind.core.memory import Memory, Refusal, Wanted, conditions
from rtpind.core.model import OTHER, Guest, Limits, Placement, Role, Sched, Scheduling, Thread
from rtpind.core.placement import place
from rtpind.core.policy import Policy
from rtpind.core.verdict import Verdict, intrusion, judge

FREE = guest("rt-1", vcpus=2)
PLACED = put(put(put(FREE, {"emulator": "0-1", "iothread 1": "0-1"}), {"vcpu 0": "2"}, fifo()), {"vcpu 1": "3"}, fifo())
WAITING = put(PLACED, {"vcpu 0": "2"}, OTHER)
WANTED = Wanted(cpus("2"), 1, exclusive=True)

ABOVE = """
version: 1
mode: enforce
pools: {realtime: isolated}
classes:
  a:
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo, priority: 1}
    emulator: {pool: housekeeping}
    iothread: {share_with: {vcpu: 0}, scheduler: fifo, priority: 2}
guests: [{name: "rt-*", class: a}]
"""


def judged(
    label: str,
    *guests: Guest,
    memory: Memory | None = None,
    ledger: Ledger | None = None,
    policy_: Policy | None = None,
) -> tuple[Verdict, str]:
    """Return the verdict of a thread of the first guest."""
    memory, seen = memory or Memory(), snapshot(*guests)
    decision = place(policy_ or policy(), seen, memory, ledger or Ledger())
    found = next(found for found in decision.guests if found.guest.uuid == guests[0].uuid)
    return judge(find(guests[0], label), found, decision, memory, seen)


def standing(of: Thread, wanted: Wanted = WANTED, *, affinity: bool) -> Memory:
    refusal = Refusal(
        wanted=wanted,
        observed=of.now,
        limits=of.limits,
        conditions=conditions(host()),
        affinity=affinity,
        text="because",
    )
    return Memory(refused={of.id: (refusal,)})


def seen_in_place(**fields: Any) -> Memory:
    wanted = place(policy(), snapshot(PLACED), Memory(), Ledger()).wanted()
    return replace(Memory(places=wanted, verified=frozenset(wanted)), **fields)


@pytest.mark.parametrize("label", ["vcpu 0", "vcpu 1", "emulator", "iothread 1"])
def test_a_thread_on_its_place_is_ok(label: str) -> None:
    """Nothing more is said of it."""
    assert judged(label, PLACED) == (Verdict.OK, "")


@pytest.mark.parametrize(
    ("of", "ledger", "verdict", "why"),
    [
        (guest("other"), Ledger(), Verdict.UNMANAGED, "no rule matches"),
        (FREE, Ledger(hands_off={FREE.uuid: Off(HandsOff.RELEASED)}), Verdict.RELEASED, "rtpinctl released"),
        (FREE, Ledger(hands_off={FREE.uuid: Off(HandsOff.PAUSED)}), Verdict.PAUSED, "rtpinctl paused"),
        (
            guest("other"),
            Ledger({find(FREE, "emulator").id: Original(FREE.uuid, "emulator", Placement(cpus("0")))}),
            Verdict.UNCLAIMED,
            "its rule is gone; rtpinctl release puts it back",
        ),
    ],
)
def test_a_guest_that_is_left_alone_says_why(of: Guest, ledger: Ledger, verdict: Verdict, why: str) -> None:
    """Every thread of it."""
    assert judged("vcpu 0", of, ledger=ledger) == (verdict, why)


def test_a_thread_on_its_way_is_pending() -> None:
    """Nothing is known to keep it."""
    assert judged("vcpu 0", FREE) == (Verdict.PENDING, "")
    assert judged("vcpu 0", put(FREE, {"vcpu 0": "2"})) == (Verdict.PENDING, "")  # its helpers are about to leave


def test_drift_is_told_from_fifo_that_rtpind_took() -> None:
    """A vCPU in place that lost FIFO for safety is pending, not drifted."""
    vcpu = find(WAITING, "vcpu 0").id

    assert judged("vcpu 0", WAITING, memory=seen_in_place()) == (Verdict.DRIFTED, "wanted pCPU 2")
    assert judged("vcpu 0", WAITING, memory=seen_in_place(owed=frozenset({vcpu}))) == (Verdict.PENDING, "")
    assert judged("vcpu 0", put(WAITING, {"vcpu 0": "5-6"}), memory=seen_in_place(owed=frozenset({vcpu}))) == (
        Verdict.DRIFTED,
        "wanted pCPU 2",
    )


def test_fifo_that_cannot_be_taken_keeps_a_thread_pending_and_says_why() -> None:
    """It is off its place, and not demoted, so not moved."""
    off = put(PLACED, {"vcpu 0": "5-6"})

    assert judged("vcpu 0", off, memory=standing(find(off, "vcpu 0"), affinity=False)) == (Verdict.PENDING, "because")


def test_a_refusal_that_does_not_stand_any_more_says_nothing() -> None:
    """The limits changed: it is tried again."""
    off = put(PLACED, {"vcpu 0": "5-6"}, OTHER)
    memory = standing(replace(find(off, "vcpu 0"), limits=Limits(fence=cpus("5-6"))), affinity=True)

    assert judged("vcpu 0", off, memory=memory) == (Verdict.PENDING, "")


@pytest.mark.parametrize(
    ("beside", "verdict", "why"),
    [
        (
            thread(index=7, on="1-2", movable=False),
            Verdict.NO_FIFO,
            "its guest's emulator (qemu-system-x86) can run on pCPU 2",
        ),
        (
            thread(role=Role.VHOST, on="2", movable=False),
            Verdict.NO_FIFO,
            "its guest's vhost (vhost-1000) can run on pCPU 2",
        ),
        (thread(index=7, on="1-2"), Verdict.PENDING, ""),  # it is about to leave
        (thread(role=Role.IOTHREAD, index=2, on="0-7", settled=False), Verdict.PENDING, ""),
        (thread(index=7, on="2", movable=False, scheduling=fifo(2)), Verdict.PENDING, ""),  # above it: lawful
        (thread(index=7, on="3", movable=False), Verdict.PENDING, ""),
    ],
)
def test_who_of_its_guest_keeps_fifo_from_a_vcpu(beside: Thread, verdict: Verdict, why: str) -> None:
    """A thread that stays where the vCPU is to be FIFO, and may not be there then."""
    assert judged("vcpu 0", replace(WAITING, threads=(*WAITING.threads, beside))) == (verdict, why)


def test_a_sibling_that_is_fenced_beside_it_keeps_fifo_from_a_vcpu() -> None:
    """Not only helpers starve."""
    found = put(WAITING, {"vcpu 1": "2"}, OTHER)
    memory = replace(
        standing(find(found, "vcpu 1"), Wanted(cpus("3"), 1, exclusive=True), affinity=True),
        places=seen_in_place().places,
    )

    assert judged("vcpu 0", found, memory=memory) == (
        Verdict.NO_FIFO,
        "its guest's vcpu 1 (CPU 1/KVM) can run on pCPU 2",
    )


@pytest.mark.parametrize(
    ("scheduling", "verdict"),
    [(OTHER, Verdict.PENDING), (fifo(), Verdict.NO_FIFO), (Scheduling(Sched.RR, 1), Verdict.NO_FIFO)],
)
def test_a_realtime_thread_of_another_guest_keeps_fifo_away(scheduling: Scheduling, verdict: Verdict) -> None:
    """One that is not realtime is an intruder, and does not."""
    other = guest("other", pid=2000, vcpus=1, iothreads=0)
    other = moved(other, {find(other, "vcpu 0").id: Placement(cpus("0-7"), scheduling)})
    why = "a realtime vcpu 0 (CPU 0/KVM) of another guest can run on pCPU 2" if verdict is Verdict.NO_FIFO else ""

    assert judged("vcpu 0", WAITING, other) == (verdict, why)


def test_an_iothread_below_fifo_is_only_pending() -> None:
    """Promise 1 is about vCPUs."""
    text = policy(ABOVE)
    found = put(put(PLACED, {"vcpu 0": "2"}, fifo()), {"iothread 1": "2"}, OTHER)

    assert judged("iothread 1", found, policy_=text) == (Verdict.PENDING, "")


def test_an_intruder_is_named_with_those_on_whose_pcpus_it_may_run() -> None:
    """A thread of a guest that is left alone, or that cannot be moved; none on its own guest's pCPUs."""
    other = guest("other", pid=2000, vcpus=1, iothreads=0)

    assert judged("vcpu 0", other, PLACED) == (
        Verdict.INTRUDER,
        "may run on pCPU 2 of rt-1's vcpu 0, pCPU 3 of rt-1's vcpu 1",
    )
    assert judged("vcpu 0", put(other, {"vcpu 0": "5"}), PLACED) == (Verdict.UNMANAGED, "no rule matches")


def test_a_managed_thread_that_nobody_can_move_intrudes() -> None:
    """Fenced or not, it is on somebody else's pCPU."""
    second = guest("rt-2", pid=2000, vcpus=1, iothreads=0, helpers=1)
    second = replace(
        second, threads=(*second.threads, thread(pid=2000, index=7, on="2", movable=False, uuid=second.uuid))
    )
    seen = snapshot(second, PLACED)
    decision = place(policy(), seen, Memory(), Ledger())
    found = next(found for found in decision.guests if found.guest is second)

    assert judge(second.threads[-1], found, decision, Memory(), seen) == (
        Verdict.INTRUDER,
        "may run on pCPU 2 of rt-1's vcpu 0",
    )


def test_an_owner_that_has_no_name_is_called_by_its_uuid() -> None:
    """The decision names guests; one that is not in it cannot be named."""
    decision = replace(place(policy(), snapshot(PLACED), Memory(), Ledger()), guests=())

    assert intrusion(thread(pid=2000, on="2"), decision) == f"may run on pCPU 2 of {uuid_of(PID)}'s vcpu 0"
    assert intrusion(find(PLACED, "emulator"), decision) == ""
    assert PLACED.process == (PID, START)
