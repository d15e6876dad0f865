# SPDX-License-Identifier: GPL-2.0-or-later
"""The placement schemes of the field on real guests, as far as two pCPUs allow; judged from the kernel."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from harness import FIFO_RESET, Daemon, helpers_on, placed, violations

from demo import guests
from demo.guests import Guest, Lab, Seen

Make = Callable[..., Daemon]
wait_for = partial(guests.wait_for, timeout_s=30.0)  # a busy machine is no failure

POLICY = """\
version: 1
mode: enforce
pools: {{housekeeping: 0, realtime: {{cpus: 1, siblings: ignore, numa: preferred}}}}
classes:
  c:
    {class_}
  other: {{vcpu: {{pool: realtime, exclusive: thread}}}}
guests:
{rules}
drift: repair
when_full: degrade
daemon: {{period: 200ms}}
"""

NOVA = "http://openstack.org/xmlns/libvirt/nova/1.1"


def policy(class_: str, *rules: str) -> str:
    return POLICY.format(class_=class_, rules="\n".join(f"  - {{{rule}}}" for rule in rules))


def of(guest: Guest, start: str) -> list[Seen]:
    """Return the guest's threads whose name begins like that."""
    return [thread for thread in guest.threads() if thread.comm.startswith(start)]


def on(guest: Guest, start: str, cpus: set[int], fifo: int = 0) -> bool:
    """Return whether these threads are there, on these pCPUs, and FIFO at that priority (0: not realtime)."""
    found = of(guest, start)
    policy_ = FIFO_RESET if fifo else os.SCHED_OTHER
    return bool(found) and all(
        thread.cpus == cpus and (thread.policy, thread.priority) == (policy_, fifo) for thread in found
    )


@pytest.mark.usefixtures("unthrottled")
def test_a_vcpu_that_is_not_realtime_and_one_that_is(lab: Lab, daemon: Make) -> None:
    """By ids: vCPU 0 and the helpers in housekeeping, vCPU 1 alone at FIFO."""
    guest = lab.start("mask", vcpus=2, iothreads=1)
    made = daemon(
        policy(
            "vcpu: [{ids: 0, pool: housekeeping}, {pool: realtime, exclusive: thread, scheduler: fifo}]",
            f"uuid: {guest.uuid}, class: c",
        )
    )
    made.start()

    wait_for(lambda: on(guest, "CPU 1/", {1}, fifo=1), "vCPU 1 is FIFO on its pCPU")
    wait_for(lambda: on(guest, "CPU 0/", {0}) and helpers_on(guest, {0}), "vCPU 0 and the helpers are on the other")
    assert violations([guest]) == []
    assert made.run_ctl("verify").returncode == 0


def test_helpers_beside_vcpu_0(lab: Lab, daemon: Make) -> None:
    """Without FIFO: the vCPU has a pCPU, and all its helpers join it there."""
    guest = lab.start("dpdk", iothreads=1)
    made = daemon(
        policy(
            "vcpu: {pool: realtime, exclusive: thread}\n    emulator: {share_with: {vcpu: 0}}",
            f"uuid: {guest.uuid}, class: c",
        )
    )
    made.start()

    wait_for(lambda: placed(guest, {1}) and helpers_on(guest, {1}), "all threads are on pCPU 1")


@pytest.mark.usefixtures("unthrottled")
def test_an_iothread_at_fifo_on_a_pcpu_of_its_own(lab: Lab, daemon: Make) -> None:
    """The vCPU floats, the iothread is alone and realtime."""
    guest = lab.start("fastio", iothreads=1)
    made = daemon(
        policy(
            "vcpu: {pool: housekeeping}\n"
            "    iothread: {pool: realtime, exclusive: thread, scheduler: fifo, priority: 2}",
            f"uuid: {guest.uuid}, class: c",
        )
    )
    made.start()

    wait_for(lambda: on(guest, "IO iothread1", {1}, fifo=2), "the iothread is FIFO 2 on pCPU 1")
    wait_for(lambda: placed(guest, {0}) and on(guest, "IO mon", {0}), "the others are on pCPU 0")


def test_one_pcpu_for_the_helpers_of_a_guest_and_who_joins_them(lab: Lab, daemon: Make) -> None:
    """The emulator has a pCPU for the guest, an iothread shares it."""
    guest = lab.start("own", iothreads=1)
    made = daemon(
        policy(
            "vcpu: {pool: housekeeping}\n    emulator: {pool: realtime, exclusive: guest}\n"
            "    iothread: {share_with: emulator}",
            f"uuid: {guest.uuid}, class: c",
        )
    )
    made.start()

    wait_for(lambda: placed(guest, {0}) and helpers_on(guest, {1}), "the helpers are on pCPU 1, the vCPU is not")


@pytest.mark.usefixtures("unthrottled", "kvm")
def test_the_pit_beside_vcpu_0_and_above_it(lab: Lab, daemon: Make) -> None:
    """KVM's timer thread is on the vCPU's pCPU at a higher priority; every other helper is elsewhere."""
    guest = lab.start("pit", kind="kvm", boot="spin")
    made = daemon(
        policy(
            "vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}\n"
            "    pit: {share_with: {vcpu: 0}, scheduler: fifo, priority: 2}",
            f"uuid: {guest.uuid}, class: c",
        )
    )
    made.start()

    wait_for(lambda: placed(guest, {1}, fifo=1) and on(guest, "kvm-pit", {1}, fifo=2), "the PIT is above its vCPU")
    wait_for(lambda: violations([guest]) == [], "nobody else is there")


