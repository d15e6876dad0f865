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
    guest = scene.guest("split", vcpus=3)
    scene.wait_for(lambda: all(vcpu.fifo for vcpu in guest.vcpus()), "the vCPUs are at FIFO")
    scene.wait_verified()

    assert sorted(vcpu.cpus for vcpu in guest.vcpus()) == [(3,), (6,), (7,)]
    assert violations([guest]) == []
    fact = scene.fact("SMT siblings across pools")
    assert (fact["value"], bool(fact["warning"])) == ("pCPU 3", True)


SIBLINGS = policy(("rt-*", "realtime"), pool="{cpus: isolated, siblings: SIBLINGS}", more="when_full: degrade\n")


def test_idle_siblings_are_nobodys(scene: Scene) -> None:
    """Two guests have a core each, whose other thread is idle; for the third there is none, as capacity knew."""
    scene.start(SIBLINGS.replace("SIBLINGS", "idle"))
    rows = {row["vcpus"]: row["guests"] for row in scene.ctl_json("capacity", "--vcpus", "1")["rows"]}
    guests = scene.guests("one", "two")
    scene.wait_for(lambda: scene.alone(guests), "each vCPU is alone on its pCPU at FIFO")

    third = scene.guest("three")
    scene.wait_for(lambda: scene.verdict(third, "vcpu") == {"not-placed"}, "there is no core for the third")

    assert sorted(vcpu.cpus for guest in guests for vcpu in guest.vcpus()) == [(2,), (6,)]
    assert not any({3, 7} & set(thread.cpus) for guest in [*guests, third] for thread in guest.threads())
    assert rows[1] == 2

    guests[0].destroy()
    scene.wait_for(lambda: scene.alone([guests[1], third]), "the third has the core that became free")


def test_a_step_is_lost_before_the_place(scene: Scene) -> None:
    """Three vCPUs on two cores: placed at FIFO, but crowded, on record; verify is not content."""
    scene.start(SIBLINGS.replace("SIBLINGS", "idle"))
    guest = scene.guest("large", vcpus=3)

    scene.wait_for(lambda: scene.alone([guest]), "each vCPU is alone on its pCPU at FIFO")
    scene.wait_for(lambda: scene.count("placed with a step lost: no core with idle siblings"), "the loss is on record")
    assert scene.ctl("verify").code == 1


def test_siblings_of_the_same_guest(scene: Scene) -> None:
    """Each guest has the two threads of a core for its two vCPUs."""
    scene.start(SIBLINGS.replace("SIBLINGS", "same-guest"))
    guests = scene.guests("one", "two", vcpus=2)

    scene.wait_for(lambda: scene.alone(guests), "each vCPU is alone on its pCPU at FIFO")
    assert sorted(sorted(cpu for vcpu in guest.vcpus() for cpu in vcpu.cpus) for guest in guests) == [[2, 3], [6, 7]]
