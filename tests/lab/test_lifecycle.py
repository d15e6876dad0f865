# SPDX-License-Identifier: GPL-2.0-or-later
"""What a guest goes through: pause, reset, dump, snapshot, a reboot of its host."""

from __future__ import annotations

import pytest

from lab.scene import Guest, Scene, policy

pytestmark = pytest.mark.lab("bookworm-rt")

SNAPSHOT = "--memspec file=/var/tmp/life.mem,snapshot=external --diskspec fda,snapshot=no"


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


def test_autostarted_guests_after_a_reboot_of_the_host(scene: Scene) -> None:
    """Service and guests come back with the host, placed."""
    scene.write_policy(policy(("rt-*", "realtime")))
    guests = scene.guests("one", "two")
    for guest in guests:
        guest.define()
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
