# SPDX-License-Identifier: GPL-2.0-or-later
"""Off-place time at start: CPU time of a vCPU elsewhere, or without its FIFO, from its first instruction on."""

from __future__ import annotations

import contextlib

import libvirt

from bench.bench import HOGS, Bench
from bench.contenders import Contender
from bench.guests import StartWatch, at_random, off_place
from bench.results import Column, Table

#: How long a guest is watched: longer than a poller's second.
WINDOW_S = 1.5
_TEXT = f"""\
A guest of one vCPU that counts from its very first instruction is started at a random moment; the count, in its
memory, tells when it began. Off-place time is CPU time of its vCPU thread (schedstat) from then on, for {WINDOW_S:g} s,
while its affinity was wrong or while it was not FIFO 1; an interval between two samples (half a millisecond) counts
whole when either end was off. "Strays" are other threads of the guest that may still run on its vCPU's pCPU then."""


def tables() -> tuple[Table, Table]:
    """Return the tables: without load, and with CPU hogs."""
    columns = {
        "cpus": Column("off its pCPU, ms"),
        "fifo": Column("without FIFO, ms"),
        "clean": Column("starts with 0 of both", 0, total=True),
        "starts": Column("starts", 0, total=True),
        "failed": Column("failed starts", 0, total=True),
        "strays": Column("strays", 0),
    }
    return (
        Table("start-idle", "Off-place time at start, no load", _TEXT, columns),
        Table("start-hogs", f"Off-place time at start, {HOGS} CPU hogs", _TEXT, columns),
    )


def run(bench: Bench, rounds: int, starts: int) -> tuple[Table, ...]:
    """Start guests under every contender, ``starts`` in each turn."""
    found = tables()
    for table, hogs in zip(found, (0, HOGS), strict=True):

        def turn(contender: Contender, table: Table = table, hogs: int = hogs) -> None:
            with contender.run(bench.stage, bench.fifo), bench.hogs(hogs):
                for _ in range(starts):
                    _start(bench, contender, table)

        bench.rounds(table, rounds, turn)
    return found


def _start(bench: Bench, contender: Contender, table: Table) -> None:
    place, name = bench.fifo, bench.name()
    watch = StartWatch(f"{bench.stage.prefix}-{name}", place, WINDOW_S, bench.stage.housekeeping)
    at_random(1)  # of a poller's second
    with contextlib.ExitStack() as ends:
        ends.enter_context(watch)
        try:
            guest = bench.start(name, contender, place, boot="count", shared=True)
        except libvirt.libvirtError as error:
            table.add(contender.name, starts=1, failed=1)
            table.remark(contender.name, error)
            return
        ends.callback(bench.end, guest)
        watch.finish(30)
        strays = place.strays(guest)
    off = off_place(watch.samples)
    clean = not off.cpus and not off.fifo
    table.add(contender.name, cpus=off.cpus, fifo=off.fifo, clean=clean, starts=1, failed=0, strays=strays)
