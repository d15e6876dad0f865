"""What one pass teaches the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from factories import PID, START, cpus, fifo, find, guest, host, policy, put, snapshot

from rtpind.core.audit import Outcome, Result
from rtpind.core.decision import Decision
from rtpind.core.learn import SETTLED_S, learn
from rtpind.core.ledger import HandsOff, Ledger, Off
from rtpind.core.memory import FIGHT_WINDOW_S, PAUSE_MAX_S, PAUSE_S, Fight, Memory, Refusal, Wanted, conditions
from rtpind.core.model import OTHER, Guest, Limits, Placement, Snapshot, Thread
from rtpind.core.offplace import OffPlace, Start
from rtpind.core.placement import place
from rtpind.core.plan import Phase, Plan, Reason, Step

PROCESS = (PID, START)
FREE = guest("rt-1", vcpus=1)
PLACED = put(put(FREE, {"emulator": "0-1", "iothread 1": "0-1"}), {"vcpu 0": "2"}, fifo())
UNSCHEDULED = put(PLACED, {"vcpu 0": "2"}, OTHER)
VCPU = find(FREE, "vcpu 0").id
EMULATOR = find(FREE, "emulator").id
IOTHREAD = find(FREE, "iothread 1").id
WANTED = Wanted(cpus("2"), 1, exclusive=True)


def decide(seen: Snapshot, memory: Memory | None = None, ledger: Ledger | None = None) -> Decision:
    return place(policy(), seen, memory or Memory(), ledger or Ledger())


def taught(
    of: Guest,
    *outcomes: Outcome,
    memory: Memory | None = None,
    plan: Plan | None = None,
    time: float = 0.0,
    finished: float | None = None,
    ledger: Ledger | None = None,
) -> Memory:
    """Return the memory after a pass over one guest."""
    memory, seen = memory or Memory(), snapshot(of, time=time)
    decision = decide(seen, memory, ledger)
    return learn(memory, seen, decision, plan or Plan(), outcomes, time if finished is None else finished)


def outcome(
    of: Thread,
    after: Placement | None,
    *,
    result: Result = Result.APPLIED,
    phase: Phase = Phase.ENTER,
    reason: Reason = Reason.PLACE,
    **fields: Any,
) -> Outcome:
    """Return the outcome of a step that led to ``after``."""
    affinity = phase in (Phase.ENTER, Phase.LEAVE, Phase.WIDEN)
    step = Step(
        phase=phase,
        thread=of,
        reason=reason,
        cpus=cpus("2") if affinity else None,
        scheduling=None if affinity else (OTHER if phase is Phase.DEMOTE else fifo()),
    )
    return Outcome(step=step, result=result, before=of.now, after=after, **fields)


def all_placed(of: Guest) -> Sequence[Outcome]:
    return [
        outcome(find(of, "emulator"), Placement(cpus("0-1")), phase=Phase.LEAVE),
        outcome(find(of, "iothread 1"), Placement(cpus("0-1")), phase=Phase.LEAVE),
        outcome(find(of, "vcpu 0"), Placement(cpus("2"))),
    ]


def test_places_are_what_was_decided() -> None:
    """Every wanted place of the last pass, and the threads that were vCPUs and iothreads."""
    memory = taught(FREE)

    assert memory.places == {EMULATOR: Wanted(cpus("0-1")), IOTHREAD: Wanted(cpus("0-1")), VCPU: WANTED}
    assert memory.incumbents == {(PROCESS, "vcpu 0"): VCPU, (PROCESS, "iothread 1"): IOTHREAD}


def test_an_unsettled_thread_is_no_incumbent() -> None:
    """Only cgroup and name together make one; whoever was one before stays."""
    found = replace(FREE, threads=tuple(replace(one, settled=one.id != VCPU) for one in FREE.threads))

    assert taught(found).incumbents == {(PROCESS, "iothread 1"): IOTHREAD}
    assert taught(found, memory=taught(FREE)).incumbents == taught(FREE).incumbents


def test_doubts_are_remembered_until_the_next_look() -> None:
    """Labels that two threads claim, fresh or contested."""
    found = replace(FREE, doubtful=("vcpu 3",), contested=("vcpu 4",))

    assert taught(found).doubtful == {(PROCESS, "vcpu 3"), (PROCESS, "vcpu 4")}
    assert taught(FREE, memory=taught(found)).doubtful == frozenset()


# --- since when it is right --------------------------------------------------------------------------------------


def test_the_first_look_is_the_one_that_read_back() -> None:
    """A guest is right since the end of the pass that placed it."""
    assert taught(FREE, *all_placed(FREE), time=5.0, finished=5.1).right_since == {PROCESS: 5.1}
    assert taught(FREE, *all_placed(FREE)[:2], time=5.0).right_since == {}
    assert taught(UNSCHEDULED, time=5.0).right_since == {PROCESS: 5.0}


def test_it_stays_right_as_long_as_each_look_finds_it_so() -> None:
    """The time is kept, and dropped when a vCPU or iothread is found elsewhere."""
    memory = Memory(right_since={PROCESS: 1.0})

    assert taught(PLACED, memory=memory, time=5.0).right_since == {PROCESS: 1.0}
    assert taught(put(PLACED, {"emulator": "3"}), memory=memory, time=5.0).right_since == {PROCESS: 1.0}
    assert taught(put(PLACED, {"iothread 1": "3"}), memory=memory, time=5.0).right_since == {}


def test_what_was_put_back_is_right_anew() -> None:
    """A vCPU that this pass found elsewhere and moved has been seen right once, not twice."""
    memory = Memory(right_since={PROCESS: 1.0})
    off = put(PLACED, {"vcpu 0": "5-6"}, OTHER)
    moved = outcome(find(off, "vcpu 0"), Placement(cpus("2")))

    assert taught(off, moved, memory=memory, time=5.0, finished=5.1).right_since == {PROCESS: 5.1}


def test_a_guest_that_is_not_managed_is_not_right() -> None:
    """Released, it does not count towards FIFO."""
    ledger = Ledger(hands_off={FREE.uuid: Off(HandsOff.RELEASED, PROCESS)})
    memory = taught(PLACED, memory=Memory(right_since={PROCESS: 1.0}), ledger=ledger)

    assert memory.right_since == {}
    assert memory.places == {}


# --- verified ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("since", "verified"),
    [(0.0, True), (9.99 - SETTLED_S, True), (10.01 - SETTLED_S, False)],
)
def test_a_thread_is_verified_on_its_place_once_its_guest_has_settled(since: float, verified: bool) -> None:
    """Libvirt sets affinities too while a guest starts; what it moves then did not drift."""
    memory = replace(taught(PLACED), right_since={PROCESS: since})

    assert (VCPU in taught(PLACED, memory=memory, time=10.0).verified) is verified


@pytest.mark.parametrize(
    ("start", "threads"),
    [
        (Start(True, {VCPU: OffPlace(9.5, 0, True, True)}), {EMULATOR}),
        (Start(True, {}, {VCPU: OffPlace(9.5, 0, True, True)}), {EMULATOR, IOTHREAD, VCPU}),
    ],
)
def test_what_libvirt_places_itself_is_not_verified_while_its_guest_starts(start: Start, threads: object) -> None:
    """Its reset of an affinity may come late, and is nobody's doing."""
    memory = replace(taught(PLACED), right_since={PROCESS: 0.0}, starts={PROCESS: start})

    assert taught(PLACED, memory=memory, time=10.0).verified == threads


