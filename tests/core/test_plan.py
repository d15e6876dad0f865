"""What is to be done, in which order: explicit lists of steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from factories import (
    PID,
    START,
    applied,
    cpus,
    fifo,
    find,
    guest,
    host,
    moved,
    policy,
    put,
    snapshot,
    thread,
    thread_id,
)

from rtpind.core.decision import Decision, GuestDecision, State
from rtpind.core.ledger import HandsOff, Ledger, Off, Original
from rtpind.core.memory import Fight, Memory, Refusal, Wanted, conditions
from rtpind.core.model import OTHER, Guest, Limits, Placement, Role, Sched, Scheduling, Snapshot, Thread
from rtpind.core.placement import place
from rtpind.core.plan import Plan, Reason, in_place, is_drift, make, release
from rtpind.core.policy import Drift, Policy

PROCESS = (PID, START)

ABOVE = """
version: 1
mode: enforce
pools: {realtime: isolated}
classes:
  a:
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo, priority: 1}
    emulator: {pool: housekeeping}
    iothread: {share_with: {vcpu: 0}, scheduler: fifo, priority: 2}
    vhost: {share_with: {vcpu: 0}, scheduler: fifo, priority: 3}
guests: [{name: "rt-*", class: a}]
drift: repair
when_full: degrade
"""

BATCH = Scheduling(Sched.BATCH)


def shown(plan: Plan) -> list[str]:
    """Return the steps as people would say them: ``ENTER vcpu 0 2 (place)``."""
    return [
        f"{step.phase.name} {step.thread.label} {step.scheduling if step.cpus is None else step.cpus} ({step.reason})"
        + (" later" if step.gated else "")
        for step in plan.steps
    ]


def planned(*guests: Guest, memory: Memory | None = None, drift: Drift = Drift.REPAIR, **kwargs: Any) -> Plan:
    """Return the plan for guests as they are now."""
    policy_: Policy = kwargs.pop("policy", None) or policy()
    seen = snapshot(*guests, **kwargs)
    memory = memory or Memory()
    return make(place(replace(policy_, drift=drift), seen, memory, kwargs.pop("ledger", Ledger())), seen, memory)


def decided(*guests: Guest, policy_: Policy | None = None) -> Decision:
    return place(policy_ or policy(), snapshot(*guests), Memory(), Ledger())


def placed(of: Guest, policy_: Policy | None = None) -> Guest:
    """Return the guest in place."""
    seen = snapshot(of)
    return applied(seen, place(policy_ or policy(), seen, Memory(), Ledger())).guests[0]


def remembering(of: Guest, policy_: Policy | None = None, **fields: Any) -> Memory:
    """Return the memory of a daemon that has verified the guest in place long ago."""
    wanted = decided(of, policy_=policy_).wanted()
    return replace(
        Memory(places=wanted, verified=frozenset(wanted), right_since={of.process: -100.0}),
        **fields,
    )


def refused(thread: Thread, wanted: Wanted, *, affinity: bool) -> Mapping[Any, tuple[Refusal, ...]]:
    return {
        thread.id: (
            Refusal(
                wanted=wanted,
                observed=thread.now,
                limits=thread.limits,
                conditions=conditions(host()),
                affinity=affinity,
                text="no",
            ),
        )
    }


# --- order -------------------------------------------------------------------------------------------------------


def test_a_fresh_guest_is_emptied_before_it_is_filled() -> None:
    """Helpers leave, vCPUs enter, and FIFO, which waits for the second look, comes last."""
    plan = planned(guest())

    assert shown(plan) == [
        "LEAVE emulator 0-1 (place)",
        "LEAVE iothread 1 0-1 (place)",
        "ENTER vcpu 0 2 (place)",
        "ENTER vcpu 1 3 (place)",
        "PROMOTE vcpu 0 fifo:1 (place) later",
        "PROMOTE vcpu 1 fifo:1 (place) later",
    ]
    assert plan.again == (guest().uuid,)
    assert all(step.guarded for step in plan.steps)
    assert plan.steps[-1].scheduling == fifo()  # with SCHED_RESET_ON_FORK


def test_phases_are_host_wide() -> None:
    """No guest gets FIFO before every helper of every guest has left, and FIFO is taken before anything else."""
    first, second = guest(vcpus=1, iothreads=0), guest("rt-2", pid=2000, vcpus=1, iothreads=0)
    first = put(first, {"vcpu 0": "4-5"}, fifo())

    assert shown(planned(first, second)) == [
        "DEMOTE vcpu 0 other (place)",
        "LEAVE emulator 0-1 (place)",
        "LEAVE emulator 0-1 (place)",
        "ENTER vcpu 0 2 (place)",
        "ENTER vcpu 0 3 (place)",
        "PROMOTE vcpu 0 fifo:1 (place) later",
        "PROMOTE vcpu 0 fifo:1 (place) later",
    ]


def test_a_thread_that_only_gets_more_room_waits_until_fifo_is_given() -> None:
    """Floaters widen last."""
    seen = put(placed(guest(vcpus=1, iothreads=0)), {"emulator": "1"})

    assert shown(planned(put(seen, {"vcpu 0": "2-3"}, OTHER))) == [
        "ENTER vcpu 0 2 (place)",
        "PROMOTE vcpu 0 fifo:1 (place) later",
        "WIDEN emulator 0-1 (place)",
    ]


def test_fifo_is_taken_from_below_and_given_from_above() -> None:
    """A thread that may be beside a FIFO vCPU because it is above it is never seen there without FIFO."""
    of = guest(vcpus=1, vhosts=1)
    away = {"vcpu 0": "5", "iothread 1": "5", "vhost": "5"}
    high = moved(
        put(of, away),
        {
            find(of, "vcpu 0").id: Placement(cpus("5-6"), fifo(1)),
            find(of, "iothread 1").id: Placement(cpus("5"), fifo(2)),
            find(of, "vhost").id: Placement(cpus("5"), fifo(3)),
        },
    )

    assert shown(planned(high, policy=policy(ABOVE))) == [
        "DEMOTE vcpu 0 other (place)",
        "DEMOTE iothread 1 other (place)",
        "DEMOTE vhost other (place)",
        "LEAVE emulator 0-1 (place)",
        "LEAVE iothread 1 2 (place)",
        "LEAVE vhost 2 (place)",
        "ENTER vcpu 0 2 (place)",
        "PROMOTE vhost fifo:3 (place) later",
        "PROMOTE iothread 1 fifo:2 (place) later",
        "PROMOTE vcpu 0 fifo:1 (place) later",
    ]


def test_equal_input_gives_an_equal_plan() -> None:
    """The order of guests and threads in the snapshot is not the order of the plan."""
    one, two = guest(), guest("rt-2", pid=2000)
    other = replace(two, threads=tuple(reversed(two.threads)))

    assert repr(planned(other, one)) == repr(planned(one, two))


# --- least touch -------------------------------------------------------------------------------------------------


def test_what_is_right_is_left_alone() -> None:
    """A guest in place gets an empty plan."""
    assert planned(placed(guest())) == Plan()


@pytest.mark.parametrize(
    ("now", "steps"),
    [
        (Placement(cpus("2"), OTHER), ["PROMOTE vcpu 0 fifo:1 (place)"]),
        (Placement(cpus("2"), fifo(5)), ["PROMOTE vcpu 0 fifo:1 (place)"]),
        (Placement(cpus("2"), fifo(1, reset_on_fork=False)), ["PROMOTE vcpu 0 fifo:1 (place)"]),
        (Placement(cpus("2"), Scheduling(Sched.RR, 1, True)), ["PROMOTE vcpu 0 fifo:1 (place)"]),
        (Placement(cpus("2"), Scheduling(Sched.DEADLINE)), []),
        (
            Placement(cpus("2-3"), fifo()),
            ["DEMOTE vcpu 0 other (place)", "ENTER vcpu 0 2 (place)", "PROMOTE vcpu 0 fifo:1 (place) later"],
        ),
    ],
)
def test_only_what_is_wrong_is_put_right(now: Placement, steps: list[str]) -> None:
    """Affinity and scheduling are two calls, and each is made only when it is needed."""
    seen = placed(guest(vcpus=1))
    plan = planned(moved(seen, {find(seen, "vcpu 0").id: now}), memory=Memory(right_since={PROCESS: -1.0}), time=0.0)

    assert shown(plan) == steps


@pytest.mark.parametrize(
    ("now", "steps"),
    [
        (Placement(cpus("0-1"), BATCH), []),
        (Placement(cpus("0-1"), Scheduling(Sched.DEADLINE)), []),
        (Placement(cpus("0-1"), fifo()), ["DEMOTE emulator other (place)"]),
        (Placement(cpus("3"), fifo()), ["DEMOTE emulator other (place)", "LEAVE emulator 0-1 (place)"]),
        (Placement(cpus("3"), BATCH), ["LEAVE emulator 0-1 (place)"]),
    ],
)
def test_a_thread_without_a_scheduler_is_only_kept_from_realtime(now: Placement, steps: list[str]) -> None:
    """FIFO that leaked to a helper is taken; BATCH and DEADLINE stay."""
    seen = placed(guest())

    assert shown(planned(moved(seen, {find(seen, "emulator").id: now}))) == steps


@pytest.mark.parametrize("affinity", [True, False])
def test_what_was_refused_is_not_asked_again(affinity: bool) -> None:
    """A call that the kernel refused is not in the next plan; the other call on that thread is judged by itself."""
    seen = placed(guest(vcpus=1))
    vcpu = find(seen, "vcpu 0")
    now = Placement(cpus("0-7"), OTHER) if affinity else Placement(cpus("2"), OTHER)
    seen = moved(seen, {vcpu.id: now})
    memory = Memory(refused=refused(find(seen, "vcpu 0"), Wanted(cpus("2"), 1, exclusive=True), affinity=affinity))

    assert planned(seen, memory=memory).steps == ()


@pytest.mark.parametrize(
    "change",
    [
        {"observed": Placement(cpus("3-7"))},
        {"wanted": Wanted(cpus("4"), 1, exclusive=True)},
        {"limits": Limits(fence=cpus("0-7"))},
        {"conditions": conditions(host(rt_runtime_us=-1))},
    ],
)
def test_it_is_asked_again_when_anything_changed(change: dict[str, Any]) -> None:
    """Wanted place, observed place, limits and the host's conditions are what a refusal stands on."""
    seen = put(placed(guest(vcpus=1)), {"vcpu 0": "0-7"}, OTHER)
    vcpu = find(seen, "vcpu 0")
    entry = refused(vcpu, Wanted(cpus("2"), 1, exclusive=True), affinity=True)[vcpu.id][0]
    memory = Memory(refused={vcpu.id: (replace(entry, **change),)})

    assert shown(planned(seen, memory=memory))[0] == "ENTER vcpu 0 2 (place)"


