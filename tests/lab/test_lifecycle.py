# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest goes through: pause, reset, save and restore, a reboot of its host."""

from __future__ import annotations

import pytest

from lab.scene import Guest, Scene, policy

pytestmark = pytest.mark.lab("bookworm-rt")


def test_pause_reset_save_and_restore(scene: Scene) -> None:
    """Pause and reset change nothing; a restored guest is another process and is placed again."""
    scene.start(policy(("rt-*", "realtime")))
    guest = scene.guest("life", boot="spin")
    scene.wait_for(lambda: scene.alone([guest]), "the guest is placed")
    before = guest.places()

    for words in ("suspend {}", "resume {}", "reset {}"):
        guest.virsh(words)
        scene.passes(1)
        assert guest.moved(before) == [], words

    guest.virsh("save {} /var/tmp/life.save")
    guest.virsh("restore /var/tmp/life.save")
    restored = Guest(scene.host, guest.name, guest.uuid, int(scene.host.read(f"/run/libvirt/qemu/{guest.name}.pid")))
    assert restored.pid != guest.pid
    scene.wait_for(lambda: scene.alone([restored]), "the restored guest is placed")
    scene.wait_verified()


def test_autostarted_guests_after_a_reboot_of_the_host(scene: Scene) -> None:
    """Service and guests come back with the host, placed."""
    scene.write_policy(policy(("rt-*", "realtime")))
    guests = scene.guests("one", "two")
    for guest in guests:
        guest.virsh("dumpxml {} >/var/tmp/{}.xml".replace("{}.xml", f"{guest.name}.xml"))
        guest.destroy()
        guest.virsh(f"define /var/tmp/{guest.name}.xml")
        guest.virsh("autostart {}")
    scene.run("systemctl enable rtpind")

    scene.host.reboot()

    def up() -> list[Guest]:
        found = scene.run("cd /run/libvirt/qemu && grep -H . rt-*.pid", check=False).out.split()
        pids = {name.removesuffix(".pid"): int(pid) for name, _, pid in (word.partition(":") for word in found)}
        return [Guest(scene.host, guest.name, guest.uuid, pids[guest.name]) for guest in guests if guest.name in pids]

    scene.wait_for(lambda: len(up()) == 2, "both guests run again", 120)
    scene.wait_for(lambda: scene.alone(up()), "both are placed", 120)
    scene.wait_verified()
    scene.run("systemctl disable rtpind")
