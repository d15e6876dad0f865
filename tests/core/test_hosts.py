# SPDX-License-Identifier: GPL-2.0-or-later
"""Every scheme that ships, on hosts of every kind: what is decided is checked by what was promised, not by a list.

Guests come one after the other until the host is full. What each should have is said here anew, in plain sets: nothing
of the code that decides is asked.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
from factories import applied, guest, host, snapshot

from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import State
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import Role, Traits
from rtpind.core.placement import place
from rtpind.core.policyfile import load
from rtpind.core.topology import Topology

SHIPPED = (Path(__file__).parents[2] / "etc" / "rtpind.yaml").read_text()

#: Scheme → where each role is, and its FIFO priority: ``own`` a pCPU for itself, ``one`` of the guest for all helpers,
#: ``vcpu 0`` beside that one, ``float`` in housekeeping.
SCHEMES = {
    "realtime": {"vcpu": ("own", 1), "helper": ("float", 0)},
    "dedicated": {"vcpu": ("own", 0), "helper": ("float", 0)},
    "dpdk": {"vcpu": ("own", 0), "helper": ("vcpu 0", 0)},
    "emulator-own-pcpu": {"vcpu": ("own", 1), "helper": ("one", 0)},
    "emulator-on-vcpu0": {"vcpu 0": ("own", 0), "vcpu": ("own", 1), "helper": ("vcpu 0", 0)},
    "with-pit": {"vcpu": ("own", 1), "pit": ("vcpu 0", 2), "helper": ("float", 0)},
    "fast-io": {"vcpu": ("own", 1), "iothread 1": ("own", 2), "helper": ("float", 0)},
    "from-xml": {"vcpu": ("own", 1), "helper": ("float", 0)},
}
SIZES = (2, 4, 1, 3, 8, 2, 5, 16, 1, 4, 24, 3)


def online_part(whole, online):
    """Return a topology as the kernel shows it: nothing of what is offline."""

    def part(kind, keys):
        return {key: cpus & online for key, cpus in kind.items() if keys or key in online}

    kinds = {name: part(getattr(whole, name), keys=False) for name in ("cores", "caches", "dies", "sockets")}
    return Topology(**kinds, nodes=part(whole.nodes, keys=True))


def made(whole, total, housekeeping, offline=()):
    online = CpuSet(range(total)) - CpuSet(offline)
    isolated = online - CpuSet(housekeeping)
    return host(online=str(online), isolated=str(isolated), possible=f"0-{total - 1}",
                topology=online_part(whole, online))  # fmt: skip


HOSTS = {
    "one socket": made(Topology.built(1, 16), 16, [0, 1]),
    "two nodes": made(Topology.built(2, 8, 2), 32, [0, 8, 16, 24]),
    "eight caches": made(Topology.built(1, 64, 2, caches=8), 128, [0, 64]),
    "holes": made(
        Topology.built(4, 128, 2, caches=16, dies=4, nodes=2),
        1024,
        [0, 512, 128, 640],
        # odd ones, a whole core here and there, and the second threads of a part
        [*range(3, 1024, 17), *range(40, 50), *range(552, 562), *range(900, 950)],
    ),
}
OPTIONS = [("ignore", "preferred"), ("same-guest", "strict"), ("idle", "strict")]


@cache
def policy(where, siblings, numa):
    """Return the shipped policy with a pool of that kind, a rule for each class, and nobody crowded."""
    pool = f"realtime: {{cpus: isolated, siblings: {siblings}, numa: {numa}}} #"
    text = SHIPPED.replace("realtime: isolated ", pool, 1)
    rules = "".join(f'  - {{name: "{name}-*", class: {name}}}\n' for name in SCHEMES)
    text = text.replace("guests: ", f"guests:\n{rules}#", 1).replace("when_full: degrade", "when_full: leave")
    made, problems = load(text, HOSTS[where])
    assert [problem for problem in problems if not problem.warning] == []
    assert made is not None
    assert made.classes.keys() == SCHEMES.keys()
    return made


class Arrivals:
    """A host on which guests arrive, each beside those that are there; after each the whole decision is checked."""

    def __init__(self, where, siblings, numa):
        self.host = HOSTS[where]
        self.policy = policy(where, siblings, numa)
        self.siblings, self.strict = siblings, numa == "strict"
        self.pool = self.host.isolated
        self.seen = snapshot(host=self.host)
        self.memory = Memory()
        self.free = self.pool

    def core(self, cpu):
        return self.host.topology.cores[cpu]

    def whole(self, cpus):
        """Return those whose core is free as a whole."""
        return CpuSet(cpu for cpu in cpus if self.core(cpu) <= self.free)

    def room(self, cpus):
        """Return how many pCPUs of a set could be given to one guest."""
        free = cpus & self.free
        if self.siblings == "ignore":
            return len(free)
        cores = {self.core(cpu) for cpu in self.whole(free)}
        return len(cores) if self.siblings == "idle" else len(self.whole(free))

    def come(self, scheme, size, number, nodes=()):
        pins = dict(enumerate(sorted(self.free)[:size])) if scheme == "from-xml" else {}
        one = guest(
            f"{scheme}-{number}", pid=1000 * (number + 1), start=number, vcpus=size, vhosts=1, pits=1, helpers=2,
            on=str(self.host.online), nodes=CpuSet(nodes),
            traits=Traits(pins={index: CpuSet([cpu]) for index, cpu in pins.items()}, realtime=dict.fromkeys(pins, 1)),
        )  # fmt: skip
        self.seen = replace(self.seen, guests=(*self.seen.guests, one))
        decision = place(self.policy, self.seen, self.memory, Ledger())
        found = {each.guest.name: each for each in decision.guests}
        for name, before in self.memory.places.items():
            assert decision.wanted()[name] == before  # who is there stays
        self.check_new(found[one.name], scheme, size, pins)
        self.check_law(decision)
        self.seen = applied(self.seen, decision)
        self.memory = Memory(places=decision.wanted())
        taken = CpuSet(cpu for wanted in decision.wanted().values() if wanted.exclusive for cpu in wanted.cpus)
        if self.siblings != "ignore":
            taken |= CpuSet(mate for cpu in taken if not self.pinned(decision, cpu) for mate in self.core(cpu))
        self.free = self.pool - taken
        return found[one.name].state

    def pinned(self, decision, cpu):
        return any(each.class_name == "from-xml" for each in decision.guests
                   for wanted in each.wanted.values() if cpu in wanted.cpus and wanted.exclusive)  # fmt: skip

    def check_new(self, found, scheme, size, pins):
        """The guest that came has what its scheme says, as close together as there was room, or there was none."""
        one = found.guest
        nodes = [cpus for node, cpus in self.host.topology.nodes.items() if not one.nodes or node in one.nodes]
        parts = nodes if self.strict else [self.pool]
        need = size + (scheme in ("emulator-own-pcpu", "fast-io"))
        fits = len(pins) == size if scheme == "from-xml" else any(self.room(part) >= need for part in parts)
        assert found.state is (State.PLACED if fits or scheme == "from-xml" else State.LEFT), found.reason
        if found.state is not State.PLACED or (scheme == "from-xml" and not fits):
            return
        own = [wanted.cpus.first() for thread in one.threads if (wanted := found.wanted[thread.id]).exclusive]
        vcpus = [found.wanted[each.id].cpus.first() for each in one.threads if each.role is Role.VCPU]
        assert CpuSet(own) <= self.free
        for thread in one.threads:
            rules = SCHEMES[scheme]
            how, priority = rules.get(thread.label, rules.get(str(thread.role), rules["helper"]))
            wanted = found.wanted[thread.id]
            assert (wanted.priority, wanted.withheld) == (priority, ""), thread.label
            if how == "float":
                assert wanted.cpus == self.host.online - self.host.isolated
            elif how == "own":
                assert len(wanted.cpus) == 1
                assert own.count(wanted.cpus.first()) == 1 or "vcpu 0" in {way for way, _ in rules.values()}
            else:
                assert len(wanted.cpus) == 1
                assert (wanted.cpus.first() == vcpus[0]) is (how == "vcpu 0"), thread.label
        assert len(set(vcpus)) == size
        if scheme == "from-xml":
            assert vcpus == list(pins.values())
            return
        if self.strict:
            assert any(CpuSet(own) <= part for part in parts)
        if scheme in ("realtime", "dedicated", "dpdk", "with-pit"):  # all its pCPUs are chosen at once
            self.check_close(CpuSet(vcpus), nodes, size)

    def check_close(self, vcpus, nodes, size):
        """In one cache if any had room, else in one die, node, socket; where the memory is, if that has room."""
        topology = self.host.topology
        near = CpuSet(cpu for part in nodes for cpu in part)
        if self.room(near) >= size:
            assert vcpus <= near
        for kind in (topology.caches, topology.dies, dict(enumerate(topology.nodes.values())), topology.sockets):
            parts = set(kind.values())
            fitting = [part for part in parts if self.room(part & near) >= size]
            if fitting:
                assert any(vcpus <= part for part in fitting)
                return

    def check_law(self, decision):
        """Nobody shares a pCPU with a FIFO vCPU but its guest's at a higher priority; siblings are as the pool says."""
        users = {}
        for each in decision.guests:
            for thread in each.guest.threads:
                if thread.id in each.wanted:
                    for cpu in each.wanted[thread.id].cpus:
                        users.setdefault(cpu, []).append((thread, each.wanted[thread.id], each.class_name))
        for cpu, there in users.items():
            assert cpu in self.host.online
            for thread, wanted, class_name in there:
                if not wanted.exclusive:
                    continue
                others = [(other, its) for other, its, _ in there if other is not thread]
                assert {other.guest for other, _ in others} <= {thread.guest}
                if thread.role is Role.VCPU and wanted.priority:
                    assert all(its.priority > wanted.priority for _, its in others)
                if self.siblings == "ignore" or class_name == "from-xml":
                    continue
                beside = {other.guest for mate in self.core(cpu) - CpuSet([cpu]) for other, *_ in users.get(mate, ())}
                assert beside <= (set() if self.siblings == "idle" else {thread.guest})


@pytest.mark.parametrize(("siblings", "numa"), OPTIONS)
@pytest.mark.parametrize("where", HOSTS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_on_each_host(scheme, where, siblings, numa):
    """Guests of one scheme, with memory on this or that node or nowhere yet, until there is no room."""
    world = Arrivals(where, siblings, numa)
    some = sorted(world.host.topology.nodes)

    states = [
        world.come(scheme, size, number, [[], [some[-1]], [some[0]]][number % 3]) for number, size in enumerate(SIZES)
    ]

    assert State.PLACED in states


@pytest.mark.parametrize(("siblings", "numa"), OPTIONS)
@pytest.mark.parametrize("where", HOSTS)
def test_all_schemes_together_on_each_host(where, siblings, numa):
    """One guest of each after the other, twice: those pinned by their XML come first, as they choose for themselves."""
    world = Arrivals(where, siblings, numa)
    names = sorted(SCHEMES, key=lambda name: name != "from-xml")

    states = [world.come(name, 2, number) for number, name in enumerate([*names, *names[1:]])]

    assert states.count(State.PLACED) >= 4
