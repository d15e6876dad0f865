# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pCPUs somebody else holds: user threads of nobody's guest that are pinned (a DPDK PMD, ptp4l, corosync).

A thread counts as pinned when it may run on at most four pCPUs and at most half of those online, and neither on all of
them nor on all that are not isolated. A wider mask is the cpuset of a slice (AllowedCPUs=) or of a container, whose
threads are at home on many pCPUs and hold none; who pins a thread means one pCPU, or the few of a core or a cache. All
of "not isolated" is what every thread has where isolcpus= is set, however few they are. It must be five seconds old: a
compiler under taskset is gone before it matters, and libvirt has then moved what it starts into the guest's cgroups.

Kernel threads do not count, nor do threads that hidepid= hides, nor those of this process. Changes nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Host
from rtpind.host.proc import TICKS, Proc, Stat

_FEW = 4
_OLD_S = 5.0
#: A scan may take one part in so many of the time: after one of 5 ms there is none for half a second. Measured (CPU
#: time, median of 15, a host of 2 pCPUs): 0.6 ms for 120 threads in 36 processes, 5.5 ms for 2100 in 143. The affinity
#: of every thread is read anew, as somebody may pin one at any time; stat only of those that are narrow.
_SPARING = 100


class Foreign:
    """The pinned threads of others, looked for now and then."""

    def __init__(self, proc: Proc, *, clock: Callable[[], float] = time.monotonic, old_s: float = _OLD_S) -> None:
        self._proc = proc
        self._clock = clock
        self._old_s = old_s
        self._rests_until = float("-inf")
        self._found: dict[int, tuple[int, int, str]] = {}  # pCPU → process, thread, name

    def busy(self, host: Host, ours: Collection[int], *, anew: bool = True) -> dict[int, str]:
        """Return pCPU → ``COMM (TID)``; ``ours``: the threads and processes of guests, which do not count.

        Of several on a pCPU it is the one with the narrowest mask, then the oldest. What was found last, when it is not
        to look ``anew`` or it is too early for that; but for who has turned out to be a guest's since.
        """
        began = self._clock()
        if anew and began >= self._rests_until:
            self._found = self._scan(host, ours)
            ended = self._clock()
            self._rests_until = ended + (ended - began) * _SPARING
        return {
            cpu: f"{comm} ({tid})"
            for cpu, (pid, tid, comm) in self._found.items()
            if pid not in ours and tid not in ours
        }

    def _scan(self, host: Host, ours: Collection[int]) -> dict[int, tuple[int, int, str]]:
        found: dict[int, tuple[tuple[int, int, int], tuple[int, int, str]]] = {}
        for pid, tid, cpus, stat in self._pinned(host, ours):
            entry = ((len(cpus), stat.start, tid), (pid, tid, stat.comm))
            for cpu in cpus:
                found[cpu] = min(found.get(cpu, entry), entry)
        return {cpu: found[cpu][1] for cpu in sorted(found)}

    def _pinned(self, host: Host, ours: Collection[int]) -> Iterator[tuple[int, int, CpuSet, Stat]]:
        most = min(_FEW, len(host.online) // 2)
        unbound = host.online - host.isolated
        now = self._proc.uptime()
        for pid, tid in self._tids(ours):
            try:
                allowed = self._proc.affinity(tid)
                if len(allowed) > most:  # nearly everybody: no more is read of them
                    continue
                cpus = CpuSet(allowed) & host.online
                stat = self._proc.stat(pid, tid)
            except OSError:
                continue
            everywhere = unbound and unbound <= cpus
            if not everywhere and not stat.kernel and now - stat.start / TICKS >= self._old_s:
                yield pid, tid, cpus, stat

    def _tids(self, ours: Collection[int]) -> Iterator[tuple[int, int]]:
        for pid in self._proc.kernel_threads.others():
            if pid in ours or pid == os.getpid():
                continue
            try:
                yield from ((pid, tid) for tid in self._proc.tids(pid) if tid not in ours)
            except OSError:
                continue
