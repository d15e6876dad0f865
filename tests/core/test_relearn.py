# SPDX-License-Identifier: GPL-2.0-or-later
"""What a pass leaves out, as nothing has changed there, is what going over everything would find too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from random import Random

from factories import fifo, guest, host, policy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from simulated import World

from rtpind.core.audit import Outcome
from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import Decision
from rtpind.core.learn import learn
from rtpind.core.ledger import HandsOff, Ledger, Off
from rtpind.core.memory import Memory
from rtpind.core.model import OTHER, Role
from rtpind.core.notices import standing
from rtpind.core.placement import place
from rtpind.core.plan import make
from rtpind.core.policy import Drift
from rtpind.core.verdict import judge
from rtpind.daemon.apply import apply

EVENTS = ["nothing", "come", "stop", "drift", "fence", "disobey", "settle", "fork", "exit", "doubt", "hands"]


class Story:
    """Guests to which things happen, and a daemon that does its passes."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.world = World(host(), [guest("rt-1"), guest("other", pid=2000, vcpus=1)])
        self.policy = replace(policy(), drift=random.choice(list(Drift)))
        self.memory = Memory()
        self.ledger = Ledger()
        self.before: Decision | None = None
        self.calm: Counter[bool | str] = Counter()

    def happen(self) -> None:
        """Let one thing happen, to one thread of one guest."""
        what, world, random = self.random.choice(EVENTS), self.world, self.random
        world.time += random.choice([0.003, 0.2, 10.0])
        if what == "come":
            pid = 1000 * random.randint(1, 6)
            if not any(one.pid == pid for one in world.guests):
                made = guest(random.choice(["rt-1", "rt-2", "x"]), pid=pid, vcpus=random.randint(1, 3), young=True)
                other = World(world.host, [made])
                world.guests.append(made)
                world.tasks |= other.tasks
                for thread in other.threads():
                    world.change(thread.id.tid, settled=bool(random.randrange(3)) or thread.role is Role.EMULATOR)
        elif what == "hands":
            entries = {one.uuid: Off(HandsOff.PAUSED, one.process) for one in world.guests if random.randrange(2)}
            self.ledger = replace(self.ledger, hands_off={} if self.ledger.hands_off else entries)
        elif world.guests and what != "nothing":
            number = random.randrange(len(world.guests))
            chosen = world.guests[number]
            tids = sorted(thread.id.tid for thread in world.threads() if thread.guest == chosen.uuid)
            self.guest(what, number, random.choice(tids))

    def guest(self, what: str, number: int, tid: int) -> None:
        world, random, chosen = self.world, self.random, self.world.guests[number]
        task = world.tasks[tid]
        some = CpuSet(random.sample(range(8), random.randint(1, 3)))
        if what == "stop":
            world.stop(chosen)
        elif what == "drift":
            world.put(tid, cpus=some, scheduling=random.choice([OTHER, fifo(1), fifo(2)]))
        elif what == "fence":
            task.fence = None if task.fence else some
            world.put(tid, cpus=some)
        elif what == "disobey":
            task.obeys = not task.obeys
        elif what == "settle":
            for thread in world.threads():
                if thread.guest == chosen.uuid:
                    world.change(thread.id.tid, settled=True)
        elif what == "fork":
            world.fork(tid)
        elif what == "exit":
            if tid != chosen.pid:
                world.exit(tid)
        else:
            doubtful = random.choice([(), ("vcpu 7",)])
            world.guests[number] = replace(chosen, doubtful=doubtful, young=False)

    def run(self) -> None:
        """Do a pass, and learn from it in both ways."""
        world, memory = self.world, self.memory
        seen = world.look(world.domains, memory)
        decision = place(self.policy, seen, memory, self.ledger, before=self.before)
        assert decision == place(self.policy, seen, replace(memory, decided={}), self.ledger)
        plan = make(decision, seen, memory)
        outcomes: list[Outcome] = apply(plan, seen, world, lambda _: None)  # type: ignore[arg-type]
        self.memory = learn(memory, seen, decision, plan, outcomes, world.time)
        whole = replace(memory, decided={}, calm=frozenset())
        assert self.memory == learn(whole, seen, decision, plan, outcomes, world.time)
        for found in decision.guests:
            self.calm[found.guest.process in memory.calm and memory.decided[found.guest.process] is found] += 1
            if found.in_order and not self.memory.fights:
                verdicts = [judge(one, found, decision, self.memory, seen) for one in found.guest.threads]
                assert {str(verdict) for verdict, _ in verdicts} <= {"ok"}
        said = dict(standing(seen, decision, plan, self.memory, outcomes))
        self.memory = replace(self.memory, said=frozenset(said))
        self.before = decision


def tell(random: Random) -> Mapping[bool | str, int]:
    """Tell a story; return how often a guest was calm, and how many threads are fought for."""
    story = Story(random)
    for _ in range(random.randint(3, 16)):
        story.happen()
        nagged = random.choice([None, *story.world.tasks])  # something else may keep moving a thread
        for _ in range(random.randint(1, 6)):
            if nagged in story.world.tasks:
                story.world.put(nagged, cpus=CpuSet([7]))
            story.run()
    story.calm["fights"] = len(story.memory.fights)
    return story.calm


@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_what_is_left_out_would_not_have_changed(random: Random) -> None:
    """Whatever comes, changes and goes, the memory is that of a daemon that goes over all guests at each pass."""
    tell(random)


def test_guests_are_left_out_and_are_gone_over() -> None:
    """Else the property above compares the long way with itself."""
    seen = sum((Counter(tell(Random(seed))) for seed in range(15)), Counter[bool | str]())
    assert seen["fights"] > 3
    assert seen[True] > 100
    assert seen[False] > 100
