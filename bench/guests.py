# SPDX-License-Identifier: GPL-2.0-or-later
"""What happens to a guest's threads, as the kernel and the guest show it: nothing here asks a contender.

A watch samples from a thread of its own, at FIFO where this process may have that, so that it is not what hogs hold up.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from demo.guests import RUN_DIR, Guest, Seen, rounds, seen

_INTERVAL_S = 0.0005
_WATCH_PRIORITY = 50
STAYS_S = 0.25


@dataclass(frozen=True, slots=True)
class Place:
    """Where a guest's threads should be: pCPUs of vCPUs and of all others, and the vCPUs' FIFO priority (0: none)."""

    vcpus: frozenset[int]
    helpers: frozenset[int]
    fifo: int = 0

    def has_cpus(self, vcpu: Seen) -> bool:
        """Return whether a vCPU may run on its pCPUs only."""
        return vcpu.cpus <= self.vcpus

    def has_fifo(self, vcpu: Seen) -> bool:
        """Return whether a vCPU has its priority; what needs none has it."""
        return not self.fifo or (vcpu.fifo and vcpu.priority == self.fifo)

    def holds(self, vcpu: Seen) -> bool:
        """Return whether a vCPU is on its place."""
        return self.has_cpus(vcpu) and self.has_fifo(vcpu)

    def strays(self, guest: Guest) -> int:
        """Return how many other threads of a guest may run on its vCPUs' pCPUs."""
        return sum(bool(thread.cpus & self.vcpus) for thread in guest.helpers())


@dataclass(frozen=True, slots=True)
class Sample:
    """A vCPU thread at one moment: its CPU time so far, and whether the guest has run any instruction yet."""

    ran_ns: int
    on_cpus: bool
    fifo: bool
    begun: bool


@dataclass(frozen=True, slots=True)
class OffPlace:
    """CPU time that a vCPU spent off its place since the guest's first instruction, in milliseconds; upper bounds.

    Counts each interval between two samples whole when the thread was off its place at either end. ``total`` is all
    CPU time that was watched: what is off its place for good has that much.
    """

    cpus: float
    fifo: float
    total: float


def off_place(samples: Sequence[Sample]) -> OffPlace:
    """Return how long a vCPU ran off its place. The last sample before the first instruction is where it begins."""
    first = max((number for number, sample in enumerate(samples) if not sample.begun), default=0)
    pairs = list(zip(samples[first:], samples[first + 1 :], strict=False))
    return OffPlace(
        cpus=sum(b.ran_ns - a.ran_ns for a, b in pairs if not (a.on_cpus and b.on_cpus)) / 1e6,
        fifo=sum(b.ran_ns - a.ran_ns for a, b in pairs if not (a.fifo and b.fifo)) / 1e6,
        total=sum(b.ran_ns - a.ran_ns for a, b in pairs) / 1e6,
    )


class Watch(threading.Thread):
    """Calls :meth:`look` about every half millisecond until it says that it has seen enough, or the block is left."""

    def __init__(self, cpus: frozenset[int]) -> None:
        super().__init__(daemon=True)
        self._cpus = cpus
        self._left = threading.Event()
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._left.set()
        self.join()
        self.close()

    def run(self) -> None:
        """Sample."""
        os.sched_setaffinity(0, self._cpus)
        with contextlib.suppress(PermissionError):
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_WATCH_PRIORITY))
        try:
            while not self._left.is_set() and not self.look():
                time.sleep(_INTERVAL_S)
        except Exception as error:  # the thread that waits for the end raises it
            self.error = error

    def finish(self, timeout_s: float) -> None:
        """Wait until it has seen enough. Raises TimeoutError, or what went wrong."""
        self.join(timeout_s)
        if self.error is not None:
            raise self.error
        if self.is_alive():
            raise TimeoutError(f"the watch has not seen the end within {timeout_s:g} s")

    def look(self) -> bool:
        """Take one sample; return whether that was all."""
        raise NotImplementedError

    def close(self) -> None:
        """Give back what it holds."""


