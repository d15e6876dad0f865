# SPDX-License-Identifier: GPL-2.0-or-later
"""A host whose pCPUs are two threads of a core each."""

from __future__ import annotations

import pytest

from lab.scene import Scene, policy, violations

pytestmark = pytest.mark.lab("smt")


def test_guests_on_whole_cores(scene: Scene) -> None:
    """Two guests fill the isolated cores; nothing of the host is on a sibling of theirs, and status says so."""
    siblings = scene.run("cat /sys/devices/system/cpu/cpu2/topology/thread_siblings_list").out.strip()
    assert siblings == "2-3"

    guests = scene.placed("one", "two", vcpus=2)

    assert sorted(vcpu.cpus for guest in guests for vcpu in guest.vcpus()) == [(2,), (3,), (6,), (7,)]
    assert violations(guests) == []
    assert scene.fact("SMT siblings across pools")["warning"] == ""


def test_a_pool_that_splits_a_core_is_named(scene: Scene) -> None:
    """Where a vCPU's sibling is housekeeping, the guest is placed, and status names the pCPU as a hazard."""
    scene.start(policy(("rt-*", "realtime"), pool="3,6-7").replace("pools:", "pools:\n  housekeeping: 0-2,4-5"))
    guest = scene.guest("split", vcpus=2)
    scene.wait_for(lambda: all(vcpu.fifo for vcpu in guest.vcpus()), "the vCPUs are at FIFO")
    scene.wait_verified()

    assert [vcpu.cpus for vcpu in guest.vcpus()] == [(3,), (6,)]
    assert violations([guest]) == []
    fact = scene.fact("SMT siblings across pools")
    assert (fact["value"], bool(fact["warning"])) == ("pCPU 3", True)
