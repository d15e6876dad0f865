# SPDX-License-Identifier: GPL-2.0-or-later
"""Observe: the running domains and the host → one immutable Snapshot. Threads and guests that vanish are left out."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from rtpind.core.commandline import bound_nodes
from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.identify import Incumbents, Sighting, identify, settled
from rtpind.core.ledger import Process
from rtpind.core.memory import Memory
from rtpind.core.model import Guest, Host, Snapshot, ThreadId, Traits
from rtpind.host import pidfile
from rtpind.host.cgroup import Cgroups
from rtpind.host.foreign import Foreign
from rtpind.host.guestthreads import GuestThreads
from rtpind.host.proc import Proc
from rtpind.host.sysfs import HostFacts

#: Looks closer to each other than this do not search for new kernel threads.
_SCAN_APART_S = 0.04


class Observer:
    """Looks at guests. A look at some of them takes the others as they were last seen."""

    def __init__(self, root: Path = Path("/"), run_dir: Path = pidfile.RUN_DIR) -> None:
        self.proc = Proc(root)
        self.cgroups = Cgroups(root)
        self.threads = GuestThreads(self.proc, self.cgroups)
        self.facts = HostFacts(self.cgroups, self.proc, root)
        self.foreign = Foreign(self.proc)
        self._run_dir = run_dir
        self._last: dict[str, Guest] = {}
        self._told: dict[str, tuple[Process, Traits | str]] = {}
        self._bound: dict[str, tuple[Process, CpuSet]] = {}  # what QEMU's command line says, which stays the same
        # What was sighted of a guest last, who is who in it, and with which incumbents that is settled.
        self._known: dict[str, tuple[list[Sighting], Guest, Incumbents | None]] = {}
        self._scanned = float("-inf")
        self._host = self._seen = Host(online=NO_CPUS, possible=NO_CPUS)  # as last read, and as last shown
        self._ours: set[int] = set()  # guests' threads and processes

    def look(self, domains: Mapping[str, str], memory: Memory, only: Collection[str] | None = None) -> Snapshot:
        """Return a snapshot of the guests ``domains`` (UUID → name), read anew: all of them, or ``only`` some."""
        began = time.monotonic()
        # Not at the quick looks at a guest that starts: the host and the list of all processes are most of a look.
        if only is None or began - self._scanned >= _SCAN_APART_S:
            self._scanned = began
            self.proc.kernel_threads.scan()
            self._host = self.facts.read()
        uptime = self.proc.uptime()
        ran: dict[ThreadId, int] = {}
        found = {} if only is None else {uuid: guest for uuid, guest in self._last.items() if uuid in domains}
        for uuid in domains if only is None else domains.keys() & only:
            guest, last = self._guest(uuid, domains[uuid], memory, uptime, ran), self._last.get(uuid)
            if guest is None:
                found.pop(uuid, None)
                continue
            if len(self._host.topology.nodes) > 1:
                guest = replace(guest, nodes=self._nodes(guest, anew=only is None))
            found[uuid] = guest if last is guest or last != guest else last  # the same object: nothing to decide
        if only is None:
            self._forget(domains, found)
        for guest in found.values() if only is None else (found[uuid] for uuid in found.keys() & only):
            self._ours |= {guest.pid, *(thread.id.tid for thread in guest.threads)}
        host = replace(self._host, busy=self.foreign.busy(self._host, self._ours, anew=only is None))
        self._host = self._seen = host if host != self._seen else self._seen
        self._last = found
        guests = tuple(sorted(found.values(), key=lambda guest: (guest.name, guest.uuid)))
        ended = time.monotonic()
        return Snapshot(host=self._host, guests=guests, time=ended, took=ended - began, ran=ran)

    def _forget(self, domains: Mapping[str, str], found: Mapping[str, Guest]) -> None:
        """Forget what is no domain, and no guest, any more."""
        self._ours = set()
        self._told = {uuid: entry for uuid, entry in self._told.items() if uuid in domains}
        self._bound = {uuid: entry for uuid, entry in self._bound.items() if uuid in domains}
        self._known = {uuid: entry for uuid, entry in self._known.items() if uuid in domains}
        self.threads.keep({guest.pid for guest in found.values()})

    def process_of(self, name: str) -> Process | None:
        """Return which process the guest ``name`` is now; None when it does not run."""
        pid = pidfile.pid_of(name, self._run_dir)
        try:
            return None if pid is None else (pid, self.proc.stat(pid).start)
        except OSError:
            return None

    def scan_anew(self) -> None:
        """Have the next look search for new kernel threads."""
        self._scanned = float("-inf")

    def describe(self, uuid: str, process: Process, told: Traits | str) -> bool:
        """Take what libvirt tells of a guest while it is that process; return whether it is news.

        Only for that process: the next one of the same UUID may be started from another definition. A text is why
        that cannot be read; what was read before stands.
        """
        before, had = self._told.get(uuid, (None, None))
        if before == process and (had == told or (isinstance(had, Traits) and isinstance(told, str))):
            return False
        self._told[uuid] = (process, told)
        return True

    def host(self) -> Host:
        """Return the host's facts alone."""
        self.proc.kernel_threads.scan()
        return self.facts.read()

    def _nodes(self, guest: Guest, *, anew: bool) -> CpuSet:
        """Return the NUMA nodes of a guest's memory: where QEMU binds it to, else where it lies.

        The latter is read in looks at everything, as the quick ones have no time for it. Where the guest has huge
        pages nothing is known of it: its cgroup counts only the rest, which is QEMU's own.
        """
        bound = self._bound_nodes(guest)
        if bound:
            return bound
        if not anew:
            last = self._last.get(guest.uuid)
            return last.nodes if last is not None and last.process == guest.process else NO_CPUS
        return NO_CPUS if self.proc.has_hugetlb(guest.pid) else self.cgroups.nodes(guest.pid)

    def _bound_nodes(self, guest: Guest) -> CpuSet:
        """Return the nodes that QEMU's command line binds memory to. Before its vCPUs begin it may not be QEMU yet."""
        if guest.starting:
            return NO_CPUS
        process, nodes = self._bound.get(guest.uuid, (None, NO_CPUS))
        if process != guest.process:
            nodes = bound_nodes(self.proc.cmdline(guest.pid))
            self._bound[guest.uuid] = (guest.process, nodes)
        return nodes

    def _guest(self, uuid: str, name: str, memory: Memory, uptime: float, ran: dict[ThreadId, int]) -> Guest | None:
        pid = pidfile.pid_of(name, self._run_dir)
        seen = None if pid is None else self.threads.look(pid, uptime, memory.starts)
        if pid is None or seen is None:
            return None
        start, sightings = seen
        ran |= {sighting.id: sighting.ran_ns for sighting in sightings if sighting.ran_ns is not None}
        guest = self._identified(uuid, name, (pid, start), sightings, memory)
        if not memory.refused or not any(thread.id in memory.refused for thread in guest.threads):
            return guest
        threads = tuple(
            replace(thread, limits=self.cgroups.limits(thread.id.pid, thread.id.tid, thread.kind))
            if thread.id in memory.refused
            else thread
            for thread in guest.threads
        )
        return replace(guest, threads=threads)

    def _identified(self, uuid: str, name: str, process: Process, sightings: list[Sighting], memory: Memory) -> Guest:
        """Return who is who in a guest, with its traits; as found last time where that cannot have changed."""
        of, told = self._told.get(uuid, (None, None))
        traits = told if of == process and isinstance(told, Traits) else None
        unreadable = told if of == process and isinstance(told, str) else ""
        known = self._known.get(uuid)
        if known is not None and known[0] == sightings:
            guest = known[1]
            same = guest.name == name and guest.process == process
            same = same and guest.traits is traits and guest.unreadable == unreadable
            if same and (known[2] is memory.incumbents or settled(guest, memory.incumbents)):
                self._known[uuid] = (sightings, guest, memory.incumbents)
                return guest
        guest = identify(
            uuid=uuid,
            name=name,
            process=process,
            sightings=sightings,
            incumbents=memory.incumbents,
            doubtful=memory.doubtful,
        )
        if traits is not None or unreadable:
            guest = replace(guest, traits=traits, unreadable=unreadable)
        self._known[uuid] = (sightings, guest, None)
        return guest