def test_only_what_was_wanted_before_is_verified() -> None:
    """The first pass verifies nothing, nor does a thread off its place become verified."""
    old = {PROCESS: 0.0}

    assert taught(PLACED, memory=Memory(right_since=old), time=10.0).verified == frozenset()
    assert taught(UNSCHEDULED, memory=replace(taught(PLACED), right_since=old), time=10.0).verified == {
        EMULATOR,
        IOTHREAD,
    }


def test_verified_lasts_until_the_place_changes_or_rtpind_touches_the_thread() -> None:
    """Found elsewhere, it is still verified: that is drift. Put back, it must be verified anew."""
    memory = replace(taught(PLACED), verified=frozenset({VCPU, EMULATOR}))
    off = put(PLACED, {"vcpu 0": "5-6"}, OTHER)
    vcpu = find(off, "vcpu 0")
    elsewhere = replace(memory, places={**memory.places, VCPU: Wanted(cpus("2"), 7, exclusive=True)})

    assert VCPU in taught(off, memory=memory).verified
    assert VCPU not in taught(off, outcome(vcpu, Placement(cpus("2"))), memory=memory).verified
    assert VCPU not in taught(off, memory=elsewhere).verified
    assert EMULATOR in taught(off, memory=elsewhere).verified


def test_a_thread_demoted_for_safety_is_still_one_that_somebody_moved() -> None:
    """Else ``drift: warn`` would place it at the next pass."""
    off = put(PLACED, {"vcpu 0": "5"})
    memory = replace(taught(PLACED), verified=frozenset({VCPU}))
    demoted = outcome(find(off, "vcpu 0"), Placement(cpus("5")), phase=Phase.DEMOTE, reason=Reason.SAFETY)
    after = taught(off, demoted, memory=memory)

    assert after.verified == {VCPU}
    assert after.owed == {VCPU}


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [Result.REFUSED, Result.NARROWED])
def test_a_refusal_is_remembered_with_what_it_stands_on(result: Result) -> None:
    """Wanted, observed, limits, the host's conditions, which call it was, and its cause in words."""
    limits = Limits(fence=cpus("5"), fenced_by="vcpu0")
    vcpu = find(FREE, "vcpu 0")
    memory = taught(FREE, outcome(vcpu, Placement(cpus("5")), result=result, limits=limits))

    assert memory.refused == {
        VCPU: (
            Refusal(
                wanted=WANTED,
                observed=Placement(cpus("5")),
                limits=limits,
                conditions=conditions(host()),
                affinity=True,
                text="cgroup vcpu0 allows only pCPU 5 (see vcpupin, emulatorpin, AllowedCPUs=)",
            ),
        )
    }