def test_fifo_that_cannot_be_taken_is_not_asked_for_again_and_the_thread_stays() -> None:
    """A FIFO thread that may not be demoted is not moved either; once it is elsewhere, it is asked again."""
    seen = put(placed(guest(vcpus=1)), {"vcpu 0": "3-4"}, fifo())
    memory = Memory(refused=refused(find(seen, "vcpu 0"), Wanted(cpus("2"), 1, exclusive=True), affinity=False))

    assert planned(seen, memory=memory).steps == ()
    assert shown(planned(put(seen, {"vcpu 0": "4-5"}), memory=memory))[0] == "DEMOTE vcpu 0 other (place)"


def test_a_thread_the_kernel_lets_nobody_move_is_not_asked_to() -> None:
    """PF_NO_SETAFFINITY: no step for its affinity, but FIFO is taken from it."""
    stuck = thread(index=7, on="0-1,6", scheduling=fifo(), movable=False)

    assert shown(planned(placed(guest(extra=[stuck])))) == []  # in_place: what guest() makes has it in its place

    seen = placed(guest())
    seen = replace(seen, threads=(*seen.threads, stuck))

    assert shown(planned(seen)) == ["DEMOTE emulator other (safety)"]


@pytest.mark.parametrize(
    ("of", "ledger"),
    [
        (guest("other"), Ledger()),
        (guest(), Ledger(hands_off={guest().uuid: Off(HandsOff.RELEASED, PROCESS)})),
        (guest(), Ledger(hands_off={"*": Off(HandsOff.PAUSED)})),
    ],
)
def test_what_is_not_managed_is_never_touched(of: Guest, ledger: Ledger) -> None:
    """No step for a guest without a rule, released or paused, whatever it looks like."""
    seen = snapshot(put(of, {"vcpu 0": "0-7", "emulator": "3"}, fifo()))

    assert make(place(policy(), seen, Memory(), ledger), seen, Memory()) == Plan()


