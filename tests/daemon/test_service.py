# SPDX-License-Identifier: GPL-2.0-or-later
"""What the loop does with words from libvirt and the kernel: whose definition is asked for, and what hotplug does."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from factories import PID, guest, host, uuid_of
from looping import DOMAIN, NAME, UUID, Loop
from simulated import World

from rtpind.core.audit import Kind
from rtpind.core.ledger import Process
from rtpind.core.model import Traits
from rtpind.daemon.service import Asked
from rtpind.host.details import Described
from rtpind.host.hypervisor import METADATA, Changed, Domain, Listed
from rtpind.host.listener import Unheard
from rtpind.host.procevents import Stirred
from rtpind.host.udev import CpusChanged

TRAITS = Traits(flavor="rt")


@pytest.fixture
def loop(tmp_path: Path) -> Loop:
    """A loop that has seen one guest, and has asked about it."""
    made = Loop(tmp_path)
    made.turn(Listed((DOMAIN,), fresh=True))
    return made


def test_a_guest_is_asked_about_when_it_is_first_seen(loop: Loop) -> None:
    """Once: later passes and lists ask for nothing."""
    assert loop.libvirt.take() == [(PID, 500)]

    for _ in range(3):
        loop.full()
        loop.turn(Listed((DOMAIN,)), Changed(DOMAIN, "lifecycle"), Changed(DOMAIN, "device_added"))

    assert loop.libvirt.take() == []
    assert loop.said(Kind.FAULT) == []


def test_another_process_is_asked_about_anew(loop: Loop) -> None:
    """Also when no event has told that the guest was started again."""
    loop.libvirt.take()
    loop.world.stop(loop.world.guests[0])
    loop.world.guests.append(guest(NAME, start=900))
    loop.full()

    assert loop.libvirt.take() == [(PID, 900)]


@pytest.mark.parametrize("what", ["lifecycle", "tunable", METADATA])
def test_an_event_that_may_change_the_definition_asks_again(loop: Loop, what: str) -> None:
    """A change of metadata is nothing else: it makes nobody look at the threads."""
    loop.libvirt.take()
    loop.turn()
    before = len(loop.service._inbox._due)
    loop.turn(Changed(DOMAIN, what, redefined=True))

    assert loop.libvirt.take() == [(PID, 500)]
    assert (len(loop.service._inbox._due) > before) is (what != METADATA)


def test_an_event_before_the_first_look_asks_once(loop: Loop) -> None:
    """A guest that was not seen yet is asked about when it is."""
    loop.libvirt.take()
    loop.world.guests.append(guest("rt-2", pid=3000))
    loop.world.tasks |= World(host(), [loop.world.guests[1]]).tasks
    loop.turn(Changed(Domain(uuid_of(3000), "rt-2"), "lifecycle", redefined=True))

    assert loop.libvirt.take() == [(3000, 500)]


def test_an_event_of_a_guest_that_is_gone_asks_nothing(loop: Loop) -> None:
    """There is nobody to describe."""
    loop.libvirt.take()
    loop.world.stop(loop.world.guests[0])
    loop.turn(Changed(DOMAIN, METADATA, redefined=True))

    assert loop.libvirt.take() == []


def test_after_libvirt_was_away_everybody_is_asked_about(loop: Loop) -> None:
    """What changed meanwhile nobody has told."""
    loop.libvirt.take()
    loop.turn(Listed((DOMAIN,), fresh=True))

    assert loop.libvirt.take() == [(PID, 500)]


def test_an_answer_is_taken_for_the_process_that_was_asked_about(loop: Loop) -> None:
    """And the guest is looked at again when it is news."""
    looks = [loop.world.seen]
    for _ in range(2):
        loop.turn(Described(UUID, (PID, 500), TRAITS))
        looks.append(loop.world.seen)

    assert loop.world.known[0] == (UUID, (PID, 500), TRAITS)
    assert looks[0] is not looks[1] is looks[2]


@pytest.mark.parametrize("process", [(PID, 499), (PID + 1, 500)])
def test_an_answer_about_an_earlier_process_is_dropped(loop: Loop, process: Process) -> None:
    """It may have been another definition: a stale trait would be believed."""
    loop.turn(Described(UUID, process, TRAITS), Described(uuid_of(9), (9, 500), TRAITS))

    assert loop.world.known == []


def test_what_libvirt_does_not_tell_is_said_once(loop: Loop) -> None:
    """With the guest and the cause; again for another cause, or another process."""
    busy = Described(UUID, (PID, 500), None, "cannot acquire state change lock")
    for _ in range(2):
        loop.turn(busy)
        loop.full()
    loop.turn(Described(UUID, (PID, 500), None, "access denied"))

    (first, second) = (text for text in loop.said(Kind.LIBVIRT) if "definition" in text)
    assert "rt-1: libvirt does not tell its definition (cannot acquire state change lock)" in first
    assert "access denied" in second
    assert loop.records[-1].fields["GUEST"] == NAME


def test_what_cannot_be_read_is_said_once_and_looked_at(loop: Loop) -> None:
    """The same text would say the same again: the guest is treated by what is known of it."""
    for _ in range(2):
        loop.turn(Described(UUID, (PID, 500), None, "not XML", unreadable=True))

    (text,) = (text for text in loop.said(Kind.LIBVIRT) if "definition" in text)
    assert text.startswith("rt-1: its definition cannot be read (not XML); rules and classes")
    assert loop.world.known[0] == (UUID, (PID, 500), "not XML")


def test_a_pcpu_that_goes_offline_makes_it_look_at_everything(loop: Loop) -> None:
    """At once, and its own threads move with the housekeeping pool; the word itself decides nothing."""
    loop.full()
    lists = loop.libvirt.lists
    loop.turn(CpusChanged(3, online=False))

    assert loop.libvirt.lists == lists + 1
    assert loop.service.adopted[-1] == ("0-1", 0, 1)
    assert loop.said(Kind.HOTPLUG) == []


@pytest.mark.parametrize(
    ("layer", "what"), [("udev", "pCPUs"), ("inotify", "libvirt's files"), ("proc-events", "threads")]
)
def test_a_kernel_that_is_not_heard_is_said(loop: Loop, layer: str, what: str) -> None:
    """With the cause, and what is lost."""
    loop.turn(Unheard(layer, "EPERM"))

    (text,) = loop.said(Kind.EVENTS)
    assert text.startswith(f"the kernel's events about {what} cannot ")
    assert "heard (EPERM)" in text
    assert text.endswith("within 10 s")


def broken(*_: object) -> None:
    """Stand for whatever a step may trip over."""
    raise RuntimeError("planted")


def test_a_look_that_a_fault_took_is_made_up_for(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Soon, by a look at everything: what was due is off the timetable, and the period may be an hour."""
    loop.full()
    with monkeypatch.context() as patch:
        patch.setattr(loop.service._reconciler, "run", broken)
        loop.turn(Changed(DOMAIN, "lifecycle"))

    assert loop.said(Kind.FAULT)[0].startswith("a fault in rtpind, one step was given up: RuntimeError: planted at ")
    assert loop.service._full_due - time.monotonic() <= 1


