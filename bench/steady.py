# SPDX-License-Identifier: GPL-2.0-or-later
"""Steady state: what a contender costs when there is nothing to do, and what the vCPU threads notice of it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from bench.bench import Bench
from bench.contenders import ALL, Contender
from bench.guests import cpu_time_ns, first_time, resident_mib, switches
from bench.results import Column, Table
from demo.guests import wait_for
from rtpind.core.identify import SETTLE_S

#: Longer than rtpind's looks after a guest's start.
_SETTLE_S = 7.0
_CALLS = "sched_setaffinity,sched_setscheduler,sched_setparam,sched_setattr"


def run(bench: Bench, rounds: int, guests: int, seconds: float) -> Table:
    """Measure beside guests that do nothing. Those of <cputune> and the hook script would have nobody to measure."""
    text = f"""\
{guests} guests whose vCPU is halted. CPU time and memory of the contender's process over {seconds:g} s, as CPU time of
a minute; context switches of all vCPU threads in that time, whoever caused them; and, in a second window of the same
length, with strace, its `sched_set*` calls. <cputune> and the hook script have no process."""
    columns = {
        "cpu": Column("CPU time, ms a minute"),
        "rss": Column("memory (RSS), MiB"),
        "switches": Column("context switches of vCPUs", 0),
        "calls": Column("sched_set* calls", 0),
    }
    table = Table("steady", f"Steady state, {guests} guests", text, columns)
    place = bench.shared
    with contextlib.ExitStack() as ends:
        nothing = ALL[0]
        running = [ends.enter_context(bench.guest(nothing, place)) for _ in range(guests)]
        time.sleep(SETTLE_S)  # then none of them is young any more
        tids = [vcpu.tid for guest in running for vcpu in guest.vcpus()]

        def turn(contender: Contender) -> None:
            with contender.run(bench.stage, place) as pid:
                first_time(lambda: all(os.sched_getaffinity(tid) <= place.vcpus for tid in tids), 5)
                time.sleep(_SETTLE_S)
                began, before = cpu_time_ns(pid) if pid else 0, switches(tids)
                time.sleep(seconds)
                after = switches(tids) - before
                if not pid:
                    table.add(contender.name, switches=after)
                    return
                cpu, memory = (cpu_time_ns(pid) - began) / 1e6 * 60 / seconds, resident_mib(pid)
                calls = _sched_calls(pid, seconds, bench.stage.dir / "calls")
                table.add(contender.name, cpu=cpu, rss=memory, switches=after, calls=calls)

        bench.rounds(table, rounds, turn, process=True)
    return table


def _sched_calls(pid: int, seconds: float, log: Path) -> int:
    """Return how many calls a process makes that change how a thread is scheduled."""
    words = ["strace", "-f", "-qq", "-e", f"trace={_CALLS}", "-o", str(log), "-p", str(pid)]
    tracer = subprocess.Popen(words, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: "TracerPid:\t0" not in Path(f"/proc/{pid}/status").read_text(), "strace is attached")
        time.sleep(seconds)
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(timeout=10)
    return sum("sched_set" in line for line in log.read_text().splitlines())
