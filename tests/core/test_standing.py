"""How well a thread stands: verdicts that a look at one thread gives, and hazards that need no policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from factories import cpus, fifo, find, guest, host, policy, put, snapshot

from rtpind.core.decision import Decision, GuestDecision
from rtpind.core.learn import learn
from rtpind.core.ledger import Ledger
from rtpind.core.memory import PAUSE_S, Fight, Memory, Refusal, Wanted, conditions
from rtpind.core.model import Guest, Placement, Role, Sched, Scheduling, Thread
from rtpind.core.placement import place
from rtpind.core.plan import Plan
from rtpind.core.verdict import Verdict, hazards, judge

HOST = host()
PLACED = put(guest("rt-1", vcpus=1), {"vcpu 0": "2", "emulator": "0-1", "iothread 1": "0-1"})


def judged(found: Guest, label: str, memory: Memory | None = None) -> tuple[Verdict, str]:
    memory = memory or Memory()
    decision = place(policy(), snapshot(found), memory, Ledger())
    return judge(find(found, label), decision.guests[0], decision, memory, snapshot(found))


def test_a_thread_for_which_there_is_no_pcpu_is_not_placed() -> None:
    """A managed guest's settled thread that got no place is said to have none."""
    found = GuestDecision(guest=PLACED, state=place(policy(), snapshot(PLACED), Memory(), Ledger()).guests[0].state)
    decision = Decision(guests=(found,))

    assert judge(find(PLACED, "emulator"), found, decision, Memory(), snapshot(PLACED)) == (
        Verdict.NOT_PLACED,
        "no pCPU for it",
    )


def test_an_unsettled_thread_is_pending() -> None:
    """A vCPU that libvirt has not moved yet, beside one that it has."""
    two = guest("rt-1", vcpus=2)
    found = replace(two, threads=tuple(replace(one, settled=one.label != "vcpu 1") for one in two.threads))

    assert judged(found, "vcpu 1") == (Verdict.PENDING, "libvirt has not moved it into its cgroup yet")


def test_a_fight_pauses_a_thread() -> None:
    """As long as the pause lasts, the verdict is paused."""
    memory = Memory(fights={find(PLACED, "vcpu 0").id: Fight(until=10.0, length_s=PAUSE_S)})

    assert judged(PLACED, "vcpu 0", memory) == (Verdict.PAUSED, "something else keeps moving it")


@pytest.mark.parametrize(
    ("movable", "verdict"), [(True, Verdict.PENDING), (False, Verdict.FENCED)], ids=["movable", "not movable"]
)
def test_a_thread_that_nobody_may_move_is_fenced(movable: bool, verdict: Verdict) -> None:
    """PF_NO_SETAFFINITY keeps a helper where it is."""
    off = put(PLACED, {"emulator": "0"})
    found = replace(off, threads=tuple(replace(one, movable=movable or one.role is Role.VCPU) for one in off.threads))

    assert judged(found, "emulator")[0] is verdict


@pytest.mark.parametrize("affinity", [True, False])
def test_a_standing_refusal_is_the_verdict(affinity: bool) -> None:
    """Fenced for an affinity that was refused, no-fifo for a priority; with the kernel's reason."""
    found = put(PLACED, {"vcpu 0": "3"}) if affinity else PLACED
    vcpu = find(found, "vcpu 0")
    wanted = Wanted(cpus("2"), 1, exclusive=True)
    refusal = Refusal(wanted, vcpu.now, vcpu.limits, conditions(HOST), affinity, "because")
    memory = Memory(places={vcpu.id: wanted}, refused={vcpu.id: (refusal,)})

    assert judged(found, "vcpu 0", memory) == (Verdict.FENCED if affinity else Verdict.NO_FIFO, "because")


