# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon hears the kernel's events about pCPUs. The event is asked for by hand, so that no pCPU changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harness import Daemon, policy

from demo.guests import Lab, wait_for

UEVENT = Path("/sys/devices/system/cpu/cpu1/uevent")


def test_an_event_makes_the_daemon_look_at_everything(lab: Lab, daemon: Callable[..., Daemon]) -> None:
    """At once, though the next look is a minute away: as root, and without privileges."""
    guest = lab.start("cpus")
    made = daemon(policy((guest, "dedicated"), period="1m"))
    made.start()

    def passes() -> int:
        return int(made.ctl("status")["daemon"]["passes"])

    wait_for(lambda: passes() == 1, "the first look at everything")
    UEVENT.write_text("change")
    UEVENT.write_text("online")
    wait_for(lambda: passes() == 2, "another")

    assert made.count("cannot be heard") == 0
    assert made.count("online") == 0  # nothing has changed, so that nothing is on record
