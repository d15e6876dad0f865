"""Guests come, go and change; the kernel says whether their threads are where the policy wants them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import harness
import pytest
from harness import Daemon, helpers_on, placed, policy, violations

from demo.guests import Lab, wait_for

Make = Callable[..., Daemon]


@pytest.mark.usefixtures("unthrottled")
def test_guests_that_run_before_the_daemon_are_placed(lab: Lab, daemon: Make) -> None:
    """One exclusive FIFO guest and two floating ones, all started before the daemon, get their places."""
    alone = lab.start("alone", boot="spin")
    two = lab.start("two", vcpus=2, iothreads=1)
    four = lab.start("four", vcpus=4, iothreads=2)
    made = daemon(policy((alone, "realtime"), (two, "floating"), (four, "floating")))

    made.start()

    wait_for(lambda: placed(alone, {1}, fifo=1) and helpers_on(alone, {0}), "alone is FIFO on pCPU 1")
    wait_for(lambda: all(placed(guest, {0}) and helpers_on(guest, {0}) for guest in (two, four)), "the others float")
    assert violations([alone, two, four]) == []
    assert made.run_ctl("verify").returncode == 0


@pytest.mark.usefixtures("unthrottled")
def test_a_guest_that_starts_later_is_placed_and_a_stopped_one_makes_room(lab: Lab, daemon: Make) -> None:
    """A second exclusive guest is not placed while the pool is full, and placed when the first one stops."""
    made = daemon(policy(names=[(f"{lab.prefix}-room-*", "realtime")]))
    made.start()

    first = lab.start("room-first")
    wait_for(lambda: placed(first, {1}, fifo=1), "the first guest has pCPU 1")
    second = lab.start("room-second")
    wait_for(lambda: placed(second, {0}) and helpers_on(second, {0}), "the second floats without FIFO")
    wait_for(lambda: made.count("room-second: not placed") == 1, "that is on record")
    assert placed(first, {1}, fifo=1)
    assert made.run_ctl("verify").returncode == 1

    first.destroy()

    wait_for(lambda: placed(second, {1}, fifo=1), "the second has pCPU 1")
    assert made.run_ctl("verify").returncode == 0


def test_with_leave_a_guest_without_room_is_not_touched(lab: Lab, daemon: Make) -> None:
    """when_full: leave does nothing to a guest for which there is no room."""
    made = daemon(policy(names=[(f"{lab.prefix}-leave-*", "dedicated")], when_full="leave"))
    made.start()
    first = lab.start("leave-first")
    wait_for(lambda: placed(first, {1}), "the first guest has pCPU 1")
    second = lab.start("leave-second")
    wait_for(lambda: made.count("leave-second: not placed") == 1, "the second is on record as not placed")

    touched = [record for record in made.records if second.name in record and "→ 0 (" in record]
    assert touched == []
    assert all(thread.cpus == {0, 1} for thread in second.threads())


@pytest.mark.usefixtures("unthrottled", "kvm")
def test_kvm_s_own_threads_leave_the_vcpu_alone(lab: Lab, daemon: Make) -> None:
    """nx-recovery and the PIT worker of a KVM guest are moved off its vCPU's pCPU and are not FIFO."""
    made = daemon(policy(names=[(f"{lab.prefix}-kvm", "realtime")]))
    made.start()
    guest = lab.start("kvm", kind="kvm")

    wait_for(lambda: placed(guest, {1}, fifo=1) and helpers_on(guest, {0}), "vCPU and helpers are apart")
    names = {thread.comm for thread in guest.helpers()}
    assert any(name.startswith("kvm-nx-lpage") for name in names)
    assert f"kvm-pit/{guest.pid}" in names
    assert violations([guest]) == []


def test_hot_plugged_threads_are_placed(lab: Lab, daemon: Make) -> None:
    """A vCPU and an iothread that are plugged in later find their place."""
    guest = lab.start("plug", vcpus=1, max_vcpus=2, iothreads=1)
    made = daemon(policy((guest, "floating")))
    made.start()
    wait_for(lambda: placed(guest, {0}), "the guest is placed")

    guest.dom.addIOThread(5)
    guest.dom.setVcpus(2)

    wait_for(lambda: len(guest.vcpus()) == 2 and placed(guest, {0}), "the new vCPU is placed")
    wait_for(lambda: len(guest.iothreads()) == 2 and helpers_on(guest, {0}), "the new iothread is placed")


@pytest.mark.usefixtures("unthrottled")
def test_a_vcpu_plugged_into_a_full_pool_stays_with_the_helpers(lab: Lab, daemon: Make) -> None:
    """The guest's other vCPU keeps its place and FIFO; the new one floats without FIFO, on record."""
    guest = lab.start("full", vcpus=1, max_vcpus=2)
    made = daemon(policy((guest, "realtime")))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1), "the guest is placed")

    guest.dom.setVcpus(2)

    def apart() -> bool:
        first, *rest = guest.vcpus()
        return bool(rest) and first.cpus == {1} and first.fifo and rest[0].cpus == {0} and not rest[0].fifo

    wait_for(apart, "the new vCPU is with the helpers")
    wait_for(lambda: made.count("vcpu 1 .*no free pCPU") == 1, "that is on record")
    assert apart()


@pytest.mark.usefixtures("unthrottled")
def test_reset_is_not_a_stop(lab: Lab, daemon: Make) -> None:
    """A reset changes nothing about any thread, and nothing is recorded."""
    guest = lab.start("reset", boot="spin")
    made = daemon(policy((guest, "realtime")))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1), "the guest is placed")
    made.passes(1)
    before, records = harness.state_of([guest]), made.count("→")

    guest.dom.reset(0)
    made.passes(2)

    assert {tid: state for tid, state in harness.state_of([guest]).items() if tid in before} == before
    assert made.count("→") == records