# --- the second look ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("since", "time", "later"),
    [
        (None, 10.0, True),
        (10.0, 10.0, True),
        (9.999, 10.0, True),
        (9.998, 10.0, False),
        (5.0, 10.0, False),
    ],
)
def test_fifo_waits_for_a_look_two_milliseconds_later(since: float | None, time: float, later: bool) -> None:
    """The first look that finds all in place gives no FIFO, nor does one less than 2 ms later."""
    seen = put(placed(guest(vcpus=1)), {"vcpu 0": "2"}, OTHER)
    memory = Memory(right_since={} if since is None else {PROCESS: since})
    plan = planned(seen, memory=memory, time=time)

    assert shown(plan) == ["PROMOTE vcpu 0 fifo:1 (place)" + (" later" if later else "")]
    assert plan.again == ((seen.uuid,) if later else ())


@pytest.mark.parametrize(
    ("since", "took", "later"),
    [(9.990, 0.002, False), (9.9925, 0.002, True), (9.9965, 0.0005, False), (9.9985, 0.0005, True), (9.0, 0.5, False),
     (9.45, 0.5, True)],
)  # fmt: skip
def test_fifo_waits_longer_where_looks_take_longer(since: float, took: float, later: bool) -> None:
    """From the read-back to the begin of the second look libvirt has three times as long as a look, 0.1 s at most."""
    seen = put(placed(guest(vcpus=1)), {"vcpu 0": "2"}, OTHER)
    plan = planned(seen, memory=Memory(right_since={PROCESS: since}), time=10.0, took=took)

    assert [step.gated for step in plan.steps] == [later]