@pytest.mark.parametrize("result", [Result.APPLIED, Result.BLOCKED, Result.DEFERRED, Result.VANISHED, Result.WOULD])
def test_nothing_else_is_a_refusal(result: Result) -> None:
    """What was not asked of the kernel was not refused by it."""
    assert taught(FREE, outcome(find(FREE, "vcpu 0"), None, result=result)).refused == {}


def test_a_refusal_of_a_thread_without_a_place_is_forgotten() -> None:
    """Released in between, say."""
    ledger = Ledger(hands_off={FREE.uuid: Off(HandsOff.RELEASED, PROCESS)})
    refused = outcome(find(FREE, "vcpu 0"), None, result=Result.REFUSED)

    assert taught(FREE, refused, ledger=ledger).refused == {}


def test_each_call_has_a_refusal_of_its_own() -> None:
    """The latest of each."""
    vcpu = find(FREE, "vcpu 0")
    first = taught(FREE, outcome(vcpu, Placement(cpus("5")), result=Result.NARROWED))
    second = taught(FREE, outcome(vcpu, Placement(cpus("5")), result=Result.REFUSED, phase=Phase.PROMOTE), memory=first)
    third = taught(FREE, outcome(vcpu, Placement(cpus("6")), result=Result.NARROWED), memory=second)

    assert [entry.affinity for entry in second.refused[VCPU]] == [True, False]
    assert [(entry.affinity, entry.observed.cpus) for entry in third.refused[VCPU]] == [
        (False, cpus("5")),
        (True, cpus("6")),
    ]


def test_a_thread_in_place_has_no_refusals_but_one_that_keeps_it_as_it_is() -> None:
    """What was refused is done by now; only FIFO that could not be taken there still stands."""
    done = taught(FREE, outcome(find(FREE, "vcpu 0"), None, result=Result.REFUSED))
    kept = taught(
        PLACED, outcome(find(PLACED, "vcpu 0"), Placement(cpus("2"), fifo()), result=Result.REFUSED, phase=Phase.DEMOTE)
    )

    assert taught(PLACED, memory=done).refused == {}
    assert taught(PLACED, memory=kept).refused == kept.refused
    assert taught(UNSCHEDULED, memory=done).refused == done.refused


# --- fights ------------------------------------------------------------------------------------------------------


def test_a_repair_is_what_puts_a_thread_back_on_its_old_place() -> None:
    """One for each pass, however many steps; older ones than a minute are dropped."""
    memory = replace(taught(PLACED), repairs={VCPU: (0.0, 50.0)})
    off = put(PLACED, {"vcpu 0": "5"})
    vcpu = find(off, "vcpu 0")
    steps = [
        outcome(vcpu, Placement(cpus("5")), phase=Phase.DEMOTE, reason=Reason.DRIFT),
        outcome(vcpu, Placement(cpus("2")), reason=Reason.DRIFT),
    ]

    assert taught(off, *steps, memory=memory, time=FIGHT_WINDOW_S + 1).repairs == {VCPU: (50.0, 61.0)}


