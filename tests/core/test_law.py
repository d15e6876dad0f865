"""Promise 1: who may share a pCPU with a FIFO vCPU, and what one more step would break."""

from __future__ import annotations

import pytest
from factories import cpus, fifo, guest, thread, thread_id
from hypothesis import given, settings
from hypothesis import strategies as st
from simulated import World, violations

from rtpind.core.cpuset import CpuSet
from rtpind.core.law import State, may_share
from rtpind.core.model import OTHER, Host, Placement, Role, Sched, Scheduling, Thread, ThreadId

VCPU = thread(role=Role.VCPU, on="2", scheduling=fifo(3))
OWN = thread(on="0-1")
FOREIGN = thread(pid=2000, on="0-1")
FOREIGN_VCPU = thread(role=Role.VCPU, pid=2000, on="3", scheduling=fifo(3))


def at(on: str, scheduling: Scheduling = OTHER) -> Placement:
    return Placement(cpus(on), scheduling)


@pytest.mark.parametrize(
    ("other", "scheduling", "lawful"),
    [
        (OWN, OTHER, False),
        (OWN, fifo(2), False),
        (OWN, fifo(3), False),
        (OWN, fifo(4), True),
        (OWN, Scheduling(Sched.RR, 4), False),
        (OWN, Scheduling(Sched.DEADLINE), False),
        (FOREIGN, OTHER, False),
        (FOREIGN, fifo(4), False),
        (FOREIGN_VCPU, fifo(4), False),
    ],
)
def test_only_fifo_above_of_the_same_guest_may_share(other: Thread, scheduling: Scheduling, lawful: bool) -> None:
    """A thread may be beside a FIFO vCPU only if it is of its guest and FIFO at a higher priority."""
    assert may_share(VCPU, VCPU.now, other, at("2", scheduling)) is lawful


@pytest.mark.parametrize(
    ("before", "now", "intrudes"),
    [
        (at("0-1"), at("2"), True),
        (at("0-1"), at("0-2"), True),
        (at("0-1"), at("0"), False),
        (at("0-1"), at("4-5"), False),
        (at("1-2"), at("2"), False),  # it is there already
        (at("1-2"), at("0-7"), False),
        (at("0-1", fifo(4)), at("2", fifo(4)), False),
        (at("0-1", fifo(3)), at("2", fifo(3)), True),
        (at("2", fifo(4)), at("2"), True),  # it may be there only with FIFO
        (at("2", fifo(4)), at("2", fifo(3)), True),
        (at("2", fifo(3)), at("2"), False),
        (at("2", fifo(4)), at("0"), False),
    ],
)
def test_a_step_intrudes_when_it_breaks_the_law_anew(before: Placement, now: Placement, intrudes: bool) -> None:
    """A thread intrudes on a FIFO vCPU when it was not, or lawfully, beside it and would be there unlawfully."""
    state = State([VCPU, OWN])
    state.update(OWN.id, before)

    assert state.intrudes(OWN, now) == ([VCPU] if intrudes else [])


def test_nothing_intrudes_on_what_is_no_fifo_vcpu() -> None:
    """Beside a vCPU without FIFO, or a FIFO helper, anybody may run; a thread not seen yet intrudes like any other."""
    state = State([thread(role=Role.VCPU, on="2"), thread(role=Role.IOTHREAD, index=1, on="3", scheduling=fifo(5))])

    assert state.intrudes(FOREIGN, at("0-7")) == []

    state.update(thread_id(role=Role.VCPU), at("2", fifo()))

    assert [vcpu.label for vcpu in state.intrudes(FOREIGN, at("0-7"))] == ["vcpu 0"]


def test_realtime_vcpus_of_any_kind_are_guarded() -> None:
    """An RR vCPU is as deaf to others as a FIFO one."""
    vcpu = thread(role=Role.VCPU, on="2", scheduling=Scheduling(Sched.RR, 1))

    assert State([vcpu]).intrudes(OWN, at("2")) == [vcpu]


