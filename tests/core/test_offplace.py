# SPDX-License-Identifier: GPL-2.0-or-later
"""Off-place time: what counts, from when, and until when."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
from factories import PID, START, cpus, fifo, find, guest, policy, put, snapshot, thread

from rtpind.core.identify import SETTLE_S
from rtpind.core.ledger import HandsOff, Ledger, Off
from rtpind.core.memory import Memory
from rtpind.core.model import OTHER, Guest, Placement, Role, Scheduling, ThreadId
from rtpind.core.offplace import GIVEN_UP_S, WATCHED_S, OffPlace, Reading, Start, Starts, account, ended
from rtpind.core.placement import place

PROCESS = (PID, START)
GUEST = guest("rt-1", vcpus=1, iothreads=0, young=True)
VCPU = find(GUEST, "vcpu 0").id
SPENT = OffPlace(0.0, 1, affine=True, scheduled=True)
RELEASED = Ledger(hands_off={GUEST.uuid: Off(HandsOff.RELEASED, PROCESS)})

#: Where the vCPU is at a look. ``waits``: in no cgroup of its own yet.
PLACES: dict[str, tuple[str, Scheduling]] = {
    "waits": ("0-7", OTHER),
    "off": ("0-7", OTHER),
    "other": ("2", OTHER),
    "right": ("2", fifo()),
    "only-fifo": ("0-7", fifo()),
}


def at(where: str, of: Guest = GUEST) -> Guest:
    """Return the guest with its vCPU there."""
    on, scheduling = PLACES[where]
    found = put(of, {"vcpu 0": on}, scheduling)
    threads = tuple(replace(one, settled=where != "waits" or one.helper) for one in found.threads)
    return replace(found, threads=threads)


def placement(where: str) -> Placement:
    on, scheduling = PLACES[where]
    return Placement(cpus(on), scheduling)


def look(
    before: Starts,
    of: Guest,
    ran_ns: int | dict[ThreadId, int] | None,
    time: float = 0.0,
    steps: tuple[tuple[str, int], ...] = (),
    ledger: Ledger | None = None,
) -> Starts:
    """Return what is known after a pass that read a CPU time, and others after its steps."""
    ran = ran_ns if isinstance(ran_ns, dict) else {} if ran_ns is None else {VCPU: ran_ns}
    seen = replace(snapshot(of, time=time), ran=ran)
    decision = place(policy(), seen, Memory(), ledger or Ledger())
    return account(before, seen, decision, [Reading(VCPU, placement(where), ns) for where, ns in steps])


@dataclass(frozen=True)
class Case:
    """A start: each pass is where the vCPU is found and its CPU time, then the same after each of its steps."""

    name: str
    passes: tuple[tuple[tuple[str, int], ...], ...]
    affinity_ns: int
    scheduling_ns: int


CASES = [
    Case("what it runs before the resume does not count", ((("waits", 500),), (("waits", 900),)), 0, 0),
    Case("from the last look before it everything does", ((("waits", 500),), (("off", 900),)), 400, 400),
    Case("up to a step's read-back", ((("waits", 500),), (("off", 900), ("other", 950), ("right", 960))), 450, 460),
    Case("and no further", ((("waits", 5),), (("off", 9), ("other", 10), ("right", 11)), (("right", 99),)), 5, 6),
    Case("put right by somebody else", ((("waits", 5),), (("off", 9),), (("right", 99),)), 94, 94),
    Case("a placed vCPU that is moved back", ((("waits", 5),), (("right", 9),), (("off", 20),)), 15, 15),
    Case("affinity apart", ((("waits", 5),), (("only-fifo", 9), ("other", 12)), (("right", 20),)), 7, 15),
    Case("nothing known from before: all of it", ((("off", 70),), (("right", 90),)), 90, 90),
    Case("first seen in place: by <cputune>", ((("right", 70),), (("right", 90),)), 0, 0),
    Case("first seen without FIFO", ((("other", 70), ("right", 75)),), 0, 75),
    Case("a counter that goes back", ((("waits", 50),), (("off", 40),), (("off", 45),)), 5, 5),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_counts(case: Case) -> None:
    """CPU time from the last look before the resume, in every interval of which either end is off its place."""
    found: Starts = {}
    for number, ((where, ran_ns), *steps) in enumerate(case.passes):
        found = look(found, at(where), ran_ns, time=number / 100, steps=tuple(steps))
    spent = found[PROCESS].spent(VCPU)
    assert spent is not None
    assert (spent.affinity_ns, spent.scheduling_ns) == (case.affinity_ns, case.scheduling_ns)


def started(*passes: tuple[float, str, int]) -> Starts:
    """Return what is known after passes at some times."""
    found: Starts = {}
    for time, where, ran_ns in passes:
        found = look(found, at(where), ran_ns, time)
    return found


@pytest.mark.parametrize(
    ("time", "where", "over"),
    [
        (WATCHED_S - 0.1, "right", False),
        (WATCHED_S, "right", True),
        (WATCHED_S, "other", False),
        (GIVEN_UP_S - 0.1, "other", False),
        (GIVEN_UP_S, "other", True),
        (GIVEN_UP_S, "waits", True),  # a thread that waits later is a hot-plugged one
    ],
)
def test_when_a_start_is_over(time: float, where: str, over: bool) -> None:
    """On its place a second after the last look at which it cannot have run, else five seconds after it."""
    before = started((9.0, "waits", 10), (10.0, "waits", 20), (10.01, "other", 25))
    after = look(before, at(where), 30, 10.0 + time)

    assert (VCPU in after[PROCESS].over) is over
    assert (VCPU in after[PROCESS].open) is not over
    told = dict(ended(before, after))
    assert set(told) == ({PROCESS} if over else set())
    if over:
        assert told[PROCESS][VCPU].right is (where == "right")


def test_a_start_is_told_once() -> None:
    """Where no CPU time was read nothing is new, and what is over stays as it is whatever happens to the vCPU."""
    before = started((0.0, "waits", 10), (WATCHED_S, "right", 10))
    after = look(before, at("off"), {VCPU: 10_000, **dict.fromkeys([VCPU._replace(tid=1)], 1)}, 2.0)

    assert after[PROCESS].spent(VCPU) == before[PROCESS].spent(VCPU)
    assert list(ended(before, after)) == []
    other = Start(over={VCPU: SPENT})  # of another guest
    assert list(ended({**before, (1, 1): other}, {**after, (1, 1): other})) == []
    assert look(after, at("off"), None, 3.0) is after
    assert list(ended(after, after)) == []


def test_only_starts_that_have_changed_are_told() -> None:
    """Of another guest's start nothing is said again."""
    spent = OffPlace(0.0, 5, affine=True, scheduled=True)
    over = Start(True, {}, {ThreadId(PID, START, PID + 10, START): spent})
    other = Start(True, {}, {ThreadId(7, START, 17, START): spent})

    assert list(ended({(7, START): other}, {(7, START): other, PROCESS: over})) == [(PROCESS, dict(over.over))]


