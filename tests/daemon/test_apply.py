"""Carrying a plan out: what is asked before each step, what is read back after it, and what a failure takes with it."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from factories import PID, START, cpus, fifo, find, guest, host, policy, put, snapshot, thread
from simulated import Task, World

from rtpind.core.audit import Outcome, Result
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import OTHER, Guest, Kind, Limits, Placement, Role, Sched, Scheduling, Thread, ThreadId
from rtpind.core.placement import place
from rtpind.core.plan import Phase, Plan, Reason, Step, make
from rtpind.daemon.apply import RealKernel, apply, pretend
from rtpind.host.cgroup import Cgroups
from rtpind.host.proc import Proc


def step(of: Thread, phase: Phase, what: str | Scheduling, **fields: Any) -> Step:
    where: dict[str, Any] = {"cpus": cpus(what)} if isinstance(what, str) else {"scheduling": what}
    return Step(phase=phase, thread=of, reason=Reason.PLACE, **(where | fields))


def carried_out(world: World, *steps: Step) -> list[Outcome]:
    """Apply the steps and check that each outcome was told as it happened."""
    told: list[Outcome] = []
    outcomes = apply(Plan(steps=steps), world.snapshot(), world, told.append)

    assert told == outcomes
    return outcomes


def results(outcomes: Sequence[Outcome]) -> list[str]:
    return [str(outcome.result) for outcome in outcomes]


def one(of: Guest | None = None, **facts: Any) -> tuple[World, Thread]:
    """Return a world with one guest, and its vCPU 0."""
    world = World(host(**facts), [of or guest(vcpus=2)])
    return world, world.tasks[PID + 10].thread


def test_a_step_is_done_when_it_reads_back_right() -> None:
    """The outcome has what was before and what was read after."""
    world, vcpu = one()
    outcomes = carried_out(world, step(vcpu, Phase.ENTER, "2"), step(vcpu, Phase.PROMOTE, fifo()))

    assert results(outcomes) == ["applied", "blocked"]  # its own helpers are there
    assert (outcomes[0].before, outcomes[0].after) == (Placement(cpus("0-7")), Placement(cpus("2")))
    assert outcomes[0].done
    assert outcomes[0].limits is None
    assert outcomes[1].beside == "emulator (qemu-system-x86), iothread 1 (IO iothread1), vcpu 1 (CPU 1/KVM)"


@pytest.mark.parametrize(
    ("meanwhile", "reason", "result"),
    [("0-7", Reason.PLACE, "overtaken"), ("2", Reason.PLACE, "narrowed"), ("0-7", Reason.RELEASE, "narrowed")],
)
def test_a_mask_that_somebody_sets_meanwhile_is_no_refusal(meanwhile: str, reason: Reason, result: str) -> None:
    """Between the call and reading back, as libvirt does at a start: else it would never be tried again."""
    world, vcpu = one()
    world.after_call = lambda: world.put(vcpu.id.tid, cpus=cpus(meanwhile))
    (outcome,) = carried_out(world, replace(step(vcpu, Phase.ENTER, "2-3"), reason=reason))

    assert str(outcome.result) == result
    assert not outcome.done
    assert outcome.after == Placement(cpus(meanwhile))


def test_a_whole_plan_ends_with_every_thread_in_place() -> None:
    """A fresh guest needs two looks; nothing fails."""
    world, _ = one()
    memory = Memory(right_since={(PID, START): 0.0})
    for _ in range(2):
        seen = world.snapshot()
        plan = make(place(policy(), seen, memory, Ledger()), seen, memory)
        outcomes = carried_out(world, *plan.steps)

    assert {tid: (str(now.cpus), str(now.scheduling)) for tid, now in world.where().items()} == {
        PID: ("0-1", "other"),
        PID + 10: ("2", "fifo:1"),
        PID + 11: ("3", "fifo:1"),
        PID + 51: ("0-1", "other"),
    }
    assert results(outcomes) == ["applied", "applied"]
    assert len(world.calls) == 6


def test_a_narrowed_mask_is_no_success_and_names_the_cgroup() -> None:
    """The kernel takes what the cpuset allows, and says 0."""
    world, _ = one()
    world.tasks[PID].fence = cpus("1-7")
    emulator = world.tasks[PID].thread
    outcomes = carried_out(world, step(emulator, Phase.LEAVE, "0-1"), step(emulator, Phase.PROMOTE, fifo()))

    assert results(outcomes) == ["narrowed", "deferred"]
    assert outcomes[0].after == Placement(cpus("1"))
    assert outcomes[0].error == 0
    assert outcomes[0].limits == Limits(fence=cpus("1-7"), fenced_by="machine.slice/emulator")
    assert not outcomes[0].done


def test_a_refusal_has_its_errno_and_takes_only_its_own_thread_along() -> None:
    """A vCPU that cannot enter gets no FIFO; another one goes on."""
    world, vcpu = one()
    world.tasks[PID + 10].fence = cpus("0-1")
    sibling = world.tasks[PID + 11].thread
    outcomes = carried_out(
        world,
        step(vcpu, Phase.ENTER, "2"),
        step(sibling, Phase.ENTER, "3"),
        step(vcpu, Phase.PROMOTE, fifo()),
    )

    assert results(outcomes) == ["refused", "applied", "deferred"]
    assert outcomes[0].error == errno.EINVAL
    assert outcomes[0].after == Placement(cpus("0-7"))
    assert len(world.calls) == 2


@pytest.mark.parametrize(
    ("change", "error"),
    [({"budget": False}, errno.EPERM), ({"obeys": False}, errno.EPERM)],
)
def test_fifo_that_is_refused(change: dict[str, bool], error: int) -> None:
    """Without a realtime budget, or where a security module forbids it; the limits are read for the record."""
    world, vcpu = one(put(guest(vcpus=1, iothreads=0), {"emulator": "0-1", "vcpu 0": "2"}))
    world.tasks[PID + 10] = replace(world.tasks[PID + 10], **change)
    (outcome,) = carried_out(world, step(vcpu, Phase.PROMOTE, fifo()))

    assert (outcome.result, outcome.error) == (Result.REFUSED, error)
    assert outcome.limits == Limits(rt_budget_us=0 if "budget" in change else None)


def test_an_error_for_what_is_right_already_is_a_success() -> None:
    """What the kernel reports afterwards counts, not what it said."""
    world, _ = one(put(guest(), {"emulator": "0-1"}), nice_capable=False)

    assert results(carried_out(world, step(world.tasks[PID].thread, Phase.LEAVE, "0-1"))) == ["applied"]


def test_a_thread_that_ends_is_nobodys_fault() -> None:
    """Before the step, in it, or after it: it vanished, and is in nobody's way any more."""
    world, vcpu = one(put(guest(vcpus=1, iothreads=0, helpers=3), {"vcpu 0": "2"}))
    main, first, second = (world.tasks[PID + number].thread for number in (0, 101, 102))
    seen = world.snapshot()
    world.exit(first.id.tid)
    ends_in_it = {second.id.tid}
    before = world.on_call

    def end(found: Thread) -> None:
        if found.id.tid in ends_in_it:
            world.exit(found.id.tid)
        before(found)

    told: list[Outcome] = []
    world.on_call = end
    plan = Plan(
        steps=(
            step(main, Phase.LEAVE, "0-1"),
            step(first, Phase.LEAVE, "0-1"),
            step(second, Phase.LEAVE, "0-1"),
            step(second, Phase.PROMOTE, fifo()),
            step(vcpu, Phase.PROMOTE, fifo()),
        )
    )
    outcomes = apply(plan, seen, world, told.append)

    assert results(outcomes) == ["applied", "vanished", "vanished", "vanished", "applied"]
    assert [call.tid for call in world.calls] == [main.id.tid, second.id.tid, vcpu.id.tid]