@pytest.mark.parametrize("label", ["vcpu 0", "iothread 1"])
def test_one_thread_not_in_place_keeps_fifo_from_all(label: str) -> None:
    """Every vCPU and every iothread must be in its own cgroup and affine."""
    seen = put(placed(guest()), {"vcpu 1": "3"}, OTHER)
    memory = Memory(right_since={PROCESS: -1.0})
    off = put(seen, {label: "0-7"}, OTHER)
    unsettled = replace(seen, threads=tuple(replace(one, settled=one.label != label) for one in seen.threads))

    assert all(step.gated for step in planned(off, memory=memory).steps if step.scheduling == fifo())
    assert [step.gated for step in planned(unsettled, memory=memory).steps] == [True]
    assert not in_place(decided(off).guests[0], memory, host())
    assert planned(unsettled, memory=memory).again == (seen.uuid,)


def test_a_helper_out_of_place_does_not_make_fifo_wait() -> None:
    """Helpers leave in the pass that gives FIFO; only a vCPU or an iothread is what libvirt still moves."""
    seen = put(put(placed(guest(vcpus=1)), {"vcpu 0": "2"}, OTHER), {"emulator": "0-7"})

    assert shown(planned(seen, memory=Memory(right_since={PROCESS: -1.0}))) == [
        "LEAVE emulator 0-1 (place)",
        "PROMOTE vcpu 0 fifo:1 (place)",
    ]


def test_a_fenced_thread_is_as_right_as_it_can_be() -> None:
    """A vCPU that a cpuset keeps from its place does not keep FIFO from the others."""
    seen = put(put(placed(guest()), {"vcpu 0": "2"}, OTHER), {"vcpu 1": "5"}, OTHER)
    fenced = find(seen, "vcpu 1")
    memory = Memory(
        right_since={PROCESS: -1.0},
        refused=refused(fenced, Wanted(cpus("3"), 1, exclusive=True), affinity=True),
        places={fenced.id: Wanted(cpus("3"), 1, exclusive=True)},
    )

    assert shown(planned(seen, memory=memory)) == ["PROMOTE vcpu 0 fifo:1 (place)"]


