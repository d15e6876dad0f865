# SPDX-License-Identifier: GPL-2.0-or-later
"""Small fake hosts, guests and policies for tests of the core. Everything is a value; the same call, the same value.

A guest's threads have the ids that :func:`tid` tells: its process is ``pid``, vCPU n is ``pid + 10 + n``, iothread n
``pid + 50 + n``, and helper n ``pid + 100 + n``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import Decision
from rtpind.core.identify import Sighting
from rtpind.core.model import OTHER, Guest, Host, Kind, Placement, Role, Sched, Scheduling, Snapshot, Thread, ThreadId
from rtpind.core.policy import Policy
from rtpind.core.policyfile import load

PID = 1000
START = 500

#: Where a thread of each role is numbered from, above its guest's pid.
_BASE = {Role.VCPU: 10, Role.IOTHREAD: 50, Role.EMULATOR: 100, Role.VHOST: 200, Role.PIT: 300}

_COMM = {
    Role.VCPU: "CPU {index}/KVM",
    Role.IOTHREAD: "IO iothread{index}",
    Role.EMULATOR: "qemu-system-x86",
    Role.VHOST: "vhost-{pid}",
    Role.PIT: "kvm-pit/{pid}",
}

#: A policy with every pCPU but 0-1 for exclusive vCPUs at FIFO 1, for guests named rt-*.
REALTIME = """
version: 1
mode: enforce
pools:
  realtime: isolated
classes:
  realtime:
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo, priority: 1}
guests:
  - {name: "rt-*", class: realtime}
drift: repair
when_full: degrade
"""


def cpus(text: str) -> CpuSet:
    """Return the set of a CPU list."""
    return CpuSet.parse(text)


def fifo(priority: int = 1, *, reset_on_fork: bool = True) -> Scheduling:
    """Return FIFO as rtpind gives it."""
    return Scheduling(Sched.FIFO, priority, reset_on_fork)


def host(*, online: str = "0-7", isolated: str = "2-7", possible: str | None = None, **facts: Any) -> Host:
    """Return a host of eight pCPUs, throttling realtime threads, with 0-1 for housekeeping."""
    facts = {"rt_runtime_us": 950_000, "throttles": True, "rt_group_sched": False, "fair_server": CpuSet()} | facts
    return Host(online=cpus(online), isolated=cpus(isolated), possible=cpus(possible or online), **facts)


def tid(*, pid: int = PID, role: Role = Role.EMULATOR, index: int = 0) -> int:
    """Return the number of a guest's thread: helper 0 of role emulator is the main thread, which is the pid."""
    return pid if (role, index) == (Role.EMULATOR, 0) else pid + _BASE[role] + index


def thread_id(*, pid: int = PID, role: Role = Role.EMULATOR, index: int = 0, start: int = START) -> ThreadId:
    """Return the id of the thread that :func:`guest` makes."""
    return ThreadId(pid, start, tid(pid=pid, role=role, index=index), start)


def thread(
    *,
    role: Role = Role.EMULATOR,
    index: int | None = None,
    pid: int = PID,
    start: int = START,
    uuid: str | None = None,
    on: str = "0-7",
    scheduling: Scheduling = OTHER,
    **fields: Any,
) -> Thread:
    """Return one thread; ``index`` also tells helpers of one role apart, but only vCPUs and iothreads keep it."""
    number = index or 0
    numbered = role in (Role.VCPU, Role.IOTHREAD)
    defaults: dict[str, Any] = {
        "id": thread_id(pid=pid, role=role, index=number, start=start),
        "comm": _COMM[role].format(index=number, pid=pid),
        "kind": Kind.KERNEL if role in (Role.VHOST, Role.PIT) else Kind.QEMU,
        "cgroup": f"machine.slice/guest-{pid}/libvirt/{role}{number}" if numbered else f"guest-{pid}/libvirt/emulator",
    }
    return Thread(
        guest=uuid or uuid_of(pid),
        role=role,
        index=number if numbered else None,
        now=Placement(cpus(on), scheduling),
        **(defaults | fields),
    )


def uuid_of(pid: int) -> str:
    """Return the UUID of the guest with that pid."""
    return str(UUID(int=pid))


def guest(
    name: str = "rt-1",
    *,
    pid: int = PID,
    start: int = START,
    uuid: str | None = None,
    vcpus: int = 2,
    iothreads: int = 1,
    helpers: int = 1,
    vhosts: int = 0,
    pits: int = 0,
    on: str = "0-7",
    extra: Sequence[Thread] = (),
    **fields: Any,
) -> Guest:
    """Return a running guest whose threads all may run on ``on``. ``helpers``: emulator threads, the main one first."""
    uuid = uuid or uuid_of(pid)
    counts = {Role.EMULATOR: helpers, Role.VCPU: vcpus, Role.IOTHREAD: iothreads, Role.VHOST: vhosts, Role.PIT: pits}
    threads = tuple(
        thread(
            role=role,
            index=index + (role is Role.IOTHREAD),  # libvirt counts iothreads from 1
            pid=pid,
            start=start,
            uuid=uuid,
            on=on,
        )
        for role, count in counts.items()
        for index in range(count)
    )
    return Guest(uuid=uuid, name=name, pid=pid, pid_start=start, threads=(*threads, *extra), **fields)


def policy(text: str = REALTIME, *, on: Host | None = None) -> Policy:
    """Return the policy of a file's text, which must have no problem and no warning."""
    made, problems = load(text, on or host())
    assert problems == []
    assert made is not None
    return made


def snapshot(*guests: Guest, host: Host | None = None, time: float = 0.0, took: float = 0.0) -> Snapshot:
    """Return a snapshot of these guests."""
    return Snapshot(host=_default_host() if host is None else host, guests=guests, time=time, took=took)


def find(of: Guest, label: str, number: int = 0) -> Thread:
    """Return the guest's thread of that label; ``number`` picks among helpers, which share one."""
    return [thread for thread in of.threads if thread.label == label][number]


def moved(of: Guest, places: Mapping[ThreadId, Placement]) -> Guest:
    """Return the guest with some of its threads elsewhere."""
    return replace(of, threads=tuple(replace(one, now=places.get(one.id, one.now)) for one in of.threads))


def put(of: Guest, where: Mapping[str, str], scheduling: Scheduling | None = None) -> Guest:
    """Return the guest with the threads of these labels on these pCPUs."""
    return moved(
        of,
        {
            one.id: Placement(cpus(where[one.label]), scheduling or one.now.scheduling)
            for one in of.threads
            if one.label in where
        },
    )


def applied(seen: Snapshot, decision: Decision) -> Snapshot:
    """Return the snapshot after the kernel took every wanted placement."""
    places = {
        id_: Placement(wanted.cpus, fifo(wanted.priority) if wanted.priority else OTHER)
        for id_, wanted in decision.wanted().items()
    }
    return replace(seen, guests=tuple(moved(one, places) for one in seen.guests))


def sighting(
    comm: str = "qemu-system-x86",
    *,
    tid: int = PID,
    pid: int = PID,
    start: int = START,
    leaf: str = "emulator",
    kind: Kind = Kind.QEMU,
    on: str = "0-7",
    **fields: Any,
) -> Sighting:
    """Return one thread as the host showed it."""
    id_ = ThreadId(pid, START, tid, start)
    return Sighting(id=id_, kind=kind, comm=comm, leaf=leaf, now=Placement(cpus(on)), **fields)


_default_host = host  # snapshot() has an argument of that name