def test_without_a_budget_fifo_is_refused_with_cause_and_cure(lab: Lab, daemon: Make) -> None:
    """Under RT_GROUP_SCHED with throttling on, affinity stays, and verdict and record say why; -1 is not advised."""
    if harness.RT_RUNTIME.read_text().strip() == "-1" or not os.path.exists("/sys/fs/cgroup/cpu/cpu.rt_runtime_us"):
        pytest.skip("this kernel has no RT_GROUP_SCHED on cgroup 1: FIFO is not refused here")
    guest = lab.start("refused")
    made = daemon(policy((guest, "realtime")))
    made.start()

    wait_for(lambda: made.count("refused: RT_GROUP_SCHED") == 1, "the refusal is on record")
    made.passes(2)

    assert placed(guest, {1})
    assert made.count("refused: RT_GROUP_SCHED") == 1
    assert made.count("sched_rt_runtime_us=-1") == 0
    threads = made.ctl("status", guest.name)["guests"][0]["threads"]
    assert [thread["verdict"] for thread in threads if thread["role"] == "vcpu"] == ["no-fifo"]
    assert made.run_ctl("verify").returncode == 1


def test_fifo_that_was_refused_is_tried_again_when_that_can_have_changed(lab: Lab, daemon: Make) -> None:
    """Turning RT throttling off makes FIFO possible, and the next pass gives it."""
    before = harness.RT_RUNTIME.read_text()
    guest = lab.start("again")
    made = daemon(policy((guest, "realtime")))
    try:
        harness.RT_RUNTIME.write_text("950000")
        made.start()
        if not os.path.exists("/sys/fs/cgroup/cpu/cpu.rt_runtime_us"):
            pytest.skip("this kernel has no RT_GROUP_SCHED on cgroup 1: FIFO is not refused here")
        wait_for(lambda: made.count("refused: RT_GROUP_SCHED") == 1, "FIFO is refused")

        harness.RT_RUNTIME.write_text("-1")

        wait_for(lambda: placed(guest, {1}, fifo=1), "FIFO is given")
    finally:
        harness.RT_RUNTIME.write_text(before)


def test_what_the_xml_pins_is_respected_and_named(lab: Lab, daemon: Make) -> None:
    """A vCPU that <vcpupin> fences to pCPU 0 cannot go to pCPU 1: fenced, by the name of the cgroup, asked once."""
    guest = lab.start("fenced", cputune="<vcpupin vcpu='0' cpuset='0'/>")
    made = daemon(policy((guest, "dedicated")))
    made.start()

    wait_for(lambda: made.count(r"vcpu 0 .*refused: cgroup .*vcpu0 allows only pCPU 0") == 1, "the fence is on record")
    made.passes(2)

    assert made.count("refused") == 1
    threads = made.ctl("status", guest.name)["guests"][0]["threads"]
    assert [thread["verdict"] for thread in threads if thread["role"] == "vcpu"] == ["fenced"]

    guest.dom.pinVcpu(0, (True, True))

    wait_for(lambda: placed(guest, {1}), "the wider fence lets it go to its place")


@pytest.mark.usefixtures("unthrottled")
def test_twenty_starts_do_not_fail(lab: Lab, daemon: Make) -> None:
    """A daemon that looks all the time makes no guest's start fail, and each guest gets FIFO."""
    made = daemon(policy(names=[(f"{lab.prefix}-start-*", "realtime")], period="50ms"))
    made.start()

    with ThreadPoolExecutor(4) as ending:
        for number in range(20):
            guest = lab.start(f"start-{number}", iothreads=number % 2)  # raises when the start fails
            wait_for(lambda guest=guest: placed(guest, {1}, fifo=1), "the guest has FIFO")
            ending.submit(guest.destroy)


def test_a_guest_killed_mid_pass_disturbs_nothing(lab: Lab, daemon: Make) -> None:
    """Guests whose QEMU is killed while passes run cost no fault, and the other guest keeps its place."""
    stays = lab.start("stays")
    made = daemon(policy((stays, "dedicated"), names=[(f"{lab.prefix}-dies-*", "floating")], period="50ms"))
    made.start()
    wait_for(lambda: placed(stays, {1}), "the guest is placed")

    for number in range(5):
        guest = lab.start(f"dies-{number}", vcpus=4, iothreads=2)
        subprocess.run(["kill", "-9", str(guest.pid)], check=True)

    made.passes(2)
    assert placed(stays, {1})
    assert made.ctl("status")["daemon"]["faults"] == 0


@pytest.mark.usefixtures("unthrottled")
def test_foreign_guests_are_not_touched(lab: Lab, daemon: Make) -> None:
    """A guest that no rule matches keeps what it has; where it may run on a given pCPU it is an intruder."""
    foreign = lab.start("foreign", vcpus=2)
    guest = lab.start("mine")
    before = harness.state_of([foreign])
    made = daemon(policy((guest, "realtime")))
    made.start()
    wait_for(lambda: placed(guest, {1}, fifo=1), "the guest is placed")
    made.passes(2)

    assert {tid: state for tid, state in harness.state_of([foreign]).items() if tid in before} == before
    threads = made.ctl("status", foreign.name)["guests"][0]["threads"]
    assert {thread["verdict"] for thread in threads} == {"intruder"}
