# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that come as a whole from somewhere else: a file, a snapshot, another host. Placed before they run."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.conftest import booted, staged
from lab.host import LabHost
from lab.recipe import SHAPES
from lab.scene import Guest, Scene, policy

#: What a snapshot of a running guest is kept in.
DISK = """<disk type='file' device='disk'><driver name='qemu' type='qcow2'/>
<source file='/var/tmp/incoming.qcow2'/><target dev='vda' bus='virtio'/></disk>"""


def placed_while_paused(scene: Scene, guest: Guest) -> None:
    """Check that a paused guest comes to its place, and that running changes nothing of it."""
    scene.wait_for(lambda: scene.alone([guest]), "the paused guest is placed")
    assert scene.run(f"virsh domstate {guest.name}").out.strip() == "paused"
    before, steps = guest.places(), scene.steps()

    guest.virsh("resume {}")

    scene.passes(1)
    assert guest.moved(before) == []
    assert scene.steps() == steps  # nor was anything put back meanwhile
    scene.wait_verified()


@pytest.mark.lab("bookworm-rt")
def test_a_restored_guest_is_placed_while_it_is_paused(scene: Scene) -> None:
    """A restored guest has its places before its first instruction; one saved by libvirt is placed again, too."""
    (guest,) = scene.placed("file")
    guest.virsh("save {} /var/tmp/incoming.save")

    guest.virsh("restore /var/tmp/incoming.save --paused")

    restored = scene.again(guest)
    assert restored.pid != guest.pid
    placed_while_paused(scene, restored)

    guest.define()
    guest.virsh("managedsave {}")
    guest.virsh("start {}")
    started = scene.again(guest)
    assert started.pid != restored.pid
    scene.wait_for(lambda: scene.alone([started]), "the guest is placed after the managed save")
    scene.wait_verified()


@pytest.mark.lab("trixie-rt")
def test_a_reverted_guest_is_placed_while_it_is_paused(scene: Scene, tmp_path: Path) -> None:
    """So has one that was set back to a snapshot."""
    disk = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "4M"], check=True)  # a lab host has no qemu-img
    scene.host.push({"/var/tmp/incoming.qcow2": disk})
    (guest,) = scene.placed("snap", devices=DISK)
    guest.define()
    guest.virsh("snapshot-create-as {} one")
    guest.destroy()

    scene.run(f"virsh -q snapshot-revert {guest.name} one --paused")

    reverted = scene.again(guest)
    assert reverted.pid != guest.pid
    placed_while_paused(scene, reverted)
    scene.run(f"virsh -q snapshot-delete {guest.name} one")


@pytest.fixture(scope="module")
def peer(host: LabHost, request: pytest.FixtureRequest) -> Iterator[LabHost]:
    """The host at the other end of the cable."""
    with booted(SHAPES[host.shape.peer], request.config) as made:
        host.plug(made)
        yield made


@pytest.fixture
def there(peer: LabHost, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """The scenario's other host."""
    with staged(peer, request) as made:
        yield made


@pytest.mark.lab("here")
def test_a_guest_from_another_host_is_placed_while_it_is_paused(scene: Scene, there: Scene) -> None:
    """A live migration: on the host to which it comes the guest has its places before it runs there."""
    (guest,) = scene.placed("roam")
    there.start(policy(("rt-*", "realtime")))
    image = Path(scene.run(f"virsh -q domblklist {guest.name}").out.split()[1])
    files = scene.run(f"cd / && tar -c {image.parent} | base64").out
    there.run("base64 -d | tar -x -C /", stdin=files)

    guest.virsh(f"migrate --live --p2p --suspend --unsafe {{}} qemu+tcp://{there.host.shape.name}/system")

    placed_while_paused(there, there.again(guest))
