# SPDX-License-Identifier: GPL-2.0-or-later
"""What the ledger keeps of originals and of guests left alone (promise 8), and how it takes damage."""

import copy
import json
from dataclasses import replace

import pytest
from factories import PID, START, cpus, fifo, find, guest, put, snapshot, thread_id, uuid_of
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpind.core import ledger as ledger_module
from rtpind.core.cpuset import CpuSet
from rtpind.core.ledger import EVERYONE, VERSION, HandsOff, Ledger, Off, Original, dump, load
from rtpind.core.model import OTHER, Placement, Role, Sched, Scheduling, ThreadId

unhurried = settings(deadline=None, max_examples=50)  # a busy machine is no failure

PROCESS = (PID, START)
OTHERS = 2000  # the pid of another guest

NUMBERS = st.integers(0, 2**31)
IDS = st.builds(ThreadId, NUMBERS, NUMBERS, NUMBERS, NUMBERS)
PLACEMENTS = st.builds(
    Placement,
    st.builds(CpuSet, st.frozensets(st.integers(0, 200), min_size=1)),
    st.builds(Scheduling, st.sampled_from(Sched), st.integers(0, 99), st.booleans()),
)
ORIGINALS = st.dictionaries(IDS, st.builds(Original, st.text(), st.text(), PLACEMENTS), max_size=5)
OFFS = st.builds(
    Off,
    st.sampled_from(HandsOff),
    st.none() | st.tuples(NUMBERS, NUMBERS),
    st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
LEDGERS = st.builds(Ledger, ORIGINALS, st.dictionaries(st.text(), OFFS, max_size=3))


def stored(ledger):
    """Return a ledger's data as the file holds it."""
    return json.loads(json.dumps(dump(ledger)))


@unhurried
@given(LEDGERS)
def test_ledger_survives_the_file(ledger):
    """What is dumped is loaded again, equal, and the same ledger has the same text."""
    assert load(stored(ledger)) == ledger
    assert json.dumps(dump(ledger)) == json.dumps(stored(ledger))


@unhurried
@given(LEDGERS)
def test_order_of_recording_does_not_show(ledger):
    """Two ledgers with the same entries have the same text, in whatever order they were made."""
    backwards = Ledger(dict(reversed(list(ledger.originals.items()))), dict(reversed(list(ledger.hands_off.items()))))

    assert json.dumps(dump(backwards)) == json.dumps(dump(ledger))


def test_stored_form_is_stable():
    """The plain form is version 1: a ledger of an earlier daemon can still be put back."""
    ledger = Ledger(
        {thread_id(role=Role.VCPU): Original("u", "vcpu 0", Placement(cpus("0-3,7"), fifo(5)))},
        {"u": Off(HandsOff.PAUSED, PROCESS, 12.5), EVERYONE: Off(HandsOff.RELEASED)},
    )

    assert stored(ledger) == {
        "version": 1,
        "originals": [[1000, 500, 1010, 500, "u", "vcpu 0", "0-3,7", "fifo", 5, True]],
        "hands_off": {
            "*": {"kind": "released", "process": None, "until": None},
            "u": {"kind": "paused", "process": [1000, 500], "until": 12.5},
        },
    }


GOOD = stored(
    Ledger(
        {
            thread_id(role=Role.VCPU): Original("u", "vcpu 0", Placement(cpus("0-3"), fifo(1))),
            thread_id(): Original("u", "emulator", Placement(cpus("0-7"))),
        },
        {"u": Off(HandsOff.PAUSED, PROCESS, 12.0), "v": Off(HandsOff.RELEASED, PROCESS)},
    )
)


def places(data, path=()):
    """Yield the path of every value in plain data, the whole of it first."""
    yield path
    if isinstance(data, dict | list):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from places(value, (*path, key))


def with_value(path, value):
    """Return GOOD with one value replaced."""
    if not path:
        return value
    data = copy.deepcopy(GOOD)
    home = data
    for key in path[:-1]:
        home = home[key]
    home[path[-1]] = value
    return data


def without_value(path):
    data = copy.deepcopy(GOOD)
    home = data
    for key in path[:-1]:
        home = home[key]
    del home[path[-1]]
    return data


WRONG = [None, [], {}, "", "x", "4-", -0.5, 1.5, 10**400, float("inf"), float("nan"), [None], {"x": 1}, [[]], object()]


def test_good_ledger_is_loaded():
    """The ledger that the tests below damage is a good one."""
    assert dump(load(GOOD)) == GOOD


@pytest.mark.parametrize("path", list(places(GOOD)), ids=lambda path: ".".join(map(str, path)) or "all")
def test_wrong_value_anywhere_is_a_value_error(path):
    """Any wrong value at any place of the data raises ValueError, or is one that a ledger can hold."""
    for wrong in WRONG:
        try:
            loaded = load(with_value(path, wrong))
        except ValueError:
            continue

        assert dump(loaded) == with_value(path, wrong)


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        ((), None),
        ((), []),
        ((), "ledger"),
        (("version",), 2),
        (("version",), "1"),
        (("version",), None),
        (("originals",), None),
        (("originals",), {}),
        (("originals",), "0123456789"),
        (("originals", 0), None),
        (("originals", 0), []),
        (("originals", 0, 0), "1000"),
        (("originals", 0, 0), 1000.5),
        (("originals", 0, 1), None),
        (("originals", 0, 2), float("inf")),
        (("originals", 0, 3), float("nan")),
        (("originals", 0, 4), 7),
        (("originals", 0, 5), None),
        (("originals", 0, 6), 3),
        (("originals", 0, 6), "3-1"),
        (("originals", 0, 6), "1,0"),
        (("originals", 0, 6), "999999"),
        (("originals", 0, 7), "FIFO"),
        (("originals", 0, 7), 1),
        (("originals", 0, 7), []),
        (("originals", 0, 8), "1"),
        (("originals", 0, 9), "true"),
        (("originals", 0, 9), None),
        (("hands_off",), None),
        (("hands_off",), []),
        (("hands_off", "u"), None),
        (("hands_off", "u"), "paused"),
        (("hands_off", "u", "kind"), "gone"),
        (("hands_off", "u", "process"), []),
        (("hands_off", "u", "process"), [1000]),
        (("hands_off", "u", "process"), [1000, 500, 1]),
        (("hands_off", "u", "process"), "12"),
        (("hands_off", "u", "process"), {"0": 1}),
        (("hands_off", "u", "process", 0), None),
        (("hands_off", "u", "until"), "12"),
        (("hands_off", "u", "until"), []),
        (("hands_off", "u", "until"), 10**400),
    ],
)
def test_damage_is_a_value_error(path, wrong):
    """Each kind of damage is refused with ValueError, so that the file is set aside and not believed."""
    with pytest.raises(ValueError, match=r"."):
        load(with_value(path, wrong))


