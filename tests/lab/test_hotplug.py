# SPDX-License-Identifier: GPL-2.0-or-later
"""Threads that begin later: hot-plugged vCPUs and iothreads, vhost workers, a restored guest."""

from __future__ import annotations

import pytest

from lab.scene import Scene, policy

pytestmark = pytest.mark.lab("bookworm-rt", "trixie-rt")


@pytest.mark.smoke
def test_hot_plugged_threads_find_their_place(scene: Scene) -> None:
    """A vCPU gets a pCPU of its own and FIFO, an iothread joins the helpers; unplugged, the pCPU is free again."""
    scene.start(policy(("rt-*", "realtime")))
    guest = scene.guest("plug", vcpus=1, max_vcpus=2, iothreads=1)
    scene.wait_for(lambda: scene.alone([guest]), "the guest is placed")

    guest.virsh("setvcpus {} 2 --live")
    guest.virsh("iothreadadd {} 7 --live")

    wanted = {"CPU 0/TCG", "CPU 1/TCG", "IO iothread1", "IO iothread7"}
    scene.wait_for(lambda: wanted <= {thread.comm for thread in guest.threads()}, "both threads are there")
    scene.wait_for(lambda: scene.alone([guest]), "both are on their place")
    scene.wait_verified()


@pytest.mark.smoke
def test_a_vhost_worker_keeps_house(scene: Scene) -> None:
    """The vhost worker of a guest with vsock is with the helpers, not on a vCPU's pCPU."""
    scene.start(policy(("rt-*", "realtime")))
    guest = scene.guest("vhost", devices="<vsock model='virtio'><cid auto='yes'/></vsock>")

    worker = f"vhost-{guest.pid}"
    scene.wait_for(lambda: worker in {helper.comm for helper in guest.helpers()}, "there is a vhost worker")
    scene.wait_for(lambda: scene.alone([guest]), "the guest is placed, the worker among the helpers")
    scene.wait_verified()
    assert "ok" in scene.verdict(guest, "vhost")
