# SPDX-License-Identifier: GPL-2.0-or-later
"""The Debian package: installed nothing changes by surprise, upgraded and removed guests stay, purged nothing is left.

All other scenarios run with the package, too.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.product import PACKAGE, install_package, newer, push_package
from lab.scene import Scene

pytestmark = [
    pytest.mark.lab("bookworm-rt", "trixie-rt"),
    pytest.mark.skipif(PACKAGE is None, reason="RTPIND_LAB_DEB names no package"),
]

#: Where the lab itself keeps something of that name, and what of the package Debian keeps after a purge.
KEPT = ("/opt", "/root", "/var/log", "/run/lab")


def test_upgraded_removed_and_purged_with_guests_running(scene: Scene, tmp_path: Path) -> None:
    """Guests' threads stay through upgrade and removal; the upgraded daemon runs; after a purge no file is left."""
    assert PACKAGE is not None
    guests = scene.placed("one", "two")
    before = [guest.places() for guest in guests]
    pid, steps = scene.pid(), scene.steps()

    try:
        upgrade = push_package(scene.host, newer(PACKAGE, tmp_path))
        scene.run(f"apt-get -y -q install {upgrade}", timeout_s=300)
        assert scene.run("dpkg-query -W -f '${Version}' rtpind").out.endswith("+lab1")
        scene.wait_for(lambda: scene.pid() not in (0, pid), "the upgraded rtpind runs")
        scene.wait_verified()
        assert "rt-*" in scene.host.read("/etc/rtpind.yaml")
        assert scene.steps() == steps
        assert scene.moved(guests, before) == []

        scene.run("apt-get -y -q remove rtpind", timeout_s=300)
        assert scene.run("systemctl is-active rtpind", check=False).code != 0
        assert scene.moved(guests, before) == []

        scene.run("apt-get -y -q purge rtpind", timeout_s=300)
        pruned = " -o ".join(f"-path {path}" for path in KEPT)
        assert scene.run(f"find / /run -xdev \\( {pruned} \\) -prune -o -name '*rtpin*' -print").out == ""
        assert scene.moved(guests, before) == []
    finally:
        scene.run("dpkg --purge rtpind", check=False, timeout_s=300)
        install_package(scene.host, PACKAGE)


def test_as_installed_it_neither_runs_nor_acts(scene: Scene) -> None:
    """Not started by the installation; the shipped policy observes; the unit is well confined."""
    assert PACKAGE is not None
    scene.run("apt-get -y -q purge rtpind", timeout_s=300)
    scene.run(f"apt-get -y -q install {push_package(scene.host, PACKAGE)}", timeout_s=300)

    assert scene.run("systemctl is-active rtpind", check=False).out.strip() == "inactive"
    assert scene.ctl("check-config").code == 0
    assert "mode: observe" in scene.host.read("/etc/rtpind.yaml")
    exposure = scene.run("systemd-analyze security --no-pager rtpind | tail -n 1").out
    assert float(exposure.split(":")[1].split()[0]) <= 1.5, exposure