def test_a_thread_that_is_gone_when_it_is_read_back_has_vanished() -> None:
    """The kernel took the step, and then the thread ended."""
    world, vcpu = one()
    world.after_call = lambda: world.exit(vcpu.id.tid)
    (outcome,) = carried_out(world, step(vcpu, Phase.ENTER, "2"))

    assert (outcome.result, outcome.error, outcome.after) == (Result.VANISHED, 0, None)


def test_nothing_is_done_to_a_thread_that_took_a_number_over() -> None:
    """The same tid with another start time is another thread."""
    world, vcpu = one()
    seen = world.snapshot()
    world.change(vcpu.id.tid, id=vcpu.id._replace(start=999))
    told: list[Outcome] = []

    assert results(apply(Plan(steps=(step(vcpu, Phase.ENTER, "2"),)), seen, world, told.append)) == ["vanished"]
    assert world.calls == []


def test_fifo_that_waits_for_the_second_look_is_not_given() -> None:
    """A gated step is deferred."""
    world, vcpu = one(put(guest(vcpus=1), {"emulator": "0", "iothread 1": "0", "vcpu 0": "2"}))

    assert results(carried_out(world, step(vcpu, Phase.PROMOTE, fifo(), gated=True))) == ["deferred"]
    assert world.calls == []


