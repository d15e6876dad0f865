# SPDX-License-Identifier: GPL-2.0-or-later
"""What counts as right, what was refused and when it is asked again (promise 3), who fights, and who is forgotten."""

from dataclasses import replace

import pytest
from factories import PID, START, cpus, fifo, find, guest, host, put, snapshot, thread, thread_id
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpind.core.cpuset import CpuSet
from rtpind.core.memory import (
    FIGHT_REPAIRS,
    FIGHT_WINDOW_S,
    PAUSE_MAX_S,
    PAUSE_S,
    Fight,
    Memory,
    Refusal,
    Wanted,
    conditions,
)
from rtpind.core.model import OTHER, Limits, Placement, Role, Sched, Scheduling
from rtpind.core.offplace import Start

unhurried = settings(deadline=None)  # a busy machine is no failure

HOST = host()
VCPU = thread(role=Role.VCPU, on="4")
WANTED = Wanted(cpus("2"), 1)


@pytest.mark.parametrize(
    ("scheduling", "calm", "realtime"),
    [
        (OTHER, True, False),
        (Scheduling(Sched.BATCH), True, False),
        (Scheduling(Sched.IDLE), True, False),
        (Scheduling(Sched.EXT), True, False),
        (Scheduling(Sched.OTHER, reset_on_fork=True), True, False),
        (Scheduling(Sched.DEADLINE), True, True),
        (fifo(2), False, True),
        (fifo(2, reset_on_fork=False), False, False),
        (fifo(1), False, False),
        (fifo(3), False, False),
        (Scheduling(Sched.RR, 2, reset_on_fork=True), False, False),
    ],
    ids=str,
)
def test_right_scheduling(scheduling, calm, realtime):
    """A place without FIFO takes all but FIFO and RR; one with FIFO takes that FIFO with reset-on-fork, or DEADLINE."""
    now = Placement(cpus("2"), scheduling)

    assert Wanted(cpus("2")).scheduled(now) is calm
    assert Wanted(cpus("2"), 2).scheduled(now) is realtime
    assert Wanted(cpus("2")).holds(now) is calm
    assert Wanted(cpus("2"), 2).holds(now) is realtime


@pytest.mark.parametrize(("on", "right"), [("2-3", True), ("2", False), ("2-4", False), ("4-5", False)])
def test_right_affinity_is_the_very_mask(on, right):
    """A thread that may run on fewer or other pCPUs than wanted is not in place, whatever its scheduling."""
    wanted = Wanted(cpus("2-3"))

    assert wanted.affine(Placement(cpus(on), fifo())) is right
    assert wanted.holds(Placement(cpus(on))) is right


def refusal(*, affinity=True, limits=None, observed=VCPU.now, wanted=WANTED, on=HOST):
    return Refusal(wanted, observed, limits, conditions(on), affinity, "why")


FENCE = Limits(cpus("4"), "a/b")

#: What may differ from a refusal, and whether it then still stands: of an affinity, of a scheduling.
CHANGES = {
    "nothing": ({}, True, True),
    "wanted pCPUs": ({"wanted": Wanted(cpus("3"), 1)}, False, True),
    "wanted priority": ({"wanted": Wanted(cpus("2"), 2)}, True, False),
    "reason to withhold": ({"wanted": Wanted(cpus("2"), 1, withheld="x")}, True, True),
    "observed pCPUs": ({"thread": replace(VCPU, now=Placement(cpus("5")))}, False, True),
    "observed scheduling": ({"thread": replace(VCPU, now=Placement(cpus("4"), fifo(9)))}, True, False),
    "fence": ({"thread": replace(VCPU, limits=FENCE)}, False, False),
    "budget": ({"thread": replace(VCPU, limits=Limits(rt_budget_us=1))}, False, False),
    "name": ({"thread": replace(VCPU, comm="x", cgroup="y")}, True, True),
    "online pCPUs": ({"on": host(online="0-6")}, False, False),
    "throttling": ({"on": host(rt_runtime_us=-1)}, False, False),
    "capability": ({"on": host(nice_capable=False)}, False, False),
    "guards": ({"on": host(guards={2: 50}, kernel="7.0")}, True, True),
}


@pytest.mark.parametrize(("change", "moved", "promoted"), CHANGES.values(), ids=CHANGES.keys())
def test_refusal_stands_until_something_of_it_changes(change, moved, promoted):
    """A refused call is made again only when the wanted or observed value, or what the kernel judges by, changed."""
    now = {"thread": VCPU, "wanted": WANTED, "on": HOST} | change

    assert refusal(affinity=True).stands(now["thread"], now["wanted"], now["on"]) is moved
    assert refusal(affinity=False).stands(now["thread"], now["wanted"], now["on"]) is promoted