def test_a_hot_plugged_vcpu_has_a_start_of_its_own() -> None:
    """All that its thread ever ran counts while it is off its place, and the vCPUs of before are left as they are."""
    before = started((0.0, "waits", 10), (WATCHED_S, "right", 10))
    new = thread(role=Role.VCPU, index=1, settled=False)
    plugged = replace(at("right"), threads=(*at("right").threads, new))
    found = look(before, plugged, {new.id: 40}, 100.0)
    placed = replace(new, settled=True, now=Placement(cpus("3"), fifo()))
    plugged = replace(plugged, threads=(*at("right").threads, placed))
    found = look(found, plugged, {new.id: 70}, 100.1)
    after = look(found, plugged, {new.id: 90}, 101.1)

    assert dict(ended(before, found)) == {}
    assert {id_: spent.affinity_ns for id_, spent in dict(ended(found, after))[PROCESS].items()} == {new.id: 70}
    assert after[PROCESS].spent(VCPU) == before[PROCESS].spent(VCPU)


@pytest.mark.parametrize(
    ("of", "ledger"),
    [
        (replace(GUEST, name="other"), Ledger()),
        (GUEST, RELEASED),
    ],
    ids=["unmanaged", "released"],
)
def test_what_is_not_measured(of: Guest, ledger: Ledger) -> None:
    """A guest that is not managed: its vCPUs are not read again, and nothing is told."""
    found = look({}, of, 10, ledger=ledger)

    assert found == {PROCESS: Start(True, {}, {VCPU: None})}
    assert found[PROCESS].spent(VCPU) is None
    assert list(ended({}, found)) == []


@pytest.mark.parametrize(
    ("start", "age_s", "due"),
    [
        (Start(), 9.9, True),
        (Start(), SETTLE_S, False),
        (Start(open={VCPU: SPENT}), SETTLE_S, True),
        (Start(over={VCPU: SPENT}), 1.0, False),
        (Start(over={VCPU: None}), 1.0, False),
    ],
)
def test_when_a_cpu_time_is_read(start: Start, age_s: float, due: bool) -> None:
    """While the thread is young, or its start is not over; never of a guest that ran before the daemon did."""
    assert start.due(VCPU, age_s) is due


def test_a_vcpu_that_is_plugged_into_a_guest_of_before_is_measured() -> None:
    """The guest is not young, so the first look at its thread is at a running guest, moved or not."""
    new = thread(role=Role.VCPU, index=1, settled=False)
    plugged = replace(at("right"), young=False, threads=(*at("right").threads, new))
    found = look({}, plugged, {new.id: 40})
    assert found[PROCESS].spent(new.id) == OffPlace(
        0.0, 40, affine=False, scheduled=False, affinity_ns=40, scheduling_ns=40
    )
    late = replace(at("waits"), young=False)  # its memory took long to allocate
    assert look({}, late, 40)[PROCESS].spent(VCPU) == OffPlace(0.0, 40, affine=False, scheduled=False)


def test_a_guest_that_is_released_while_it_starts_is_not_measured() -> None:
    """Nothing is wanted of it any more; what was measured of a start before stays."""
    before = started((0.0, "waits", 10), (0.1, "off", 20))
    assert look(before, at("off"), 30, 0.2, ledger=RELEASED)[PROCESS].over == {VCPU: None}
    over = started((0.0, "waits", 10), (WATCHED_S, "right", 10))
    assert look(over, at("right"), 30, 2.0, ledger=RELEASED)[PROCESS] == over[PROCESS]


def test_only_vcpus_are_measured() -> None:
    """A helper that calls itself one is not, nor is a guest of which nothing was read."""
    emulator = find(GUEST, "emulator").id
    other = guest("rt-2", pid=2000, young=True)
    seen = replace(snapshot(at("off"), other), ran={emulator: 5})
    found = account({}, seen, place(policy(), seen, Memory(), Ledger()))

    assert found == {PROCESS: Start(True)}


def test_a_step_on_a_vcpu_of_which_nothing_is_known_counts_for_nobody() -> None:
    """A start that is over is not changed by later steps."""
    over = started((0.0, "waits", 10), (WATCHED_S, "right", 10))
    other = VCPU._replace(tid=1)
    found = look(over, at("off"), {other: 1}, 2.0, steps=(("right", 99),))

    assert found[PROCESS].over == over[PROCESS].over
