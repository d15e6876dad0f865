# SPDX-License-Identifier: GPL-2.0-or-later
"""The nouns that every stage shares: threads, guests, what they have, and the snapshot of them all.

Values only: nothing here decides, and nothing here touches the host.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.topology import Topology


class Role(StrEnum):
    """What a thread is to its guest. ``emulator`` is whatever is none of the others."""

    VCPU = "vcpu"
    EMULATOR = "emulator"
    IOTHREAD = "iothread"
    VHOST = "vhost"
    PIT = "pit"


class Sched(StrEnum):
    """A scheduling policy of sched(7); EXT is sched_ext."""

    OTHER = "other"
    FIFO = "fifo"
    RR = "rr"
    BATCH = "batch"
    IDLE = "idle"
    DEADLINE = "deadline"
    EXT = "ext"


REALTIME = frozenset({Sched.FIFO, Sched.RR})


@dataclass(frozen=True, slots=True)
class Scheduling:
    """A policy, its realtime priority (1–99 for FIFO and RR, else 0), and SCHED_RESET_ON_FORK."""

    sched: Sched = Sched.OTHER
    priority: int = 0
    reset_on_fork: bool = False

    @property
    def realtime(self) -> bool:
        """Whether the thread is FIFO or RR."""
        return self.sched in REALTIME

    def __str__(self) -> str:
        return f"{self.sched}:{self.priority}" if self.realtime else str(self.sched)


OTHER = Scheduling()


@dataclass(frozen=True, slots=True)
class Placement:
    """Affinity and scheduling of one thread, as the kernel reports them."""

    cpus: CpuSet
    scheduling: Scheduling = OTHER


class ThreadId(NamedTuple):
    """Who a thread is: its guest's QEMU process and the thread itself, each with its start time.

    Start times are clock ticks after boot (field 22 of stat): they make a reused number another thread.
    """

    pid: int
    pid_start: int
    tid: int
    start: int


class Kind(StrEnum):
    """How a thread belongs to its guest, which is also how that is proved again before each touch."""

    QEMU = "qemu"  # listed under /proc/PID/task
    PROCESS = "process"  # a process that libvirt put into the guest's emulator cgroup
    KERNEL = "kernel"  # a kernel thread that names the guest's pid


@dataclass(frozen=True, slots=True)
class Limits:
    """What keeps a thread from its place: read only for threads whose placement was refused, as that costs.

    ``fence``: the pCPUs its cpuset allows, ``fenced_by`` the cgroup that says so. ``rt_budget_us``: what its cpu
    cgroup may spend realtime (RT_GROUP_SCHED), None where the kernel has no such file.
    """

    fence: CpuSet | None = None
    fenced_by: str = ""
    rt_budget_us: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Thread:
    """One thread of one guest, at one look.

    ``index`` is the vCPU or iothread number. ``settled``: libvirt has moved it into its final cgroup (always
    true of helpers). ``movable``: the kernel lets its affinity change (no PF_NO_SETAFFINITY). ``cgroup``: its
    path below the cgroup mount, for messages and for proving a PROCESS again.
    """

    id: ThreadId
    guest: str
    comm: str
    role: Role
    now: Placement
    index: int | None = None
    kind: Kind = Kind.QEMU
    settled: bool = True
    movable: bool = True
    cgroup: str = ""
    limits: Limits | None = None

    @property
    def label(self) -> str:
        """``vcpu 0``, ``iothread 1``, ``emulator``: how people name it."""
        return str(self.role) if self.index is None else f"{self.role} {self.index}"

    @property
    def helper(self) -> bool:
        """Whether it is any thread but a vCPU."""
        return self.role is not Role.VCPU


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What libvirt's definition of a guest says beside its threads; the guest itself cannot change it.

    ``flavor``, ``project``, ``project_id``: Nova's metadata. ``has``: of :data:`FEATURES`. ``partition``: libvirt's
    resource partition. ``threads``: of each of the guest's own cores. ``pins``: vCPU → <vcpupin>. ``realtime``:
    vCPU → priority, by <vcpusched> fifo or rr. ``nodes``: NUMA nodes that its memory is bound to.
    """

    flavor: str = ""
    project: str = ""
    project_id: str = ""
    has: frozenset[str] = frozenset()
    partition: str = ""
    threads: int = 1
    pins: Mapping[int, CpuSet] = field(default_factory=dict)
    realtime: Mapping[int, int] = field(default_factory=dict)
    nodes: CpuSet = NO_CPUS

    @property
    def projects(self) -> tuple[str, ...]:
        """What a rule's ``project`` may match: the name, which another domain of Keystone may have too, and the id."""
        return tuple(word for word in (self.project, self.project_id) if word)