def test_a_guest_of_whom_two_threads_claim_one_id_is_looked_at_again() -> None:
    """So is one whose threads libvirt still moves, managed or not."""
    doubted, starting = guest("other", doubtful=("vcpu 0",)), guest("other-2", pid=2000)
    starting = replace(starting, threads=tuple(replace(one, settled=not one.index) for one in starting.threads))

    assert planned(doubted, starting).again == (doubted.uuid, starting.uuid)


# --- safety ------------------------------------------------------------------------------------------------------


def test_a_vcpu_loses_fifo_to_a_helper_that_stays_beside_it() -> None:
    """A helper of its own guest that can run there and will not move takes FIFO from the vCPU, for safety."""
    seen = placed(guest(vcpus=1))
    seen = replace(seen, threads=(*seen.threads, thread(index=7, on="1-2", movable=False)))

    assert shown(planned(seen)) == ["DEMOTE vcpu 0 other (safety)"]

    seen = put(seen, {"vcpu 0": "2"}, OTHER)

    assert planned(seen).steps == ()  # and gets none


@pytest.mark.parametrize("scheduling", [fifo(9), fifo(1, reset_on_fork=False)])
def test_so_does_a_vcpu_whose_fifo_is_not_quite_right(scheduling: Scheduling) -> None:
    """FIFO at another priority is not put right where it should not be at all."""
    seen = put(placed(guest(vcpus=1)), {"vcpu 0": "2"}, scheduling)
    seen = replace(seen, threads=(*seen.threads, thread(index=7, on="1-2", movable=False)))

    assert shown(planned(seen)) == ["DEMOTE vcpu 0 other (safety)"]


def test_a_sibling_that_stays_takes_fifo_as_well() -> None:
    """A vCPU that is fenced onto its sibling's pCPU would starve there like any other thread."""
    seen = put(placed(guest()), {"vcpu 1": "2"}, OTHER)
    memory = Memory(
        right_since={PROCESS: -1.0},
        places=decided(placed(guest())).wanted(),
        refused=refused(find(seen, "vcpu 1"), Wanted(cpus("3"), 1, exclusive=True), affinity=True),
    )

    assert shown(planned(seen, memory=memory)) == ["DEMOTE vcpu 0 other (safety)"]
    assert planned(put(seen, {"vcpu 0": "2"}, OTHER), memory=memory).steps == ()


def test_a_thread_above_may_stay() -> None:
    """A helper that shares the vCPU's pCPU with a higher FIFO priority is lawful, even one that is held back."""
    text = policy(ABOVE)
    seen = placed(guest(vcpus=1), text)

    assert planned(seen, policy=text) == Plan()

    higher = moved(seen, {find(seen, "iothread 1").id: Placement(cpus("2"), fifo(8))})
    plan = planned(higher, policy=text, memory=remembering(seen, text), drift=Drift.WARN)

    assert plan.steps == ()
    assert [found.label for found, _ in plan.drifted] == ["iothread 1"]


def test_a_vcpu_in_place_lets_threads_of_its_guest_pass() -> None:
    """Who comes beside a FIFO vCPU, or is demoted there, is not above it in between: the vCPU waits without FIFO."""
    text = policy(ABOVE)
    seen = placed(guest(vcpus=1), text)
    arrives = moved(seen, {find(seen, "iothread 1").id: Placement(cpus("0-1"), fifo(2))})

    assert shown(planned(arrives, policy=text)) == [
        "DEMOTE vcpu 0 other (safety)",
        "DEMOTE iothread 1 other (place)",
        "LEAVE iothread 1 2 (place)",
        "PROMOTE iothread 1 fifo:2 (place) later",
        "PROMOTE vcpu 0 fifo:1 (safety) later",
    ]

    leaves = moved(placed(guest(vcpus=1)), {find(seen, "emulator").id: Placement(cpus("2"), fifo(2))})

    assert shown(planned(leaves, memory=Memory(right_since={PROCESS: -1.0}))) == [
        "DEMOTE vcpu 0 other (safety)",
        "DEMOTE emulator other (place)",
        "LEAVE emulator 0-1 (place)",
        "PROMOTE vcpu 0 fifo:1 (safety)",
    ]


