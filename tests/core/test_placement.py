# SPDX-License-Identifier: GPL-2.0-or-later
"""Where threads should be: disjoint, sticky and deterministic (promises 1, 6, 10), with FIFO where earned (7)."""

from dataclasses import replace

import factories
import pytest
from factories import (
    PID,
    REALTIME,
    START,
    applied,
    cpus,
    fifo,
    find,
    guest,
    host,
    moved,
    put,
    snapshot,
    thread,
    thread_id,
    uuid_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.decision import State
from rtpind.core.ledger import EVERYONE, HandsOff, Ledger, Off
from rtpind.core.memory import Memory, Refusal, Wanted, conditions
from rtpind.core.model import OTHER, Placement, Role, Sched, Scheduling
from rtpind.core.placement import place
from rtpind.core.policy import Exclusive
from rtpind.core.protection import fifo_withheld, unprotected

unhurried = settings(deadline=None)  # a busy machine is no failure

HOST = host()

#: Every kind of class, in one pool of six pCPUs; a guest's name says its class.
CLASSES = """
version: 1
mode: enforce
pools:
  helpers: 0
  own: isolated
classes:
  rt: {vcpu: {pool: own, exclusive: thread, scheduler: fifo}, emulator: {pool: helpers}}
  iso: {vcpu: {pool: own, exclusive: thread, scheduler: fifo}, emulator: {pool: own, exclusive: guest}}
  one: {emulator: {pool: own, exclusive: guest}}
  dpdk: {vcpu: {pool: own, exclusive: thread}, emulator: {share_with: {vcpu: 0}}}
  above:
    vcpu: {pool: own, exclusive: thread, scheduler: fifo}
    emulator: {pool: helpers}
    iothread: {share_with: {vcpu: 1}, scheduler: fifo, priority: 2}
  vhosts:
    vcpu: {pool: own, exclusive: thread, scheduler: fifo}
    emulator: {pool: helpers}
    iothread: {pool: own, exclusive: thread}
    vhost: {pool: own, exclusive: thread, scheduler: fifo, priority: 2}
  float: {vcpu: {pool: helpers}}
guests:
  - {name: "infra-*", class: unmanaged}
  - {name: "rt-*", class: rt}
  - {name: "iso-*", class: iso}
  - {name: "one-*", class: one}
  - {name: "dpdk-*", class: dpdk}
  - {name: "above-*", class: above}
  - {name: "vhosts-*", class: vhosts}
  - {name: "float-*", class: float}
when_full: WHEN_FULL
"""


def policy(when_full="degrade", own="isolated"):
    return factories.policy(CLASSES.replace("WHEN_FULL", when_full).replace("own: isolated", f"own: {own}"))


POLICY = policy()


def decide(*guests, by=POLICY, on=HOST, memory=None, ledger=None, clock=0.0):
    return place(by, snapshot(*guests, host=on), memory or Memory(), ledger or Ledger(), clock)


def remembered(decision):
    """Return the memory of a daemon that decided this a moment ago."""
    return Memory(places=decision.wanted())


def touched(*guests):
    """Return the ledger of a daemon that touched these guests."""
    return Ledger().recording(one for guest in guests for one in guest.threads)


def of(decision, name):
    return next(found for found in decision.guests if found.guest.name == name)


def text(wanted):
    return str(wanted.cpus) + (f" fifo:{wanted.priority}" if wanted.priority else "")


def where(decision, name):
    """Return the wanted places of a guest by label; those of several threads of one label side by side."""
    found = of(decision, name)
    places = {}
    for one in found.guest.threads:
        if one.id in found.wanted:
            places.setdefault(one.label, {})[text(found.wanted[one.id])] = None
    return {label: " + ".join(those) for label, those in places.items()}


def vcpus(decision, name):
    """Return the wanted pCPUs of a guest's vCPUs, in their order."""
    return [on for label, on in where(decision, name).items() if label.startswith("vcpu")]


def held_by(decision):
    """Return who holds which pCPU, with guests by name."""
    names = {found.guest.uuid: found.guest.name for found in decision.guests}
    return {
        cpu: f"{names[uuid]} {label}"
        for cpu, owner in decision.owners.items()
        for uuid, _, label in [owner.partition(": ")]
    }


def states(decision):
    return {found.guest.name: found.state for found in decision.guests}


def filler(count, *, pid=9000, start=1, first=2):
    """Return a guest that was placed on ``count`` pCPUs from ``first``, and its ledger and memory."""
    one = guest("rt-filler", pid=pid, start=start, vcpus=count)
    return put(one, {f"vcpu {index}": str(first + index) for index in range(count)}, fifo())


# Giving out


def test_first_guest_gets_the_lowest_free_pcpus():
    """Its vCPUs get a pCPU each, in order from the lowest free one, at the FIFO of the class; helpers their pool."""
    decision = decide(guest("rt-1", vcpus=3, helpers=2, vhosts=1, pits=1))

    assert where(decision, "rt-1") == {
        "emulator": "0",
        "vcpu 0": "2 fifo:1",
        "vcpu 1": "3 fifo:1",
        "vcpu 2": "4 fifo:1",
        "iothread 1": "0",
        "vhost": "0",
        "pit": "0",
    }
    assert held_by(decision) == {2: "rt-1 vcpu 0", 3: "rt-1 vcpu 1", 4: "rt-1 vcpu 2"}
    found = of(decision, "rt-1")
    assert (found.state, found.class_name, found.reason) == (State.PLACED, "rt", "")
    assert found.rule == "guests[1] name=rt-* → rt"
    assert all(found.wanted[one.id].exclusive is (not one.helper) for one in found.guest.threads)
    assert not any(wanted.withheld for wanted in found.wanted.values())


def test_wanted_of_a_decision_is_that_of_all_its_guests():
    """The whole decision's wanted places are those of its guests together."""
    decision = decide(guest("rt-1"), guest("infra-1", pid=2000), guest("rt-2", pid=3000))

    assert decision.wanted() == {**of(decision, "rt-1").wanted, **of(decision, "rt-2").wanted}
    assert len(decision.wanted()) == 8


def test_guests_are_listed_by_name():
    """A decision lists guests by name, then by UUID, whatever their age."""
    guests = [guest(name, pid=pid, start=start) for name, pid, start in [("b", 2, 1), ("a", 3, 3), ("a", 1, 4)]]

    assert [(found.guest.name, found.guest.pid) for found in decide(*guests).guests] == [("a", 1), ("a", 3), ("b", 2)]


def test_vcpus_are_placed_by_number_not_by_thread():
    """A vCPU 0 comes before vCPU 10 and 2, in whatever order the threads were found."""
    threads = [
        replace(thread(role=Role.VCPU, index=index), id=thread_id(role=Role.VCPU, index=number))
        for number, index in enumerate((10, 2, 0))
    ]

    decision = decide(guest("rt-1", vcpus=0, iothreads=0, extra=threads))

    assert where(decision, "rt-1") == {
        "emulator": "0",
        "vcpu 0": "2 fifo:1",
        "vcpu 2": "3 fifo:1",
        "vcpu 10": "4 fifo:1",
    }


def test_offline_pcpu_is_not_given_out():
    """A pool goes without the pCPUs that are offline."""
    decision = decide(guest("rt-1"), on=host(online="0-1,3,5-7", possible="0-7"))

    assert vcpus(decision, "rt-1") == ["3 fifo:1", "5 fifo:1"]


# Keeping


def test_place_that_the_kernel_shows_is_kept():
    """A daemon that starts keeps a vCPU on a pCPU of its pool, and fills in the others around it (promise 6)."""
    decision = decide(put(guest("rt-1", vcpus=3), {"vcpu 1": "2", "vcpu 2": "6"}))

    assert vcpus(decision, "rt-1") == ["3 fifo:1", "2 fifo:1", "6 fifo:1"]


@pytest.mark.parametrize("on", ["4-5", "0", "0,4", "0-7"])
def test_only_one_pcpu_of_the_pool_is_a_place(on):
    """A vCPU on several pCPUs, or on one outside the pool, has no place to keep."""
    assert vcpus(decide(put(guest("rt-1", vcpus=1), {"vcpu 0": on})), "rt-1") == ["2 fifo:1"]


def test_place_that_was_decided_is_kept():
    """A place that this run gave out is kept though the thread is elsewhere now, even on another valid place."""
    one = guest("rt-1")
    memory = Memory(places={find(one, "vcpu 0").id: Wanted(cpus("6"), 1), find(one, "vcpu 1").id: Wanted(cpus("4"))})

    decision = decide(put(one, {"vcpu 0": "5", "vcpu 1": "6"}), memory=memory)

    assert vcpus(decision, "rt-1") == ["6 fifo:1", "4 fifo:1"]


def test_remembered_place_goes_before_what_the_kernel_shows_of_an_older_guest():
    """A younger guest keeps what this run gave it, though an older guest was moved onto it."""
    old, young = guest("rt-old", vcpus=1, start=1), guest("rt-young", pid=2000, vcpus=1, start=2)
    memory = remembered(decide(put(young, {"vcpu 0": "4"})))

    decision = decide(put(old, {"vcpu 0": "4"}), put(young, {"vcpu 0": "7"}), memory=memory)

    assert vcpus(decision, "rt-young") == ["4 fifo:1"]
    assert vcpus(decision, "rt-old") == ["2 fifo:1"]


def test_remembered_place_that_left_the_pool_is_not_kept():
    """A policy that takes a pCPU out of the pool moves who was there, and only them."""
    one = guest("rt-1", vcpus=3)
    memory = remembered(decide(one))

    decision = decide(one, by=policy(own='"isolated,^3"'), memory=memory)

    assert vcpus(decision, "rt-1") == ["2 fifo:1", "5 fifo:1", "4 fifo:1"]


@pytest.mark.parametrize(
    ("first", "second", "winner"),
    [
        ({"start": 1}, {"start": 2}, "rt-1"),
        ({"start": 2}, {"start": 1}, "rt-2"),
        ({"start": 1, "uuid": "a"}, {"start": 1, "uuid": "b"}, "rt-1"),
        ({"start": 1, "uuid": "b"}, {"start": 1, "uuid": "a"}, "rt-2"),
        ({"start": 1, "uuid": "z"}, {"start": 2, "uuid": "a"}, "rt-1"),
    ],
)
@pytest.mark.parametrize("pids", [(1000, 2000), (2000, 1000)])
def test_conflict_goes_to_the_oldest_process_then_by_uuid(first, second, winner, pids):
    """Of two guests found on one pCPU the older process keeps it, then the lower UUID; the other moves (promise 6)."""
    one = put(guest("rt-1", pid=pids[0], vcpus=1, **first), {"vcpu 0": "5"})
    two = put(guest("rt-2", pid=pids[1], vcpus=1, **second), {"vcpu 0": "5"})

    decision = decide(one, two)

    assert held_by(decision) == {5: f"{winner} vcpu 0", 2: f"{'rt-2' if winner == 'rt-1' else 'rt-1'} vcpu 0"}


def test_room_goes_to_the_oldest_process():
    """Where not all new guests fit, the older ones get their places."""
    young, old = guest("rt-a", start=9, vcpus=4), guest("rt-z", pid=2000, start=1, vcpus=4)

    assert states(decide(young, old)) == {"rt-a": State.DEGRADED, "rt-z": State.PLACED}


def test_two_vcpus_on_one_pcpu_are_parted():
    """Of two vCPUs of one guest found on one pCPU the first keeps it."""
    assert vcpus(decide(put(guest("rt-1"), {"vcpu 0": "5", "vcpu 1": "5"})), "rt-1") == ["5 fifo:1", "2 fifo:1"]


# Guests that are left alone


@pytest.mark.parametrize(("name", "reason"), [("infra-1", ""), ("stranger", "no rule matches")])
def test_guest_without_rule_is_never_touched(name, reason):
    """A guest that no rule matches, or one that is unmanaged by rule, gets no place at all (promise 6)."""
    decision = decide(put(guest(name), {"vcpu 0": "4"}, fifo(9)))

    found = of(decision, name)
    assert (found.state, found.wanted, found.reason, found.class_name) == (State.UNMANAGED, {}, reason, "")
    assert found.rule == ("guests[0] name=infra-* → unmanaged" if name == "infra-1" else "")
    assert not found.state.managed
    assert decision.owners == {}


@pytest.mark.parametrize("label", ["vcpu 0", "emulator", "iothread 1"])
def test_what_an_unmanaged_guest_is_narrowed_to_is_not_given_out(label):
    """Any thread of an unmanaged guest keeps exclusive places off the pCPUs it is narrowed to (promise 6)."""
    stranger = put(guest("stranger", pid=2000), {label: "2,4-5"})

    decision = decide(guest("rt-1"), stranger)

    assert vcpus(decision, "rt-1") == ["3 fifo:1", "6 fifo:1"]
    assert decision.blocked == dict.fromkeys((2, 4, 5), f"stranger: {label}")


def test_place_found_under_an_unmanaged_guest_is_not_adopted():
    """A pCPU that an unmanaged guest is narrowed to is not kept by a guest that rtpind has yet to place."""
    stranger = put(guest("stranger", pid=2000), {"vcpu 0": "5"})

    assert vcpus(decide(put(guest("rt-1"), {"vcpu 0": "5"}), stranger), "rt-1") == ["2 fifo:1", "3 fifo:1"]


@pytest.mark.parametrize(
    ("on", "facts", "first"),
    [
        ("0-7", {}, "2"),  # all that is online
        ("0-1", {}, "2"),  # all that is not isolated
        ("0-15", {}, "2"),  # as written; the kernel runs it on what is online
        ("0-7", {"online": "0-6", "possible": "0-7"}, "2"),
        ("2-7", {}, None),  # somebody chose that
        ("0-2", {}, "3"),
        ("2-15", {}, None),
        ("1", {}, "2"),
        ("2", {}, "3"),
    ],
)
def test_mask_that_nobody_chose_blocks_nothing(on, facts, first):
    """Threads on all online pCPUs, or on all that are not isolated, are not narrowed; others are."""
    decision = decide(guest("rt-1", vcpus=1), guest("stranger", pid=2000, on=on), on=host(**facts))

    assert (vcpus(decision, "rt-1")[0] == f"{first} fifo:1") is (first is not None)
    assert bool(decision.blocked) is (on not in ("0-7", "0-1", "0-15"))
    assert states(decision)["rt-1"] is (State.PLACED if first else State.DEGRADED)


def test_who_blocks_is_said_by_guest():
    """A blocked pCPU names each guest once, by its first thread there."""
    one, two = (put(guest(f"s-{pid}", pid=pid), {"vcpu 0": "5", "vcpu 1": "5"}) for pid in (2000, 3000))

    assert decide(two, one).blocked == {5: "s-2000: vcpu 0; s-3000: vcpu 0"}


@pytest.mark.parametrize(
    ("off", "state", "reason"),
    [
        (Off(HandsOff.RELEASED), State.RELEASED, "rtpinctl released"),
        (Off(HandsOff.PAUSED, (PID, START)), State.PAUSED, "rtpinctl paused"),
        (Off(HandsOff.PAUSED, None, 100.5), State.PAUSED, "rtpinctl paused"),
    ],
)
@pytest.mark.parametrize("key", [uuid_of(PID), EVERYONE])
def test_hands_off_a_released_or_paused_guest(off, state, reason, key):
    """A guest that was released or paused is not touched, and what it is narrowed to is not given out."""
    ledger = replace(touched(guest()), hands_off={key: off})
    off_guest, other = put(guest("rt-1"), {"vcpu 0": "2"}), guest("rt-2", pid=2000, vcpus=1)
    if key == EVERYONE:
        other = replace(other, name="stranger")

    decision = decide(off_guest, other, ledger=ledger, clock=100.0)

    found = of(decision, "rt-1")
    assert (found.state, found.reason, found.wanted) == (state, reason, {})
    assert not found.state.managed
    assert 2 not in decision.owners
    assert decision.blocked[2] == "rt-1: vcpu 0"


@pytest.mark.parametrize("off", [Off(HandsOff.PAUSED, None, 100.0), Off(HandsOff.RELEASED, (PID, START - 1))])
def test_pause_that_is_over_and_release_of_an_earlier_run_are_nothing(off):
    """A guest whose pause ended, or that was started anew after its release, is placed."""
    assert states(decide(guest("rt-1"), ledger=Ledger(hands_off={uuid_of(PID): off}), clock=100.0)) == {
        "rt-1": State.PLACED
    }


@pytest.mark.parametrize("name", ["infra-1", "stranger"])
def test_guest_whose_rule_is_gone_stays_as_it_is(name):
    """A guest that rtpind touched and that no rule claims now is unclaimed and keeps its pCPUs (promise 6)."""
    gone = put(guest(name), {"vcpu 0": "2", "vcpu 1": "3"}, fifo())

    decision = decide(gone, guest("rt-2", pid=2000, vcpus=1), ledger=touched(gone))

    found = of(decision, name)
    assert (found.state, found.wanted) == (State.UNCLAIMED, {})
    assert found.reason == "its rule is gone; rtpinctl release puts it back"
    assert vcpus(decision, "rt-2") == ["4 fifo:1"]


def test_unclaimed_is_a_guest_not_a_process_number():
    """A later process with the number of a touched one is merely unmanaged."""
    ledger = touched(guest("stranger", start=1))

    assert states(decide(guest("stranger", start=2), ledger=ledger)) == {"stranger": State.UNMANAGED}


FLOATING = """
version: 1
pools: {housekeeping: 0, floats: 1-7}
classes: {float: {emulator: {pool: floats}}, home: {emulator: {pool: housekeeping}}}
guests: [{name: "float-*", class: float}, {name: home, class: home}]
"""


@pytest.mark.parametrize("name", ["stranger", "rt-gone"])
def test_floaters_keep_off_foreign_fifo(name):
    """A floating thread's pool is without the pCPUs of FIFO or RR threads that rtpind leaves alone (promise 1)."""
    foreign = guest(name, pid=2000)
    foreign = moved(
        foreign,
        {
            find(foreign, "vcpu 0").id: Placement(cpus("4"), fifo(1)),
            find(foreign, "vcpu 1").id: Placement(cpus("5-6"), Scheduling(Sched.RR, 1)),
            find(foreign, "iothread 1").id: Placement(cpus("3"), Scheduling(Sched.BATCH)),
            find(foreign, "emulator").id: Placement(cpus("0-7"), fifo(1)),  # everywhere is nowhere to keep off
        },
    )

    decision = decide(guest("float-1", vcpus=1), foreign, by=factories.policy(FLOATING, on=host(isolated="")))

    assert set(where(decision, "float-1").values()) == {"1-3,7"}


@pytest.mark.parametrize(
    ("on", "label", "known", "floats"),
    [
        ("4", "vcpu 0", True, "1-3,5-7"),
        ("4", "vcpu 0", False, "1-7"),  # never placed by rtpind
        ("4", "emulator", True, "1-7"),
        ("4-5", "vcpu 0", True, "1-7"),  # no exclusive place
        ("0", "vcpu 0", True, "1-7"),
        ("0,4", "vcpu 0", True, "1-7"),
    ],
)
def test_floaters_keep_off_the_places_of_an_unclaimed_guest(on, label, known, floats):
    """An unclaimed or paused guest keeps the pCPUs rtpind gave its vCPUs to itself, without FIFO too (promise 6)."""
    gone = put(guest("rt-gone", pid=2000), {label: on})
    ledger = touched(gone) if known else Ledger()

    decision = decide(
        guest("float-1"),
        guest("home", pid=3000),
        gone,
        by=factories.policy(FLOATING, on=host(isolated="")),
        ledger=ledger,
    )

    assert set(where(decision, "float-1").values()) == {floats}
    assert set(where(decision, "home").values()) == {"0"}


def test_floaters_with_no_pool_left_go_to_housekeeping():
    """Where foreign FIFO takes a whole pool its floaters go to housekeeping."""
    foreign = put(guest("stranger", pid=2000), {"vcpu 0": "1-7"}, fifo())

    decision = decide(guest("float-1", vcpus=1), foreign, by=factories.policy(FLOATING, on=host(isolated="")))

    assert set(where(decision, "float-1").values()) == {"0"}


def test_floaters_with_nowhere_to_go_stay_where_they_are():
    """Where foreign FIFO takes housekeeping too, floaters have no wanted place rather than an empty one."""
    foreign = put(guest("stranger", pid=2000), {"vcpu 0": "1-7", "vcpu 1": "0"}, fifo())

    decision = decide(guest("float-1", vcpus=1), foreign, by=factories.policy(FLOATING, on=host(isolated="")))

    assert where(decision, "float-1") == {}
    assert states(decision)["float-1"] is State.PLACED


# Fences


def refused(of_thread, *, affinity=True):
    return Refusal(Wanted(cpus("6")), of_thread.now, None, conditions(HOST), affinity, "fenced")


def test_what_a_cpuset_holds_a_thread_to_is_not_given_to_others():
    """A thread that a cpuset keeps off its place keeps other guests off where it is, but not its own."""
    fenced = put(guest("rt-1", vcpus=1), {"emulator": "3", "iothread 1": "5"})
    emulator, iothread = find(fenced, "emulator"), find(fenced, "iothread 1")
    memory = Memory(refused={emulator.id: (refused(emulator),), iothread.id: (refused(iothread, affinity=False),)})

    decision = decide(fenced, guest("rt-2", pid=2000), memory=memory)

    assert vcpus(decision, "rt-1") == ["2 fifo:1"]
    assert vcpus(decision, "rt-2") == ["4 fifo:1", "5 fifo:1"]
    assert decision.blocked == {3: "rt-1: emulator (fenced)"}


@pytest.mark.parametrize("placed", [False, True], ids=["new", "placed there before"])
def test_vcpu_keeps_off_what_its_own_helpers_are_fenced_to(placed):
    """A vCPU goes where a cpuset holds no helper of its guest, though it was there: beside them it is never FIFO."""
    one = put(guest("rt-1", vcpus=1), {"emulator": "2", "vcpu 0": "2"})
    vcpu, emulator = find(one, "vcpu 0"), find(one, "emulator")
    places = {vcpu.id: Wanted(cpus("2"), 1, exclusive=True)} if placed else {}

    decision = decide(one, memory=Memory(places=places, refused={emulator.id: (refused(emulator),)}))

    assert decision.wanted()[vcpu.id] == Wanted(cpus("3"), 1, exclusive=True)


def test_vcpu_whose_helpers_are_fenced_to_the_whole_pool_has_its_place_there():
    """Where the helpers' fence leaves nothing else, the vCPU has its own pCPU all the same."""
    one = put(guest("rt-1", vcpus=1), {"emulator": "2-7"})
    emulator = find(one, "emulator")

    decision = decide(one, memory=Memory(refused={emulator.id: (refused(emulator),)}))

    assert decision.wanted()[find(one, "vcpu 0").id].cpus == cpus("2")


def test_fenced_vcpu_may_be_given_the_pcpu_it_is_fenced_to():
    """A fence of its own guest does not keep a vCPU off a pCPU."""
    fenced = put(guest("rt-1", vcpus=1), {"vcpu 0": "3"})
    vcpu = find(fenced, "vcpu 0")

    decision = decide(fenced, memory=Memory(refused={vcpu.id: (refused(vcpu),)}))

    assert vcpus(decision, "rt-1") == ["3 fifo:1"]


# No room


def test_guest_without_room_floats_in_housekeeping_without_fifo():
    """With when_full: degrade a guest that does not fit floats in housekeeping, all of it, and says why (promise 6)."""
    decision = decide(filler(5), guest("rt-1", vcpus=3, on="2-7"))

    found = of(decision, "rt-1")
    assert (found.state, found.state.managed) == (State.DEGRADED, True)
    assert found.reason == "no free pCPU in 'own' for vcpu 1"
    assert where(decision, "rt-1") == {
        **dict.fromkeys(("vcpu 0", "vcpu 1", "vcpu 2"), "0-1"),
        **dict.fromkeys(("emulator", "iothread 1"), "0"),
    }
    assert {found.wanted[one.id].withheld for one in found.guest.threads if not one.helper} == {found.reason}
    assert {found.wanted[one.id].withheld for one in found.guest.threads if one.helper} == {""}
    assert not any(wanted.exclusive for wanted in found.wanted.values())
    assert found.roomless == frozenset()
    assert 7 not in decision.owners


def test_guest_without_room_stays_as_it_is():
    """With when_full: leave a guest that does not fit is not touched, and says why (promise 6)."""
    decision = decide(filler(5), guest("rt-1", vcpus=2), by=policy("leave"))

    found = of(decision, "rt-1")
    assert (found.state, found.wanted) == (State.LEFT, {})
    assert not found.state.managed
    assert found.reason == "no free pCPU in 'own' for vcpu 1"
    assert 7 not in decision.owners


def test_what_a_left_guest_is_narrowed_to_is_not_given_out():
    """A guest left as it is for want of room stays on its pCPUs, so they go to no younger guest (promise 6)."""
    left = put(guest("rt-left", pid=2000, start=100, vcpus=3), {"vcpu 0": "6", "vcpu 1": "7"})
    late = guest("rt-late", pid=3000, start=200, vcpus=1)

    decision = decide(filler(4), left, late, by=policy("leave"))

    assert states(decision) == {"rt-filler": State.PLACED, "rt-late": State.LEFT, "rt-left": State.LEFT}
    assert decision.blocked == {6: "rt-left: vcpu 0", 7: "rt-left: vcpu 1"}


@pytest.mark.parametrize(
    ("when_full", "on"), [("degrade", ["6 fifo:1", "7 fifo:1"]), ("leave", ["6 fifo:1", "7 fifo:1"])]
)
def test_place_is_given_when_there_is_room(when_full, on):
    """A guest that had no room gets its place when another one stopped."""
    waiting = guest("rt-1", start=900, vcpus=2)
    full = [filler(5, first=2), waiting]
    by = policy(when_full)
    first = decide(*full, by=by)

    decision = decide(filler(4), waiting, by=by, memory=remembered(first), ledger=touched(*full))

    assert vcpus(decision, "rt-1") == on


def test_guest_too_large_does_not_block_one_that_fits():
    """A younger, smaller guest gets the room that an older one cannot use (promise 6)."""
    decision = decide(guest("rt-big", start=1, vcpus=9), guest("rt-small", pid=2000, start=2, vcpus=6))

    assert states(decision) == {"rt-big": State.DEGRADED, "rt-small": State.PLACED}


def test_guest_that_finds_part_of_its_places_gives_them_back():
    """A new guest gets all its places or none: those it was found on go to others."""
    part = put(guest("rt-1", pid=2000, start=100, vcpus=3), {"vcpu 0": "6", "vcpu 2": "7"})
    late = guest("rt-2", pid=3000, start=200, vcpus=2)

    decision = decide(filler(4), part, late)
    again = decide(filler(4), part, memory=remembered(decision))  # as in mode: observe, where nothing moved

    assert states(decision)["rt-1"] is State.DEGRADED
    assert vcpus(decision, "rt-2") == ["6 fifo:1", "7 fifo:1"]
    assert states(again)["rt-1"] is State.DEGRADED


def plugged(of_guest, *extra):
    return replace(of_guest, threads=(*of_guest.threads, *extra))


@pytest.mark.parametrize("known", ["memory", "ledger"])
def test_hot_plugged_vcpu_without_room_stays_with_the_helpers(known):
    """A vCPU plugged into a placed guest on a full host waits with the helpers; the others keep their places."""
    placed = filler(6)
    memory = remembered(decide(placed)) if known == "memory" else Memory()
    ledger = touched(placed) if known == "ledger" else Ledger()
    new = thread(role=Role.VCPU, index=6, pid=9000, start=1)

    decision = decide(plugged(placed, new), memory=memory, ledger=ledger)

    found = of(decision, "rt-filler")
    assert (found.state, found.reason) == (State.PLACED, "")
    assert vcpus(decision, "rt-filler") == [*(f"{cpu} fifo:1" for cpu in range(2, 8)), "0"]
    assert found.roomless == {new.id}
    assert found.wanted[new.id] == Wanted(cpus("0"), withheld="no free pCPU")


def test_hot_plugged_vcpu_with_room_gets_its_place():
    """A vCPU plugged into a placed guest gets a free pCPU, and no other vCPU moves for it."""
    placed = put(guest("rt-1"), {"vcpu 0": "5", "vcpu 1": "2"}, fifo())
    new = thread(role=Role.VCPU, index=2)

    decision = decide(plugged(placed, new), memory=remembered(decide(placed)), ledger=touched(placed))

    assert vcpus(decision, "rt-1") == ["5 fifo:1", "2 fifo:1", "3 fifo:1"]
    assert of(decision, "rt-1").roomless == frozenset()


def test_of_two_hot_plugged_vcpus_one_finds_room():
    """Room for one of two plugged vCPUs is given to the first; the other waits, and nobody loses a place."""
    placed = filler(5)
    new = [thread(role=Role.VCPU, index=index, pid=9000, start=1) for index in (5, 6)]

    decision = decide(plugged(placed, *new), memory=remembered(decide(placed)))

    assert vcpus(decision, "rt-filler") == [*(f"{cpu} fifo:1" for cpu in range(2, 8)), "0"]


@pytest.mark.parametrize("role", [Role.IOTHREAD, Role.VHOST])
def test_hot_plugged_helper_without_room_costs_nobody_a_place(role):
    """An iothread or vhost thread that a full host has no pCPU for waits with the helpers, too."""
    placed = guest("vhosts-1", vcpus=5, iothreads=1)
    first = decide(placed)
    new = thread(role=role, index=2)

    decision = decide(plugged(placed, new), memory=remembered(first), ledger=touched(placed))

    assert where(first, "vhosts-1").items() <= where(decision, "vhosts-1").items()
    assert of(decision, "vhosts-1").roomless == {new.id}
    assert of(decision, "vhosts-1").wanted[new.id].cpus == cpus("0")


def test_policy_that_asks_for_more_than_there_is_costs_no_placed_guest_its_place():
    """A placed guest whose class now wants one pCPU more, on a full host, keeps its vCPUs where they are."""
    placed = filler(6)
    more = factories.policy(CLASSES.replace("WHEN_FULL", "degrade").replace('"rt-*", class: rt', '"rt-*", class: iso'))

    decision = decide(placed, by=more, memory=remembered(decide(placed)), ledger=touched(placed))

    assert vcpus(decision, "rt-filler") == [f"{cpu} fifo:1" for cpu in range(2, 8)]
    assert where(decision, "rt-filler")["emulator"] == "0-1"


@pytest.mark.parametrize("when_full", ["degrade", "leave"])
@pytest.mark.parametrize("start", [1, 9000])
def test_full_host_never_costs_a_placed_guest_its_place(when_full, start):
    """A guest that starts on a full host, or an unmanaged one narrowed to its pCPUs, moves no placed guest away."""
    placed = filler(6, start=500)
    first = decide(placed)
    late = guest("rt-late", pid=2000, start=start, on="3")
    stranger = guest("stranger", pid=3000, start=start, on="2-4")

    for memory, ledger in ((remembered(first), Ledger()), (Memory(), touched(placed))):
        decision = decide(placed, late, stranger, by=policy(when_full), memory=memory, ledger=ledger)

        assert vcpus(decision, "rt-filler") == [f"{cpu} fifo:1" for cpu in range(2, 8)]
        assert of(decision, "rt-late").state is (State.DEGRADED if when_full == "degrade" else State.LEFT)


def test_only_guest_whose_last_place_is_intruded_upon_keeps_it():
    """A placed guest's only vCPU stays where it is when an unmanaged guest is narrowed to the whole pool."""
    placed = put(guest("rt-1", vcpus=1), {"vcpu 0": "4"}, fifo())

    decision = decide(placed, guest("stranger", pid=3000, on="2-7"), ledger=touched(placed))

    assert vcpus(decision, "rt-1") == ["4 fifo:1"]


def test_intrusion_and_hot_plug_together_cost_no_place():
    """A placed guest whose pCPUs are all intruded upon keeps them though a vCPU plugged into it has none."""
    placed = put(guest("rt-1"), {"vcpu 0": "4", "vcpu 1": "5"}, fifo())
    new = thread(role=Role.VCPU, index=2)

    decision = decide(plugged(placed, new), guest("stranger", pid=3000, on="2-7"), ledger=touched(placed))

    assert vcpus(decision, "rt-1") == ["4 fifo:1", "5 fifo:1", "0"]
    assert of(decision, "rt-1").roomless == {new.id}


def test_guest_that_was_touched_but_not_placed_keeps_nothing():
    """A guest that rtpind touched and that floats has no place to keep where an unmanaged guest is narrowed to."""
    floating = guest("rt-1", vcpus=1, on="2-7")

    decision = decide(floating, guest("stranger", pid=3000, on="2-7"), ledger=touched(floating))

    assert states(decision)["rt-1"] is State.DEGRADED


def test_one_pcpu_is_not_kept_by_two():
    """Of two placed guests that somebody put on one pCPU of a full host the younger one loses its place."""
    old, young = (
        put(guest(f"rt-{start}", pid=start, start=start, vcpus=1), {"vcpu 0": "4"}, fifo()) for start in (1000, 2000)
    )

    decision = decide(old, young, guest("stranger", pid=3000, on="2-7"), ledger=touched(old, young))

    assert states(decision) == {"rt-1000": State.PLACED, "rt-2000": State.DEGRADED, "stranger": State.UNMANAGED}


def test_floaters_keep_off_what_is_given_out():
    """A floating thread's mask is without exclusive pCPUs even where today's facts make its pool overlap with them."""
    decision = decide(guest("rt-1", vcpus=1), guest("float-1", pid=2000), by=policy(own="2-7"), on=host(isolated="3-7"))

    assert vcpus(decision, "rt-1") == ["2"]
    assert where(decision, "float-1") == {"emulator": "0-1", "vcpu 0": "0", "vcpu 1": "0", "iothread 1": "0-1"}


def test_new_guest_gets_no_pcpu_beside_an_unmanaged_one():
    """A guest not yet placed does not stay where an unmanaged guest is narrowed to, even where all else is taken."""
    new = put(guest("rt-1", vcpus=1), {"vcpu 0": "4"})

    assert states(decide(new, guest("stranger", pid=3000, on="2-7")))["rt-1"] is State.DEGRADED


def test_placed_guest_gives_way_to_an_unmanaged_one_while_there_is_room():
    """Where another pCPU is free a placed vCPU leaves one that an unmanaged guest is now narrowed to."""
    placed = put(guest("rt-1"), {"vcpu 0": "2", "vcpu 1": "3"}, fifo())

    decision = decide(placed, guest("stranger", pid=3000, on="3"), memory=remembered(decide(placed)))

    assert vcpus(decision, "rt-1") == ["2 fifo:1", "4 fifo:1"]


# One pCPU for a role of a guest


def test_exclusive_guest_gives_the_role_one_pcpu():
    """exclusive: guest gives all threads of the role, and of roles that follow it, one pCPU for the whole guest."""
    decision = decide(
        guest("iso-1", vcpus=1, helpers=3, iothreads=2, vhosts=2, pits=1), guest("iso-2", pid=2000, vcpus=1)
    )

    others = dict.fromkeys(("emulator", "iothread 1", "iothread 2", "vhost", "pit"), "3")
    assert where(decision, "iso-1") == {"vcpu 0": "2 fifo:1", **others}
    assert where(decision, "iso-2") == {"vcpu 0": "4 fifo:1", "emulator": "5", "iothread 1": "5"}
    assert held_by(decision) == {2: "iso-1 vcpu 0", 3: "iso-1 emulator", 4: "iso-2 vcpu 0", 5: "iso-2 emulator"}


def test_exclusive_guest_for_all_roles_is_one_pcpu():
    """A class whose every role follows an exclusive emulator puts the whole guest on one pCPU."""
    decision = decide(guest("one-1", vcpus=3), guest("one-2", pid=2000))

    assert set(where(decision, "one-1").values()) == {"2"}
    assert set(where(decision, "one-2").values()) == {"3"}


def test_roles_with_an_entry_of_their_own_have_a_pcpu_of_their_own():
    """Two roles that each say exclusive: guest get a pCPU each."""
    both = factories.policy(
        REALTIME.replace(
            "priority: 1}\n",
            "priority: 1}\n    emulator: {pool: realtime, exclusive: guest}\n"
            "    vhost: {pool: realtime, exclusive: guest}\n",
        )
    )

    decision = decide(guest("rt-1", vcpus=1, vhosts=2, iothreads=1), by=both)

    assert where(decision, "rt-1") == {"vcpu 0": "2 fifo:1", "emulator": "3", "iothread 1": "3", "vhost": "4"}


def test_exclusive_guest_keeps_the_place_of_any_of_its_threads():
    """The pCPU of a role is kept where any thread of it is in place; later threads join it."""
    found = put(guest("iso-1", vcpus=1, iothreads=2), {"iothread 1": "6", "iothread 2": "7"})

    decision = decide(found)

    assert where(decision, "iso-1") == {
        "vcpu 0": "2 fifo:1",
        **dict.fromkeys(("emulator", "iothread 1", "iothread 2"), "6"),
    }
    assert held_by(decision) == {2: "iso-1 vcpu 0", 6: "iso-1 emulator"}


def test_role_without_threads_takes_no_pcpu():
    """A guest without helpers needs no pCPU for them."""
    assert held_by(decide(guest("iso-1", vcpus=1, helpers=0, iothreads=0))) == {2: "iso-1 vcpu 0"}


def test_exclusive_thread_parts_threads_without_a_number():
    """exclusive: thread gives each of several vhost threads a pCPU of its own, and keeps it there."""
    one = guest("vhosts-1", vcpus=1, iothreads=1, vhosts=2)
    other = find(one, "vhost", 1).id

    decision = decide(one)
    again = decide(replace(one, threads=one.threads[::-1]), memory=Memory(places={other: decision.wanted()[other]}))

    assert where(decision, "vhosts-1") == {
        "vcpu 0": "2 fifo:1",
        "emulator": "0",
        "iothread 1": "3",
        "vhost": "4 fifo:2 + 5 fifo:2",
    }
    assert again.wanted() == decision.wanted()
    assert held_by(decision) == {
        2: "vhosts-1 vcpu 0",
        3: "vhosts-1 iothread 1",
        4: "vhosts-1 vhost tid 1200",
        5: "vhosts-1 vhost tid 1201",
    }


# Sharing


def test_share_with_joins_the_vcpu():
    """share_with puts a role on the pCPU of that vCPU, which stays exclusive to the guest."""
    decision = decide(guest("dpdk-1"), guest("dpdk-2", pid=2000, vcpus=1))

    assert where(decision, "dpdk-1") == {"emulator": "2", "vcpu 0": "2", "vcpu 1": "3", "iothread 1": "2"}
    assert where(decision, "dpdk-2") == {"emulator": "4", "vcpu 0": "4", "iothread 1": "4"}
    assert all(wanted.exclusive for wanted in decision.wanted().values())


def test_share_with_takes_the_fifo_of_its_own_entry():
    """A role that shares with a FIFO vCPU has its own, higher priority there."""
    decision = decide(guest("above-1"))

    assert where(decision, "above-1") == {
        "emulator": "0",
        "vcpu 0": "2 fifo:1",
        "vcpu 1": "3 fifo:1",
        "iothread 1": "3 fifo:2",
    }


def test_share_with_is_not_misled_by_an_iothread_of_that_number():
    """share_with: {vcpu: 1} joins vCPU 1 also where iothread 1 has a pCPU of its own."""
    text = REALTIME.replace(
        "fifo, priority: 1}\n", "fifo, priority: 1}\n    iothread: {pool: realtime, exclusive: thread}\n"
    )
    text = text.replace("realtime, exclusive: thread, scheduler: fifo, priority: 1}", "realtime, exclusive: thread}")
    by = factories.policy(text.replace("    iothread", "    emulator: {share_with: {vcpu: 1}}\n    iothread"))

    assert where(decide(guest("rt-1"), by=by), "rt-1") == {
        "emulator": "3",
        "vcpu 0": "2",
        "vcpu 1": "3",
        "iothread 1": "4",
    }


@pytest.mark.parametrize("when_full", ["degrade", "leave"])
def test_share_with_a_vcpu_that_is_not_there_is_refused(when_full):
    """A guest without the vCPU that a role shares with is not placed at all, and takes no pCPU from others."""
    lame = guest("above-1", start=1, vcpus=1)
    later = guest("rt-2", pid=2000, vcpus=6)

    decision = decide(lame, later, by=policy(when_full))

    found = of(decision, "above-1")
    assert found.state is (State.DEGRADED if when_full == "degrade" else State.LEFT)
    assert found.reason == "iothread is to share with vcpu 1, which the guest does not have"
    assert where(decision, "above-1") == (
        {"emulator": "0", "vcpu 0": "0-1", "iothread 1": "0-1"} if when_full == "degrade" else {}
    )
    assert states(decision)["rt-2"] is State.PLACED


def test_role_that_shares_with_a_vcpu_without_room_waits_with_it():
    """Where the vCPU that a role shares with has no pCPU, the role floats too, without FIFO, and that is said."""
    before = replace(POLICY, rules=(replace(POLICY.rules[1], name="above-*"), *POLICY.rules))
    placed = guest("above-1", vcpus=1)
    memory = remembered(decide(placed, by=before))
    full = plugged(placed, thread(role=Role.VCPU, index=1))

    decision = decide(full, filler(5, first=3), memory=memory, ledger=touched(placed, filler(5)))

    found, iothread = of(decision, "above-1"), find(full, "iothread 1")
    assert where(decision, "above-1") == {"emulator": "0", "vcpu 0": "2 fifo:1", "vcpu 1": "0", "iothread 1": "0"}
    assert found.state is State.PLACED
    assert found.roomless == {thread_id(role=Role.VCPU, index=1), iothread.id}
    assert found.wanted[iothread.id].withheld == "no free pCPU"


# Threads that libvirt has yet to move


def unsettled(index, *, on="0-7", **fields):
    return thread(role=Role.VCPU, index=index, on=on, settled=False, **fields)


def test_unsettled_vcpu_has_no_wanted_place_but_room():
    """A vCPU that libvirt is about to move is not touched; a pCPU waits for it."""
    decision = decide(guest("rt-1", vcpus=1, extra=[unsettled(1)]), guest("rt-2", pid=2000, start=1, vcpus=1))

    assert vcpus(decision, "rt-1") == ["3 fifo:1"]
    assert held_by(decision) == {2: "rt-2 vcpu 0", 3: "rt-1 vcpu 0", 4: "rt-1 vcpu 1"}


def test_name_alone_takes_no_pcpu_from_anybody():
    """A guest that names its threads like vCPUs gets no pCPU that another guest could have (promise 5)."""
    names = [unsettled(index, on=str(index)) for index in range(2, 8)]
    placed, later = guest("rt-1", vcpus=1), guest("rt-2", pid=2000, start=START + 1, vcpus=5)

    decision = decide(plugged(placed, *names), later, memory=remembered(decide(placed)), ledger=touched(placed))

    assert vcpus(decision, "rt-1") == ["2 fifo:1"]
    assert vcpus(decision, "rt-2") == [f"{cpu} fifo:1" for cpu in range(3, 8)]


def test_room_for_threads_that_are_not_settled_goes_by_age():
    """Of two starting guests the older one's threads come first."""
    old = guest("rt-old", start=1, vcpus=0, extra=[unsettled(index) for index in range(4)])
    young = guest(
        "rt-young",
        pid=2000,
        start=2,
        vcpus=0,
        extra=[thread(role=Role.VCPU, index=index, pid=2000, settled=False) for index in range(4)],
    )

    assert states(decide(young, old)) == {"rt-old": State.PLACED, "rt-young": State.DEGRADED}


@pytest.mark.parametrize("tid", [1, 9999])
def test_two_claimants_of_one_vcpu_need_one_pcpu(tid):
    """A thread that claims a settled vCPU's name takes no second pCPU, and does not draw the vCPU to its own."""
    forger = replace(unsettled(0, on="6"), id=thread_id()._replace(tid=tid))

    decision = decide(put(guest("rt-1", vcpus=1, extra=[forger]), {}))

    assert held_by(decision) == {2: "rt-1 vcpu 0"}
    assert vcpus(decision, "rt-1") == ["2 fifo:1"]
    assert forger.id not in decision.wanted()


def test_doubtful_claimants_need_one_pcpu():
    """Two threads of which nobody knows yet which is the vCPU have room for one."""
    two = [replace(unsettled(0), id=thread_id()._replace(tid=tid)) for tid in (7, 8)]

    decision = decide(guest("rt-1", vcpus=0, extra=two))

    assert held_by(decision) == {2: "rt-1 vcpu 0"}


# FIFO is earned (promise 7)

BARE = {"throttles": False, "rt_runtime_us": -1, "fair_server": NO_CPUS}


@pytest.mark.parametrize(
    ("throttles", "runtime", "fair_server", "is_unprotected"),
    [
        (True, 950_000, "", False),
        (True, -1, "", True),
        (False, 950_000, "", True),
        (False, -1, "", True),
        (None, 950_000, "", False),
        (None, -1, "", True),
        (True, None, "", False),
        (False, None, "", True),
        (None, None, "", False),
        (False, -1, "4", False),
        (False, -1, "5", True),
        (False, -1, None, False),
        (True, -1, None, False),
        (True, -1, "4-5", False),
    ],
)
def test_throttling_or_the_fair_server_protects_a_pcpu(throttles, runtime, fair_server, is_unprotected):
    """A pCPU is protected by RT throttling in force or by its fair server; what cannot be read counts as protection."""
    on = host(
        throttles=throttles, rt_runtime_us=runtime, fair_server=None if fair_server is None else cpus(fair_server)
    )

    assert unprotected(on, 4) is is_unprotected


@pytest.mark.parametrize(
    ("facts", "priority", "withheld"),
    [
        ({}, 99, False),  # throttled
        (BARE, 1, False),  # guards cannot be read
        (BARE | {"guards": {}}, 1, False),
        (BARE | {"guards": {4: 2}}, 1, False),
        (BARE | {"guards": {4: 1}}, 1, True),
        (BARE | {"guards": {4: 0}}, 1, True),
        (BARE | {"guards": {4: 50}}, 49, False),
        (BARE | {"guards": {4: 50}}, 50, True),
        (BARE | {"guards": {4: 50, 5: 1}}, 49, False),  # another pCPU's
        (BARE | {"guards": {4: 1}, "throttles": True, "rt_runtime_us": 1}, 1, False),
        (BARE | {"guards": {4: 1}, "fair_server": CpuSet([4])}, 1, False),
    ],
)
def test_fifo_needs_protection_or_guards_above_it(facts, priority, withheld):
    """Where nothing protects a pCPU, FIFO is given only below its rcuc, ktimers and ksoftirqd, or with unsafe: true."""
    on = host(**facts)

    reason = fifo_withheld(on, cpus("4"), priority, cpus("0-1"), unsafe=False)

    assert bool(reason) is withheld
    if withheld:
        assert "nothing protects the host on pCPU 4: RT throttling is off" in reason
        assert f"at FIFO {on.guards[4]}, not above {priority}" in reason
    assert fifo_withheld(on, cpus("4"), priority, cpus("0-1"), unsafe=True) == ""


def test_fifo_is_judged_by_every_pcpu():
    """One pCPU whose guards are too low is enough."""
    on = host(**BARE, guards={4: 50, 5: 1})

    assert "on pCPU 5" in fifo_withheld(on, cpus("4-5"), 1, cpus("0-1"), unsafe=False)


@pytest.mark.parametrize("unsafe", [False, True])
def test_fifo_is_never_given_on_housekeeping(unsafe):
    """A pCPU of the housekeeping pool gets no FIFO, whatever the class says."""
    assert fifo_withheld(HOST, cpus("1-2"), 1, cpus("0-1"), unsafe=unsafe) == "pCPU 1 is housekeeping"
    assert fifo_withheld(HOST, cpus("2"), 1, cpus("0-1"), unsafe=unsafe) == ""


@pytest.mark.parametrize("unsafe", [False, True])
def test_vcpu_without_earned_fifo_still_has_its_pcpu(unsafe):
    """A vCPU from which FIFO is withheld is placed exclusively without it, with the reason; unsafe: true gives it."""
    by = factories.policy(
        REALTIME.replace("  realtime:\n    vcpu", f"  realtime:\n    unsafe: {str(unsafe).lower()}\n    vcpu")
    )
    on = host(**BARE, guards={2: 0, 3: 2})
    one = guest("rt-1")

    decision = decide(one, by=by, on=on)

    first, second = (decision.wanted()[find(one, f"vcpu {index}").id] for index in (0, 1))
    assert (first.cpus, first.exclusive, first.priority) == (cpus("2"), True, int(unsafe))
    assert bool(first.withheld) is not unsafe
    assert second == Wanted(cpus("3"), 1, exclusive=True)


def test_no_fifo_on_a_pcpu_that_became_housekeeping():
    """A pCPU that is housekeeping by today's facts gets no FIFO though the policy was read on other facts."""
    by = policy(own="2-7")

    decision = decide(guest("rt-1", vcpus=1), by=by, on=host(isolated="3-7"))

    (wanted,) = (decision.wanted()[find(guest(), "vcpu 0").id],)
    assert wanted == Wanted(cpus("2"), exclusive=True, withheld="pCPU 2 is housekeeping")


# Whatever the host

NAMES = ["infra", "rt", "iso", "one", "dpdk", "above", "vhosts", "float", "stranger"]
MASKS = st.sampled_from(["0-7", "0-1", "0", "2-7", "3-4", "2", "3", "4", "5", "6"])
CALM_OR_NOT = st.sampled_from([OTHER, OTHER, fifo(1), Scheduling(Sched.RR, 5), Scheduling(Sched.BATCH)])
HOSTS = st.sampled_from([HOST, host(online="0-5", possible="0-7"), host(isolated="3-7"), host(**BARE, guards={3: 1})])
POLICIES = st.sampled_from([POLICY, policy("leave"), policy(own="2-4"), policy("leave", own='"2-3,6"')])


@st.composite
def guests(draw, masks=MASKS, schedulings=CALM_OR_NOT):
    """Up to four guests of any class, with threads anywhere."""
    made = []
    for number in range(draw(st.integers(1, 4))):
        one = guest(
            f"{draw(st.sampled_from(NAMES))}-{number}",
            pid=1000 * (number + 1),
            start=draw(st.sampled_from([500, 501])),
            vcpus=draw(st.integers(0, 3)),
            iothreads=draw(st.integers(0, 1)),
            helpers=draw(st.integers(1, 2)),
            vhosts=draw(st.integers(0, 2)),
        )
        late = draw(st.booleans()) and draw(st.booleans())
        threads = tuple(
            replace(
                thread,
                now=Placement(cpus(draw(masks)), draw(schedulings)),
                settled=not (late and thread.index is not None and draw(st.booleans())),
            )
            for thread in one.threads
        )
        made.append(replace(one, threads=threads))
    return made


@st.composite
def histories(draw, seen):
    """What a daemon may know of these guests: what an earlier pass decided, touched, was refused and was told."""
    memory, ledger = Memory(), Ledger()
    if draw(st.booleans()):
        earlier = decide(*draw(st.permutations(seen))[: draw(st.integers(0, len(seen)))], by=draw(POLICIES))
        memory = remembered(earlier)
        ledger = ledger.recording(one for one in snapshot(*seen).threads() if one.id in memory.places)
    for one in snapshot(*seen).threads():
        if draw(st.integers(0, 15)) == 0:
            memory = replace(memory, refused={**memory.refused, one.id: (refused(one),)})
    if draw(st.integers(0, 3)) == 0:
        ledger = replace(ledger, hands_off={draw(st.sampled_from(seen)).uuid: Off(draw(st.sampled_from(HandsOff)))})
    return memory, ledger


@st.composite
def worlds(draw):
    """A policy, a snapshot, and what is remembered."""
    seen = draw(guests())
    memory, ledger = draw(histories(seen))
    return draw(POLICIES), snapshot(*seen, host=draw(HOSTS)), memory, ledger


def slot_of(found, one):
    """Return what a thread's place is exclusive to, by its class."""
    entry = POLICY.classes[found.class_name].entry(one.role, one.index)
    if entry.share_with is not None:
        return str(entry.share_with)
    if entry.exclusive is Exclusive.GUEST:
        return "guest"
    return one.id


@unhurried
@given(worlds())
def test_exclusive_places_are_disjoint(world):
    """On any host, no thread is to run on another's exclusive pCPU, unless its guest's class joins the two."""
    decision = place(*world)

    holders = {}
    for found in decision.guests:
        for one in found.guest.threads:
            wanted = found.wanted.get(one.id)
            if wanted is None:
                continue
            assert wanted.cpus
            if not wanted.exclusive:
                assert not wanted.cpus & CpuSet(decision.owners)
                assert not wanted.priority
                continue
            slot = slot_of(found, one)
            (cpu,) = wanted.cpus
            assert cpu in decision.owners
            holder = holders.setdefault(cpu, (found.guest.uuid, {}))
            assert holder[0] == found.guest.uuid
            holder[1].setdefault(one.label if one.role is Role.VCPU and slot == one.id else slot, one)
    for _, slots in holders.values():
        assert len(slots) == 1


@unhurried
@given(worlds())
def test_fifo_vcpu_shares_with_nobody_but_its_own_guests_higher_fifo(world):
    """On any host, no wanted place breaks promise 1, nor does one use housekeeping for FIFO (promise 7)."""
    policy_, seen, *_ = world
    decision = place(*world)
    every = [
        (one, found.wanted[one.id])
        for found in decision.guests
        for one in found.guest.threads
        if one.id in found.wanted
    ]

    for vcpu, wanted in every:
        if vcpu.helper or not wanted.priority:
            continue
        assert not wanted.cpus & policy_.pool("housekeeping", seen.host)
        for other, theirs in every:
            if other.id != vcpu.id and theirs.cpus & wanted.cpus:
                assert (other.guest, theirs.priority > wanted.priority) == (vcpu.guest, True)


@unhurried
@given(worlds())
def test_every_wanted_place_is_a_pool_s(world):
    """On any host, threads are to be on online pCPUs of the pool of their entry, or else in housekeeping."""
    policy_, seen, *_ = world
    decision = place(*world)

    for found in decision.guests:
        for one in found.guest.threads:
            wanted = found.wanted.get(one.id)
            if wanted is None:
                continue
            class_ = policy_.classes[found.class_name]
            names = (
                {"own"}
                if wanted.exclusive
                else {
                    "housekeeping",
                    class_.entry(one.role, one.index).pool,
                    class_.entry(Role.EMULATOR, None).pool,
                }
            )
            assert any(wanted.cpus <= policy_.pool(name, seen.host) for name in names)


@unhurried
@given(worlds())
def test_guest_is_placed_touched_and_given_pcpus_only_in_its_state(world):
    """On any host, only settled threads of managed guests have places; who has no room holds no pCPU, and says so."""
    policy_, seen, _, ledger = world
    decision = place(*world)
    uuids = {owner.partition(": ")[0] for owner in decision.owners.values()}

    assert {found.guest.uuid for found in decision.guests} == {one.uuid for one in seen.guests}
    for found in decision.guests:
        assert found.state.managed or not found.wanted
        assert found.state is State.PLACED or found.guest.uuid not in uuids
        assert (found.state in (State.DEGRADED, State.LEFT)) <= bool(found.reason)
        assert not found.roomless or found.state is State.PLACED
        settled = {one.id for one in found.guest.threads if one.settled}
        assert set(found.wanted) | found.roomless <= settled
        wanted = found.wanted.values()
        assert found.state is State.PLACED or not any(one.exclusive or one.priority for one in wanted)
        class_ = policy_.class_of(policy_.rule_for(found.guest))
        left = ledger.off(found.guest, 0.0) is not None or class_ is None
        assert (found.state in (State.UNMANAGED, State.UNCLAIMED, State.RELEASED, State.PAUSED)) is left


@unhurried
@given(worlds())
def test_new_place_is_not_where_somebody_left_alone_is_narrowed_to(world):
    """On any host, what a guest that is left alone is narrowed to is given to nobody who was not there already."""
    _, seen, memory, ledger = world
    decision = place(*world)

    defaults = (seen.host.online, seen.host.online - seen.host.isolated)
    alone = NO_CPUS
    for found in decision.guests:
        if found.state in (State.UNMANAGED, State.UNCLAIMED, State.RELEASED, State.PAUSED):
            for one in found.guest.threads:
                narrowed = one.now.cpus & seen.host.online
                alone |= NO_CPUS if narrowed in defaults else narrowed
    for found in decision.guests:
        fresh = all(one.id not in memory.places and one.id not in ledger.originals for one in found.guest.threads)
        if fresh:
            assert not any(wanted.exclusive and wanted.cpus & alone for wanted in found.wanted.values())


@unhurried
@given(worlds(), st.randoms(use_true_random=False))
def test_order_of_guests_and_threads_does_not_matter(world, random):
    """The same guests and threads in another order have the same places (promise 10)."""
    policy_, seen, memory, ledger = world
    shuffled = [replace(one, threads=tuple(random.sample(one.threads, len(one.threads)))) for one in seen.guests]
    random.shuffle(shuffled)

    one = place(policy_, seen, memory, ledger)
    two = place(policy_, replace(seen, guests=tuple(shuffled)), memory, ledger)

    assert one.wanted() == two.wanted()
    assert list(one.owners.items()) == list(two.owners.items())
    assert list(one.blocked) == list(two.blocked)
    assert [(found.guest.uuid, found.state, found.reason, found.roomless) for found in one.guests] == [
        (found.guest.uuid, found.state, found.reason, found.roomless) for found in two.guests
    ]


def places(decision):
    """Return the wanted places without the reasons, which may name another vCPU when another guest came or went."""
    return {id_: replace(wanted, withheld="") for id_, wanted in decision.wanted().items()}


def settled(seen):
    return replace(
        seen,
        guests=tuple(
            replace(one, threads=tuple(replace(thread, settled=True) for thread in one.threads)) for one in seen.guests
        ),
    )


@unhurried
@given(guests(masks=st.just("0-7"), schedulings=st.just(OTHER)), POLICIES, HOSTS)
def test_placement_is_kept_by_a_daemon_that_starts_anew(seen, by, on):
    """Decided and applied, the same is decided again: by the same daemon, and by one that knows only the kernel."""
    before = settled(snapshot(*seen, host=on))
    first = place(by, before, Memory(), Ledger())
    after = applied(before, first)
    ledger = Ledger().recording(one for one in before.threads() if one.id in first.wanted())

    for memory in (Memory(), remembered(first)):
        assert places(place(by, after, memory, ledger)) == places(first)
    assert places(place(by, after, Memory(), Ledger())) == places(first)


@unhurried
@given(worlds())
def test_placement_comes_to_rest(world):
    """From any beginning, a placement that is applied does not change again, at the latest after a pass per guest.

    A guest without room blocks what it is narrowed to. When it gets room it leaves that, and the next guest may follow.
    """
    policy_, seen, memory, ledger = world
    seen = settled(seen)
    decision = place(policy_, seen, memory, ledger)
    for _ in range(2 + len(seen.guests)):
        ledger = ledger.recording(one for one in seen.threads() if one.id in decision.wanted())
        memory, seen, last = replace(memory, places=decision.wanted()), applied(seen, decision), decision
        decision = place(policy_, seen, memory, ledger)

    assert places(decision) == places(last)
    assert decision.owners == last.owners


@unhurried
@given(worlds(), guests(masks=st.just("0-7"), schedulings=st.just(OTHER)))
def test_newcomers_move_no_placed_guest(world, late):
    """Guests that start with nothing chosen for them take no place from one that has it."""
    policy_, seen, memory, ledger = world
    first = place(policy_, settled(seen), memory, ledger)
    before = settled(applied(seen, first))
    ledger = ledger.recording(one for one in seen.threads() if one.id in first.wanted())
    memory = replace(memory, places=first.wanted())
    newcomers = [
        replace(
            one,
            uuid=f"late-{one.uuid}",
            threads=tuple(
                replace(thread, guest=f"late-{one.uuid}", id=thread.id._replace(pid=thread.id.pid + 9))
                for thread in one.threads
            ),
        )
        for one in late
    ]

    alone = place(policy_, before, memory, ledger).wanted()
    together = place(policy_, replace(before, guests=(*before.guests, *newcomers)), memory, ledger).wanted()

    kept = {id_: wanted for id_, wanted in first.wanted().items() if wanted.exclusive and alone[id_] == wanted}
    assert {id_: together.get(id_) for id_ in kept} == kept