def test_refusal_of_one_call_says_nothing_of_the_other():
    """A refused affinity stands in the way of affinities only, and of that thread only."""
    moving, promoting = refusal(affinity=True), refusal(affinity=False)
    other = thread(role=Role.VCPU, index=1, on="4")

    both = Memory(refused={VCPU.id: (moving, promoting)})
    one = Memory(refused={VCPU.id: (promoting,)})

    assert both.refusal(VCPU, WANTED, HOST, affinity=True) is moving
    assert both.refusal(VCPU, WANTED, HOST, affinity=False) is promoting
    assert one.refusal(VCPU, WANTED, HOST, affinity=True) is None
    assert both.refusal(other, WANTED, HOST, affinity=True) is None
    assert both.refusal(VCPU, Wanted(cpus("3"), 2), HOST, affinity=True) is None


def test_refusal_that_still_stands_is_found_behind_one_that_does_not():
    """Of several refusals of one thread any that stands counts."""
    stale, standing = refusal(wanted=Wanted(cpus("3"))), refusal()

    memory = Memory(refused={VCPU.id: (stale, standing)})

    assert memory.refusal(VCPU, WANTED, HOST, affinity=True) is standing


@pytest.mark.parametrize(
    ("ago", "tired"),
    [
        ([], False),
        ([0.0] * (FIGHT_REPAIRS - 1), False),
        ([0.0] * FIGHT_REPAIRS, True),
        ([0.0, 1.0, FIGHT_WINDOW_S], True),
        ([0.0, 1.0, FIGHT_WINDOW_S + 1], False),
    ],
)
def test_third_repair_within_the_window_makes_the_next_a_fight(ago, tired):
    """A thread put back too often in a short time is not put back again; long ago does not count."""
    memory = Memory(repairs={VCPU.id: tuple(1000 - seconds for seconds in ago)})

    assert memory.tired(VCPU.id, 1000) is tired
    assert not memory.tired(thread_id(), 1000)


@pytest.mark.parametrize(("until", "fighting"), [(1001, True), (1000, False), (999, False)])
def test_fight_pauses_until_its_time(until, fighting):
    """A fighting thread is left alone until its pause is over; other threads are not."""
    memory = Memory(fights={VCPU.id: Fight(until, PAUSE_S)})

    assert memory.fighting(VCPU.id, 1000) is fighting
    assert not memory.fighting(thread_id(), 1000)


def test_each_fight_is_paused_twice_as_long_up_to_a_bound():
    """The pauses of a thread that is fought over again and again double, up to the longest one."""
    memory, now, lengths = Memory(), 0.0, []
    for _ in range(6):
        fight = memory.next_pause(VCPU.id, now)
        lengths.append(fight.length_s)
        assert fight.until == now + fight.length_s
        memory, now = Memory(fights={VCPU.id: fight}), fight.until + PAUSE_MAX_S

    assert lengths == [PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S, 8 * PAUSE_S, PAUSE_MAX_S, PAUSE_MAX_S]


def test_fight_long_over_is_forgiven():
    """A thread that had peace for long begins with the shortest pause again."""
    memory = Memory(fights={VCPU.id: Fight(1000, PAUSE_MAX_S)})

    assert memory.next_pause(VCPU.id, 1000 + PAUSE_MAX_S + 1).length_s == PAUSE_S
    assert memory.next_pause(thread_id(), 1000).length_s == PAUSE_S


def test_pruned_forgets_threads_and_guests_that_are_gone():
    """What is remembered of a thread or a guest goes with it, and nothing else does."""
    alive, dead = find(guest(), "vcpu 0").id, thread_id(pid=2000, role=Role.VCPU)
    here, gone = (PID, START), (2000, START)
    wanted, times, fight = Wanted(cpus("2")), (1.0,), Fight(2.0, 1.0)

    def memory(*those):
        ids = [id_ for id_, _ in those]
        return Memory(
            incumbents={(process, "vcpu 0"): id_ for id_, process in those},
            doubtful=frozenset((process, "vcpu 1") for _, process in those),
            places=dict.fromkeys(ids, wanted),
            verified=frozenset(ids),
            right_since={process: 1.0 for _, process in those},
            refused=dict.fromkeys(ids, (refusal(),)),
            repairs=dict.fromkeys(ids, times),
            fights=dict.fromkeys(ids, fight),
            owed=frozenset(ids),
            said=frozenset({("no-fifo", dead)}),
            starts={process: Start() for _, process in those},
        )

    assert memory((alive, here), (dead, gone)).pruned(snapshot(guest())) == memory((alive, here))


@unhurried
@given(st.frozensets(st.integers(0, 20), min_size=1), st.integers(0, 99), st.sampled_from(Sched), st.integers(0, 99))
def test_place_that_was_taken_holds(numbers, priority, sched, other):
    """A thread given exactly what is wanted is in place, and it is only in place when the mask is that mask."""
    wanted = Wanted(CpuSet(numbers), priority)
    given_ = Placement(CpuSet(numbers), fifo(priority) if priority else OTHER)
    elsewhere = Placement(CpuSet([*numbers, 21]), Scheduling(sched, other))

    assert wanted.holds(given_)
    assert not wanted.holds(elsewhere)


def test_moving_a_thread_changes_nothing_of_the_memory():
    """A memory is a value: where the threads are now leaves it as it was."""
    memory = Memory(places={VCPU.id: WANTED}, verified=frozenset({VCPU.id}))

    assert memory.pruned(snapshot(put(guest(), {"vcpu 0": "7"}))) == memory
