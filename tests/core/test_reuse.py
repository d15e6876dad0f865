# SPDX-License-Identifier: GPL-2.0-or-later
"""A decision that takes over what an earlier one decided is the one that would be made from nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random
from typing import Any

from factories import applied, fifo, guest, host, policy, thread
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import Decision
from rtpind.core.ledger import HandsOff, Ledger, Off
from rtpind.core.memory import Memory, Refusal, Wanted, conditions
from rtpind.core.model import Guest, Placement, Role, Snapshot, Thread, Traits
from rtpind.core.placement import place
from rtpind.core.policy import Policy
from rtpind.core.policyfile import load
from rtpind.core.topology import Topology

HOSTS = [
    host(online="0-11", isolated="2-11"),
    host(online="0-15", isolated="1-7,9-15", topology=Topology.built(2, 4, 2)),
    host(online="0-15", isolated="2-15", topology=Topology.built(2, 8, caches=2)),
    host(online="0-11", isolated="1-11", rt_runtime_us=-1, guards=dict.fromkeys(range(12), 1)),
]


def any_policy(random: Random) -> Policy:
    """Three classes, one for each letter that a guest's name may begin with; ``d`` has no rule."""
    pools = f"siblings: {random.choice(['idle', 'same-guest', 'ignore'])}, numa: {random.choice(['strict', 'ignore'])}"
    beside = random.choice(["", "emulator: {share_with: {vcpu: 0}}", "emulator: {pool: r, exclusive: guest}"])
    made, _ = load(
        f"""
version: 1
pools: {{r: {{cpus: isolated, {pools}}}}}
classes:
  a: {{vcpu: {{pool: r, exclusive: thread, scheduler: fifo}}}}
  b: {{vcpu: {{pool: r, exclusive: thread}}{", " if beside else ""}{beside}}}
  c: {{vcpu: {{from: cputune}}, unsafe: {random.choice(["true", "false"])}}}
  f: {{vcpu: {{pool: housekeeping}}}}
guests: [{{name: "a*", class: a}}, {{name: "b*", class: b}}, {{name: "c*", class: c}}, {{name: "f*", class: f}}]
when_full: {random.choice(["degrade", "leave"])}
""",
        HOSTS[1],
    )
    assert made is not None
    return made


EVENTS = [
    *["come"] * 6,
    *["go", "drift", "plug", "settle", "told", "again", "refuse"] * 2,
    *["policy", "hands", "forget", "remember"],
]