@pytest.mark.parametrize(
    "path", [path for path in places(GOOD) if path and len(path) != 2], ids=lambda path: ".".join(map(str, path))
)
def test_missing_value_is_a_value_error(path):
    """A ledger that lacks any of its fields is refused."""
    with pytest.raises(ValueError, match=r"."):
        load(without_value(path))


def test_one_thread_twice_is_a_value_error():
    """Two originals of one thread are refused: nobody knows which is true."""
    twice = copy.deepcopy(GOOD)
    twice["originals"].append(twice["originals"][-1])

    with pytest.raises(ValueError, match="does not write"):
        load(twice)


def test_too_many_entries_are_a_value_error(monkeypatch):
    """More originals than any host has threads are refused before they are read."""
    monkeypatch.setattr(ledger_module, "MAX_ENTRIES", 2)
    assert load(GOOD)

    monkeypatch.setattr(ledger_module, "MAX_ENTRIES", 1)
    with pytest.raises(ValueError, match="2 entries"):
        load(GOOD)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=11) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=20,
)


@unhurried
@given(
    JSON
    | st.fixed_dictionaries({"version": st.just(VERSION), "originals": JSON, "hands_off": JSON})
    | st.builds(with_value, st.sampled_from(list(places(GOOD))), JSON)
)
def test_no_data_raises_anything_else(data):
    """Whatever JSON the file holds: ValueError, or a ledger that is written just so."""
    try:
        loaded = load(data)
    except ValueError:
        return

    assert dump(loaded) == data


def test_recording_keeps_the_first_original():
    """What a thread had before the first touch stands, however often it is touched (promise 8)."""
    before = put(guest(), {"vcpu 0": "4-5"}, fifo(3))
    after = put(guest(), {"vcpu 0": "2"}, fifo(1))
    vcpu = find(before, "vcpu 0")

    once = Ledger().recording([vcpu])
    twice = once.recording([find(after, "vcpu 0"), find(after, "vcpu 1")])

    assert once.originals == {vcpu.id: Original(uuid_of(PID), "vcpu 0", Placement(cpus("4-5"), fifo(3)))}
    assert twice.originals[vcpu.id] == once.originals[vcpu.id]
    assert list(twice.originals) == [vcpu.id, find(after, "vcpu 1").id]
    assert not Ledger().originals


def test_recording_nothing_new_changes_nothing():
    """A pass that touches no new thread gives the very same ledger, so that no file is written."""
    ledger = Ledger().recording(guest().threads)

    assert ledger.recording(guest().threads) is ledger
    assert ledger.recording([]) is ledger


def test_recording_keeps_who_is_left_alone():
    """Originals are added beside the guests that are left alone."""
    ledger = Ledger(hands_off={"v": Off(HandsOff.RELEASED)})

    assert ledger.recording(guest().threads).hands_off == ledger.hands_off


def test_reused_thread_number_is_another_thread():
    """A thread with the number of a recorded one, begun later, gets an original of its own."""
    old = find(guest(), "vcpu 0")
    new = replace(old, id=old.id._replace(start=START + 1))

    assert set(Ledger().recording([old]).recording([new]).originals) == {old.id, new.id}


