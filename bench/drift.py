# SPDX-License-Identifier: GPL-2.0-or-later
"""Drift: how long until a vCPU that somebody moved away is back, and one whose pin was narrowed and widened again."""

from __future__ import annotations

import os
import time

import libvirt

from bench.bench import Bench
from bench.contenders import Contender
from bench.guests import at_random, first_time
from bench.results import Column, Table

#: Longer than rtpind's period.
PATIENCE_S = 12.0
_START_S = 3.0
#: Longer than the looks that rtpind has at a guest after something happened to it.
_SETTLE_S = 6.0
_TEXT = f"""\
A vCPU on its place for more than {_SETTLE_S:g} s is allowed on every pCPU with `sched_setaffinity`, as `taskset` does,
at a random moment; then it is fenced off with `virsh vcpupin` for a second or two, and the pin is widened to all pCPUs.
Each time runs until the vCPU is back on its pCPU only; "never" means not within {PATIENCE_S:g} s."""


def run(bench: Bench, rounds: int) -> Table:
    """Move a guest's vCPU away under every contender."""
    columns = {"moved": Column("moved away, back after, ms", 0), "widened": Column("pin widened, back after, ms", 0)}
    table = Table("drift", "Drift", _TEXT, columns)
    place = bench.shared

    def turn(contender: Contender) -> None:
        with contender.run(bench.stage, place), bench.guest(contender, place) as guest:
            tid = guest.vcpus()[0].tid

            def back() -> bool:
                return os.sched_getaffinity(tid) <= place.vcpus

            if first_time(back, _START_S) is None:
                table.add(contender.name, moved=None, widened=None)  # it never was there
                return
            time.sleep(_SETTLE_S)
            at_random(3)
            os.sched_setaffinity(tid, bench.stage.all)
            moved = first_time(back, PATIENCE_S)
            cpus = range(max(bench.stage.all) + 1)
            for allowed in (place.helpers, bench.stage.all):
                guest.dom.pinVcpuFlags(0, tuple(cpu in allowed for cpu in cpus), libvirt.VIR_DOMAIN_AFFECT_LIVE)
                if allowed == place.helpers:
                    time.sleep(1)
                    at_random(1)
            table.add(contender.name, moved=moved, widened=first_time(back, PATIENCE_S))

    bench.rounds(table, rounds, turn)
    return table
