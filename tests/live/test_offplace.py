# SPDX-License-Identifier: GPL-2.0-or-later
"""Off-place time of real starts, against what the kernel counts of the vCPUs."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Daemon, placed, policy

from demo.guests import Guest, Lab, wait_for

Make = Callable[..., Daemon]


def off_place(daemon: Daemon, guest: Guest) -> list[dict[str, int]]:
    """Return what status tells of a guest's vCPUs."""
    (found,) = daemon.ctl("status", guest.name)["guests"]
    return [thread["off_place"] for thread in found["threads"] if thread["role"] == "vcpu"]


def ran_ns(guest: Guest) -> int:
    """Return the CPU time of a guest's vCPUs as the kernel counts it."""
    return sum(int(Path(f"/proc/{vcpu.tid}/schedstat").read_text().split()[0]) for vcpu in guest.vcpus())


def told(daemon: Daemon, guest: Guest) -> re.Match[str] | None:
    """Return the record of a guest's start: its CPU time off place, and without its scheduling."""
    found = (
        re.search(rf"{guest.name}: vCPU 0 started, at most ([\d.]+) .* ([\d.]+) ms", one) for one in daemon.records
    )
    return next((one for one in found if one), None)


@pytest.mark.usefixtures("unthrottled")
def test_the_off_place_time_of_a_start_is_told(lab: Lab, daemon: Make) -> None:
    """One record of a start that is over; status tells the same; it is not more than the vCPU ever ran."""
    made = daemon(policy(names=[(f"{lab.prefix}-*", "realtime")]))
    made.start()
    guest = lab.start("one", boot="spin")
    wait_for(lambda: placed(guest, {1}, fifo=1), "it is placed")
    wait_for(lambda: told(made, guest), "its start is over")

    record: Any = told(made, guest)
    (spent,) = off_place(made, guest)
    for number, key in ((1, "affinity_ns"), (2, "scheduling_ns")):
        assert float(record[number]) == pytest.approx(spent[key] / 1e6, abs=0.001)
    assert spent["affinity_ns"] <= spent["scheduling_ns"] <= ran_ns(guest)
    assert made.count("started, at most") == 1


def test_what_is_never_placed_is_told_too(lab: Lab, daemon: Make) -> None:
    """In observe mode nothing places the vCPU: all that it runs counts, until that is given up."""
    made = daemon(policy(names=[(f"{lab.prefix}-*", "dedicated")], mode="observe"))
    made.start()
    guest = lab.start("one", boot="spin")
    wait_for(lambda: told(made, guest), "its start is over", 20)

    (spent,) = off_place(made, guest)
    used = ran_ns(guest)
    assert 0.2e9 < spent["affinity_ns"] <= used
    assert made.count("not on its place yet") == 1