@pytest.mark.usefixtures("unthrottled")
def test_the_guests_own_cputune_is_kept(lab: Lab, daemon: Make) -> None:
    """A rule by what the XML has; the vCPU stays where and what <cputune> says, the helpers are moved."""
    made = daemon(
        policy(
            "vcpu: {from: cputune}\n    emulator: {pool: housekeeping}",
            f'name: "{lab.prefix}-*", has: vcpusched, class: c',
        )
    )
    made.start()
    guest = lab.start(
        "xml", cputune="<vcpupin vcpu='0' cpuset='1'/><vcpusched vcpus='0' scheduler='fifo' priority='3'/>"
    )
    plain = lab.start("plain")

    wait_for(lambda: placed(guest, {1}, fifo=3), "the vCPU is FIFO 3 on pCPU 1, with RESET_ON_FORK")
    wait_for(lambda: helpers_on(guest, {0}), "the helpers are on pCPU 0")
    assert all(thread.cpus == {0, 1} for thread in plain.threads())


def test_rules_by_flavor_follow_the_metadata(lab: Lab, daemon: Make) -> None:
    """A guest whose metadata gets the flavor of a rule is placed by it; another is not touched."""
    guest, other = lab.start("flavor"), lab.start("none")
    made = daemon(
        policy(
            "vcpu: {pool: realtime, exclusive: thread}",
            f'name: "{lab.prefix}-*", flavor: "rt.*", class: c',
        )
    )
    made.start()
    xml = "<instance><flavor name='rt.small'/></instance>"
    words = ["virsh", "-q", "metadata", guest.name, NOVA, "--live", "--key", "nova", "--set", xml]
    subprocess.run(words, check=True, timeout=30, capture_output=True)

    wait_for(lambda: placed(guest, {1}) and helpers_on(guest, {0}), "the guest of that flavor is placed")
    assert all(thread.cpus == {0, 1} for thread in other.threads())


def test_fixed_pcpus_and_the_other_guests(lab: Lab, daemon: Make) -> None:
    """The pCPU of a rule is its guest's, and nobody else's."""
    first = lab.start("other")
    made = daemon(
        policy(
            "vcpu: {pool: realtime, exclusive: thread}",
            f'name: "{lab.prefix}-fixed", class: c, pcpus: 1',
            f"uuid: {first.uuid}, class: unmanaged",
        )
    )
    made.start()
    guest = lab.start("fixed")

    wait_for(lambda: placed(guest, {1}) and helpers_on(guest, {0}), "the guest has the pCPU of its rule")
    assert "pcpus" not in made.run_ctl("explain", guest.name).stderr


@pytest.fixture
def pinned() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody's program that is pinned to pCPU 1, as a DPDK PMD or ptp4l is."""
    process = subprocess.Popen(["taskset", "-c", "1", "sleep", "600"])
    yield process
    process.kill()
    process.wait()


def test_what_somebody_is_pinned_to_is_not_given_out(lab: Lab, daemon: Make, pinned: subprocess.Popen[bytes]) -> None:
    """While a program is pinned to the only pCPU of the pool the guest floats; when it ends, the guest gets it."""
    guest = lab.start("busy")
    made = daemon(policy("vcpu: {pool: realtime, exclusive: thread}", f"uuid: {guest.uuid}, class: c"))
    old = time.monotonic() + 6.0  # a pin counts when it is some seconds old
    wait_for(lambda: time.monotonic() > old, "the pin is old enough to count")
    made.start()

    wait_for(lambda: placed(guest, {0}), "the guest floats in housekeeping")
    assert f"sleep ({pinned.pid})" in made.run_ctl("explain", guest.name).stdout

    pinned.kill()
    pinned.wait()

    wait_for(lambda: placed(guest, {1}), "the guest has the pCPU")


def test_floating_vcpus_share_what_is_left(lab: Lab, daemon: Make) -> None:
    """A floating guest leaves the pCPU that another gets, and comes back when that one stops."""
    web = lab.start("web")
    made = daemon(
        policy(
            "vcpu: {pool: realtime}",
            f"uuid: {web.uuid}, class: c",
            f'name: "{lab.prefix}-rt", class: other',
        )
    )
    made.start()
    wait_for(lambda: placed(web, {1}) and helpers_on(web, {0}), "the floating vCPU is in its pool")

    alone = lab.start("rt")
    wait_for(lambda: placed(alone, {1}) and placed(web, {0}), "it has left the pool to the other")
    alone.destroy()
    wait_for(lambda: placed(web, {1}), "it is back")


def test_a_guest_of_another_shape_is_left_alone(lab: Lab, daemon: Make) -> None:
    """A class that names a vCPU which the guest has not refuses it, on record, and touches nothing."""
    guest = lab.start("shape")
    made = daemon(policy("vcpu: {ids: 0-1, pool: realtime, exclusive: thread}", f"uuid: {guest.uuid}, class: c"))
    made.start()

    wait_for(lambda: made.count("names vcpu 1, which the guest does not have") == 1, "it is refused on record")
    assert all(thread.cpus == {0, 1} for thread in guest.threads())
    assert made.run_ctl("verify").returncode == 1
