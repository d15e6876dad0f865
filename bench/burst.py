# SPDX-License-Identifier: GPL-2.0-or-later
"""A burst of starts: from each vCPU's and iothread's entry into its own cgroup until it is on its place."""

from __future__ import annotations

import contextlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles

import libvirt

from bench.bench import Bench
from bench.contenders import Contender
from bench.guests import STAYS_S, Place, Watch, in_cgroup
from bench.results import Column, Table
from demo.guests import RUN_DIR, Guest

#: libvirt serves so many requests of one client at a time (max_client_requests).
_AT_A_TIME = 5
#: Nobody should be off its place this long after the last start.
_AFTER_S = 5.0
_EVERY = 4  # samples of a watch: a look at many guests takes longer than one at one
_TEXT = f"""\
Guests of one vCPU and one iothread are started, {_AT_A_TIME} at a time. Each time runs from the sample that first
shows the thread in its `vcpuN` or `iothreadN` cgroup to the one from which on it stays on its pCPUs; FIFO does not
count, as all vCPUs share a pCPU. "Never placed": threads that did not get there. "Off their place": threads, helpers
included, {_AFTER_S:g} s after the last start. A time can be off by what lies between two samples."""


@dataclass
class _Late:
    """A thread that libvirt moves into ``cgroup``: when it was seen there, and on its place, first."""

    cgroup: str
    entered: float = 0.0
    placed: float = 0.0


@dataclass
class _Begun:
    """A guest of the burst: its process, and its vCPU and iothread by tid."""

    pid: int
    threads: dict[str, _Late] = field(default_factory=dict)


class BurstWatch(Watch):
    """Watches guests whose names begin with ``prefix``, each until its vCPU and its iothread stay on their place."""

    def __init__(self, prefix: str, place: Place, cpus: frozenset[int]) -> None:
        super().__init__(cpus)
        self._prefix, self._place = prefix, place
        self._begun: dict[str, _Begun] = {}
        self._open: set[str] = set()
        self._count = 0
        self._last = 0.0
        self.gap_ms = 0.0  # the longest time between two samples

    def took_ms(self) -> list[float]:
        """Return milliseconds from cgroup to place, of each thread that got there."""
        threads = [thread for guest in self._begun.values() for thread in guest.threads.values()]
        return [(thread.placed - thread.entered) * 1000 for thread in threads if thread.placed]

    def look(self) -> bool:
        """Look for guests that begin, and at those that are not in place."""
        self._count += 1
        if self._count % _EVERY:
            return False
        now = time.monotonic()
        self.gap_ms = max(self.gap_ms, (now - (self._last or now)) * 1000)
        self._last = now
        for name in os.listdir(RUN_DIR):
            if name.startswith(self._prefix) and name.endswith(".pid") and name not in self._begun:
                with contextlib.suppress(OSError, ValueError):
                    self._begun[name] = _Begun(int((RUN_DIR / name).read_text()))
                    self._open.add(name)
        for name in sorted(self._open):
            with contextlib.suppress(OSError):
                if self._look(self._begun[name]):
                    self._open.discard(name)
        return False

    def _look(self, guest: _Begun) -> bool:
        """Look at one guest; return whether both threads have been on their place long enough."""
        if len(guest.threads) < 2:
            for tid in os.listdir(f"/proc/{guest.pid}/task"):
                cgroup = cgroup_of(guest.pid, tid)
                if cgroup:
                    guest.threads.setdefault(tid, _Late(cgroup))
        for tid, thread in guest.threads.items():
            if not thread.entered and in_cgroup(tid, thread.cgroup):
                thread.entered = time.monotonic()
            if not os.sched_getaffinity(int(tid)) <= where(self._place, thread.cgroup):
                thread.placed = 0.0  # or not any more: it can have inherited its place, until libvirt resets it
            elif thread.entered:
                thread.placed = thread.placed or time.monotonic()
        last = [thread.placed and thread.placed + STAYS_S < time.monotonic() for thread in guest.threads.values()]
        return len(last) == 2 and all(last)


def cgroup_of(pid: int, tid: str) -> str:
    """Return the cgroup that libvirt has for a thread of that name, "" for a helper."""
    comm = Path(f"/proc/{pid}/task/{tid}/comm").read_text().rstrip("\n")
    if comm.startswith("CPU "):
        return f"vcpu{comm[4:].partition('/')[0]}"
    return comm.removeprefix("IO ") if comm.startswith("IO iothread") else ""


def where(place: Place, cgroup: str) -> frozenset[int]:
    """Return the pCPUs of a thread that belongs in a cgroup of that name."""
    return place.vcpus if cgroup.startswith("vcpu") else place.helpers


def off_place(guest: Guest, place: Place) -> int:
    """Return how many threads of a guest are not where they should be, by what the kernel says now."""
    return sum(not vcpu.cpus <= place.vcpus for vcpu in guest.vcpus()) + sum(
        not helper.cpus <= place.helpers for helper in guest.helpers()
    )


def run(bench: Bench, rounds: int, guests: int) -> Table:
    """Start many guests at once under every contender."""
    columns = {
        "p99": Column("99 % placed after, ms"),
        "worst": Column("worst, ms"),
        "never": Column("never placed", 0),
        "off": Column(f"off their place {_AFTER_S:g} s later", 0),
        "failed": Column("failed starts", 0, total=True),
        "gap": Column("longest between samples, ms"),
    }
    table = Table("burst", f"A burst of {guests} starts", _TEXT, columns)
    place = bench.shared

    def turn(contender: Contender) -> None:
        names = [bench.name() for _ in range(guests)]
        prefix = f"{bench.stage.prefix}-"
        with contextlib.ExitStack() as ends, contender.run(bench.stage, place):

            def start(name: str) -> Guest | None:
                try:
                    guest = bench.start(name, contender, place, iothreads=1)
                except libvirt.libvirtError as error:
                    table.remark(contender.name, error)
                    return None
                ends.callback(bench.end, guest)
                return guest

            with BurstWatch(prefix, place, bench.stage.housekeeping) as watch:
                with ThreadPoolExecutor(_AT_A_TIME) as pool:
                    started = [guest for guest in pool.map(start, names) if guest is not None]
                time.sleep(_AFTER_S)
                off = sum(off_place(guest, place) for guest in started)
            if watch.error is not None:
                raise RuntimeError(f"the watch ended: {watch.error}")
            took = watch.took_ms()
        p99 = quantiles(took, n=100, method="inclusive")[-1] if len(took) > 1 else None
        worst = max(took, default=None)
        never, failed = 2 * len(started) - len(took), guests - len(started)
        table.add(contender.name, p99=p99, worst=worst, never=never, off=off, failed=failed, gap=watch.gap_ms)

    bench.rounds(table, rounds, turn)
    return table
