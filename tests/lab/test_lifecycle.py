# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest goes through: pause, reset, dump, snapshot, save and restore, a reboot of its host."""

from __future__ import annotations

import pytest

from lab.scene import Guest, Scene, policy

pytestmark = pytest.mark.lab("bookworm-rt")

SNAPSHOT = "--memspec file=/var/tmp/life.mem,snapshot=external --diskspec fda,snapshot=no"


def now(scene: Scene, guest: Guest) -> Guest:
    """Return the guest as the process that it is now."""
    return Guest(scene.host, guest.name, guest.uuid, int(scene.host.read(f"/run/libvirt/qemu/{guest.name}.pid")))


def define(scene: Scene, guest: Guest) -> None:
    """Make a transient guest persistent."""
    scene.run(f"virsh -q dumpxml {guest.name} >/var/tmp/{guest.name}.xml && virsh -q define /var/tmp/{guest.name}.xml")


def test_pause_reset_dump_and_snapshot(scene: Scene) -> None:
    """What stops the guest for a while and copies its memory changes no thread of it."""
    (guest,) = scene.placed("life")
    before = guest.places()

    for words in (
        "suspend {}",
        "resume {}",
        "reset {}",
        "dump {} /var/tmp/life.dump --memory-only --live",
        f"snapshot-create-as {{}} life --no-metadata {SNAPSHOT}",
    ):
        guest.virsh(words)
        scene.passes(1)
        assert guest.moved(before) == [], words
    scene.wait_for(lambda: scene.alone([guest]), "threads that came for it keep house or have gone")
    scene.wait_verified()


def test_save_and_restore(scene: Scene) -> None:
    """A restored guest is another process and is placed again, whether saved to a file or by libvirt."""
    (guest,) = scene.placed("life")

    guest.virsh("save {} /var/tmp/life.save")
    guest.virsh("restore /var/tmp/life.save")
    restored = now(scene, guest)
    assert restored.pid != guest.pid
    scene.wait_for(lambda: scene.alone([restored]), "the restored guest is placed")

    define(scene, guest)
    guest.virsh("managedsave {}")
    guest.virsh("start {}")
    started = now(scene, guest)
    assert started.pid != restored.pid
    scene.wait_for(lambda: scene.alone([started]), "the guest is placed after the managed save")
    scene.wait_verified()


def test_autostarted_guests_after_a_reboot_of_the_host(scene: Scene) -> None:
    """Service and guests come back with the host, placed."""
    scene.write_policy(policy(("rt-*", "realtime")))
    guests = scene.guests("one", "two")
    for guest in guests:
        define(scene, guest)
        guest.destroy()
        guest.virsh("autostart {}")
    scene.run("systemctl enable rtpind")

    scene.host.reboot()

    def up() -> list[Guest]:
        found = scene.run("cd /run/libvirt/qemu && grep -H . rt-*.pid", check=False).out.split()
        pids = {name.removesuffix(".pid"): int(pid) for name, _, pid in (word.partition(":") for word in found)}
        return [Guest(scene.host, guest.name, guest.uuid, pids[guest.name]) for guest in guests if guest.name in pids]

    scene.wait_for(lambda: len(up()) == 2, "both guests run again")
    scene.wait_for(lambda: scene.alone(up()), "both are placed")
    scene.wait_verified()
    scene.run("systemctl disable rtpind")
