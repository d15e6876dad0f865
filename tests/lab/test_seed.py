# SPDX-License-Identifier: GPL-2.0-or-later
"""The case that rtpind was made for: four pCPUs, one for the host, three for realtime guests."""

from __future__ import annotations

import pytest

from lab.scene import Scene, policy


@pytest.mark.smoke
@pytest.mark.lab("small")
def test_three_realtime_guests_on_four_pcpus(scene: Scene) -> None:
    """Each of three vCPUs is alone on its pCPU at FIFO, all helpers share pCPU 0, and verify agrees."""
    scene.start(policy(("rt-*", "realtime")))

    guests = scene.guests("one", "two", "three")

    scene.wait_for(lambda: scene.alone(guests), "each vCPU is alone on its pCPU at FIFO, all helpers keep house")
    scene.wait_verified()
    assert sorted(vcpu.cpus for guest in guests for vcpu in guest.vcpus()) == [(1,), (2,), (3,)]
    assert scene.housekeeping == (0,)