def test_a_helper_that_did_not_leave_keeps_fifo_from_its_vcpu() -> None:
    """The law is asked of what the kernel answered, not of the plan."""
    world, vcpu = one(put(guest(vcpus=1, iothreads=0), {"vcpu 0": "2"}))
    world.tasks[PID].fence = cpus("1-2")
    outcomes = carried_out(world, step(world.tasks[PID].thread, Phase.LEAVE, "0"), step(vcpu, Phase.PROMOTE, fifo()))

    assert results(outcomes) == ["refused", "blocked"]
    assert outcomes[1].beside == "emulator (qemu-system-x86)"


def test_a_narrowing_that_does_no_harm_keeps_nobody_from_fifo() -> None:
    """The helper is not where it should be, but away from the vCPU."""
    world, vcpu = one(put(guest(vcpus=1, iothreads=0), {"vcpu 0": "2"}))
    world.tasks[PID].fence = cpus("1-2")
    outcomes = carried_out(world, step(world.tasks[PID].thread, Phase.LEAVE, "0-1"), step(vcpu, Phase.PROMOTE, fifo()))

    assert results(outcomes) == ["narrowed", "applied"]


@pytest.mark.parametrize(
    ("scheduling", "result"),
    [
        (OTHER, "applied"),
        (fifo(), "blocked"),
        (Scheduling(Sched.RR, 1), "blocked"),
        (Scheduling(Sched.BATCH), "applied"),
    ],
)
def test_only_a_realtime_thread_of_another_guest_keeps_fifo_away(scheduling: Scheduling, result: str) -> None:
    """Any other is an intruder, reported, and no reason: else any guest could take FIFO from any other."""
    world, vcpu = one(put(guest(vcpus=1, iothreads=0), {"vcpu 0": "2", "emulator": "0-1"}))
    stranger = thread(pid=2000, on="0-7", scheduling=scheduling)
    world.guests.append(Guest(uuid=stranger.guest, name="other", pid=2000, pid_start=START))
    world.tasks[2000] = Task(stranger)

    assert results(carried_out(world, step(vcpu, Phase.PROMOTE, fifo()))) == [result]


def test_no_step_brings_a_thread_beside_a_fifo_vcpu() -> None:
    """Neither in nor out, when the vCPU's own step failed before."""
    world, vcpu = one(put(guest(vcpus=2, iothreads=0), {"vcpu 0": "2", "emulator": "0-1", "vcpu 1": "3"}))
    world.put(vcpu.id.tid, scheduling=fifo())
    world.tasks[vcpu.id.tid].obeys = False
    vcpu, sibling, main = (world.tasks[PID + number].thread for number in (10, 11, 0))
    outcomes = carried_out(
        world,
        step(vcpu, Phase.DEMOTE, OTHER),
        step(vcpu, Phase.LEAVE, "0-1"),
        step(sibling, Phase.ENTER, "2"),
        step(main, Phase.WIDEN, "0-2"),
    )

    assert results(outcomes) == ["refused", "deferred", "blocked", "blocked"]
    assert world.where()[vcpu.id.tid] == Placement(cpus("2"), fifo())


def test_a_helper_above_a_vcpu_keeps_its_fifo_beside_it() -> None:
    """Neither demoted nor lowered where the law allows it only above the vCPU; and it may be raised."""
    world, _ = one(put(guest(vcpus=1), {"emulator": "0", "vcpu 0": "2", "iothread 1": "2"}))
    world.put(PID + 10, scheduling=fifo(3))
    world.put(PID + 51, scheduling=fifo(5))
    iothread = world.tasks[PID + 51].thread
    low = carried_out(world, step(iothread, Phase.DEMOTE, OTHER))
    lower = carried_out(world, step(iothread, Phase.PROMOTE, fifo(2)))
    higher = carried_out(world, step(iothread, Phase.PROMOTE, fifo(4)))

    assert results([*low, *lower, *higher]) == ["blocked", "blocked", "applied"]


