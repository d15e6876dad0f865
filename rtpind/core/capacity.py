# SPDX-License-Identifier: GPL-2.0-or-later
"""How many guests fit: places made-up guests by the policy until one finds no room. Pure.

It asks :func:`rtpind.core.placement.place` itself, so the answer is what the daemon would do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import Decision, GuestDecision, State
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import Guest, Host, Placement, Role, Snapshot, Thread, ThreadId, Traits
from rtpind.core.placement import place
from rtpind.core.policy import GuestClass, Policy, Rule, WhenFull
from rtpind.core.topology import Topology

#: A made-up guest's process: no real pid is that large (PID_MAX_LIMIT is 4 Mi), and no process that young.
_PID = 1 << 23
_START = 1 << 62
#: Numbers of a made-up guest's threads, so far apart that roles do not meet.
_STEP = 1 << 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What a guest brings: how many vCPUs and iothreads, and the threads of each of its own cores."""

    vcpus: int
    iothreads: int = 0
    threads: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """How many guests of one size fit under one class (None: any number), and what keeps the next one out.

    ``running``: how many of them are there and have their places, and ``running_realtime`` their FIFO vCPUs; None where
    that is not counted.
    """

    class_name: str
    vcpus: int
    guests: int | None
    realtime_vcpus: int
    limited_by: str
    running: int | None = None
    running_realtime: int | None = None


def made_up(class_: str, shape: Shape, number: int = 0) -> Guest:
    """Return a guest that is not there, all of whose threads may run anywhere. It matches its class's rule alone."""
    name = f"{class_}#{number + 1}"
    pid = _PID + number * 4 * _STEP
    everywhere = Placement(CpuSet())

    def thread(role: Role, index: int | None, offset: int, comm: str) -> Thread:
        id_ = ThreadId(pid, _START + number, pid + offset, _START + number)
        return Thread(id=id_, guest=name, comm=comm, role=role, index=index, now=everywhere)

    threads = [thread(Role.EMULATOR, None, 0, "qemu-system-x86")]
    threads += [thread(Role.VCPU, index, _STEP + index, f"CPU {index}/KVM") for index in range(shape.vcpus)]
    threads += [
        thread(Role.IOTHREAD, index, 2 * _STEP + index, f"IO iothread{index}")
        for index in range(1, shape.iothreads + 1)
    ]
    traits = Traits(threads=shape.threads)
    return Guest(uuid=name, name=name, pid=pid, pid_start=_START + number, threads=tuple(threads), traits=traits)


def with_made_up(policy: Policy, class_name: str) -> Policy:
    """Return the policy with a first rule that gives made-up guests of a class just that class."""
    rule = Rule(number=0, line=0, class_name=class_name, uuid=f"{class_name}#*")
    return replace(policy, rules=(rule, *policy.rules))


def fits(policy: Policy, class_: GuestClass, shape: Shape, running: Snapshot, memory: Memory, ledger: Ledger) -> Row:
    """Return how many guests of ``shape`` fit under ``class_`` beside those of ``running``."""
    own = replace(class_, when_full=WhenFull.LEAVE)  # a guest that is degraded does not fit
    asked = with_made_up(replace(policy, classes={**policy.classes, class_.name: own}), class_.name)
    most = len(running.host.online) + 1  # each guest that takes no pCPU of its own fits without end
    guests = tuple(made_up(class_.name, shape, number) for number in range(most))
    decision = place(asked, replace(running, guests=(*running.guests, *guests)), memory, ledger)
    names = {guest.uuid for guest in guests}
    found = [guest for guest in decision.guests if guest.guest.uuid in names]
    placed = [guest for guest in found if guest.state is State.PLACED and not guest.roomless]
    realtime = sum(_realtime(guest) for guest in placed)
    wants_realtime = any(entry.priority for entry in class_.entries[Role.VCPU])
    row = Row(class_name=class_.name, vcpus=shape.vcpus, guests=len(placed), realtime_vcpus=realtime, limited_by="")
    if wants_realtime and placed and not _realtime(placed[0]):
        return replace(row, guests=0, realtime_vcpus=0, limited_by=_why_no_realtime(placed[0], shape))
    if not any(entry.exclusive for _, entry in class_.every()):
        return replace(row, guests=None, limited_by="nothing: its threads share what there is")
    return replace(row, limited_by=_first_reason(found))


def _realtime(guest: GuestDecision) -> int:
    return sum(
        guest.wanted[thread.id].priority > 0
        for thread in guest.guest.threads
        if thread.role is Role.VCPU and thread.id in guest.wanted
    )


def _why_no_realtime(guest: GuestDecision, shape: Shape) -> str:
    withheld = sorted({wanted.withheld for wanted in guest.wanted.values() if wanted.withheld})
    if withheld:
        return withheld[0]
    return f"a guest of {shape.vcpus} vCPU{'s' * (shape.vcpus > 1)} has no realtime vCPU in this class"


def _first_reason(found: Sequence[GuestDecision]) -> str:
    """Return why the first made-up guest that did not fit did not."""
    left = sorted((guest for guest in found if guest.reason), key=lambda guest: guest.guest.pid)
    return left[0].reason if left else ""


def table(
    policy: Policy,
    sizes: Iterable[int],
    running: Snapshot,
    memory: Memory,
    ledger: Ledger,
    *,
    iothreads: int = 0,
    there: Decision | None = None,
) -> Iterator[Row]:
    """Yield a row for each class of the policy and each number of vCPUs.

    ``there``: what is decided for the guests of ``running``, if they are to be counted; sizes that some of them have
    get rows too.
    """
    asked = tuple(sizes)
    for name, class_ in sorted(policy.classes.items()):
        found = _there(there, name) if there is not None else {}
        for vcpus in dict.fromkeys((*asked, *sorted(found))):
            row = fits(policy, class_, Shape(vcpus=vcpus, iothreads=iothreads), running, memory, ledger)
            counted = found.get(vcpus, [])
            if there is not None:
                row = replace(row, running=len(counted), running_realtime=sum(map(_realtime, counted)))
            yield row


def _there(decision: Decision, class_name: str) -> dict[int, list[GuestDecision]]:
    """Return number of vCPUs → the guests of a class that have their places."""
    found: dict[int, list[GuestDecision]] = {}
    for guest in decision.guests:
        if guest.class_name == class_name and guest.state in (State.PLACED, State.CROWDED, State.REMOTE):
            vcpus = sum(thread.role is Role.VCPU for thread in guest.guest.threads)
            if vcpus and not guest.pending:
                found.setdefault(vcpus, []).append(guest)
    return found


def made_up_host(
    sockets: int, cores: int, threads: int, isolated: CpuSet | None = None, parts: Mapping[str, int] | None = None
) -> Host:
    """Return a host of that shape; by default all but its first core is isolated.

    ``parts``: how many L3 ``caches``, ``dies`` and NUMA ``nodes`` each socket has; one where nothing is said.
    """
    topology = Topology.built(sockets, cores, threads, **(parts or {}))
    online = CpuSet(range(sockets * cores * threads))
    own = topology.siblings(0) if isolated is None else online - isolated
    return Host(online=online, possible=online, isolated=online - own, topology=topology)


def one_more(
    policy: Policy, class_name: str, shape: Shape, running: Snapshot, memory: Memory, ledger: Ledger
) -> tuple[Decision, Guest]:
    """Return what would be decided with one more guest of a class, and that guest."""
    guest = made_up(class_name, shape)
    snapshot = replace(running, guests=(*running.guests, guest))
    return place(with_made_up(policy, class_name), snapshot, memory, ledger), guest
