# SPDX-License-Identifier: GPL-2.0-or-later
"""Nothing here waits for a period: the kernel and libvirt tell of each thread, and it is placed at once."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import libvirt
import pytest
from harness import Daemon, helpers_on, placed, policy

from demo.guests import Guest, Lab, wait_for

Make = Callable[..., Daemon]
NEVER = "60m"


@pytest.fixture
def kept(lab: Lab, daemon: Make) -> Daemon:
    """A daemon that looks at everything only when it starts; its guests are those of this lab."""
    made = daemon(policy(names=[(f"{lab.prefix}-*", "dedicated")], period=NEVER))
    made.start()
    return made


def _paused(guest: Guest) -> bool:
    return guest.dom.state()[0] == libvirt.VIR_DOMAIN_PAUSED


@pytest.mark.usefixtures("kept")
def test_a_guest_that_is_started_paused_is_placed_before_it_runs(lab: Lab) -> None:
    """It is told of as started, and of no more until somebody lets it run."""
    guest = lab.start("paused", paused=True, iothreads=1)
    wait_for(lambda: placed(guest, {1}) and helpers_on(guest, {0}), "it is placed")

    assert _paused(guest)
    spent = Path(f"/proc/{guest.vcpus()[0].tid}/schedstat").read_text().split()[0]
    guest.dom.resume()
    assert int(spent) < 1e9
    wait_for(lambda: placed(guest, {1}) and helpers_on(guest, {0}), "it stays so")


@pytest.mark.usefixtures("kept")
def test_a_guest_that_is_restored_is_placed_before_it_runs(lab: Lab, tmp_path: Path) -> None:
    """From a saved image, as from a snapshot or a migration: another process of the same guest."""
    guest = lab.start("saved")
    wait_for(lambda: placed(guest, {1}), "it is placed")
    before, image = guest.pid, str(tmp_path / "image")
    guest.dom.save(image)
    lab.conn.restoreFlags(image, None, libvirt.VIR_DOMAIN_SAVE_PAUSED)
    guest.dom = lab.conn.lookupByUUIDString(guest.uuid)
    wait_for(lambda: placed(guest, {1}) and helpers_on(guest, {0}), "it is placed")

    assert _paused(guest)
    assert guest.pid != before


def test_what_is_plugged_in_is_placed(lab: Lab, daemon: Make) -> None:
    """A vCPU and an iothread, of which libvirt sends no event.

    inotify tells of their cgroups, and the proc connector of the threads; without both the test fails. No look follows
    the start of the guest: that was before.
    """
    guest = lab.start("plug", vcpus=1, max_vcpus=2, iothreads=1)
    daemon(policy((guest, "floating"), period=NEVER)).start()
    wait_for(lambda: placed(guest, {0}) and helpers_on(guest, {0}), "it is placed")

    guest.dom.addIOThread(5)
    wait_for(lambda: len(guest.iothreads()) == 2 and helpers_on(guest, {0}), "the new iothread is placed")
    guest.dom.setVcpus(2)
    wait_for(lambda: len(guest.vcpus()) == 2 and placed(guest, {0}), "the new vCPU is placed")


def test_a_fence_that_is_widened_is_used_at_once(lab: Lab, kept: Daemon) -> None:
    """What a live pin keeps a vCPU from is its place again when the pin is widened."""
    guest = lab.start("pin")
    wait_for(lambda: placed(guest, {1}), "it is placed")
    guest.dom.pinVcpu(0, (True, False))
    wait_for(lambda: kept.count("vcpu 0 .*allows only pCPU 0") and placed(guest, {0}), "the pin fences it off")
    guest.dom.pinVcpu(0, (True, True))

    wait_for(lambda: placed(guest, {1}), "it is back")


def test_a_worker_that_begins_later_is_placed(lab: Lab, daemon: Make) -> None:
    """By the proc connector or, as libvirt writes it just then, by the guest's status file."""
    guest = lab.start("worker")
    daemon(policy((guest, "dedicated"), period=NEVER)).start()
    wait_for(lambda: placed(guest, {1}) and helpers_on(guest, {0}), "it is placed")
    os.sched_setaffinity(guest.pid, {0, 1})  # of this nobody tells, and what the main thread begins inherits it
    read = ["virsh", "qemu-monitor-command", guest.name, "--hmp", 'qemu-io libvirt-1-format "read 0 512"']
    subprocess.run(read, capture_output=True, check=True)  # by a worker, a thread that begins for that

    wait_for(lambda: helpers_on(guest, {0}), "both are put on their place")
