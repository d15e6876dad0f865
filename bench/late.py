# SPDX-License-Identifier: GPL-2.0-or-later
"""Late threads: from a hot-plugged iothread's or vCPU's entry into its own cgroup until it is on its place."""

from __future__ import annotations

from collections.abc import Callable

from bench.bench import Bench
from bench.contenders import Contender
from bench.guests import LateWatch, at_random, first_time
from bench.results import Column, Table
from demo.guests import Guest

PATIENCE_S = 3.0
_TEXT = f"""\
An iothread and a vCPU are plugged into a running guest at random moments. The time runs from the sample that first
shows the new thread in its `iothreadN` or `vcpuN` cgroup (libvirt resets its affinity there) to the one from which on
it stays on its pCPUs; "never" means not within {PATIENCE_S:g} s."""


def run(bench: Bench, rounds: int) -> Table:
    """Plug threads into a guest under every contender."""
    columns = {"iothread": Column("iothread placed after, ms"), "vcpu": Column("vCPU placed after, ms")}
    table = Table("late", "Late threads", _TEXT, columns)
    place = bench.shared

    def turn(contender: Contender) -> None:
        with (
            contender.run(bench.stage, place),
            bench.guest(contender, place, vcpus=1, max_vcpus=2, iothreads=1) as guest,
        ):
            first_time(lambda: all(map(place.holds, guest.vcpus())), PATIENCE_S)

            def plugged(cgroup: str, cpus: frozenset[int], plug: Callable[[Guest], object]) -> float | None:
                at_random(1)
                with LateWatch(guest, cgroup, cpus, PATIENCE_S, bench.stage.housekeeping) as watch:
                    plug(guest)
                    watch.finish(PATIENCE_S + 10)
                return watch.took_ms

            table.add(
                contender.name,
                iothread=plugged("iothread2", place.helpers, lambda guest: guest.dom.addIOThread(2)),
                vcpu=plugged("vcpu1", place.vcpus, lambda guest: guest.dom.setVcpus(2)),
            )

    bench.rounds(table, rounds, turn)
    return table
