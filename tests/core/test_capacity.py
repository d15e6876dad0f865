# SPDX-License-Identifier: GPL-2.0-or-later
"""How many guests fit under which class."""

import pytest
from factories import applied, cpus, guest, host, snapshot

from rtpind.core.capacity import Shape, fits, made_up, made_up_host, one_more, table
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import Snapshot
from rtpind.core.placement import place
from rtpind.core.policyfile import load

SCHEMES = """
version: 1
pools: {housekeeping: HOUSEKEEPING, realtime: REALTIME}
classes:
  emulator-on-vcpu0:
    vcpu:
      - {ids: 0, pool: realtime, exclusive: thread}
      - {pool: realtime, exclusive: thread, scheduler: fifo}
    emulator: {share_with: {vcpu: 0}}
  emulator-own-pcpu:
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}
    emulator: {pool: realtime, exclusive: guest}
  shared-pool: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}}
"""


def policy(text, on):
    made, problems = load(text, on)
    assert problems == []
    return made


def rows(text, on, sizes, guests=(), **options):
    by = policy(text, on)
    return list(table(by, sizes, Snapshot(host=on, guests=tuple(guests)), Memory(), Ledger(), **options))


@pytest.mark.parametrize(
    ("shape", "housekeeping", "realtime", "expected"),
    [
        # Three pCPUs for guests and one for the host and the shared pool: facts measured on Nova 34.
        ((1, 4, 1), "0", "1-3", {"emulator-on-vcpu0": [0, 1, 1], "emulator-own-pcpu": [1, 1, 0]}),
        ((1, 4, 1), "0", "1-3", {"shared-pool": [3, 1, 1]}),
        # All four given to guests; the host has a fifth.
        ((1, 5, 1), "4", "0-3", {"emulator-on-vcpu0": [0, 2, 1, 1], "emulator-own-pcpu": [2, 1, 1, 0]}),
    ],
)  # fmt: skip
def test_the_packing_table(shape, housekeeping, realtime, expected):
    """The figures of the field for a host of four pCPUs."""
    text = SCHEMES.replace("HOUSEKEEPING", housekeeping).replace("REALTIME", f'"{realtime}"')
    on = made_up_host(*shape)

    found = rows(text, on, range(1, 1 + max(map(len, expected.values()))))

    for name, guests in expected.items():
        assert [row.guests for row in found if row.class_name == name] == guests


def test_a_row_says_what_limits_it_and_how_many_vcpus_are_realtime():
    """No realtime vCPU, no free pCPU, and the count."""
    text = SCHEMES.replace("HOUSEKEEPING", "0").replace("REALTIME", '"1-3"')
    found = {(row.class_name, row.vcpus): row for row in rows(text, made_up_host(1, 4, 1), [1, 2])}

    alone = found["emulator-on-vcpu0", 1]
    assert (alone.realtime_vcpus, alone.limited_by) == (0, "a guest of 1 vCPU has no realtime vCPU in this class")
    assert found["shared-pool", 1].realtime_vcpus == 3
    assert found["emulator-on-vcpu0", 2].realtime_vcpus == 1
    assert found["shared-pool", 2].limited_by == "no free pCPU in 'realtime' for vcpu 1"


def test_what_promise_7_withholds_is_said():
    """Where no pCPU of the pool may have FIFO, no guest fits, and the reason is the daemon's."""
    on = host(throttles=False, rt_runtime_us=-1, guards=dict.fromkeys(range(8), 0))
    text = SCHEMES.replace("HOUSEKEEPING", '"0-1"').replace("REALTIME", '"2-7"')

    (row,) = (row for row in rows(text, on, [1]) if row.class_name == "shared-pool")

    assert row.guests == 0
    assert "nothing protects the host on pCPU 2" in row.limited_by


def test_threads_that_all_float_fit_without_end():
    """A class without a pCPU of its own is not limited by pCPUs."""
    (row,) = rows("version: 1\nclasses: {web: {vcpu: {pool: housekeeping}}}\n", host(), [2])

    assert (row.guests, row.limited_by) == (None, "nothing: its threads share what there is")


def test_guests_that_run_take_room():
    """With those that are there, fewer fit; they are not moved."""
    on = host()
    text = SCHEMES.replace("HOUSEKEEPING", '"0-1"').replace("REALTIME", '"2-7"')
    text += 'guests: [{name: "*", class: shared-pool}]\nwhen_full: degrade\n'
    before = snapshot(guest(vcpus=4), host=on)
    seen = applied(before, place(policy(text, on), before, Memory(), Ledger()))

    (row,) = (row for row in rows(text, on, [1], seen.guests) if row.class_name == "shared-pool")

    assert row.guests == 2


