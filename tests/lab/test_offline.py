# SPDX-License-Identifier: GPL-2.0-or-later
"""A pCPU goes away under a spinning FIFO vCPU, on a host with one pCPU for everything else."""

from __future__ import annotations

import pytest

from lab.scene import Scene, policy

#: The kernel's threads on housekeeping pCPU 0: as they are where nobody said otherwise, and as this host has them.
_AT = "ps -eo pid=,rtprio=,comm= | awk '$3 ~ /^rcu/ && $2 == {} {{print $1}}' | xargs -rn1 chrt -f -p {}"
_DEFAULT = f"{_AT.format(4, 1)}; chrt -f -p 1 $(pgrep ktimers/0); chrt -o -p 0 $(pgrep ksoftirqd/0)"
_RAISED = f"{_AT.format(1, 4)}; chrt -f -p 2 $(pgrep ktimers/0); chrt -f -p 2 $(pgrep ksoftirqd/0)"


@pytest.mark.lab("small")
@pytest.mark.parametrize("ladder", ["raised", "default"])
def test_a_spinning_vcpu_on_the_only_pcpu_of_the_host_is_taken_off_it(scene: Scene, ladder: str) -> None:
    """Moved there by hand at FIFO; rtpind is above it, and takes it off also where no timer expires behind it."""
    scene.start(policy(("rt-*", "realtime")))
    spinning = scene.guest("one", boot="spin")
    scene.wait_for(lambda: scene.alone([spinning]), "the vCPU is alone on its pCPU at FIFO")
    scene.wait_for(lambda: scene.count("vCPU 0 started"), "its start is over")  # else it may be libvirt that moves it
    try:
        if ladder == "default":
            scene.run(_DEFAULT)
            assert scene.run("ps -o rtprio= -p $(pgrep ktimers/0)").out.strip() == "1"
        scene.host.call("set_place", tid=spinning.vcpus()[0].tid, cpus=list(scene.housekeeping))
        scene.wait_for(lambda: scene.count("moved by somebody"), "rtpind has seen it", every_s=3)
        scene.wait_for(lambda: scene.alone([spinning]), "the vCPU is back")
    finally:
        if ladder == "default":
            scene.run(_RAISED)
    assert scene.count(r"fifo:1 → other \((drift|safety)\)") == 1


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
