# SPDX-License-Identifier: GPL-2.0-or-later
"""Every policy of a small grammar × every order in which guests come and go, on small hosts. Finds no violation.

``python -m exhaustive`` (from tests/core, with the tree on the path) does all of it and prints its size and time;
:mod:`test_exhaustive` does a slice. What is the same state, reached in another order, is looked at once: a decision
rests on the policy, on who runs, where their threads are, and on what was decided before, and on nothing else.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

from factories import applied, guest, host

from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import Decision, State
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import Host, Snapshot
from rtpind.core.placement import place
from rtpind.core.policy import Policy
from rtpind.core.policyfile import load
from rtpind.core.topology import Topology

VCPUS = {
    "fifo": "{pool: r, exclusive: thread, scheduler: fifo}",
    "own": "{pool: r, exclusive: thread}",
    "mask": "[{ids: 0, pool: r, exclusive: thread}, {pool: r, exclusive: thread, scheduler: fifo}]",
    "float": "{pool: housekeeping}",
}
EMULATORS = {
    "pool": "{pool: housekeeping}",
    "own": "{pool: r, exclusive: guest}",
    "beside": "{share_with: {vcpu: 0}}",
}
HOSTS = {
    "4 cores": Topology.built(1, 4),
    "2 cores x 2": Topology.built(1, 2, 2),
    "6 cores": Topology.built(1, 6),
    "3 cores x 2": Topology.built(1, 3, 2),
    "2 nodes x 3": Topology.built(2, 3),
}
SIZES = ((1, 1, 1, 1), (2, 1, 1, 2), (1, 2, 2, 1), (3, 1, 2, 1), (2, 2, 2, 2))


def hosts(names) -> Iterator[tuple[str, Host]]:
    for name in names:
        topology = HOSTS[name]
        online = CpuSet(topology.cores)
        own = topology.siblings(0)
        yield name, host(online=str(online), isolated=str(online - own), topology=topology)


def policies(on: Host) -> Iterator[tuple[str, Policy]]:
    """Yield every valid policy of two classes, one for odd and one for even guests."""
    kinds = list(itertools.product(VCPUS, EMULATORS))
    for (one, two), siblings, full in itertools.product(
        itertools.product(kinds, repeat=2), ("idle", "same-guest", "ignore"), ("degrade", "leave")
    ):
        classes = "".join(
            f"  {name}: {{vcpu: {VCPUS[vcpu]}, emulator: {EMULATORS[emulator]}}}\n"
            for name, (vcpu, emulator) in (("a", one), ("b", two))
        )
        text = f"version: 1\npools: {{r: {{cpus: isolated, siblings: {siblings}}}}}\nclasses:\n{classes}"
        text += f'guests: [{{name: "a*", class: a}}, {{name: "b*", class: b}}]\nwhen_full: {full}\n'
        policy, _ = load(text, on)
        if policy is not None:
            yield f"{one} {two} {siblings} {full}", policy


def violations(policy: Policy, after: Snapshot, decision: Decision) -> Iterator[str]:
    """Yield what breaks promises 1 and 7 once a decision is carried out."""
    # Of a guest that is left as it is no thread may be moved: it is reported as an intruder.
    managed = {each.guest.uuid for each in decision.guests if each.state.managed}
    threads = [thread for each in after.guests for thread in each.threads if each.uuid in managed]
    for vcpu in threads:
        if vcpu.helper or not vcpu.now.scheduling.realtime:
            continue
        for other in threads:
            above = other.guest == vcpu.guest and other.now.scheduling.priority > vcpu.now.scheduling.priority
            if other.id != vcpu.id and other.now.cpus & vcpu.now.cpus and not above:
                yield f"{other.label} of {other.guest} may run beside the FIFO {vcpu.label} of {vcpu.guest}"
        if vcpu.now.cpus & policy.pool("housekeeping", after.host):
            yield f"FIFO {vcpu.label} on housekeeping"
    yield from beside(policy, after, decision)


def beside(policy: Policy, after: Snapshot, decision: Decision) -> Iterator[str]:
    """Yield who is on the sibling of a pCPU that a pool gives with its core."""
    topology = after.host.topology
    for each in decision.guests:
        exclusive = {id_: place.cpus for id_, place in each.wanted.items() if place.exclusive}
        if each.state is State.PLACED and policy.pools["r"].siblings != "ignore":
            for cpus in exclusive.values():
                for cpu in topology.siblings(cpus.first()) - cpus:
                    owner = decision.owners.get(cpu, each.guest.uuid)
                    if not owner.startswith(each.guest.uuid):
                        yield f"{owner} beside {each.guest.name}"


def losses(before: Snapshot, memory: Memory, decision: Decision) -> Iterator[str]:
    """Yield who lost a place that it had, or was moved for nothing."""
    wanted = decision.wanted()
    kept = {id_: place for id_, place in memory.places.items() if place.exclusive}
    alive = {thread.id for each in before.guests for thread in each.threads}
    crowded = {thread.id for each in decision.guests for thread in each.guest.threads if each.state is State.PLACED}
    for id_, place_ in kept.items():
        if id_ in alive and not wanted[id_].exclusive:
            yield f"{id_} lost its place"
        elif id_ in alive and wanted[id_].cpus != place_.cpus and id_ not in crowded:
            yield f"{id_} was shuffled"


def explore(name: str, policy: Policy, on: Host, sizes: tuple[int, ...]) -> tuple[int, list[str]]:
    """Follow every order of arrivals and departures; return how many decisions were made, and what was wrong."""
    everyone = {
        number: guest(f"{'ab'[number % 2]}{number}", pid=1000 * (number + 1), start=number, vcpus=size, iothreads=0)
        for number, size in enumerate(sizes)
    }
    seen: set[object] = set()
    todo: list[tuple[Snapshot, Memory, Ledger]] = [(Snapshot(host=on), Memory(), Ledger())]
    wrong: list[str] = []
    decisions = 0
    while todo:
        snapshot, memory, ledger = todo.pop()
        running = {each.pid: each for each in snapshot.guests}
        for one in everyone.values():
            rest = [each for pid, each in running.items() if pid != one.pid]
            then = replace(snapshot, guests=tuple(rest if one.pid in running else [*rest, one]))
            decision = place(policy, then, memory, ledger)
            after = applied(then, decision)
            decisions += 1
            found = [*violations(policy, after, decision), *losses(then, memory, decision)]
            wrong += [f"{name} {sizes}: {text}; {[each.name for each in then.guests]}" for text in found]
            again = place(policy, after, replace(memory, places=decision.wanted()), ledger)
            places = {id_: (wanted.cpus, wanted.priority) for id_, wanted in decision.wanted().items()}
            key = frozenset((thread.id, thread.now) for each in after.guests for thread in each.threads)
            if (key, frozenset(places.items())) not in seen:
                seen.add((key, frozenset(places.items())))
                if {id_: (w.cpus, w.priority) for id_, w in again.wanted().items() if id_ in places} != places:
                    wrong.append(f"{name} {sizes}: not at rest; {[each.name for each in then.guests]}")
                said, more = ([(each.state, each.reason) for each in found.guests] for found in (decision, again))
                if said != more:
                    wrong.append(f"{name} {sizes}: says {more} and not {said}")
                touched = [thread for each in then.guests for thread in each.threads if thread.id in places]
                alive = {thread.id for each in after.guests for thread in each.threads}
                kept = Ledger({id_: old for id_, old in ledger.originals.items() if id_ in alive}).recording(touched)
                todo.append((after, replace(Memory(), places=decision.wanted()), kept))
    return decisions, wrong


def run(names, sizes, step: int = 1) -> tuple[int, int, list[str]]:
    """Explore; return how many policies and decisions there were, and what was wrong."""
    count, decisions, wrong = 0, 0, []
    for host_name, on in hosts(names):
        for name, policy in itertools.islice(policies(on), 0, None, step):
            count += 1
            for one in sizes:
                made, found = explore(f"{host_name}: {name}", policy, on, one)
                decisions += made
                wrong += found
    return count, decisions, wrong


if __name__ == "__main__":
    began = time.monotonic()
    count, decisions, wrong = run(HOSTS, SIZES, int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(f"{count} policies, {decisions} decisions, {time.monotonic() - began:.0f} s, {len(wrong)} violations")
    print("\n".join(wrong[:20]))
    sys.exit(bool(wrong))
