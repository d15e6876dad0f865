# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of the free pCPUs a guest gets, on hosts of every kind; beside the best that could be done."""

from itertools import combinations

import pytest
from factories import cpus, guest, host, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpind.core.allocate import choose
from rtpind.core.claims import Claims
from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import State
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.placement import place
from rtpind.core.policy import Siblings
from rtpind.core.policyfile import load
from rtpind.core.topology import Topology

unhurried = settings(deadline=None)

FLAT = Topology.built(1, 8)
SERVER = Topology.built(2, 8, 2)  # two sockets, eight cores each, two threads
MANY_CACHES = Topology.built(1, 32, 2, caches=8)  # as AMD's
DIES = Topology.built(1, 16, caches=4, dies=2)
QUARTERS = Topology.built(1, 32, caches=8, nodes=4)  # AMD with four nodes per socket
HOLES = Topology.built(4, 128, 2)  # 1024 pCPUs


def chosen(count, free, topology=FLAT, siblings=Siblings.IGNORE, threads=1):
    return list(choose(count, cpus(free), topology, [CpuSet(range(1024))], siblings, threads))


@pytest.mark.parametrize(
    ("count", "free", "topology", "expected"),
    [
        (2, "3-7", FLAT, [3, 4]),
        (6, "3-7", FLAT, []),
        (2, "0-31", SERVER, [0, 1]),
        (2, "0,8-15", SERVER, [8, 9]),  # the socket with less room could hold only one
        (2, "0-1,8-15", SERVER, [0, 1]),  # the fullest that has room
        (9, "0-7,8-15", SERVER, [0, 1, 2, 3, 4, 5, 6, 7, 8]),  # no socket is enough
        (2, "0-3,33,4-7", MANY_CACHES, [4, 5]),  # 0-3 and 33 are one cache: 4-7 is fuller
        (5, "4-11", MANY_CACHES, [4, 5, 6, 7, 8]),  # no cache is enough
        (3, "0-99,200-1000:1/2", HOLES, [200, 202, 204]),
        (4, "1-15", DIES, [4, 5, 6, 7]),  # one L3 cache
        (6, "3-15", DIES, [8, 9, 10, 11, 12, 13]),  # no cache is enough, and one die is
        (6, "3-31", QUARTERS, [8, 9, 10, 11, 12, 13]),  # the die is the socket: its nodes are closer
    ],
)
def test_the_smallest_and_fullest_part_with_room_is_taken(count, free, topology, expected):
    """L3 cache before die before node before socket, best fit, lowest pCPU; on small, large and odd hosts."""
    assert chosen(count, free, topology) == expected


def test_pairs_come_whole_cores_first():
    """A guest with threads takes cores of which both siblings are free before halves."""
    assert chosen(2, "0,1,17", SERVER, threads=2) == [1, 17]
    assert chosen(3, "0,1,17", SERVER, threads=2) == [1, 17, 0]
    assert chosen(2, "0,2,1", SERVER, threads=2) == [0, 1]


def test_half_used_cores_come_last():
    """For others an idle core comes before the sibling of a pCPU that is in use."""
    assert chosen(2, "0,16,1,18", SERVER) == [0, 1]
    assert chosen(3, "0,16,1,18", SERVER) == [0, 1, 16]


def test_idle_counts_cores():
    """With idle siblings a core is good for one."""
    assert chosen(2, "0,16,1,17", SERVER, Siblings.IDLE) == [0, 1]
    assert chosen(3, "0,16,1,17", SERVER, Siblings.IDLE) == []


@unhurried
@given(
    st.integers(1, 6),
    st.sets(st.integers(0, 31)),
    st.sampled_from([FLAT, SERVER, MANY_CACHES]),
    st.sampled_from(Siblings),
    st.integers(1, 2),
)
def test_what_is_chosen_is_free_enough_and_stable(count, free, topology, siblings, threads):
    """As many as asked of those that are free, none twice; or none, and only where there are too few."""
    free = CpuSet(free)
    found = choose(count, free, topology, [CpuSet(range(64))], siblings, threads)
    cores = len({topology.siblings(cpu) for cpu in free})

    assert bool(found) == ((cores if siblings is Siblings.IDLE else len(free)) >= count)
    assert len(set(found)) == len(found) == (count if found else 0)
    assert CpuSet(found) <= free
    assert found == choose(count, free, topology, [CpuSet(range(64))], siblings, threads)


