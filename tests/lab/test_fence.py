# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt's <cputune> fences off on cgroup 2: what can be done is done, the rest is named."""

from __future__ import annotations

import pytest

from lab.scene import Scene, policy, violations

pytestmark = pytest.mark.lab("bookworm-rt", "trixie-rt")


@pytest.mark.smoke
def test_a_pinned_vcpu_is_placed_inside_its_pin_or_named(scene: Scene) -> None:
    """A vCPU pinned inside the pool is at FIFO there; one pinned outside stays, and its cgroup is named."""
    scene.start(policy(("rt-*", "realtime")))
    inside = scene.guest("inside", cputune="<vcpupin vcpu='0' cpuset='3'/>")
    outside = scene.guest("outside", cputune="<vcpupin vcpu='0' cpuset='0'/>")

    scene.wait_for(lambda: scene.alone([inside]), "the vCPU pinned inside the pool is at FIFO there")
    scene.wait_for(lambda: "fenced" in scene.verdict(outside, "vcpu"), "the vCPU pinned outside is fenced")

    assert [vcpu.cpus for vcpu in inside.vcpus()] == [(3,)]
    (out,) = outside.vcpus()
    assert (out.cpus, out.fifo) == ((0,), False)
    assert violations([inside, outside]) == []
    assert scene.ctl("verify").code == 1
    assert [out.cgroup in why for why in scene.whys(outside)] == [True]
    steps = scene.steps()
    scene.passes()
    assert scene.steps() == steps  # what was refused is remembered


def test_a_worker_of_a_pinned_vcpu_goes_and_fifo_comes(scene: Scene) -> None:
    """A worker that a pinned vCPU began is held to its pCPU by its cgroup; when it has ended, the vCPU is at FIFO."""
    scene.start(policy(("rt-*", "realtime")))
    guest = scene.guest("inside", cputune="<vcpupin vcpu='0' cpuset='3'/>", firmware=True)

    scene.wait_for(lambda: scene.count("worker.*refused"), "a worker is held to the vCPU's pCPU")
    scene.wait_for(lambda: "worker" not in {thread.comm for thread in guest.threads()}, "it has ended")
    scene.wait_for(lambda: scene.alone([guest]), "the vCPU is at FIFO", 60)
    assert [vcpu.cpus for vcpu in guest.vcpus()] == [(3,)]


def test_helpers_pinned_into_the_pool_leave_the_vcpu_another_pcpu(scene: Scene) -> None:
    """The helpers cannot leave and are named; their guest's vCPU is at FIFO on another pCPU."""
    scene.start(policy(("rt-*", "realtime")))
    guest = scene.guest("helpers", cputune="<emulatorpin cpuset='2'/>")

    scene.wait_for(lambda: "fenced" in scene.verdict(guest, "emulator"), "the helpers are fenced")
    scene.wait_for(lambda: len(guest.vcpus()[0].cpus) == 1, "the vCPU has a pCPU")
    scene.passes()

    (vcpu,) = guest.vcpus()
    assert vcpu.cpus != (2,)
    assert vcpu.fifo
    assert {helper.cpus for helper in guest.helpers()} == {(2,)}
    assert violations([guest]) == []
    assert all(guest.helpers()[0].cgroup in why for why in scene.whys(guest))


def test_a_live_pin_is_obeyed_and_a_lifted_one_forgotten(scene: Scene) -> None:
    """Virsh vcpupin on a placed guest moves the vCPU within the law; lifted, the vCPU is placed again."""
    scene.start(policy(("rt-*", "realtime")))
    guest = scene.guest("live")
    scene.wait_for(lambda: scene.alone([guest]), "the vCPU is alone at FIFO")

    guest.virsh("vcpupin {} 0 0 --live")
    scene.wait_for(lambda: "fenced" in scene.verdict(guest, "vcpu"), "the vCPU is fenced")
    scene.wait_for(lambda: not guest.vcpus()[0].fifo, "it is not FIFO on a housekeeping pCPU")

    everywhere = f"0-{max(scene.isolated + scene.housekeeping)}"
    guest.virsh(f"vcpupin {{}} 0 {everywhere} --live")
    scene.wait_for(lambda: scene.alone([guest]), "the vCPU is alone at FIFO again")
    scene.wait_verified()
