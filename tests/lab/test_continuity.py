# SPDX-License-Identifier: GPL-2.0-or-later
"""rtpind, libvirtd and journald come and go; the guests' threads stay where they are, and nothing is lost."""

from __future__ import annotations

import pytest

from lab.scene import Scene, policy

pytestmark = pytest.mark.lab("bookworm-rt")


@pytest.mark.lab("bookworm-rt", "trixie-rt")
def test_libvirtd_is_restarted(scene: Scene) -> None:
    """No thread changes; rtpind connects again and places the next guest."""
    (guest,) = scene.placed("one")
    before = guest.places()
    connected = scene.count("connected to libvirt")

    scene.run("systemctl restart libvirtd", timeout_s=120)
    scene.wait_for(lambda: scene.count("connected to libvirt") > connected, "rtpind is connected again")

    assert guest.moved(before) == []
    second = scene.guest("two")
    scene.wait_for(lambda: scene.alone([guest, second]), "the second is placed too")
    assert guest.moved(before) == []


@pytest.mark.smoke
def test_killed_and_started_again(scene: Scene) -> None:
    """After kill -9 systemd starts it again; no thread changes, nothing is done twice, originals are still known."""
    guests = scene.placed("one", "two")
    before = [guest.places() for guest in guests]
    pid, steps = scene.pid(), scene.steps()

    scene.run(f"kill -9 {pid}")
    scene.wait_for(lambda: scene.pid() not in (0, pid), "systemd starts it again")
    scene.wait_verified()

    assert scene.moved(guests, before) == []
    assert scene.steps() == steps


def test_stopped_hung_and_restarted(scene: Scene) -> None:
    """Stopping, and a watchdog that fires, leave the guests placed."""
    (guest,) = scene.placed("one")
    before, pid = guest.places(), scene.pid()

    scene.run(f"kill -STOP {pid}")
    scene.wait_for(lambda: scene.pid() not in (0, pid), "the watchdog has it started again")
    assert guest.moved(before) == []
    scene.wait_verified()

    scene.run("systemctl stop rtpind")
    assert guest.moved(before) == []


def test_release_puts_back_what_was(scene: Scene) -> None:
    """Every thread gets back what it had, also after rtpind was killed in between; manage takes it again."""
    guests = scene.guests("one", "two", vcpus=2, iothreads=1)
    before = [guest.places() for guest in guests]
    scene.start(policy(("rt-*", "realtime")))
    scene.wait_for(lambda: scene.alone(guests), "each vCPU is alone on its pCPU at FIFO")
    pid = scene.pid()
    scene.run(f"kill -9 {pid}")
    scene.wait_for(lambda: scene.pid() not in (0, pid), "systemd starts it again")
    scene.wait_verified()

    assert scene.ctl("release", guests[0].name).code == 0

    assert guests[0].moved(before[0]) == []
    assert scene.alone(guests[1:])
    scene.passes()
    assert guests[0].moved(before[0]) == []

    assert scene.ctl("manage", guests[0].name).code == 0
    scene.wait_for(lambda: scene.alone(guests), "both are placed")
    assert scene.ctl("release", "--all").code == 0
    assert scene.moved(guests, before) == []


def test_journald_is_stopped_and_started(scene: Scene) -> None:
    """Without journald guests are placed all the same; when it is back, records arrive again."""
    (guest,) = scene.placed("one")

    scene.run("systemctl stop systemd-journald.socket systemd-journald-dev-log.socket systemd-journald", check=False)
    second = scene.guest("two")
    scene.wait_for(lambda: scene.alone([guest, second]), "the second is placed without journald")
    scene.run("systemctl start systemd-journald.socket systemd-journald-dev-log.socket systemd-journald")
    third = scene.guest("three")
    scene.wait_for(lambda: scene.alone([guest, second, third]), "the third is placed")

    scene.wait_for(lambda: scene.count("rt-three.*→"), "its records are in the journal")
    assert scene.pid() != 0
