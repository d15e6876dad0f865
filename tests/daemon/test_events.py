# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of each event: which guest is looked at, when, and how often at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from factories import PID, guest, host, uuid_of
from looping import DOMAIN, NAME, UUID, Loop
from simulated import World

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Placement
from rtpind.core.policy import Mode
from rtpind.daemon.inbox import Inbox
from rtpind.host.hypervisor import Listed
from rtpind.host.inotify import Appeared, Moved, Regrouped, Saved
from rtpind.host.listener import Overran, Unheard
from rtpind.host.procevents import Stirred


class Timed(Loop):
    """A loop whose time the test lets pass; ``looks`` are the times of passes, in ms after the last event."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.now = 100.0
        self.hurried: list[float] = []
        events: Any = self.service._events
        events._clock = lambda: self.now
        events._hurry = lambda seconds: self.hurried.append(round(seconds, 3))
        events._inbox = self.service._inbox = Inbox(lambda: self.now)

    def start(self) -> None:
        """See the one guest, and let what follows from that pass."""
        self.turn(Listed((DOMAIN,)))
        self.after()

    def after(self, event: Any = None, seconds: float = 20.0, meanwhile: Callable[[float], None] | None = None) -> Any:
        """Take an event and return when guests are looked at from then on, in ms; ``meanwhile``: told of each look."""
        began, looks = self.now, []
        if event is not None:
            self.service._take(event)
        while self.service._inbox._due and (due := self.service._inbox._due[0][0]) <= began + seconds:
            self.now = max(self.now, due)
            seen = self.world.seen
            self.turn()
            if self.world.seen is not seen:
                looks.append(round((self.now - began) * 1000, 1))
            if meanwhile is not None:
                meanwhile(self.now - began)
            self.service._full_due = float("inf")
        self.now = began + seconds
        return looks


@pytest.fixture
def loop(tmp_path: Path) -> Timed:
    made = Timed(tmp_path)
    made.service._full_due = float("inf")
    made.start()
    return made


def another(loop: Loop) -> str:
    """Have a second guest begin, of which nobody has told; return its UUID."""
    loop.world.guests.append(guest("rt-2", pid=3000))
    loop.world.tasks |= World(host(), [loop.world.guests[-1]]).tasks
    return uuid_of(3000)


def test_a_guest_is_watched_from_its_first_look_on(loop: Timed) -> None:
    """Its cgroup and its process; it is looked at again at once, for what happened in between."""
    uuid = another(loop)
    looks = loop.after(Appeared(uuid, "rt-2"))

    assert loop.service._reconciler.domains == {UUID: NAME, uuid: "rt-2"}
    assert [one for one, _ in loop.watches.places] == [UUID, uuid]
    assert loop.watches.places[1][1].startswith("/cgroups")
    assert loop.watches.pids == {PID, 3000}
    assert looks == [0, 0]


def test_a_guest_that_cannot_be_watched_yet_is_tried_again(loop: Timed) -> None:
    """The listener may begin after the first look."""
    loop.watches.deaf = True
    uuid = another(loop)
    first = loop.after(Appeared(uuid, "rt-2"))
    loop.watches.deaf = False
    second = loop.after(Saved("rt-2"))

    assert (first, second) == ([0], [0, 0])


def test_a_guest_that_starts_is_looked_at_more_often_where_nobody_tells(loop: Timed) -> None:
    """Until libvirt moves its vCPUs: every 200 ms where inotify tells of that, and every 20 ms where it does not."""
    vcpu = next(tid for tid, task in loop.world.tasks.items() if task.thread.label == "vcpu 0")
    loop.world.change(vcpu, settled=False)
    told = loop.after(Saved(NAME), 1.0)
    loop.watches.deaf = True
    untold = loop.after(Unheard("inotify", "no more"), 1.0)

    assert len(told) in (5, 6)
    assert len(untold) >= 45


def test_another_process_is_watched_anew(loop: Timed) -> None:
    """It has another cgroup."""
    loop.world.stop(loop.world.guests[0])
    loop.world.guests.append(guest(NAME, start=900))
    loop.world.tasks |= World(host(), loop.world.guests).tasks
    loop.after(Saved(NAME))

    assert [one for one, _ in loop.watches.places] == [UUID, UUID]


@pytest.mark.parametrize(("uuid", "name"), [(UUID, "other"), ("other", NAME)])
def test_who_contradicts_libvirt_is_left_for_libvirt_to_tell(loop: Timed, uuid: str, name: str) -> None:
    """A QEMU's arguments are no proof of which guest it is."""
    loop.after(Appeared(uuid, name))

    assert loop.service._reconciler.domains == {UUID: NAME}


def test_a_status_that_is_written_has_its_guest_looked_at(loop: Timed) -> None:
    """And nobody else: a network of that name, say."""
    assert loop.after(Saved(NAME)) == [0]
    assert loop.after(Saved("other")) == []