def test_incumbents_and_processes_are_those_recorded():
    """The ledger tells which thread was which, for a daemon that starts anew, and which processes were touched."""
    one, two = guest(), guest("rt-2", pid=OTHERS)
    ledger = Ledger(hands_off={"x": Off(HandsOff.PAUSED, (7, 7)), "*": Off(HandsOff.PAUSED)})
    ledger = ledger.recording([find(one, "vcpu 1"), find(two, "iothread 1")])

    assert ledger.incumbents() == {
        (one.process, "vcpu 1"): find(one, "vcpu 1").id,
        (two.process, "iothread 1"): find(two, "iothread 1").id,
    }
    assert ledger.managed() == {one.process, two.process}
    assert ledger.processes() == {one.process, two.process, (7, 7)}


def test_without_forgets_one_process():
    """After a guest was put back its originals go, and only its; that it is left alone stays."""
    one, two = guest(), guest("rt-2", pid=OTHERS)
    again = thread_id()._replace(pid_start=START + 1)
    off = {uuid_of(PID): Off(HandsOff.RELEASED, one.process)}
    ledger = Ledger(hands_off=off).recording([*one.threads, *two.threads])
    ledger = replace(ledger, originals={**ledger.originals, again: Original("u", "emulator", Placement(cpus("0")))})

    left = ledger.without(one.process)

    assert set(left.originals) == {*(thread.id for thread in two.threads), again}
    assert left.hands_off == off


@pytest.mark.parametrize(
    ("hands_off", "kind"),
    [
        ({}, None),
        ({"me": Off(HandsOff.RELEASED, PROCESS)}, HandsOff.RELEASED),
        ({"me": Off(HandsOff.RELEASED)}, HandsOff.RELEASED),
        ({"me": Off(HandsOff.RELEASED, (PID, START + 1))}, None),
        ({"me": Off(HandsOff.RELEASED, (PID + 1, START))}, None),
        ({"you": Off(HandsOff.RELEASED)}, None),
        ({"me": Off(HandsOff.PAUSED, PROCESS, 101.0)}, HandsOff.PAUSED),
        ({"me": Off(HandsOff.PAUSED, PROCESS, 100.0)}, None),
        ({"me": Off(HandsOff.PAUSED, PROCESS, 99.0)}, None),
        ({EVERYONE: Off(HandsOff.PAUSED)}, HandsOff.PAUSED),
        ({EVERYONE: Off(HandsOff.PAUSED, None, 100.0)}, None),
        ({"me": Off(HandsOff.RELEASED, PROCESS), EVERYONE: Off(HandsOff.PAUSED)}, HandsOff.RELEASED),
        ({"me": Off(HandsOff.PAUSED, PROCESS, 99.0), EVERYONE: Off(HandsOff.RELEASED)}, HandsOff.RELEASED),
        ({"me": Off(HandsOff.PAUSED, (1, 1)), EVERYONE: Off(HandsOff.RELEASED)}, HandsOff.RELEASED),
    ],
)
def test_guest_is_left_alone_until_it_stops_or_the_time_is_over(hands_off, kind):
    """A guest is left alone in its own name or with everyone, that run of it, and until the second given."""
    off = Ledger(hands_off=hands_off).off(guest(uuid="me"), 100.0)

    assert (off and off.kind) == kind


def test_pruned_drops_the_dead_and_keeps_the_unseen():
    """Threads that ended, guests that stopped and pauses that are over go; guests merely not seen stay."""
    seen, stopped, unseen = guest(), guest("rt-2", pid=OTHERS), guest("rt-3", pid=3000)
    ended = thread_id()._replace(tid=1)
    originals = {**Ledger().recording([*seen.threads, *stopped.threads, *unseen.threads]).originals}
    originals[ended] = Original("u", "emulator", Placement(cpus("0"), OTHER))
    ledger = Ledger(
        originals,
        {
            "a": Off(HandsOff.RELEASED, stopped.process),
            "b": Off(HandsOff.RELEASED, unseen.process),
            "c": Off(HandsOff.PAUSED, seen.process, 100.0),
            "d": Off(HandsOff.PAUSED, seen.process, 100.5),
            "e": Off(HandsOff.PAUSED, seen.process),
            EVERYONE: Off(HandsOff.PAUSED),
        },
    )

    left = ledger.pruned(snapshot(seen), frozenset({stopped.process}), 100.0)

    assert set(left.originals) == {thread.id for one in (seen, unseen) for thread in one.threads}
    assert set(left.hands_off) == {"b", "d", "e", EVERYONE}


@pytest.mark.parametrize(
    ("gone", "until"), [(frozenset({(1, 1)}), 101.0), (frozenset(), 100.0), (frozenset({PROCESS}), 101.0)]
)
def test_pruned_changes_nothing_where_nothing_ended(gone, until):
    """With everyone alive the ledger stays the very same; else it is another."""
    ledger = Ledger(hands_off={"u": Off(HandsOff.PAUSED, (9, 9), until)}).recording(guest().threads)

    left = ledger.pruned(snapshot(guest()), gone, 100.0)

    assert (left is ledger) is (gone == {(1, 1)})
