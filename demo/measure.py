# SPDX-License-Identifier: GPL-2.0-or-later
"""Measures what a vCPU loses: run delay as the kernel counts it, and the worst gap as the guest itself sees it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from demo.guests import Guest, run_delay_ns, worst_gap
from rtpind.ctl import show

ROUNDS = 5
SECONDS = 2.0
_STOP_S = 0.25
_SERVED_MS = 10.0


@dataclass(frozen=True, slots=True)
class Reading:
    """One measurement of one vCPU."""

    delay_ms_per_s: float
    gap_ms: float
    steal: float  # the share of this machine's CPU time that its own host withheld meanwhile


class Clock:
    """The guest's clock: how many of its cycles are a millisecond, found by stopping it for a known time."""

    def __init__(self, guest: Guest) -> None:
        with guest.memory() as memory:
            time.sleep(0.2)  # it boots
            worst_gap(memory, reset=True)
            began = time.monotonic()
            os.kill(guest.pid, signal.SIGSTOP)
            try:
                time.sleep(_STOP_S)
            finally:
                os.kill(guest.pid, signal.SIGCONT)
            stopped_ms = (time.monotonic() - began) * 1000
            time.sleep(0.1)  # it notices
            self.cycles_per_ms = worst_gap(memory) / stopped_ms
        if not 100_000 < self.cycles_per_ms < 10_000_000:
            raise RuntimeError(f"the guest's clock makes no sense: {self.cycles_per_ms:.0f} cycles in a millisecond")


def take(guest: Guest, clock: Clock) -> Reading:
    """Measure for :data:`SECONDS`."""
    (vcpu,) = guest.vcpus()
    with guest.memory() as memory:
        time.sleep(0.2)  # what moving it cost is over
        stolen, total = cpu_time()
        delay = run_delay_ns(vcpu.tid)
        worst_gap(memory, reset=True)
        began = time.monotonic()
        time.sleep(SECONDS)
        delay = run_delay_ns(vcpu.tid) - delay
        gap = worst_gap(memory)
        took = time.monotonic() - began
        stolen_now, total_now = cpu_time()
    return Reading(delay / 1e6 / took, gap / clock.cycles_per_ms, (stolen_now - stolen) / max(total_now - total, 1))


def report(rows: Sequence[tuple[Reading, Reading]]) -> bool:
    """Print rounds, medians and their ratio; return whether the median run delay was less with rtpind."""
    table = [(f"round {number}", *_texts(without), *_texts(with_)) for number, (without, with_) in enumerate(rows, 1)]
    delay = [median(reading.delay_ms_per_s for reading in column) for column in zip(*rows, strict=True)]
    gap = [median(reading.gap_ms for reading in column) for column in zip(*rows, strict=True)]
    table.append(("median", f"{delay[0]:.2f}", f"{gap[0]:.2f}", f"{delay[1]:.2f}", f"{gap[1]:.2f}"))
    columns = ("", "without: run delay ms/s", "worst gap ms", "with rtpind: run delay ms/s", "worst gap ms")
    show.table(columns, table)
    show.line(f"Medians, without → with rtpind: run delay {_ratio(delay, 'ms/s')}; worst gap {_ratio(gap, 'ms')}.")
    steal = max(reading.steal for row in rows for reading in row)
    show.line(
        f"{len(rows)} turns of {SECONDS:g} s each, on whatever machine this is (its own host withheld up to "
        f"{steal:.1%} of its CPU time meanwhile): good for the contrast, not for absolute figures."
    )
    if gap[1] > _SERVED_MS:
        show.line(
            "Gaps of this size are most likely what the kernel itself takes (up to 50 ms in a second): the fair "
            "server, for threads of other programs that wait on this pCPU, or RT throttling. rtpind does not keep "
            "those off it."
        )
    return bool(delay[1] < delay[0])


def _ratio(medians: Sequence[float], unit: str) -> str:
    """Return both and how they compare; what is below 0.01 counts as 0.01."""
    without, with_ = medians
    before, after = max(without, 0.01), max(with_, 0.01)
    times = f"{before / after:.1f} times less" if after <= before else f"{after / before:.1f} times MORE"
    return f"{without:.2f} → {with_:.2f} {unit} ({times})"


def _texts(reading: Reading) -> tuple[str, str]:
    return f"{reading.delay_ms_per_s:.2f}", f"{reading.gap_ms:.2f}"


def cpu_time() -> tuple[int, int]:
    """Return stolen and total CPU time of this machine, in ticks."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return fields[7], sum(fields)
