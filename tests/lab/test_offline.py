# SPDX-License-Identifier: GPL-2.0-or-later
"""A pCPU goes away under a spinning FIFO vCPU, on a host with one pCPU for everything else."""

from __future__ import annotations

import pytest

from lab.scene import Scene, policy


@pytest.mark.lab("small")
def test_the_pcpu_of_a_spinning_guest_goes_offline(scene: Scene) -> None:
    """The host stays alive; the vCPU is demoted and placed on a free pCPU; back online, the pCPU is used again."""
    scene.start(policy(("rt-*", "realtime")))
    guests = [scene.guest("two"), scene.guest("one", boot="spin")]
    spinning = guests[1]
    scene.wait_for(lambda: scene.alone(guests), "each vCPU is alone on its pCPU at FIFO")
    (gone,) = spinning.vcpus()[0].cpus

    online = f"/sys/devices/system/cpu/cpu{gone}/online"
    try:
        scene.run(f"echo 0 >{online} &")  # until the vCPU is demoted, 5 % of a pCPU are left for everything else
        scene.wait_for(lambda: spinning.vcpus()[0].cpus != (gone,), "the vCPU is elsewhere", 600, every_s=3)
        scene.wait_for(
            lambda: scene.alone(guests), "each vCPU is alone on one of the two that are left", 600, every_s=3
        )
    finally:
        scene.run(f"echo 1 >{online}")

    spinning.virsh("suspend {}")  # it keeps its pCPU, and leaves the lab's to the guest that starts
    third = scene.guest("three")
    scene.wait_for(lambda: scene.alone([*guests, third]), "the third has the pCPU that came back")
    scene.wait_verified()
    assert scene.count("something else moves it") == 0  # the kernel does, when pCPUs come and go