class Host:
    """Guests that come, change and go, and a daemon that decides, does it or not, and remembers."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.host = random.choice(HOSTS)
        self.policy = any_policy(random)
        self.guests: dict[int, Guest] = {}
        self.before: Decision | None = None
        self.memory = self.older = Memory()
        self.ledger = Ledger()
        self.reused: Counter[bool] = Counter()
        self.history: list[str] = []

    def some(self) -> CpuSet:
        return CpuSet(self.random.sample(sorted(self.host.online), self.random.randint(1, 2)))

    def come(self) -> None:
        number = self.random.randint(1, 20)
        vcpus = self.random.randint(1, 3)
        pins = {index: self.some() for index in range(vcpus) if self.random.randrange(3)}
        nodes = CpuSet([self.random.randrange(2)]) if self.random.randrange(2) else CpuSet()
        self.guests[number] = guest(
            f"{self.random.choice('aaabbbcfd')}{number}",
            pid=1000 * number,
            start=500 + self.random.randint(1, 40),
            vcpus=vcpus,
            iothreads=self.random.randint(0, 1),
            on=str(self.host.online if self.random.randrange(5) else self.some()),
            young=not self.random.randrange(4),
            nodes=nodes,
            traits=Traits(pins=pins, realtime=dict.fromkeys(pins, 1)) if self.random.randrange(4) else None,
        )

    def change(self, one: Thread, **fields: Any) -> None:
        number = one.id.pid // 1000
        threads = tuple(replace(each, **fields) if each.id == one.id else each for each in self.guests[number].threads)
        self.guests[number] = replace(self.guests[number], threads=threads)

    def happen(self) -> None:
        """Let one thing happen."""
        what = self.random.choice(EVENTS)
        self.history.append(f"{what} {sorted(self.guests)}")
        if what == "come" or not self.guests:
            self.come()
            return
        chosen = self.guests[self.random.choice(sorted(self.guests))]
        if what in ("policy", "hands", "forget"):
            self.daemon(what, chosen)
        else:
            self.guest(what, chosen, self.random.choice(chosen.threads))

    def daemon(self, what: str, chosen: Guest) -> None:
        if what == "policy":
            self.policy = any_policy(self.random)
        elif what == "hands":
            off = {} if self.ledger.hands_off else {chosen.uuid: Off(HandsOff.PAUSED, chosen.process)}
            self.ledger = replace(self.ledger, hands_off=off)
        else:
            self.memory = self.random.choice([Memory(), self.older])

    def guest(self, what: str, chosen: Guest, one: Thread) -> None:
        number = chosen.pid // 1000
        if what == "go":
            del self.guests[number]
        elif what == "drift":
            self.change(one, now=Placement(self.some(), self.random.choice([one.now.scheduling, fifo(1)])))
        elif what == "plug":
            role = self.random.choice([Role.VCPU, Role.EMULATOR, Role.IOTHREAD])
            new = thread(
                role=role, index=self.random.randint(3, 6), pid=chosen.pid, start=chosen.pid_start, on="0-3",
                settled=bool(self.random.randrange(2)),
            )  # fmt: skip
            if new.id not in {each.id for each in chosen.threads}:
                self.guests[number] = replace(chosen, threads=(*chosen.threads, new))
        elif what == "settle":
            self.change(one, settled=True)
            self.guests[number] = replace(self.guests[number], young=False)
        elif what == "told":
            self.guests[number] = replace(chosen, traits=chosen.traits or Traits(), young=False)
        elif what == "remember":  # a place of a thread of which the last decision says nothing
            self.ledger = self.ledger.recording([one])
            self.change(one, settled=False)
        elif what == "refuse" and self.before is not None and one.id in self.before.wanted():
            wanted = self.before.wanted()[one.id]
            refusal = Refusal(wanted, one.now, None, conditions(self.host), affinity=True, text="refused")
            self.memory = replace(self.memory, refused={**self.memory.refused, one.id: (refusal,)})

    def decide(self) -> None:
        """Decide twice, with and without what was decided before; carry it out, or some of it."""
        snapshot = Snapshot(host=self.host, guests=tuple(self.guests.values()))
        whole = place(self.policy, snapshot, self.memory, self.ledger)
        decision = place(self.policy, snapshot, self.memory, self.ledger, before=self.before)
        assert decision == whole, self.history
        if self.before is not None and len(self.guests) > 1:
            kept = {id(found) for found in self.before.guests}
            self.reused[any(id(found) in kept for found in decision.guests)] += 1
        after = applied(snapshot, decision) if self.random.randrange(4) else snapshot
        for new in after.guests:
            if new != self.guests[new.pid // 1000]:
                self.guests[new.pid // 1000] = new
        if self.random.randrange(2):
            managed = [each for found in decision.guests if found.wanted for each in found.guest.threads]
            self.ledger = self.ledger.recording(managed)
        self.older = self.memory
        self.memory = replace(self.memory, places=decision.wanted())
        self.before = decision


def live(random: Random) -> Counter[bool]:
    """Let things happen on one host; return how often a decision was taken over in part."""
    world = Host(random)
    for _ in range(random.randint(2, 14)):
        world.happen()
        world.decide()
    return world.reused


@settings(deadline=None, max_examples=100, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False))
def test_what_is_taken_over_is_what_would_be_decided(random: Random) -> None:
    """Whatever comes, changes and goes."""
    live(random)


def test_decisions_are_taken_over_and_are_made_anew() -> None:
    """Else the property above compares what is made from nothing with itself."""
    seen = sum((live(Random(seed)) for seed in range(40)), Counter[bool]())
    assert seen[True] > 20
    assert seen[False] > 20


def test_a_guest_that_comes_with_a_refusal_is_decided_with_all_others() -> None:
    """What a cpuset holds its threads to is kept from everybody: the kernel gives a thread's number again."""
    one, two = guest("rt-1"), guest("rt-2", pid=2000)
    seen = Snapshot(host=host(), guests=(one,))
    rules = policy()
    first = place(rules, seen, Memory(), Ledger())
    seen = applied(seen, first)
    before = place(rules, seen, Memory(places=first.wanted()), Ledger())
    id_ = two.threads[0].id
    refusal = Refusal(Wanted(CpuSet([2])), Placement(CpuSet([2])), None, (), affinity=True, text="")
    memory = Memory(places=before.wanted(), refused={id_: (refusal,)})
    more = replace(seen, guests=(*seen.guests, two))

    assert place(rules, more, memory, Ledger(), before=before) == place(rules, more, memory, Ledger())
