# SPDX-License-Identifier: GPL-2.0-or-later
"""Reads threads from /proc: what they are, where they are allowed, and how they are scheduled. Changes nothing.

Everything here works for a user without privileges (stat, comm, cgroup and cmdline are world-readable).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Kind, Placement, Sched, Scheduling, ThreadId
from rtpind.host.kernelfile import read

# include/linux/sched.h
_PF_USER_WORKER = 0x00004000
_PF_KTHREAD = 0x00200000
_PF_NO_SETAFFINITY = 0x04000000
#: sched_getscheduler(2) reports this bit beside the policy.
RESET_ON_FORK = 0x40000000

# include/uapi/linux/sched.h
_POLICIES = {
    0: Sched.OTHER,
    1: Sched.FIFO,
    2: Sched.RR,
    3: Sched.BATCH,
    5: Sched.IDLE,
    6: Sched.DEADLINE,
    7: Sched.EXT,
}

#: Placements that are kept: more than a host has pCPUs, and than anybody means.
_PLACEMENTS = 10_000

#: Of start times, in a second.
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Stat:
    """The fields of /proc/PID/stat that rtpind uses; ``start`` in clock ticks after boot."""

    comm: str
    parent: int
    flags: int
    start: int
    priority: int
    policy: int

    @property
    def kernel(self) -> bool:
        """Whether it is a kernel thread."""
        return bool(self.flags & _PF_KTHREAD)

    @property
    def worker(self) -> bool:
        """Whether the kernel made it: a thread of its own, or one of a process (vhost, io_uring)."""
        return bool(self.flags & (_PF_KTHREAD | _PF_USER_WORKER))

    @property
    def movable(self) -> bool:
        """Whether the kernel lets its affinity change."""
        return not self.flags & _PF_NO_SETAFFINITY


def parse_stat(text: bytes) -> Stat:
    """Read one stat line. The name stands in brackets and may itself hold any of ``) (``: the last one counts."""
    head, _, tail = text.rpartition(b") ")
    comm = head.partition(b"(")[2].decode("utf-8", "replace")
    fields = tail.split()
    return Stat(comm, int(fields[1]), int(fields[6]), int(fields[19]), int(fields[37]), int(fields[38]))


class Proc:
    """/proc below ``root``. ``affinity`` and ``policy`` are the two system calls that read a thread's placement.

    They raise OSError when it is gone; ``policy`` has RESET_ON_FORK beside the policy.
    """

    def __init__(
        self,
        root: Path = Path("/"),
        *,
        affinity: Callable[[int], Collection[int]] = os.sched_getaffinity,
        scheduler: Callable[[int], int] = os.sched_getscheduler,
    ) -> None:
        self._proc = str(root / "proc")
        self.affinity = affinity
        self.policy = scheduler
        self._placements: dict[tuple[frozenset[int], int, int, int], Placement] = {}
        self.kernel_threads = KernelThreads(self)

    def stat(self, pid: int, tid: int | None = None) -> Stat:
        """Return the stat of a thread (of a process' main thread without ``tid``). Raises OSError when gone."""
        return parse_stat(self.raw_stat(pid, tid))

    def raw_stat(self, pid: int, tid: int | None = None) -> bytes:
        """Return the stat line itself. Raises OSError when gone."""
        return read(f"{self._proc}/{pid}/stat" if tid is None else f"{self._proc}/{pid}/task/{tid}/stat")

    def placement(self, tid: int, stat: Stat) -> Placement:
        """Return where a thread is allowed and how it is scheduled. Raises OSError when it is gone."""
        return self.placed(stat, self.policy(tid), self.affinity(tid))

    def placed(self, stat: Stat, policy: int, allowed: Collection[int]) -> Placement:
        """Return a placement from stat, :meth:`policy` and :meth:`affinity`; most threads share a few of them."""
        key = (frozenset(allowed), stat.policy, stat.priority, policy & RESET_ON_FORK)
        found = self._placements.get(key)
        if found is None:
            scheduling = Scheduling(_POLICIES.get(stat.policy, Sched.OTHER), stat.priority, bool(key[3]))
            found = Placement(CpuSet(allowed), scheduling)
            if len(self._placements) >= _PLACEMENTS:
                self._placements.clear()
            self._placements[key] = found
        return found

    def pids(self) -> list[int]:
        """Return every process id."""
        return [int(name) for name in os.listdir(self._proc) if name.isdigit()]

    def tids(self, pid: int) -> list[int]:
        """Return the thread ids of a process. Raises OSError when it is gone."""
        return sorted(int(name) for name in os.listdir(f"{self._proc}/{pid}/task"))

    def cmdline(self, pid: int) -> list[str]:
        """Return the arguments of a process; empty when it is gone or a kernel thread."""
        try:
            with open(f"{self._proc}/{pid}/cmdline", "rb") as file:
                return [part.decode("utf-8", "replace") for part in file.read().split(b"\0")]
        except OSError:
            return []

    def uuid(self, pid: int) -> str:
        """Return the UUID in the arguments that libvirt gave a QEMU; "" for who is none, or not yet."""
        words = self.cmdline(pid)
        return words[words.index("-uuid") + 1] if "-uuid" in words[:-1] else ""

    def has_hugetlb(self, pid: int) -> bool:
        """Return whether a process has pages of hugetlbfs (``HugetlbPages`` of status)."""
        try:
            with open(f"{self._proc}/{pid}/status", "rb") as file:
                return re.search(rb"^HugetlbPages:\s*[1-9]", file.read(), re.MULTILINE) is not None
        except OSError:
            return False

    def uptime(self) -> float:
        """Return seconds since boot."""
        with open(f"{self._proc}/uptime", "rb") as file:
            return float(file.read().split()[0])

    def is_still(self, thread: ThreadId, kind: Kind, comm: str) -> bool:
        """Return whether a thread is, at this moment, the one that was seen, and of its guest (promise 5).

        For one of a guest's other processes the caller has its cgroup checked too.
        """
        try:
            if kind is Kind.QEMU:
                return self.stat(thread.pid, thread.tid).start == thread.start
            stat = self.stat(thread.tid)
            return stat.start == thread.start and (kind is Kind.PROCESS or (stat.kernel and stat.comm == comm))
        except OSError:
            return False

    def ran_ns(self, thread: ThreadId) -> int | None:
        """Return the CPU time of a QEMU's thread in ns; None where it is gone, or the kernel does not know.

        The first field of schedstat. The kernel counts up to the last tick of a thread that runs right now, and all of
        one that sleeps or has just been moved or given another scheduling. Without CONFIG_SCHED_INFO it says 0.
        """
        try:
            return int(read(f"{self._proc}/{thread.pid}/task/{thread.tid}/schedstat").split()[0]) or None
        except (OSError, LookupError):
            return None


class KernelThreads:
    """The kernel's threads by name. Names do not change, so each pid is read once; all of them anew now and then."""

    _ANEW = 64

    def __init__(self, proc: Proc) -> None:
        self._proc = proc
        self._names: dict[int, str] = {}  # pid → name, "" for what is no kernel thread
        self._pids: dict[str, list[int]] = {}  # the other way round
        self._scans = 0

    def scan(self) -> None:
        """Look for new kernel threads."""
        self._scans += 1
        if self._scans % self._ANEW == 0:
            self._names = {}  # a pid that was reused meanwhile
        pids = self._proc.pids()
        names = {pid: self._names[pid] for pid in pids if pid in self._names}
        for pid in pids:
            if pid not in names:
                try:
                    stat = self._proc.stat(pid)
                except OSError:
                    continue
                if stat.comm != "kthreadd" or pid == 2:  # else it has not been given its name yet
                    names[pid] = stat.comm if stat.kernel else ""
        self._names = names
        self._pids = {}
        for pid, name in names.items():
            self._pids.setdefault(name, []).append(pid)

    def named(self, *names: str) -> list[int]:
        """Return the pids of the kernel threads with one of these names."""
        return sorted(pid for name in names for pid in self._pids.get(name, ()))

    def others(self) -> list[int]:
        """Return the pids of processes: of the last scan what is no kernel thread."""
        return sorted(self._pids.get("", ()))

    def lowest_priority(self, cpu: int, kinds: Iterable[str]) -> int | None:
        """Return the lowest FIFO priority among the threads ``KIND/CPU``, 0 for one that is not FIFO; None: none."""
        found: list[int] = []
        for pid in self.named(*(f"{kind}/{cpu}" for kind in kinds)):
            try:
                found.append(self._proc.stat(pid).priority)
            except OSError:
                continue
        return min(found, default=None)