# Claims


def test_the_books_are_balanced():
    """What was given is taken; what is taken back is free again; a sibling kept idle is its guest's."""
    claims = Claims(SERVER)
    claims.give(0, "a", "vcpu 0", Siblings.IDLE)
    claims.give(1, "b", "vcpu 0", Siblings.IGNORE)

    assert (str(claims.taken), claims.owners) == ("0-1,16", {0: "a: vcpu 0", 1: "b: vcpu 0"})
    assert str(claims.free(cpus("0-2,16-18"), "a")) == "2,17-18"
    assert str(claims.free(cpus("0-2,16-18"), "b")) == "2,17-18"
    assert str(claims.alone(cpus("2,16-18"), "a", Siblings.IDLE)) == "2,18"
    assert str(claims.alone(cpus("2,16-18"), "a", Siblings.SAME_GUEST)) == "2,16,18"
    claims.take_back("a")
    claims.take_back("nobody")
    assert (str(claims.taken), list(claims.owners)) == ("1", [1])


def test_a_block_of_ones_own_is_none():
    """A guest may be given what only its own threads are narrowed to, and join who it is told to join."""
    claims = Claims(SERVER, shared=cpus("3"))
    claims.block(cpus("4-5"), "a", "a: emulator")
    claims.block(cpus("5"), "b", "b: emulator")
    claims.block(cpus("6"), "", "busy: x")

    assert str(claims.free(cpus("4-7"), "a")) == "4,7"
    assert str(claims.free(cpus("4-7"), "b")) == "7"
    assert str(claims.free(cpus("4-7"), "b", beside="")) == "6-7"
    assert claims.blocked() == {4: "a: emulator", 5: "a: emulator; b: emulator", 6: "busy: x"}
    assert str(claims.alone(cpus("19-22"), "a", Siblings.SAME_GUEST)) == "20"  # beside 3 floats, 5 and 6 are others'


# Beside the best that could be done


def policy_of(siblings, on):
    text = f"""
version: 1
pools: {{realtime: {{cpus: isolated, siblings: {siblings}}}}}
classes: {{c: {{vcpu: {{pool: realtime, exclusive: thread}}}}}}
guests: [{{name: "*", class: c}}]
when_full: leave
"""
    made, problems = load(text, on)
    assert problems == []
    return made


def best(sizes, free, topology, siblings):
    """Return how many guests fit at most, whoever fits when it comes being let in, by trying every choice of pCPUs."""
    if not sizes:
        return 0
    choices = []
    for some in combinations(sorted(free), sizes[0]):
        cores = set().union(*(topology.siblings(cpu) for cpu in some))
        apart = siblings != "idle" or len({topology.siblings(cpu) for cpu in some}) == len(some)
        if apart and (siblings == "ignore" or cores <= free):
            choices.append(frozenset(some) if siblings == "ignore" else frozenset(cores))
    rest = sizes[1:]
    return max((1 + best(rest, free - taken, topology, siblings) for taken in set(choices)), default=None) or best(
        rest, free, topology, siblings
    )


@unhurried
@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=4),
    st.sampled_from([(1, 4, 1), (1, 3, 2), (2, 3, 1), (2, 2, 2)]),
    st.sampled_from(["ignore", "same-guest", "idle"]),
)
def test_no_more_than_one_guest_is_lost_to_the_best(sizes, shape, siblings):
    """On small hosts, guests that come one after the other are placed as well as could be, but for one at most."""
    topology = Topology.built(*shape)
    online = CpuSet(range(shape[0] * shape[1] * shape[2]))
    free = online - topology.siblings(0)
    on = host(online=str(online), isolated=str(free), topology=topology)
    guests = [
        guest(f"g{number}", pid=1000 * (number + 1), start=number, vcpus=size, iothreads=0)
        for number, size in enumerate(sizes)
    ]

    decision = place(policy_of(siblings, on), snapshot(*guests, host=on), Memory(), Ledger())

    placed = sum(found.state is State.PLACED for found in decision.guests)
    assert placed >= best(tuple(sizes), frozenset(free), topology, siblings) - 1