def test_a_vcpu_of_another_priority_is_put_right_when_others_have_passed() -> None:
    """Its own promotion is planned once."""
    seen = placed(guest(vcpus=1))
    leaves = moved(
        seen,
        {
            find(seen, "emulator").id: Placement(cpus("2"), fifo(9)),
            find(seen, "vcpu 0").id: Placement(cpus("2"), fifo(5)),
        },
    )

    assert shown(planned(leaves, memory=Memory(right_since={PROCESS: -1.0}))) == [
        "DEMOTE vcpu 0 other (safety)",
        "DEMOTE emulator other (place)",
        "LEAVE emulator 0-1 (place)",
        "PROMOTE vcpu 0 fifo:1 (place)",
    ]


def test_fifo_that_cannot_be_taken_for_safety_is_asked_once() -> None:
    """Where a vCPU may not be demoted, a thread above it keeps the FIFO that lets it be there."""
    seen = placed(guest(vcpus=1))
    leaves = moved(seen, {find(seen, "emulator").id: Placement(cpus("2"), fifo(2))})
    vcpu = find(leaves, "vcpu 0")
    memory = Memory(refused=refused(vcpu, Wanted(cpus("2"), 1, exclusive=True), affinity=False))

    assert planned(leaves, memory=memory).steps == ()


def test_a_foreign_realtime_thread_that_stays_keeps_fifo_away() -> None:
    """Two realtime threads on one pCPU would never yield to each other; one that is not realtime is an intruder."""
    seen = put(placed(guest(vcpus=1)), {"vcpu 0": "2"}, OTHER)
    memory = Memory(right_since={PROCESS: -1.0})
    stranger = guest("other", pid=2000, vcpus=1, iothreads=0)

    assert planned(seen, put(stranger, {"vcpu 0": "0-7"}, fifo()), memory=memory).steps == ()
    assert shown(planned(seen, stranger, memory=memory)) == ["PROMOTE vcpu 0 fifo:1 (place)"]


def test_a_helper_that_libvirt_still_moves_counts_as_one_that_stays() -> None:
    """An iothread without a place may run where the vCPU is FIFO."""
    seen = placed(guest(vcpus=1))
    extra = thread(role=Role.IOTHREAD, index=2, on="0-7", settled=False)

    assert shown(planned(replace(seen, threads=(*seen.threads, extra)))) == ["DEMOTE vcpu 0 other (safety)"]


# --- drift and fights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drift", "steps"),
    [
        (
            Drift.REPAIR,
            ["DEMOTE vcpu 0 other (drift)", "ENTER vcpu 0 2 (drift)", "PROMOTE vcpu 0 fifo:1 (drift) later"],
        ),
        (Drift.WARN, ["DEMOTE vcpu 0 other (safety)"]),
        (Drift.IGNORE, ["DEMOTE vcpu 0 other (safety)"]),
    ],
)
def test_drift_decides_about_the_place_but_not_about_safety(drift: Drift, steps: list[str]) -> None:
    """A FIFO vCPU that somebody moved is demoted in any case, and put back only with ``repair``."""
    seen = placed(guest(vcpus=1))
    plan = planned(put(seen, {"vcpu 0": "5"}), memory=remembering(seen), drift=drift)

    assert shown(plan) == steps
    assert [(found.label, wanted.cpus) for found, wanted in plan.drifted] == [("vcpu 0", cpus("2"))]


def test_who_is_off_its_place_but_not_realtime_is_left_there() -> None:
    """``warn`` does not move a helper back, and takes FIFO from the vCPU that it was moved onto."""
    seen = placed(guest(vcpus=1))
    off = put(seen, {"emulator": "1-2"})

    assert shown(planned(off, memory=remembering(seen), drift=Drift.WARN)) == ["DEMOTE vcpu 0 other (safety)"]


