# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package: installed nothing changes by surprise, upgraded and removed guests stay, purged nothing is left.

Runs when RTPIND_LAB_DEB names a package; then all other scenarios run with the package, too.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lab.product import install_package
from lab.scene import Scene, policy

PACKAGE = os.environ.get("RTPIND_LAB_DEB", "")

pytestmark = [
    pytest.mark.lab("bookworm-rt", "trixie-rt"),
    pytest.mark.skipif(not PACKAGE, reason="RTPIND_LAB_DEB names no package"),
]


def test_upgraded_removed_and_purged_with_guests_running(scene: Scene) -> None:
    """Guests' threads stay through upgrade and removal; after a purge no file is left."""
    guests = scene.guests("one", "two")
    scene.start(policy(("rt-*", "realtime")))
    scene.wait_for(lambda: scene.alone(guests), "each vCPU is alone on its pCPU at FIFO")
    before = [guest.places() for guest in guests]

    def moved() -> list[object]:
        return [found for guest, places in zip(guests, before, strict=True) for found in guest.moved(places)]

    try:
        scene.run(f"apt-get -y -q install --reinstall /var/tmp/{Path(PACKAGE).name}", timeout_s=300)
        scene.wait_for(lambda: scene.pid() != 0, "rtpind runs after the upgrade")
        scene.wait_verified()
        assert "rt-*" in scene.host.read("/etc/rtpind.yaml")
        assert moved() == []

        scene.run("apt-get -y -q remove rtpind", timeout_s=300)
        assert scene.run("systemctl is-active rtpind", check=False).code != 0
        assert moved() == []

        scene.run("apt-get -y -q purge rtpind", timeout_s=300)
        places = "/etc/rtpind.yaml* /run/rtpind* /usr/bin/rtpin* /usr/share/rtpind* /lib/systemd/system/rtpind*"
        assert scene.run(f"ls -d {places}", check=False).out == ""
        assert moved() == []
    finally:
        install_package(scene.host, Path(PACKAGE))


def test_as_installed_it_neither_runs_nor_acts(scene: Scene) -> None:
    """Not started by the installation; the shipped policy observes; the unit is well confined."""
    scene.run("apt-get -y -q purge rtpind", timeout_s=300)
    scene.host.push({f"var/tmp/{Path(PACKAGE).name}": Path(PACKAGE)})
    scene.run(f"apt-get -y -q install /var/tmp/{Path(PACKAGE).name}", timeout_s=300)

    assert scene.run("systemctl is-active rtpind", check=False).out.strip() == "inactive"
    assert scene.ctl("check-config").code == 0
    assert "mode: observe" in scene.host.read("/etc/rtpind.yaml")
    exposure = scene.run("systemd-analyze security --no-pager rtpind | tail -n 1").out
    assert float(exposure.split(":")[1].split()[0]) <= 1.5, exposure