def test_what_is_there_is_counted_too():
    """Who has its places, by class and size, with its FIFO vCPUs; sizes that nobody asked for have rows too."""
    on = host()
    text = SCHEMES.replace("HOUSEKEEPING", '"0-1"').replace("REALTIME", '"2-7"')
    by = policy(text + 'guests: [{name: "*", class: shared-pool}]\nwhen_full: degrade\n', on)
    running = snapshot(
        guest(vcpus=2), guest("two", pid=2000, start=600, vcpus=3), guest("no room", pid=3000, start=700, vcpus=2),
        guest("starting", pid=4000, start=800, vcpus=0, young=True), host=on,
    )  # fmt: skip
    there = place(by, running, Memory(), Ledger())

    found = list(table(by, [1, 2], running, Memory(), Ledger(), there=there))

    assert {(row.class_name, row.vcpus): (row.running, row.running_realtime) for row in found} == {
        **{(name, size): (0, 0) for name in ("emulator-on-vcpu0", "emulator-own-pcpu") for size in (1, 2)},
        ("shared-pool", 1): (0, 0), ("shared-pool", 2): (1, 2), ("shared-pool", 3): (1, 3),
    }  # fmt: skip
    assert {row.running for row in table(by, [1], running, Memory(), Ledger())} == {None}


def test_a_whole_core_for_each_guest_halves_what_fits():
    """Siblings that are kept idle are room that is not there."""
    on = made_up_host(1, 4, 2)
    text = "version: 1\npools: {r: {cpus: isolated, siblings: SIBLINGS}}\n"
    text += "classes: {c: {vcpu: {pool: r, exclusive: thread}}}\n"

    assert str(on.isolated) == "1-3,5-7"
    for siblings, guests in (("ignore", 6), ("same-guest", 3), ("idle", 3)):
        (row,) = rows(text.replace("SIBLINGS", siblings), on, [1])
        assert row.guests == guests


def test_iothreads_and_ids_count():
    """Iothreads with pCPUs of their own take room; a class for another shape takes none."""
    on = made_up_host(1, 8, 1)
    own = """
version: 1
pools: {r: isolated}
classes:
  c: {vcpu: {pool: r, exclusive: thread}, iothread: {pool: r, exclusive: thread}}
  four: {vcpu: {ids: 0-3, pool: r, exclusive: thread}}
"""
    found = rows(own, on, [1], iothreads=1)

    assert [(row.class_name, row.guests) for row in found] == [("c", 3), ("four", 0)]
    assert found[1].limited_by == "class four names vcpu 1-3, which the guest does not have"


def test_where_one_more_guest_would_go():
    """A made-up guest is placed beside the others, by its class, whatever the rules say."""
    on = host()
    text = SCHEMES.replace("HOUSEKEEPING", '"0-1"').replace("REALTIME", '"2-7"')
    text += 'guests: [{name: "*", class: shared-pool}]\n'
    before = snapshot(guest(vcpus=2), host=on)

    decision, added = one_more(
        policy(text, on), "emulator-own-pcpu", Shape(vcpus=1, threads=2), before, Memory(), Ledger()
    )

    places = {thread.label: str(decision.wanted()[thread.id].cpus) for thread in added.threads}
    assert places == {"vcpu 0": "4", "emulator": "5"}
    assert added.traits.threads == 2


def test_a_host_that_is_made_up_keeps_its_first_core_for_itself():
    """Unless it is told what is isolated."""
    assert str(made_up_host(2, 2, 2).isolated) == "1-3,5-7"
    assert str(made_up_host(1, 4, 1, cpus("2")).isolated) == "2"


def test_the_row_of_one_class():
    """The classes that are not asked for are not placed."""
    on = host()
    by = policy(SCHEMES.replace("HOUSEKEEPING", '"0-1"').replace("REALTIME", '"2-7"'), on)

    row = fits(by, by.classes["shared-pool"], Shape(vcpus=2), Snapshot(host=on), Memory(), Ledger())

    assert (row.guests, row.realtime_vcpus) == (3, 6)
    assert len(made_up("x", Shape(vcpus=2, iothreads=2)).threads) == 5