class StartWatch(Watch):
    """Watches vCPU 0 of a guest that is about to be started, until ``window_s`` after its first instruction.

    The guest boots ``count`` without firmware and with shared memory: the number that it counts tells when it began.
    """

    def __init__(self, name: str, place: Place, window_s: float, cpus: frozenset[int]) -> None:
        super().__init__(cpus)
        self._name, self._place, self._window = name, place, window_s
        self._tid = 0
        self._files = contextlib.ExitStack()
        self._memory: mmap.mmap | None = None
        self._schedstat = -1
        self._end = 0.0
        self.samples: list[Sample] = []

    def look(self) -> bool:
        """Find the vCPU thread first, then sample it."""
        if self._memory is None or not self._tid:
            with contextlib.suppress(OSError, ValueError):
                self._find()
            return False
        ran = int(os.pread(self._schedstat, 64, 0).split()[0])
        vcpu = seen(self._tid, "CPU 0/")
        if vcpu is None:
            raise ProcessLookupError("the vCPU thread is gone")
        # Read last: as long as this is 0, no instruction had run when the rest was read.
        begun = bool(self._end) or rounds(self._memory) != 0
        if begun and not self.samples:
            raise RuntimeError("the guest had begun before it was watched")
        self.samples.append(Sample(ran, self._place.has_cpus(vcpu), self._place.has_fifo(vcpu), begun))
        if begun and not self._end:
            self._end = time.monotonic() + self._window
        return bool(self._end) and time.monotonic() > self._end

    def _find(self) -> None:
        pid = int((RUN_DIR / f"{self._name}.pid").read_text())
        for tid in map(int, os.listdir(f"/proc/{pid}/task")):
            if Path(f"/proc/{tid}/comm").read_text().startswith("CPU 0/"):
                self._memory = self._files.enter_context(Guest.memory_of(self._name))
                self._schedstat = os.open(f"/proc/{tid}/schedstat", os.O_RDONLY)
                self._files.callback(os.close, self._schedstat)
                self._tid = tid

    def close(self) -> None:
        """Unmap the guest's memory."""
        self._files.close()


class LateWatch(Watch):
    """Watches for a new thread of a running guest: from its entry into its own cgroup until it is on its place."""

    def __init__(self, guest: Guest, cgroup: str, place: frozenset[int], patience_s: float, cpus: frozenset[int]):
        super().__init__(cpus)
        self._pid, self._cgroup, self._place, self._patience = guest.pid, cgroup, place, patience_s
        self._old = set(os.listdir(f"/proc/{self._pid}/task"))
        self._tid = ""
        self._entered = self._placed = 0.0

    @property
    def took_ms(self) -> float | None:
        """Milliseconds from its cgroup to its place; None when it did not get there in time."""
        return (self._placed - self._entered) * 1000 if self._placed else None

    def look(self) -> bool:
        """Look for the thread in its cgroup first, then at its affinity."""
        if not self._tid:
            for tid in sorted(set(os.listdir(f"/proc/{self._pid}/task")) - self._old, key=int):
                with contextlib.suppress(OSError):
                    if in_cgroup(tid, self._cgroup):
                        self._tid, self._entered = tid, time.monotonic()
                        break  # what it begins itself is born in its cgroup, and has another place
        if not self._tid:
            return False
        now = time.monotonic()
        if not os.sched_getaffinity(int(self._tid)) <= self._place:
            self._placed = 0.0  # or not any more: it can have inherited its place, until libvirt resets it
            return now > self._entered + self._patience
        self._placed = self._placed or now
        return now > self._placed + STAYS_S


def in_cgroup(tid: str, name: str) -> bool:
    """Return whether a thread is in a cgroup of that name where it counts: in v1's cpuset hierarchy, or in v2's."""
    lines = Path(f"/proc/{tid}/cgroup").read_text().splitlines()
    paths = [line.split(":", 2) for line in lines]
    cpuset = [path for _, controllers, path in paths if "cpuset" in controllers.split(",")]
    return any(path.endswith(f"/{name}") for path in cpuset or [path for *_, path in paths])


def first_time(condition: Callable[[], bool], patience_s: float) -> float | None:
    """Return after how many milliseconds a condition held; None when it did not within ``patience_s`` seconds."""
    began = time.monotonic()
    while (passed := time.monotonic() - began) < patience_s:
        if condition():
            return passed * 1000
        time.sleep(_INTERVAL_S * 2)
    return None


def at_random(within_s: float) -> None:
    """Wait for a random time, so that nothing is in step with a contender's period."""
    time.sleep(random.random() * within_s)  # noqa: S311 - not a secret


def switches(tids: Sequence[int]) -> int:
    """Return the context switches of threads so far, voluntary or not."""
    total = 0
    for tid in tids:
        lines = Path(f"/proc/{tid}/status").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if "ctxt_switches" in line)
    return total


def cpu_time_ns(pid: int) -> int:
    """Return the CPU time of all threads of a process, in nanoseconds; those that ended are not in it."""
    total = 0
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(OSError):
            total += int(Path(f"/proc/{pid}/task/{tid}/schedstat").read_text().split()[0])
    return total


def resident_mib(pid: int) -> float:
    """Return a process's resident memory in MiB."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20
