# SPDX-License-Identifier: GPL-2.0-or-later
"""The placement schemes of the field side by side, on a host of two NUMA nodes (pCPUs 0-3 and 4-7)."""

from __future__ import annotations

import pytest

from lab.scene import Guest, Scene, violations

pytestmark = pytest.mark.lab("bookworm-rt")

POLICY = """\
version: 1
mode: enforce
pools:
  realtime: {cpus: isolated, numa: NUMA}
classes:
  mask:
    vcpu: [{ids: 0, pool: realtime, exclusive: thread}, {pool: realtime, exclusive: thread, scheduler: fifo}]
    emulator: {share_with: {vcpu: 0}}
  own:
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}
    emulator: {pool: realtime, exclusive: guest}
  shared:
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}
    emulator: {pool: housekeeping}
  xml:
    vcpu: {from: cputune}
    emulator: {pool: housekeeping}
guests:
  - {has: vcpusched, class: xml}
  - {name: "rt-mask*", class: mask}
  - {name: "rt-own*", class: own}
  - {name: "rt-shared*", class: shared}
drift: repair
when_full: degrade
daemon: {period: 2s}
"""


def cpus(guest: Guest, *, vcpus: bool) -> list[tuple[int, ...]]:
    return sorted({thread.cpus for thread in guest.threads() if thread.vcpu is vcpus})


def fifo(guest: Guest) -> list[bool]:
    return [vcpu.fifo for vcpu in guest.vcpus()]


def test_the_schemes_side_by_side(scene: Scene) -> None:
    """Emulator beside vCPU 0, on a pCPU of its own, in a shared pool: each guest on one node, nobody beside FIFO."""
    scene.start(POLICY.replace("NUMA", "preferred"))
    mask = scene.guest("mask", vcpus=2)
    scene.wait_for(lambda: fifo(mask) == [False, True] and cpus(mask, vcpus=True) == [(2,), (3,)], "mask is placed")
    own = scene.guest("own")
    scene.wait_for(lambda: fifo(own) == [True], "own is placed")
    shared = scene.guest("shared")
    scene.wait_for(lambda: fifo(shared) == [True], "shared is placed")
    scene.wait_verified()

    assert cpus(mask, vcpus=False) == [mask.vcpus()[0].cpus]
    (vcpu,), (emulator,) = cpus(own, vcpus=True), cpus(own, vcpus=False)
    assert {*vcpu, *emulator} < {5, 6, 7}
    assert {*vcpu, *emulator, *cpus(shared, vcpus=True)[0]} == {5, 6, 7}
    assert cpus(shared, vcpus=False) == [scene.housekeeping]
    assert violations([mask, own, shared]) == []
    rows = scene.ctl_json("capacity", "--running", "--vcpus", "1")["rows"]
    assert {row["class"]: row["guests"] for row in rows} == {"mask": 0, "own": 0, "shared": 0, "xml": None}


def test_what_the_xml_says_is_kept_and_completed(scene: Scene) -> None:
    """A rule by <vcpusched>: the vCPU stays where the XML pins it, with RESET_ON_FORK; helpers go to the pool."""
    scene.start(POLICY.replace("NUMA", "preferred"))
    guest = scene.guest(
        "nova", cputune="<vcpupin vcpu='0' cpuset='6'/><vcpusched vcpus='0' scheduler='fifo' priority='1'/>"
    )

    scene.wait_for(lambda: scene.alone([guest]), "the vCPU is alone at FIFO, the helpers keep house")
    assert cpus(guest, vcpus=True) == [(6,)]
    other = scene.guest("shared-2", vcpus=2)
    scene.wait_for(lambda: scene.alone([guest, other]), "the other guest keeps off")


@pytest.mark.lab("bookworm-rt", "trixie-rt")
def test_a_strict_pool_serves_a_guest_from_the_node_of_its_memory(scene: Scene) -> None:
    """Bound to node 1, both vCPUs are there; a guest that does not fit there is not put elsewhere."""
    scene.start(POLICY.replace("NUMA", "strict"))
    bound = "<numatune><memory mode='strict' nodeset='1'/></numatune>"
    guest = scene.guest("shared-near", vcpus=2, numatune=bound)
    scene.wait_for(lambda: scene.alone([guest]), "the guest is placed")

    assert {cpu for places in cpus(guest, vcpus=True) for cpu in places} < {5, 6, 7}
    second = scene.guest("shared-far", vcpus=2, numatune=bound)
    scene.wait_for(lambda: scene.verdict(second, "vcpu") == {"not-placed"}, "node 1 has room for one vCPU only")