def test_what_was_never_verified_is_placed_whatever_drift_says() -> None:
    """A thread that was not seen on its place, or whose place changed, did not drift."""
    seen = placed(guest(vcpus=1))
    memory = remembering(seen)
    vcpu = find(seen, "vcpu 0")
    off = put(seen, {"vcpu 0": "5"}, OTHER)
    unseen = replace(memory, verified=memory.verified - {vcpu.id})
    elsewhere = replace(memory, places={**memory.places, vcpu.id: Wanted(cpus("2"), 7, exclusive=True)})

    assert shown(planned(off, memory=unseen, drift=Drift.WARN))[0] == "ENTER vcpu 0 2 (place)"
    assert shown(planned(off, memory=elsewhere, drift=Drift.WARN))[0] == "ENTER vcpu 0 2 (policy)"


def test_fifo_that_rtpind_took_is_given_back_and_is_no_drift() -> None:
    """A vCPU back on its place, which lost FIFO for safety, gets it again even with ``warn``."""
    seen = put(placed(guest(vcpus=1)), {"vcpu 0": "2"}, OTHER)
    vcpu = find(seen, "vcpu 0")
    memory = remembering(seen)
    owing = replace(memory, owed=frozenset({vcpu.id}))

    assert planned(seen, memory=memory, drift=Drift.WARN).steps == ()
    assert shown(planned(seen, memory=owing, drift=Drift.WARN)) == ["PROMOTE vcpu 0 fifo:1 (place)"]
    assert not is_drift(vcpu, memory.places[vcpu.id], owing)
    assert is_drift(replace(vcpu, now=Placement(cpus("5"))), memory.places[vcpu.id], owing)


def test_one_repair_too_many_is_a_fight() -> None:
    """The thread is named, held back, and keeps no FIFO off its place."""
    seen = placed(guest(vcpus=1))
    vcpu = find(seen, "vcpu 0")
    times = (1.0, 2.0, 3.0)
    off = put(seen, {"vcpu 0": "5"})
    plan = planned(off, memory=remembering(seen, repairs={vcpu.id: times}), time=61.0)

    assert shown(plan) == ["DEMOTE vcpu 0 other (safety)"]
    assert [fighter.label for fighter in plan.fighters] == ["vcpu 0"]

    plan = planned(off, memory=remembering(seen, repairs={vcpu.id: times}), time=61.5)  # the first was long ago

    assert len(plan.steps) == 3
    assert plan.fighters == ()


@pytest.mark.parametrize(
    ("now", "steps"),
    [
        (Placement(cpus("5"), fifo()), ["DEMOTE vcpu 0 other (safety)"]),
        (Placement(cpus("5"), OTHER), []),
        (Placement(cpus("2"), fifo(9)), []),
        (Placement(cpus("2"), OTHER), []),
    ],
)
def test_a_paused_thread_is_left_alone_but_not_with_fifo_off_its_place(now: Placement, steps: list[str]) -> None:
    """Until the pause is over, nothing else is done; then it is placed again."""
    seen = placed(guest(vcpus=1))
    vcpu = find(seen, "vcpu 0")
    memory = remembering(seen, fights={vcpu.id: Fight(50.0, 300.0)})
    off = moved(seen, {vcpu.id: now})

    assert shown(planned(off, memory=memory, time=49.0)) == steps
    assert planned(off, memory=memory, time=49.0).drifted == ()
    assert len(planned(off, memory=memory, time=50.0).drifted) == 1


def test_a_helper_is_demoted_where_its_class_gives_no_fifo() -> None:
    """A held-back helper in place loses FIFO that it should not have."""
    seen = placed(guest(vcpus=1))
    leaked = moved(seen, {find(seen, "emulator").id: Placement(cpus("0-1"), fifo())})

    assert shown(planned(leaked, memory=remembering(seen), drift=Drift.IGNORE)) == ["DEMOTE emulator other (safety)"]


# --- release -----------------------------------------------------------------------------------------------------


def originally(of: Guest) -> Ledger:
    return Ledger().recording(of.threads)


def test_release_puts_back_what_was_there() -> None:
    """FIFO off, affinity back, and the realtime that a thread had comes last; nobody asks the law."""
    before = put(guest(vcpus=1), {"vcpu 0": "0-3"}, fifo(7, reset_on_fork=False))
    plan = release([placed(before)], originally(before))

    assert shown(plan) == [
        "DEMOTE vcpu 0 other (release)",
        "LEAVE emulator 0-7 (release)",
        "LEAVE iothread 1 0-7 (release)",
        "LEAVE vcpu 0 0-3 (release)",
        "PROMOTE vcpu 0 fifo:7 (release)",
    ]
    assert plan.steps[-1].scheduling == fifo(7, reset_on_fork=False)
    assert not any(step.guarded or step.gated for step in plan.steps)