@pytest.mark.parametrize(("event", "first", "apart", "most"), [(Regrouped, 0, 200, 10), (Moved, 0.3, 1, 60)])
def test_while_libvirt_moves_threads_looks_are_close(
    loop: Timed, event: Any, first: float, apart: float, most: int
) -> None:
    """From the making of a cgroup on, and closer from the move on; then ever farther, and over after a second."""
    looks = loop.after(event(UUID))
    gaps = [after - before for before, after in pairwise(looks)]

    assert looks[:2] == [first, first + apart]
    assert all(gap <= max(apart + 0.1, 0.15 * before) for before, gap in zip(looks, gaps, strict=False))
    assert 900 < looks[-1] < 1200
    assert len(looks) < most


@pytest.mark.parametrize(("event", "looks"), [(Regrouped, [0]), (Moved, [0.3, 1.3, 2.3])])
def test_each_thread_begins_the_window_anew(loop: Timed, event: Any, looks: list[float]) -> None:
    """As libvirt takes the vCPUs one by one."""
    loop.after(Moved(UUID), 0.5)
    found = loop.after(event(UUID), 0.02)

    assert set(looks) <= set(found)


def test_looks_that_take_long_are_farther_apart(loop: Timed) -> None:
    """Libvirt needs the pCPU that they take."""
    loop.world.took = 0.01

    assert loop.after(Moved(UUID), 0.07) == [0.3, 30.3, 60.3]


def test_a_move_that_nobody_told_of_is_followed_as_closely(loop: Timed) -> None:
    """The cgroup was watched too late: that a thread is off its place tells of the move, too."""
    reconciler = loop.service._reconciler
    assert reconciler.policy is not None
    reconciler.policy = replace(reconciler.policy, mode=Mode.ENFORCE)
    vcpu = next(tid for tid, task in loop.world.tasks.items() if task.thread.label == "vcpu 0")
    loop.world.change(vcpu, now=Placement(CpuSet.parse("0-3")))

    assert {0, 1, 2, 3} <= set(loop.after(Regrouped(UUID), 0.0035))


def test_moves_that_come_together_are_two_looks_at_most(loop: Timed) -> None:
    """In each look every thread is seen."""
    for _ in range(5):
        loop.service._take(Moved(UUID))
        loop.now += 0.00005

    assert len(loop.after(None, 0.0005)) in (1, 2)


def test_a_new_thread_is_looked_at_within_milliseconds(loop: Timed) -> None:
    """Those that come together are one look."""
    for _ in range(10):
        loop.service._take(Stirred(PID))

    assert loop.after() == [3]
    assert loop.after(Stirred(PID)) == [3]
    assert loop.after(Stirred(4711)) == []


def test_a_thread_that_begins_after_an_early_look_is_looked_at(loop: Timed) -> None:
    """A look that was due anyway, shortly before, stands for the one that was asked for; not for who comes later."""
    loop.service._inbox.look_in(0.002, UUID)
    assert loop.after(Stirred(PID), 0.0025) == [2]
    assert loop.after(Stirred(PID)) == [6]


def test_a_guest_whose_threads_never_end_to_come_is_looked_at_ever_more_seldom(loop: Timed) -> None:
    """Its flood takes no more of the daemon than five looks a second, and the last thread is seen all the same."""
    looks = []
    for _ in range(3_000):
        looks += loop.after(Stirred(PID), 0.001)
    last = loop.after()

    assert 15 < len(looks) < 30
    assert len(last) == 1
    assert loop.after(Stirred(PID)) == [3]


def test_a_new_kernel_thread_is_searched_for(loop: Timed) -> None:
    """Quick looks take the list of kernel threads from the last search."""
    loop.after(Stirred(PID))
    assert loop.world.anew == 0
    loop.after(Stirred(PID, kernel=True))
    assert loop.world.anew == 1


def test_after_a_loss_everything_is_looked_at(loop: Timed) -> None:
    """At once, and then every second at most."""
    for _ in range(4):
        loop.service._take(Overran())
        loop.now += 0.4

    assert loop.hurried == [0, 0.6, 0.2, 0]


def test_what_is_kept_of_a_guest_goes_with_it(loop: Timed) -> None:
    """After a full pass nothing is left of it."""
    loop.service._take(Regrouped(UUID))
    loop.service._take(Stirred(PID))
    loop.full()
    assert loop.watches.kept == {UUID}
    loop.world.stop(loop.world.guests[0])
    loop.now += 10
    loop.full()
    events = loop.service._events

    assert loop.watches.pids == loop.watches.kept == set()
    assert [events._watched, events._pids, events._moving, events._stirred] == [{}, {}, {}, {}]


def test_a_guest_that_stays_unsettled_makes_nobody_spin(loop: Timed) -> None:
    """A vCPU that libvirt does not move is looked at fifty times a second at most, by its cgroup's events or none."""
    vcpu = next(tid for tid, task in loop.world.tasks.items() if task.thread.label == "vcpu 0")
    loop.world.change(vcpu, settled=False)
    looks = loop.after(Saved(NAME), 10.0)

    assert len(looks) <= 501
    assert replace(loop.world.tasks[vcpu].thread).settled is False
