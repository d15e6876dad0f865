# SPDX-License-Identifier: GPL-2.0-or-later
"""The order of the steps, from the system calls that the daemon makes: any prefix of them keeps the promises."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import pytest

from lab.scene import FIFO_RESET, OTHER, Guest, Scene, Thread, policy, violations_among

pytestmark = pytest.mark.lab("bookworm-rt")

TRACE = "/run/lab/trace"
KINDS = ("helper leaves", "vCPU comes", "FIFO on")
PROMOTED = r"\): other → fifo:1"
_AFFINITY = re.compile(r"sched_setaffinity\((\d+), \d+, \[([\d ]*)\]\) += 0")
_SCHEDULER = re.compile(r"sched_setscheduler\((\d+), (0x[0-9a-f]+|0), \[(\d+)\]\) += 0")

#: tid → (guest, thread)
Threads = dict[int, tuple[str, Thread]]


@dataclass(frozen=True, slots=True)
class Call:
    """A system call that succeeded."""

    tid: int
    cpus: tuple[int, ...] = ()
    policy: int = OTHER
    priority: int = 0

    def on(self, thread: Thread) -> Thread:
        """Return what the thread is afterwards."""
        if self.cpus:
            return replace(thread, cpus=self.cpus)
        return replace(thread, policy=self.policy, priority=self.priority)

    def kind(self, thread: Thread) -> str:
        """Return what it is for."""
        if self.cpus:
            return "vCPU comes" if thread.vcpu else "helper leaves"
        return "FIFO on" if self.policy == FIFO_RESET else "FIFO off"


@pytest.mark.smoke
def test_any_prefix_of_the_steps_is_safe(scene: Scene) -> None:
    """Helpers leave, vCPUs come, FIFO last; to another pCPU FIFO goes first. No prefix has FIFO beside another."""
    guests = scene.guests("one", "two", iothreads=1)
    scene.start(policy(("rt-*", "realtime"), mode="observe", pool="2-3", period="30s"))  # a trace slows each look

    before = look(guests)
    calls = traced(scene, policy(("rt-*", "realtime"), pool="2-3", period="30s"), lambda: scene.alone(guests))
    assert {call.kind(before[call.tid][1]) for call in calls if call.tid in before} == set(KINDS)
    assert violations_at(before, calls) == []
    kinds = [call.kind(before[call.tid][1]) for call in calls if call.tid in before]
    assert kinds == sorted(kinds, key=KINDS.index)

    before = look(guests)
    calls = traced(
        scene,
        policy(("rt-*", "realtime"), pool="5-7", period="30s"),
        lambda: scene.alone(guests) and not {(2,), (3,)} & {vcpu.cpus for guest in guests for vcpu in guest.vcpus()},
    )
    assert violations_at(before, calls) == []
    for tid in {call.tid for call in calls if call.tid in before}:
        thread = before[tid][1]
        assert [call.kind(thread) for call in calls if call.tid == tid] == ["FIFO off", "vCPU comes", "FIFO on"]


def traced(scene: Scene, text: str, arrived: Callable[[], bool]) -> list[Call]:
    """Reload with a policy and return the calls on guests' threads that the daemon made until all had arrived."""
    pid, said = scene.pid(), scene.count(PROMOTED)
    watched = "trace=sched_setaffinity,sched_setscheduler,sched_setattr"
    scene.run(f"rm -f {TRACE}; setsid strace -qq -X raw -e {watched} -o {TRACE} -p {pid} >/dev/null 2>&1 </dev/null &")
    try:
        traced_by = f"sed -n 's/^TracerPid:.//p' /proc/{pid}/status"
        scene.wait_for(lambda: scene.run(traced_by).out.strip() != "0", "the daemon is traced")
        scene.write_policy(text)
        scene.run("systemctl reload rtpind")
        scene.wait_for(arrived, "every thread is on its place")
        # The daemon goes on, and writes this, only after strace has seen the end of its call.
        scene.wait_for(lambda: scene.count(PROMOTED) >= said + 2, "both vCPUs' FIFO is on record")
    finally:
        scene.run("pkill -x strace")
        scene.wait_for(lambda: scene.run("pgrep -x strace", check=False).code != 0, "the trace is written")
    return list(parsed(scene.host.read(TRACE)))


def parsed(trace: str) -> Iterator[Call]:
    for line in trace.splitlines():
        if found := _AFFINITY.search(line):
            yield Call(int(found[1]), cpus=tuple(map(int, found[2].split())))
        elif found := _SCHEDULER.search(line):
            yield Call(int(found[1]), policy=int(found[2], 0), priority=int(found[3]))


def look(guests: Sequence[Guest]) -> Threads:
    """Return the guests' threads without QEMU's workers, which come and go."""
    threads = ((guest.name, thread) for guest in guests for thread in guest.threads())
    return {thread.tid: (name, thread) for name, thread in threads if thread.comm != "worker"}


def violations_at(before: Threads, calls: Sequence[Call]) -> list[tuple[Call, object]]:
    """Return each call after which somebody shares a FIFO vCPU's pCPU, or that moves a thread which is FIFO."""
    now, found = dict(before), []
    for call in (call for call in calls if call.tid in before):
        guest, thread = now[call.tid]
        if call.cpus and thread.fifo:
            found.append((call, "moved while FIFO"))
        now[call.tid] = (guest, call.on(thread))
        found += [(call, pair) for pair in violations_among(now.values())]
    return found
