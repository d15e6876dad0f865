# SPDX-License-Identifier: GPL-2.0-or-later
"""Sees the threads of a guest: those of its QEMU, the processes in its emulator cgroup, and its kernel threads.

Everything is read anew at each look; what was made of it is kept, thread by thread, and used again where the kernel
shows the same. So an unchanged thread costs its reads and a comparison, and stays the same object. Changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from rtpind.core.identify import SETTLE_S, Sighting
from rtpind.core.model import Kind, ThreadId
from rtpind.core.offplace import Start, Starts
from rtpind.host.cgroup import Cgroups, Groups, parse
from rtpind.host.proc import TICKS, Proc, Stat, parse_stat

_NONE: Starts = MappingProxyType({})
_UNKNOWN = Start()


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the kernel showed of one thread, and what was made of it. ``asked``: what it was looked at as."""

    asked: Kind
    raw_stat: bytes
    stat: Stat
    raw_groups: bytes
    groups: Groups
    allowed: Collection[int]
    policy: int
    sighting: Sighting


@dataclass(frozen=True, slots=True)
class _Guest:
    """A guest at one look: its process, its own cgroups, and its threads by tid."""

    pid: int
    start: int
    raw_home: bytes
    home: Groups
    threads: dict[int, _Seen] = field(default_factory=dict)


class GuestThreads:
    """The threads of guests, by the pid of their QEMU."""

    def __init__(self, proc: Proc, cgroups: Cgroups) -> None:
        self._proc = proc
        self._cgroups = cgroups
        self._guests: dict[int, _Guest] = {}

    def keep(self, pids: Collection[int]) -> None:
        """Forget all guests but these."""
        if len(self._guests) > len(pids):
            self._guests = {pid: guest for pid, guest in self._guests.items() if pid in pids}

    def look(self, pid: int, uptime: float, starts: Starts = _NONE) -> tuple[int, list[Sighting]] | None:
        """Return the start time and all threads of the guest whose QEMU is ``pid``.

        ``starts``: of which vCPUs the CPU time is to be read. None when the guest is gone, or not
        yet in the emulator cgroup in which libvirt starts it (before that, libvirt still sets its affinity). Threads
        that end meanwhile are left out.
        """
        last = self._guests.get(pid)
        try:
            start = self._proc.stat(pid, pid).start  # the main thread's, which is the process'
            raw_home = self._cgroups.text(pid, pid)
            tids = self._proc.tids(pid)
        except OSError:
            return None
        home = last.home if last is not None and last.raw_home == raw_home else parse(raw_home)
        if home.leaf != "emulator":
            return None
        guest = _Guest(pid, start, raw_home, home)
        begun = starts.get((pid, start), _UNKNOWN)
        known = last.threads if last is not None else {}
        own = set(tids)
        others = [tid for tid in self._cgroups.threads(home) if tid not in own]
        names = (f"vhost-{pid}", f"kvm-pit/{pid}")
        kernel = [tid for tid in self._proc.kernel_threads.named(*names) if tid not in others]
        for kind, members in ((Kind.QEMU, tids), (Kind.PROCESS, others), (Kind.KERNEL, kernel)):
            for tid in members:
                seen = self._see(guest, tid, kind, known.get(tid), uptime, begun)
                if seen is None:
                    continue
                # The names are from the last scan: a number that was reused since is somebody else's.
                if kind is Kind.KERNEL and (seen.sighting.kind is not kind or seen.stat.comm not in names):
                    continue
                guest.threads[tid] = seen
        self._guests[pid] = guest
        return start, [seen.sighting for seen in guest.threads.values()]

    def _see(
        self, guest: _Guest, tid: int, kind: Kind, last: _Seen | None, uptime: float, begun: Start
    ) -> _Seen | None:
        """Read one thread; ``last``: what was seen of that number at the last look."""
        qemu, proc, raw_groups, ran_ns = kind is Kind.QEMU, self._proc, b"", None
        try:
            raw_stat = proc.raw_stat(guest.pid, tid) if qemu else proc.raw_stat(tid)
            alike = last is not None and last.raw_stat == raw_stat
            stat = last.stat if last is not None and alike else parse_stat(raw_stat)
            age_s = min(uptime - stat.start / TICKS, SETTLE_S)
            groups = guest.home
            if qemu and stat.comm.startswith(("CPU ", "IO iothread")):
                if (age_s < SETTLE_S or begun.open) and stat.comm.startswith("CPU "):
                    id_ = ThreadId(guest.pid, guest.start, tid, stat.start)
                    # Before its cgroup, which tells whether it can have run a guest by then.
                    ran_ns = proc.ran_ns(id_) if begun.due(id_, age_s) else None
                raw_groups = self._cgroups.text(guest.pid, tid)
                groups = last.groups if last is not None and last.raw_groups == raw_groups else parse(raw_groups)
            policy, allowed = proc.policy(tid), proc.affinity(tid)
        except (FileNotFoundError, ProcessLookupError):
            return None  # anything else (no more files, no memory) does not mean that it has ended
        if last is not None and groups is last.groups and policy == last.policy and allowed == last.allowed:
            then = last.sighting
            same = then.ran_ns == ran_ns and then.age_s == age_s and then.id.pid_start == guest.start
            if same and last.asked is kind:
                if alike:
                    return last
                if stat == last.stat:
                    return replace(last, raw_stat=raw_stat, stat=stat)
        sighting = Sighting(
            id=ThreadId(guest.pid, guest.start, tid, stat.start),
            kind=Kind.KERNEL if stat.kernel else kind if qemu else Kind.PROCESS,
            comm=stat.comm,
            now=proc.placed(stat, policy, allowed),
            leaf=groups.leaf,
            cgroup=groups.path,
            movable=stat.movable,
            worker=stat.worker,
            age_s=age_s,
            ran_ns=ran_ns,
        )
        return _Seen(kind, raw_stat, stat, raw_groups, groups, allowed, policy, sighting)
