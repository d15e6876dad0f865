# SPDX-License-Identifier: GPL-2.0-or-later
"""Jitter: what a vCPU loses under CPU hogs, as the kernel counts it and as its guest sees it (the demonstration's)."""

from __future__ import annotations

import time

from bench.bench import HOGS, Bench
from bench.contenders import Contender
from bench.guests import first_time
from bench.results import Column, Table
from demo import measure
from demo.guests import Guest

_PATIENCE_S = 3.0
#: The hogs have found pCPUs: one that starts where FIFO runs waits there until the kernel moves it.
_SETTLE_S = 2.0
_TEXT = f"""\
The guest does nothing but read the clock and note its worst gap, for {measure.SECONDS:g} s under {HOGS} CPU hogs that
began {_SETTLE_S:g} s before. Run delay is how long its vCPU was ready to run and did not (schedstat). RT throttling is
off where the kernel's own fair server protects the host. An emulated (TCG) guest, so that its clock is the host's."""


def run(bench: Bench, rounds: int) -> Table:
    """Measure a guest that was started under every contender."""
    columns = {
        "delay": Column("run delay, ms/s", 2),
        "gap": Column("worst gap, ms", 2),
        "placed": Column("turns that ended on its place", 0, total=True),
    }
    table = Table("jitter", f"Jitter under {HOGS} CPU hogs", _TEXT, columns)
    place = bench.fifo
    clocks: list[measure.Clock] = []

    def clock(guest: Guest) -> measure.Clock:
        if not clocks:
            clocks.append(measure.Clock(guest))
        return clocks[0]

    def turn(contender: Contender) -> None:
        with (
            contender.run(bench.stage, place),
            bench.guest(contender, place, kind="qemu", boot="oslat", shared=True, firmware=True) as guest,
        ):
            first_time(lambda: all(map(place.holds, guest.vcpus())), _PATIENCE_S)
            cycles = clock(guest)
            with bench.hogs():
                time.sleep(_SETTLE_S)
                reading = measure.take(guest, cycles)
            placed = all(map(place.holds, guest.vcpus()))
            table.add(contender.name, delay=reading.delay_ms_per_s, gap=reading.gap_ms, placed=placed)

    bench.rounds(table, rounds, turn)
    return table
