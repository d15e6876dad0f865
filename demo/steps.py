# SPDX-License-Identifier: GPL-2.0-or-later
"""The steps of the demonstration, in order. Each shows something and claims it; the kernel decides whether it is so."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable

from demo import measure
from demo.guests import Guest, Seen, kvm_works, seen, wait_for
from demo.stage import FIFO_RESET, PERIOD_S, PREFIX, Stage, cpus_text
from rtpind.ctl import show

_POLICY = """\
version: 1
mode: enforce
pools:
  housekeeping: "{housekeeping}"
  realtime: "{realtime}"
classes:
  realtime:     # every vCPU alone on a pCPU at FIFO 1; all else of the guest with the host
    vcpu: {{pool: realtime, exclusive: thread, scheduler: fifo, priority: 1}}
    emulator: {{pool: housekeeping}}
  shared:
    vcpu: {{pool: housekeeping}}
    emulator: {{pool: housekeeping}}
guests:         # only the guests of this demonstration; all others stay as they are
{rules}
drift: repair
daemon: {{period: {period}s}}
"""


def guests(stage: Stage) -> None:
    """Start throwaway guests, and look before anything is done."""
    stage.rt = stage.start("rt", boot="oslat", iothreads=1, shared=True)
    stage.classes[stage.rt.uuid] = "realtime"
    if kvm_works():
        kvm = stage.start("kvm", kind="kvm", iothreads=1)
        stage.classes[kvm.uuid] = "realtime" if len(stage.realtime) > 1 else "shared"
    else:
        show.line("libvirt offers no KVM here: an emulated (TCG) guest stands for all.")
    for guest in stage.guests:
        stage.before |= {thread.tid: thread for thread in guest.threads()}
    stage.clock = measure.Clock(stage.rt)
    stage.rtpinctl("status", stage.rt.name)
    floats = all(thread.cpus >= stage.all for thread in stage.rt.threads())
    stage.claim("libvirt leaves every thread of the guest on every pCPU", true=floats)


def placing(stage: Stage) -> None:
    """Start rtpind, and compare every thread before and after."""
    stage.allow_fifo(stage.rt.vcpus()[0].tid)
    rules = "\n".join(f"  - {{uuid: {uuid}, class: {class_}}}" for uuid, class_ in stage.classes.items())
    stage.policy.write_text(
        _POLICY.format(
            housekeeping=cpus_text(stage.housekeeping),
            realtime=cpus_text(stage.realtime),
            rules=rules,
            period=PERIOD_S,
        )
    )
    show.line("The policy for this host:")
    for line in stage.policy.read_text().splitlines():
        show.line(f"    {line}")
    began = time.monotonic()
    stage.start_daemon()
    wait_for(lambda: all(_placed(stage, guest) for guest in stage.guests), "every thread is on its place", 20)
    show.line("")
    show.line(f"rtpind started; every thread on its place after {time.monotonic() - began:.2f} s.")
    show.line("Every thread before and after, read from the kernel:")
    _compare(stage)
    exclusive = [guest for guest in stage.guests if stage.classes[guest.uuid] == "realtime"]
    vcpus = [vcpu for guest in exclusive for vcpu in guest.vcpus()]
    alone = len({vcpu.cpus for vcpu in vcpus}) == len(vcpus) and all(len(vcpu.cpus) == 1 for vcpu in vcpus)
    stage.claim("each realtime vCPU has a pCPU of its own", true=alone)
    if stage.fifo:
        fifo = all(vcpu.policy == FIFO_RESET and vcpu.priority == 1 for vcpu in vcpus)
        stage.claim("each is SCHED_FIFO 1, and threads that it makes do not inherit that", true=fifo)
    taken = frozenset().union(*(vcpu.cpus for vcpu in vcpus))
    others = [thread for guest in stage.guests for thread in guest.threads() if thread not in vcpus]
    stage.claim("no other thread of the guests may run there", true=not any(one.cpus & taken for one in others))
    stage.claim("rtpinctl verify says the same", true=stage.rtpinctl("verify") == 0)


def hotplug(stage: Stage) -> None:
    """Plug an iothread into the running guest."""
    guest = stage.rt
    show.line("Plain <cputune> never places it: it would stay on every pCPU for ever.")
    before = {thread.tid for thread in guest.threads()}
    stage.run("virsh", "-q", "iothreadadd", guest.uuid, "2", "--live")
    began = time.monotonic()

    def fresh() -> list[Seen]:
        return [thread for thread in guest.iothreads() if thread.tid not in before]

    wait_for(lambda: fresh() and fresh()[0].cpus == stage.housekeeping, "the new iothread is placed")
    took = time.monotonic() - began
    thread = fresh()[0]
    show.line(f"{thread.comm} (tid {thread.tid}) is on pCPU {cpus_text(thread.cpus)}, {took * 1000:.0f} ms later.")
    stage.claim("a hot-plugged iothread is placed too", true=_placed(stage, guest))


def drift(stage: Stage) -> None:
    """Move threads away by hand, and see them put back."""
    vcpu = stage.rt.vcpus()[0]
    moves = (
        (vcpu.tid, vcpu.comm, stage.all, "lets the vCPU run everywhere"),
        (stage.rt.pid, "QEMU's main thread", vcpu.cpus, "puts QEMU's main thread under the vCPU"),
    )
    for tid, name, cpus, text in moves:
        stage.passes(2)  # what was not looked at again since it was placed is not verified yet
        show.line(f"Somebody {text}:")
        stage.run("taskset", "-pc", cpus_text(cpus), str(tid))
        began = time.monotonic()
        wait_for(lambda: _placed(stage, stage.rt), "the thread is back")
        show.line(f"back on pCPU {cpus_text(_cpus(tid))} after {time.monotonic() - began:.2f} s (period {PERIOD_S} s)")
        records = [record for record in stage.records() if "(drift)" in record and f"RTPIND_TID={tid} " in record]
        stage.claim(f"{name} is back, and one record says so", true=sum("pCPU" in one for one in records) == 1)


def audit(stage: Stage) -> None:
    """Read what rtpind wrote down: one record for each change."""
    records = [line.removeprefix("rtpind: ") for line in stage.records() if "RTPIND_TID=" in line]
    show.line("As a service it writes these to the journal (journalctl -t rtpind); here they went to stderr:")
    own = [record for record in records if f"RTPIND_GUEST={stage.rt.name} " in record]
    for record in own:
        show.line("  " + record.partition(" [RTPIND_")[0])
    show.line(f"  (and {len(records) - len(own)} of the other guests)")
    show.line("Each record carries fields; all of the last one:")
    show.line("  " + records[-1].partition(" [")[2].rstrip("]"))
    changed = {
        thread.tid
        for guest in stage.guests
        for thread in guest.threads()
        if (old := stage.before.get(thread.tid)) and (old.cpus, old.policy) != (thread.cpus, thread.policy)
    }
    recorded = {tid for tid in changed if any(f"RTPIND_TID={tid} " in record for record in records)}
    stage.claim("every thread that changed is on record", true=bool(changed) and changed == recorded)


def why(stage: Stage) -> None:
    """Load the host: why anyone should care."""
    hogs = 2 * len(stage.all)
    show.line(
        f"{hogs} CPU hogs run on this host's {len(stage.all)} pCPUs. The guest does nothing but read the clock and "
        "note its worst gap; the kernel counts how long its vCPU was ready and did not run (run delay)."
    )
    for _ in range(hogs):
        stage.spawn("sh", "-c", "while :; do :; done", f"{PREFIX}-hog")
    rows: list[tuple[measure.Reading, measure.Reading]] = []
    for number in range(measure.ROUNDS):
        if not stage.quietly("release", stage.rt.name):
            raise RuntimeError("rtpinctl release failed")
        wait_for(lambda: not _changed(stage, [stage.rt]), "the guest is as it was")
        without = measure.take(stage.rt, stage.clock)
        if not stage.quietly("manage", stage.rt.name):
            raise RuntimeError("rtpinctl manage failed")
        wait_for(lambda: _placed(stage, stage.rt), "the guest is placed again")
        rows.append((without, measure.take(stage.rt, stage.clock)))
        show.line(f"  round {number + 1} of {measure.ROUNDS} is done")
    better = measure.report(rows)
    if stage.fifo:
        stage.claim("the vCPU waited less with rtpind", true=better)
    else:
        show.line("Without FIFO nothing is claimed: a pCPU of one's own helps only when others stay off it.")


def release(stage: Stage) -> None:
    """Give every guest back exactly as it was."""
    code = stage.rtpinctl("release", *(guest.name for guest in stage.guests))
    _compare(stage)
    stage.claim("every thread has back what it had before rtpind", true=code == 0 and not _changed(stage, stage.guests))
    stage.passes(2)
    stage.claim("and keeps it while rtpind goes on running", true=not _changed(stage, stage.guests))


STEPS: tuple[Callable[[Stage], None], ...] = (guests, placing, hotplug, drift, audit, why, release)


def _placed(stage: Stage, guest: Guest) -> bool:
    """Return whether every thread is where the policy wants it, and FIFO where it may be."""
    realtime = stage.classes[guest.uuid] == "realtime"
    policy = FIFO_RESET if realtime and stage.fifo else os.SCHED_OTHER
    place = stage.realtime if realtime else stage.housekeeping
    vcpus, helpers = guest.vcpus(), guest.helpers()
    return (
        all(vcpu.cpus <= place and vcpu.policy == policy for vcpu in vcpus)
        and all(len(vcpu.cpus) == 1 for vcpu in vcpus if realtime)
        and all(helper.cpus == stage.housekeeping and not helper.fifo for helper in helpers)
    )


def _changed(stage: Stage, which: Iterable[Guest]) -> list[Seen]:
    """Return the threads that are not as they were before rtpind; those that began later have no before."""
    threads = [thread for guest in which for thread in guest.threads()]
    return [thread for thread in threads if thread != stage.before.get(thread.tid, thread)]


def _compare(stage: Stage) -> None:
    """Print every thread before and now."""
    rows = []
    for guest in stage.guests:
        for thread in guest.threads():
            old = stage.before.get(thread.tid)
            rows.append((guest.name, thread.comm, str(thread.tid), _text(old), _text(thread)))
    show.table(("guest", "thread", "tid", "before", "now"), rows)


def _text(thread: Seen | None) -> str:
    if thread is None:
        return "-"
    name = {os.SCHED_OTHER: "", os.SCHED_FIFO: f" FIFO {thread.priority}"}.get(thread.policy & 0xFF, " other")
    return f"pCPU {cpus_text(thread.cpus)}{name}"


def _cpus(tid: int) -> frozenset[int]:
    thread = seen(tid)
    return thread.cpus if thread else frozenset()