def test_a_helper_beside_it_keeps_fifo_from_a_vcpu() -> None:
    """no-fifo names the helper that can run on the vCPU's pCPU."""
    off = put(PLACED, {"iothread 1": "2"})
    found = replace(off, threads=tuple(replace(one, movable=one.role is not Role.IOTHREAD) for one in off.threads))

    assert judged(found, "vcpu 0") == (Verdict.NO_FIFO, "its guest's iothread 1 (IO iothread1) can run on pCPU 2")


def test_a_thread_that_somebody_moved_has_drifted() -> None:
    """Verified on its place, still wanted there, and elsewhere now."""
    found = put(PLACED, {"emulator": "0"})
    helper = find(found, "emulator")
    memory = Memory(places={helper.id: Wanted(cpus("0-1"))}, verified=frozenset({helper.id}))

    assert judged(found, "emulator", memory) == (Verdict.DRIFTED, "wanted pCPU 0-1")


def test_a_healthy_guest_has_no_hazard() -> None:
    """A FIFO vCPU alone on its pCPU, helpers off the isolated ones."""
    found = put(PLACED, {"vcpu 0": "2"}, fifo())

    assert list(hazards(found.threads, HOST)) == []


def texts(*threads: Thread) -> list[str]:
    return [hazard.text for hazard in hazards(threads, HOST)]


def test_a_fifo_vcpu_with_its_own_helpers_is_a_hazard() -> None:
    """It names the helpers that may starve; they are also helpers on an isolated pCPU."""
    found = put(put(PLACED, {"vcpu 0": "2"}, fifo()), {"emulator": "2"})

    assert sorted(texts(*found.threads)) == [
        "FIFO vCPU shares pCPU 2 with its own helpers (qemu-system-x86): QEMU can starve",
        "helper may run on isolated pCPU 2",
    ]


def test_two_fifo_vcpus_on_a_pcpu_are_a_hazard() -> None:
    """Neither yields to the other."""
    found = put(guest("rt-1", vcpus=2, helpers=0, iothreads=0), {"vcpu 0": "2", "vcpu 1": "2"}, fifo())

    assert texts(*found.threads) == ["FIFO vCPU shares pCPU 2 with another FIFO vCPU"] * 2


def test_fifo_that_leaked_to_a_helper_is_a_hazard() -> None:
    """A worker that inherited FIFO; an iothread at FIFO is somebody's choice."""
    worker = put(guest("x", vcpus=0), {"emulator": "0"}, Scheduling(Sched.FIFO, 1))
    iothread = put(guest("x", vcpus=0, helpers=0), {"iothread 1": "0"}, fifo())

    assert texts(*worker.threads, *iothread.threads)[0] == "fifo:1 leaked to qemu-system-x86"
    assert texts(*iothread.threads) == []


def test_a_fight_begins_with_a_pause() -> None:
    """The thread that was repaired too often is paused from the end of the pass on, and its repairs are forgotten."""
    vcpu = find(PLACED, "vcpu 0")
    memory = Memory(repairs={vcpu.id: (1.0, 2.0, 3.0)})
    decision = place(policy(), snapshot(PLACED), memory, Ledger())

    learned = learn(memory, snapshot(PLACED, time=4.0), decision, Plan(fighters=(vcpu,)), [], 5.0)

    assert learned.fights == {vcpu.id: Fight(5.0 + PAUSE_S, PAUSE_S)}
    assert learned.repairs == {}


def test_fifo_that_somebody_took_is_not_owed() -> None:
    """Only FIFO that rtpind has yet to give, or took itself, is owed: else giving it again is a repair."""
    wanted = Wanted(cpus("2"), 1, exclusive=True)
    vcpu = find(PLACED, "vcpu 0")
    decision = place(policy(), snapshot(PLACED), Memory(), Ledger())

    fresh = learn(Memory(), snapshot(PLACED), decision, Plan(), [], 1.0)
    taken = learn(Memory(places={vcpu.id: wanted}), snapshot(PLACED), decision, Plan(), [], 1.0)

    assert vcpu.id in fresh.owed
    assert vcpu.id not in taken.owed
    assert Placement(cpus("2")) == vcpu.now