#: What a rule can ask for by ``has``: <vcpusched>, <hugepages>, <locked>.
FEATURES = ("hugepages", "locked", "vcpusched")


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """A running guest: libvirt's domain, proved to be the process ``pid`` (start time ``pid_start``)."""

    uuid: str
    name: str
    pid: int
    pid_start: int
    threads: tuple[Thread, ...] = ()
    contested: tuple[str, ...] = ()  # labels that two threads claim: nobody gets them
    young: bool = False  # its QEMU began so lately that libvirt may not have moved its threads yet
    doubtful: tuple[str, ...] = ()  # labels that two threads claim for the first time: look again
    traits: Traits | None = None  # None: libvirt has not told them yet, or they are
    unreadable: str = ""  # why its definition cannot be read
    nodes: CpuSet = NO_CPUS  # NUMA nodes that QEMU binds its memory to, or that most of it is on; empty: not known

    @property
    def process(self) -> tuple[int, int]:
        """Pid and start time: one run of the guest; a reboot keeps it, a stop ends it."""
        return (self.pid, self.pid_start)

    @property
    def memory_nodes(self) -> CpuSet:
        """NUMA nodes of its memory: what libvirt binds it to, else QEMU, else where it lies; empty: not known."""
        return self.traits.nodes if self.traits is not None and self.traits.nodes else self.nodes

    @property
    def starting(self) -> bool:
        """Whether libvirt has not begun to move its vCPUs: how many they are, and so what it needs, is not known.

        Only while it is young: a guest that renames its threads later does not get out of anything by that.
        """
        vcpus = any(thread.role is Role.VCPU and thread.settled for thread in self.threads)
        return self.young and not vcpus and not self.contested


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The host's facts at one look. Sets are of pCPUs; None means that it could not be read.

    ``rt_runtime_us``: kernel.sched_rt_runtime_us, -1 is no throttling. ``throttles``: whether this kernel
    throttles realtime threads by that value at all (before 6.12, or with RT_GROUP_SCHED). ``fair_server``: the
    pCPUs whose fair server has a runtime; empty where the kernel has none. ``guards``: lowest FIFO priority
    among a pCPU's rcuc, ktimers and ksoftirqd. ``busy``: pCPU → the user thread of nobody's guest that is
    narrowed to it, as ``COMM (TID)``.
    """

    online: CpuSet
    possible: CpuSet
    isolated: CpuSet = NO_CPUS
    topology: Topology = field(default_factory=Topology)
    busy: Mapping[int, str] = field(default_factory=dict)
    rt_runtime_us: int | None = None
    throttles: bool | None = None
    rt_group_sched: bool | None = None
    fair_server: CpuSet | None = None
    guards: Mapping[int, int] | None = None
    nice_capable: bool = True
    kernel: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything one decision rests on.

    ``time``: when the look was over, monotonic seconds of which only differences mean anything. ``took``: how long it
    took, seconds.
    ``ran``: CPU time (ns) of the vCPUs whose start is not over (:mod:`rtpind.core.offplace`), read at this look.
    """

    host: Host
    guests: tuple[Guest, ...] = ()
    time: float = 0.0
    took: float = 0.0
    ran: Mapping[ThreadId, int] = field(default_factory=dict)

    def threads(self) -> tuple[Thread, ...]:
        """Return every thread of every guest, in the guests' order."""
        return tuple(thread for guest in self.guests for thread in guest.threads)
