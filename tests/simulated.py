"""A simulated host whose threads can be placed: sched_setaffinity(2) and sched_setscheduler(2), and a look at it.

:class:`World` is the Kernel that applying needs, and the Observer that reconciling needs. Its threads are those of
its guests, each with what the kernel would know of it; it can be made to crash the daemon at any system call.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from rtpind.core.cpuset import CpuSet
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import OTHER, Guest, Host, Limits, Placement, Role, Sched, Scheduling, Snapshot, Thread

FIRST_CHILD = 50_000
CALL_S = 1e-5


class Killed(BaseException):
    """The daemon was killed."""


@dataclass
class Task:
    """What the kernel knows of one thread. ``fence``: its cpuset. ``budget``: RT_GROUP_SCHED lets it be realtime."""

    thread: Thread
    fence: CpuSet | None = None
    budget: bool = True
    obeys: bool = True  # False: a security module forbids every sched_setscheduler(2) on it


@dataclass
class Call:
    """One system call that was made, and its errno."""

    tid: int
    value: CpuSet | Scheduling
    error: int


class World:
    """A host and its guests' threads, by tid."""

    def __init__(self, host: Host, guests: list[Guest], tasks: dict[int, Task] | None = None) -> None:
        self.host = host
        self.guests = guests
        self.tasks = tasks or {thread.id.tid: Task(thread) for guest in guests for thread in guest.threads}
        self.calls: list[Call] = []
        self.time = 1000.0  # monotonic seconds
        self.took = 0.0  # by a look
        self.children = 0  # that began; a tid is not used twice
        self.crash_before = -1  # number of the system call before which the daemon is killed
        self.crash_after = -1
        self.on_call: Callable[[Thread], None] = lambda _: None  # before each system call
        self.after_call: Callable[[], None] = lambda: None
        self.seen: dict[str, Guest] = {}
        self.ran: dict[int, int] = {}  # tid → CPU time in ns, of those that the kernel tells it of

    def __repr__(self) -> str:
        """Return a table of the threads, for a failing test to show."""
        rows = [f"host {self.host.online} isolated {self.host.isolated} guards {self.host.guards}"]
        for tid, task in sorted(self.tasks.items()):
            thread, marks = task.thread, f"{'' if task.thread.settled else ' unsettled'}"
            marks += f"{'' if task.thread.movable else ' immovable'}{'' if task.budget else ' no budget'}"
            marks += f"{'' if task.obeys else ' disobeys'}{'' if task.fence is None else f' fence {task.fence}'}"
            reset = "R" if thread.now.scheduling.reset_on_fork else ""
            rows.append(f"{tid} {thread.label}: {thread.now.cpus} {thread.now.scheduling}{reset}{marks}")
        return "\n    ".join(rows)

    def copy(self) -> World:
        """Return the same world, to be changed independently; without hooks, calls and crashes."""
        tasks = {tid: replace(task) for tid, task in self.tasks.items()}
        made = World(self.host, list(self.guests), tasks)
        made.time = self.time
        return made

    # --- the system calls -------------------------------------------------------------------------------------

    def set_affinity(self, tid: int, cpus: CpuSet) -> int:
        """sched_setaffinity(2): the cpuset silently narrows the mask; EINVAL where nothing is left of it."""
        return self._call(tid, cpus, lambda task: self._affinity(task, cpus))

    def set_scheduling(self, tid: int, scheduling: Scheduling) -> int:
        """sched_setscheduler(2): EPERM without a realtime budget."""
        return self._call(tid, scheduling, lambda task: self._scheduling(task, scheduling))

    def _call(self, tid: int, value: CpuSet | Scheduling, change: Callable[[Task], int]) -> int:
        number = len(self.calls)
        if number == self.crash_before:
            raise Killed
        if tid in self.tasks:
            self.on_call(self.tasks[tid].thread)
        error = change(self.tasks[tid]) if tid in self.tasks else errno.ESRCH
        self.calls.append(Call(tid, value, error))
        self.time += CALL_S
        self.after_call()
        if number == self.crash_after:
            raise Killed
        return error

    def _affinity(self, task: Task, cpus: CpuSet) -> int:
        allowed = cpus & (self.host.online if task.fence is None else task.fence & self.host.online)
        if not self.host.nice_capable:
            return errno.EPERM
        if not task.thread.movable or not allowed:
            return errno.EINVAL
        self.put(task.thread.id.tid, cpus=allowed)
        return 0

    def _scheduling(self, task: Task, scheduling: Scheduling) -> int:
        if not self.host.nice_capable or not task.obeys or (scheduling.realtime and not task.budget):
            return errno.EPERM
        assert scheduling.sched not in (Sched.DEADLINE, Sched.EXT), "sched_setscheduler(2) cannot"
        self.put(task.thread.id.tid, scheduling=scheduling)
        return 0

    def clock(self) -> float:
        """Return the time; only system calls and stories let it pass."""
        return self.time

    # --- what others do ---------------------------------------------------------------------------------------

    def put(self, tid: int, *, cpus: CpuSet | None = None, scheduling: Scheduling | None = None) -> None:
        """Have a thread somewhere, whoever did it."""
        task = self.tasks[tid]
        now = task.thread.now
        placement = Placement(cpus or now.cpus, scheduling or now.scheduling)
        task.thread = replace(task.thread, now=placement)

    def change(self, tid: int, **fields: Any) -> None:
        """Change what a thread is."""
        task = self.tasks[tid]
        task.thread = replace(task.thread, **fields)

    def fork(self, tid: int, **fields: Any) -> int:
        """Have a thread begin another one, as clone(2) does: a helper with its affinity, and its scheduling.

        SCHED_RESET_ON_FORK is not inherited, and then neither is FIFO.
        """
        parent = self.tasks[tid]
        now = parent.thread.now
        self.children += 1
        child = FIRST_CHILD + self.children
        scheduling = OTHER if now.scheduling.reset_on_fork else now.scheduling
        made = {"role": Role.EMULATOR, "index": None, "comm": "worker"} | fields
        thread = replace(
            parent.thread,
            id=parent.thread.id._replace(tid=child, start=parent.thread.id.start + self.children),
            now=Placement(now.cpus, scheduling),
            **made,
        )
        self.tasks[child] = replace(parent, thread=thread)
        return child

    def exit(self, tid: int) -> None:
        """End a thread."""
        self.tasks.pop(tid, None)

    def stop(self, guest: Guest) -> None:
        """End a guest."""
        self.guests.remove(guest)
        for thread in self.threads():
            if thread.guest == guest.uuid:
                self.exit(thread.id.tid)

    # --- what can be seen -------------------------------------------------------------------------------------

    def threads(self) -> list[Thread]:
        """Return every thread as it is now."""
        return [task.thread for task in self.tasks.values()]

    def where(self) -> dict[int, Placement]:
        """Return where every thread is, by tid."""
        return {tid: task.thread.now for tid, task in self.tasks.items()}

    def is_still(self, thread: Thread) -> bool:
        """Return whether the thread still runs."""
        task = self.tasks.get(thread.id.tid)
        return task is not None and task.thread.id == thread.id

    def read(self, thread: Thread) -> Placement | None:
        """Return where a thread is."""
        return self.tasks[thread.id.tid].thread.now if self.is_still(thread) else None

    def limits(self, thread: Thread) -> Limits:
        """Return a thread's cpuset and realtime budget."""
        task = self.tasks[thread.id.tid]
        fenced_by = "" if task.fence is None else f"machine.slice/{thread.label}"
        return Limits(fence=task.fence, fenced_by=fenced_by, rt_budget_us=None if task.budget else 0)

    def guest(self, guest: Guest, memory: Memory) -> Guest:
        """Return a guest with its threads as they are now; limits only of those that were refused something."""
        found = [thread for thread in self.threads() if thread.guest == guest.uuid]
        threads = tuple(
            replace(thread, limits=self.limits(thread)) if thread.id in memory.refused else thread for thread in found
        )
        return replace(guest, threads=threads)

    def snapshot(self, memory: Memory | None = None) -> Snapshot:
        """Return what a look finds."""
        guests = tuple(self.guest(guest, memory or Memory()) for guest in self.guests)
        return Snapshot(host=self.host, guests=guests, time=self.time, took=self.took)

    def look(self, domains: Mapping[str, str], memory: Memory, only: Collection[str] | None = None) -> Snapshot:
        """Return a snapshot as the Observer does: of guests not in ``only``, what was seen last."""
        found = self.snapshot(memory)
        guests = {guest.uuid: guest for guest in found.guests if guest.uuid in domains}
        if only is not None:
            old = {uuid: guest for uuid, guest in self.seen.items() if uuid not in only and uuid in domains}
            guests = old | {uuid: guest for uuid, guest in guests.items() if uuid in only}
        guests = {uuid: old if (old := self.seen.get(uuid)) == guest else guest for uuid, guest in guests.items()}
        self.seen = guests
        read = {uuid for uuid in guests if only is None or uuid in only}
        over = {id_ for start in memory.starts.values() for id_ in start.over}
        told = [one for one in found.threads() if one.role is Role.VCPU and one.guest in read and one.id not in over]
        found = replace(found, ran={one.id: self.ran[one.id.tid] for one in told if one.id.tid in self.ran})
        return replace(found, guests=tuple(sorted(guests.values(), key=lambda guest: (guest.name, guest.uuid))))

    @property
    def domains(self) -> dict[str, str]:
        """UUID → name of the guests that run."""
        return {guest.uuid: guest.name for guest in self.guests}

    @property
    def proc(self) -> Any:
        """What the reconciler asks of /proc: whether a process still runs."""
        starts = {guest.pid: guest.pid_start for guest in self.guests}

        def stat(pid: int) -> Any:
            if pid not in starts:
                raise ProcessLookupError(pid)
            return SimpleNamespace(start=starts[pid])

        return SimpleNamespace(stat=stat, ran_ns=lambda id_: self.ran.get(id_.tid))


class Disk:
    """The ledger file, kept in memory; ``full`` makes writing fail."""

    def __init__(self, ledger: Ledger | None = None) -> None:
        self.ledger = ledger or Ledger()
        self.full = False
        self.writes = 0

    def read(self) -> tuple[Ledger, str]:
        """Return what was written."""
        return self.ledger, ""

    def write(self, ledger: Ledger) -> None:
        """Replace it."""
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.writes += 1
        self.ledger = ledger


def violations(world: World) -> set[tuple[int, int]]:
    """Return every (FIFO vCPU, thread beside it) that breaks promise 1, as the kernel shows it."""
    found: set[tuple[int, int]] = set()
    threads = world.threads()
    for vcpu in threads:
        if vcpu.role is not Role.VCPU or not vcpu.now.scheduling.realtime:
            continue
        for other in threads:
            scheduling = other.now.scheduling
            above = scheduling.sched is Sched.FIFO and scheduling.priority > vcpu.now.scheduling.priority
            lawful = other.guest == vcpu.guest and above
            if other.id != vcpu.id and other.now.cpus & vcpu.now.cpus and not lawful:
                found.add((vcpu.id.tid, other.id.tid))
    return found