def test_an_event_that_a_fault_took_is_made_up_for(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other events of the turn are taken all the same."""
    loop.full()
    with monkeypatch.context() as patch:
        patch.setattr(loop.service._events, "_stir", broken)
        loop.turn(Stirred(PID, kernel=False), Changed(Domain(uuid_of(3000), "rt-2"), "lifecycle"))

    assert len(loop.said(Kind.FAULT)) == 1
    assert "rt-2" in loop.service._reconciler.domains.values()
    assert loop.service._full_due - time.monotonic() <= 1


def test_a_fault_that_stays_is_met_ever_more_seldom(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """In full passes and others: it must not become a pass a second, and what events ask for comes in between."""
    waits = []
    with monkeypatch.context() as patch:
        patch.setattr(loop.service._reconciler, "run", broken)
        for _ in range(3):
            loop.full()
            waits.append(loop.service._full_due - time.monotonic())
            loop.turn(Changed(DOMAIN, "lifecycle"))
            waits.append(loop.service._full_due - time.monotonic())

    assert len(loop.said(Kind.FAULT)) == 6
    # A partial pass that fails waits longer than the full one before it, which is due all the same.
    assert [round(wait) for wait in waits] == [1, 1, 4, 4, 10, 10]


@pytest.mark.parametrize("request_", [{"do": "status", "guests": 5}, {"do": []}, {"do": "pause", "seconds": 10**400}])
def test_a_question_that_makes_no_sense_is_answered_and_costs_no_look(loop: Loop, request_: dict[str, object]) -> None:
    """Whatever JSON can say, from whoever may ask: an error, no fault, and no pass."""
    loop.full()
    due = loop.service._full_due
    asked = Asked(request_)
    loop.turn(asked)

    assert "error" in asked.reply.get_nowait()
    assert loop.said(Kind.FAULT) == []
    if request_["do"] == "status":
        assert loop.service._full_due == due
    assert loop.service._answer_from_thread({"do": []}, False)["error"].startswith("only root")


def test_a_fault_in_an_answer_costs_no_look(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is lost but the answer, and who may only look must not have everything looked at."""
    loop.full()
    due = loop.service._full_due
    asked = Asked({"do": "status"})
    with monkeypatch.context() as patch:
        patch.setattr(loop.service._reconciler, "view", broken)
        loop.turn(asked)

    assert asked.reply.get_nowait() == {"error": "a fault in rtpind; see the journal"}
    assert len(loop.said(Kind.FAULT)) == 1
    assert loop.service._full_due == due


def test_a_fault_in_a_command_has_everything_looked_at(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of a release may be done: what is there now is seen in the same turn."""
    loop.full()
    lists = loop.libvirt.lists
    with monkeypatch.context() as patch:
        patch.setattr(loop.service._reconciler, "release", broken)
        loop.turn(Asked({"do": "release", "guests": []}))

    assert len(loop.said(Kind.FAULT)) == 1
    assert loop.libvirt.lists == lists + 1