@pytest.mark.parametrize(
    ("old", "now", "steps"),
    [
        (OTHER, OTHER, []),
        (OTHER, fifo(), ["DEMOTE vcpu 0 other (release)"]),
        (BATCH, fifo(), ["DEMOTE vcpu 0 batch (release)"]),
        (BATCH, OTHER, ["DEMOTE vcpu 0 batch (release)"]),
        (Scheduling(reset_on_fork=True), OTHER, ["DEMOTE vcpu 0 other (release)"]),
        (fifo(3), OTHER, ["PROMOTE vcpu 0 fifo:3 (release)"]),
        (fifo(3), fifo(), ["DEMOTE vcpu 0 other (release)", "PROMOTE vcpu 0 fifo:3 (release)"]),
        (fifo(3), fifo(3), []),
        (fifo(3), BATCH, ["PROMOTE vcpu 0 fifo:3 (release)"]),
        (Scheduling(Sched.DEADLINE), fifo(), ["DEMOTE vcpu 0 other (release)"]),
        (Scheduling(Sched.DEADLINE), OTHER, []),
        (Scheduling(Sched.DEADLINE), Scheduling(Sched.DEADLINE), []),
        (OTHER, Scheduling(Sched.DEADLINE), ["DEMOTE vcpu 0 other (release)"]),
    ],
)
def test_release_puts_scheduling_back(old: Scheduling, now: Scheduling, steps: list[str]) -> None:
    """Whatever a thread had, but for DEADLINE, which nobody but its owner can give: that was a boost."""
    of = put(guest(vcpus=1), {"vcpu 0": "2"}, now)

    assert shown(release([of], originally(put(of, {"vcpu 0": "2"}, old)))) == steps


def test_a_fifo_thread_moves_back_without_fifo() -> None:
    """Also where its FIFO is what it had."""
    of = put(guest(vcpus=1), {"vcpu 0": "2"}, fifo(3))

    assert shown(release([of], originally(put(of, {"vcpu 0": "4"})))) == [
        "DEMOTE vcpu 0 other (release)",
        "LEAVE vcpu 0 4 (release)",
        "PROMOTE vcpu 0 fifo:3 (release)",
    ]


def test_helpers_that_began_later_get_what_the_main_thread_had() -> None:
    """Not so threads that libvirt places, nor one that nobody can move."""
    before = guest(vcpus=1, iothreads=0)
    extra = [
        thread(index=5, on="0-1"),
        thread(index=6, on="0-1", movable=False),
        thread(role=Role.IOTHREAD, index=1, on="0-1"),
        thread(role=Role.VCPU, index=1, on="0-1"),
    ]
    after = placed(before)
    after = replace(after, threads=(*after.threads, *extra))
    plan = release([after], originally(before))

    moving = [step.thread.id.tid for step in plan.steps if step.cpus == cpus("0-7")]
    assert moving == [PID, PID + 105, PID + 10]


def test_a_guest_that_was_never_touched_needs_nothing() -> None:
    """Without originals there is nothing to put back."""
    other = Ledger({thread_id(pid=2000): Original("u", "emulator", Placement(cpus("0")))})

    assert release([guest()], Ledger()) == Plan()
    assert release([guest()], other) == Plan()


# --- a decision by hand ------------------------------------------------------------------------------------------


def test_a_thread_that_has_nowhere_to_be_is_left_alone() -> None:
    """No wanted place, no step."""
    of = guest(vcpus=1, iothreads=0)
    decision = Decision(guests=(GuestDecision(guest=of, state=State.PLACED),))
    seen: Snapshot = snapshot(of)

    assert make(decision, seen, Memory()) == Plan()
    assert not in_place(decision.guests[0], Memory(), host())


def test_every_reason_has_a_word() -> None:
    """The words are what the journal's RTPIND_REASON says."""
    assert [str(reason) for reason in Reason] == ["place", "policy", "drift", "safety", "release"]