def test_release_asks_no_law() -> None:
    """What was there comes back, even beside a FIFO vCPU."""
    world, vcpu = one(put(guest(vcpus=1, iothreads=0), {"vcpu 0": "2", "emulator": "0-1"}))
    world.put(vcpu.id.tid, scheduling=fifo())

    assert results(
        carried_out(
            world,
            step(world.tasks[PID].thread, Phase.LEAVE, "0-7", guarded=False),
            step(world.tasks[PID + 10].thread, Phase.PROMOTE, fifo(2), guarded=False),
        )
    ) == ["applied", "applied"]


def test_pretending_touches_nothing() -> None:
    """Every step, gated or not, is one that would be taken."""
    world, vcpu = one()
    outcomes = pretend(Plan(steps=(step(vcpu, Phase.ENTER, "2"), step(vcpu, Phase.PROMOTE, fifo(), gated=True))))

    assert results(outcomes) == ["would", "would"]
    assert [outcome.before for outcome in outcomes] == [vcpu.now, vcpu.now]
    assert world.calls == []


# --- the kernel of this host -------------------------------------------------------------------------------------


def own_thread(proc: Proc, **fields: Any) -> Thread:
    """Return this process's main thread as a guest's."""
    pid = os.getpid()
    start = proc.stat(pid).start
    return thread(pid=pid, start=start, id=ThreadId(pid, start, pid, start), comm=proc.stat(pid).comm, **fields)


def test_the_real_kernel_knows_a_thread_by_its_start_time() -> None:
    """It reads where this very thread is, and nothing for one with another start time or one that is gone."""
    proc = Proc(Path("/"))
    kernel = RealKernel(proc, Cgroups(Path("/")))
    me = own_thread(proc)
    other = replace(me, id=me.id._replace(start=me.id.start + 1))
    gone = replace(me, id=ThreadId(2**22, 1, 2**22, 1))
    now = kernel.read(me)

    assert kernel.is_still(me)
    assert now is not None
    assert set(now.cpus) == os.sched_getaffinity(0)
    assert kernel.read(other) is None
    assert kernel.read(gone) is None
    assert not kernel.is_still(gone)
    assert isinstance(kernel.limits(me), Limits)


def test_the_real_kernel_knows_a_process_by_its_cgroup() -> None:
    """A process of the guest's emulator cgroup that has left it is not the guest's any more."""
    proc, cgroups = Proc(Path("/")), Cgroups(Path("/"))
    kernel = RealKernel(proc, cgroups)
    mine = own_thread(proc, kind=Kind.PROCESS, cgroup=cgroups.of(os.getpid(), os.getpid()).path)

    assert kernel.is_still(mine)
    assert not kernel.is_still(replace(mine, cgroup="/somewhere/else"))


def test_a_process_whose_cgroup_cannot_be_read_is_not_the_guests(tmp_path: Path) -> None:
    """Nothing is done to what cannot be proved."""
    proc = Proc(Path("/"))
    mine = own_thread(proc, kind=Kind.PROCESS, cgroup="x")

    assert not RealKernel(proc, Cgroups(tmp_path)).is_still(mine)


def test_the_simulated_kernel_inherits_as_the_real_one_does() -> None:
    """A child has its parent's affinity and scheduling, but no FIFO from a thread with SCHED_RESET_ON_FORK."""
    world, _ = one()
    world.put(PID + 10, cpus=cpus("2"), scheduling=fifo())
    world.put(PID + 11, cpus=cpus("3"), scheduling=fifo(reset_on_fork=False))
    calm, leaked = world.fork(PID + 10), world.fork(PID + 11)

    assert world.where()[calm] == Placement(cpus("2"), OTHER)
    assert world.where()[leaked] == Placement(cpus("3"), fifo(reset_on_fork=False))
    assert world.tasks[leaked].thread.role is Role.EMULATOR
    assert find(world.snapshot().guests[0], "emulator", 2).id.tid == leaked
    assert snapshot(*world.guests).time == 0.0