@pytest.mark.parametrize(
    ("phase", "reason", "owed", "counts"),
    [
        (Phase.ENTER, Reason.DRIFT, False, True),
        (Phase.ENTER, Reason.PLACE, False, True),
        (Phase.DEMOTE, Reason.SAFETY, False, False),
        (Phase.PROMOTE, Reason.SAFETY, False, False),
        (Phase.PROMOTE, Reason.PLACE, True, False),
        (Phase.PROMOTE, Reason.DRIFT, False, True),
    ],
)
def test_what_counts_as_a_repair(phase: Phase, reason: Reason, owed: bool, counts: bool) -> None:
    """Not what rtpind does for safety, nor FIFO that it owed."""
    memory = replace(taught(PLACED), owed=frozenset({VCPU} if owed else ()))
    step = outcome(find(UNSCHEDULED, "vcpu 0"), Placement(cpus("2"), fifo()), phase=phase, reason=reason)

    assert (VCPU in taught(UNSCHEDULED, step, memory=memory).repairs) is counts


def test_a_new_place_is_no_repair() -> None:
    """Nor is one that the policy changed."""
    memory = replace(taught(PLACED), places={VCPU: Wanted(cpus("2"), 5, exclusive=True)})
    step = outcome(find(UNSCHEDULED, "vcpu 0"), Placement(cpus("2"), fifo()))

    assert taught(FREE, *all_placed(FREE)).repairs == {}
    assert taught(UNSCHEDULED, step, memory=memory).repairs == {}


def test_fights_double_from_five_minutes_to_an_hour() -> None:
    """A fight that begins again after its pause is paused twice as long; one long after, as at first."""
    plan = Plan(fighters=(find(PLACED, "vcpu 0"),))
    memory, lengths, time = taught(PLACED), [], 0.0
    for _ in range(6):
        memory = taught(PLACED, memory=replace(memory, repairs={VCPU: (time,)}), plan=plan, time=time)
        assert memory.repairs == {}
        lengths.append(memory.fights[VCPU].length_s)
        time = memory.fights[VCPU].until + 1.0

    assert lengths == [PAUSE_S, 600.0, 1200.0, 2400.0, PAUSE_MAX_S, PAUSE_MAX_S]

    memory = taught(PLACED, memory=memory, plan=plan, time=time + PAUSE_MAX_S)

    assert memory.fights[VCPU] == Fight(time + PAUSE_MAX_S + PAUSE_S, PAUSE_S)


# --- owed --------------------------------------------------------------------------------------------------------


def test_fifo_is_owed_until_it_is_given() -> None:
    """For a new place, and after rtpind took it; not where somebody else did."""
    fresh = taught(UNSCHEDULED)
    given = outcome(find(UNSCHEDULED, "vcpu 0"), Placement(cpus("2"), fifo()), phase=Phase.PROMOTE)
    demoted = outcome(find(PLACED, "vcpu 0"), Placement(cpus("2")), phase=Phase.DEMOTE, reason=Reason.SAFETY)

    assert fresh.owed == {VCPU}
    assert taught(UNSCHEDULED, memory=fresh).owed == {VCPU}
    assert taught(UNSCHEDULED, given, memory=fresh).owed == frozenset()
    assert taught(PLACED, memory=fresh).owed == frozenset()
    assert taught(UNSCHEDULED, memory=taught(PLACED)).owed == frozenset()
    assert taught(PLACED, demoted, memory=taught(PLACED)).owed == {VCPU}


def test_threads_that_are_gone_are_forgotten() -> None:
    """Nothing of a guest that stopped is kept."""
    memory = taught(PLACED, memory=replace(taught(PLACED), repairs={VCPU: (0.0,)}, verified=frozenset({VCPU})))
    seen = snapshot(guest("rt-2", pid=2000))
    after = learn(memory, seen, decide(seen), Plan(), [], 0.0)

    assert {id_.pid for id_ in after.places} == {2000}
    assert (after.repairs, after.verified, after.right_since) == ({}, frozenset(), {})
