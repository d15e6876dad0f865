"""A guest that libvirt has not begun to set up is left alone: what it needs is not known yet (promise 6)."""

from __future__ import annotations

from dataclasses import replace

import pytest
from factories import find, guest, policy, sighting, snapshot

from rtpind.core.decision import Decision, State
from rtpind.core.identify import SETTLE_S, identify
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import Guest
from rtpind.core.placement import place
from rtpind.core.plan import make
from rtpind.core.verdict import Verdict, judge


def decide(found: Guest) -> Decision:
    return place(policy(), snapshot(found), Memory(), Ledger())


def unsettled(found: Guest) -> Guest:
    return replace(found, threads=tuple(replace(thread, settled=thread.helper) for thread in found.threads))


@pytest.mark.parametrize("vcpus", [0, 2], ids=["no vCPU yet", "vCPUs not moved yet"])
def test_a_young_guest_without_a_settled_vcpu_is_not_touched(vcpus: int) -> None:
    """No thread gets a place and no step is planned; it is looked at again in a moment, and pending."""
    found = unsettled(guest(vcpus=vcpus, young=True))
    decision = decide(found)
    plan = make(decision, snapshot(found), Memory())
    verdict, why = judge(find(found, "emulator"), decision.guests[0], decision, Memory(), snapshot(found))

    assert [(entry.state, entry.wanted) for entry in decision.guests] == [(State.PLACED, {})]
    assert plan.steps == ()
    assert list(plan.again) == [found.uuid]
    assert (verdict, why) == (Verdict.PENDING, "it is starting: libvirt has not moved its vCPUs yet")


@pytest.mark.parametrize(
    "found",
    [
        guest(vcpus=2, young=True),
        guest(vcpus=0, young=False),
        guest(vcpus=0, young=True, contested=("vcpu 0",)),
    ],
    ids=["a vCPU is settled", "it is no longer young", "its vCPU is contested"],
)
def test_no_other_guest_gets_out_of_its_place(found: Guest) -> None:
    """One settled vCPU, or age, or a contested id: its helpers are placed, whatever its threads are called."""
    assert find(found, "emulator").id in decide(found).guests[0].wanted


@pytest.mark.parametrize(("age_s", "young"), [(0.1, True), (SETTLE_S - 0.1, True), (SETTLE_S, False)])
def test_a_guest_is_as_young_as_its_main_thread(age_s: float, young: bool) -> None:
    """Threads that begin later do not make a guest young again."""
    main = sighting(age_s=age_s)
    later = sighting("worker", tid=1100, start=900, age_s=0.0)

    made = identify(uuid="u", name="rt-1", process=(1000, 500), sightings=[main, later], incumbents={})

    assert made.young is young
