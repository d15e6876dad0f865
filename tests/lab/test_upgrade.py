# SPDX-License-Identifier: GPL-2.0-or-later
"""libvirt's packages are upgraded on a host whose guests run."""

from __future__ import annotations

import pytest

from lab.scene import Scene


@pytest.mark.lab("bookworm-rt", "trixie-rt")
def test_libvirt_is_upgraded_with_guests_running(scene: Scene) -> None:
    """No thread changes and none is set again; rtpind connects to the new libvirtd and places the next guest."""
    guests = scene.placed("one", "two")
    before = [guest.places() for guest in guests]
    connected, steps = scene.count("connected to libvirt"), scene.steps()

    scene.run("dpkg -i /var/lib/lab/upgrade/*.deb", timeout_s=600)
    scene.wait_for(lambda: scene.count("connected to libvirt") > connected, "rtpind is connected again")

    assert scene.run("dpkg-query -W -f '${Version}' libvirt-daemon").out.endswith("+lab1")
    assert scene.moved(guests, before) == []
    assert scene.steps() == steps
    third = scene.guest("three")
    scene.wait_for(lambda: scene.alone([*guests, third]), "the third is placed too")
    assert scene.moved(guests, before) == []
