# SPDX-License-Identifier: GPL-2.0-or-later
"""What a decision costs on a large host: 1024 pCPUs, 500 guests. ``python -m bench.planning``; touches nothing.

A first plan (no guest placed), the steady one (all placed: nothing to do), and one more guest.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

from rtpind.core.capacity import Shape, made_up, made_up_host
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import OTHER, Placement, Sched, Scheduling, Snapshot
from rtpind.core.placement import place
from rtpind.core.plan import make
from rtpind.core.policyfile import load

POLICY = """
version: 1
mode: enforce
pools: {realtime: {cpus: isolated, siblings: SIBLINGS}}
classes: {c: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}}}
guests: [{name: "*", class: c}]
when_full: degrade
"""


def timed(rounds: int, what: Callable[[], object]) -> str:
    """Return ``median (min–max)`` of some rounds, in milliseconds of CPU time: others run on this machine."""
    taken = []
    for _ in range(rounds):
        gc.collect()
        began = time.process_time()
        what()
        taken.append((time.process_time() - began) * 1000)
    return f"{median(taken):8.1f} ({min(taken):.1f}–{max(taken):.1f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--guests", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    host = made_up_host(4, 128, 2)
    print(f"{len(host.online)} pCPUs, {options.guests} guests of 1 vCPU, 1 iothread and 1 helper; ms, median (min–max)")
    for siblings in ("ignore", "idle"):
        policy, problems = load(POLICY.replace("SIBLINGS", siblings), host)
        assert policy is not None, problems
        guests = tuple(made_up("c", Shape(vcpus=1, iothreads=1), number) for number in range(options.guests + 1))
        guests = tuple(
            replace(guest, threads=tuple(replace(thread, now=Placement(host.online)) for thread in guest.threads))
            for guest in guests
        )
        before = Snapshot(host=host, guests=guests[:-1])
        first = place(policy, before, Memory(), Ledger())
        wanted = first.wanted()
        memory = replace(Memory(), places=wanted, verified=frozenset(wanted))
        fifo = Scheduling(Sched.FIFO, 1, reset_on_fork=True)
        after = replace(
            before,
            guests=tuple(
                replace(
                    guest,
                    threads=tuple(
                        replace(
                            thread,
                            now=Placement(wanted[thread.id].cpus, fifo if wanted[thread.id].priority else OTHER),
                        )
                        for thread in guest.threads
                    ),
                )
                for guest in before.guests
            ),
        )
        settled = place(policy, after, memory, Ledger())
        memory = replace(memory, places=settled.wanted())
        more = replace(after, guests=(*after.guests, guests[-1]))
        cases = {
            "first plan": lambda before=before, policy=policy: make(
                place(policy, before, Memory(), Ledger()), before, Memory()
            ),
            "steady": lambda after=after, memory=memory, policy=policy, settled=settled: make(
                place(policy, after, memory, Ledger(), before=settled), after, memory
            ),
            "one more guest": lambda more=more, memory=memory, policy=policy, settled=settled: make(
                place(policy, more, memory, Ledger(), before=settled), more, memory
            ),
        }
        for name, what in cases.items():
            print(f"siblings {siblings:8} {name:15} {timed(options.rounds, what)}")


if __name__ == "__main__":
    main()