def test_who_would_break_the_law_if_a_vcpu_were_fifo() -> None:
    """Every other thread that may run on its pCPU, but for those above it in its own guest; in a stable order."""
    above = thread(role=Role.IOTHREAD, index=1, on="2", scheduling=fifo(4))
    wide, foreign = thread(index=1, on="0-7"), thread(pid=2000, on="1-2")
    vcpu = thread(role=Role.VCPU, on="2")
    state = State([foreign, above, wide, vcpu, OWN])

    assert state.shares(vcpu, at("2", fifo(3))) == [wide, foreign]
    assert state.shares(vcpu, at("0", fifo(3))) == [OWN, wide]
    assert state.shares(vcpu, at("5", fifo(3))) == [wide]


def test_the_state_follows_what_the_kernel_answered() -> None:
    """Threads are where they were last read, and nowhere once they are gone."""
    state = State([VCPU, OWN])
    state.update(OWN.id, at("2"))

    assert state.now(OWN.id) == at("2")
    assert [other.id for other in state.beside(cpus("2"), VCPU.id)] == [OWN.id]
    assert state.beside(cpus("0-1,3-7"), VCPU.id) == []

    state.update(OWN.id, None)
    state.update(OWN.id, None)

    assert state.now(OWN.id) is None
    assert state.beside(CpuSet(range(8)), VCPU.id) == []


PLACES = st.builds(
    Placement,
    st.frozensets(st.integers(0, 2), min_size=1).map(CpuSet),
    st.sampled_from([OTHER, fifo(1), fifo(2), Scheduling(Sched.RR, 1)]),
)
CAST = [*guest(vcpus=2, helpers=2).threads, *guest("rt-2", pid=2000, vcpus=2).threads]


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.tuples(st.sampled_from(CAST), st.none() | PLACES), min_size=6, max_size=30),
    st.sampled_from(CAST),
    PLACES,
)
def test_what_is_looked_up_is_what_is_there(
    steps: list[tuple[Thread, Placement | None]], thread: Thread, now: Placement
) -> None:
    """However threads moved, who is beside whom, and upon whom a step intrudes, is as a walk over all of them finds."""
    state = State(CAST)
    where: dict[ThreadId, Placement | None] = {one.id: one.now for one in CAST}
    for one, place in steps:
        state.update(one.id, place)
        where[one.id] = place

    there = [one for one in sorted(CAST, key=lambda one: one.id) if one.id != thread.id and where[one.id] is not None]
    beside = [one for one in there if where[one.id].cpus & now.cpus]  # type: ignore[union-attr]
    assert state.beside(now.cpus, thread.id) == beside

    def breaks(vcpu: Thread, place: Placement | None) -> bool:
        at_now = where[vcpu.id]
        if place is None or at_now is None or vcpu.role is not Role.VCPU or not at_now.scheduling.realtime:
            return False
        return bool(place.cpus & at_now.cpus) and not may_share(vcpu, at_now, thread, place)

    expected = [one for one in beside if breaks(one, now) and not breaks(one, where[thread.id])]
    assert state.intrudes(thread, now) == expected


def test_every_violation_is_found() -> None:
    """The pairs are (FIFO vCPU, thread beside it): both ways between two FIFO vCPUs, none for who is gone or above."""
    world = World(Host(online=cpus("0-7"), possible=cpus("0-7")), [guest(vcpus=3, helpers=2)])
    for tid, on, scheduling in [
        (1010, "2", fifo(1)),
        (1011, "2-3", fifo(1)),
        (1012, "4", OTHER),
        (1051, "3", fifo(2)),
        (1000, "0-1", fifo(1)),
        (1101, "3-4", OTHER),
    ]:
        world.put(tid, cpus=cpus(on), scheduling=scheduling)
    state = State(world.threads())

    assert {(vcpu.tid, other.tid) for vcpu, other in state.violations()} == violations(world)
    assert violations(world) == {(1010, 1011), (1011, 1010), (1011, 1101)}

    state.update(thread_id(role=Role.VCPU, index=1), None)

    assert state.violations() == set()
