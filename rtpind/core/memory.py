# SPDX-License-Identifier: GPL-2.0-or-later
"""What one run of the daemon remembers between passes. Where threads are is the kernel's to say.

It holds what cannot be read back: what was decided and verified (to tell drift from a place not yet taken), what
was refused (to ask again only when something changed), who fights, and what was said already.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from rtpind.core.cpuset import CpuSet
from rtpind.core.ledger import Process
from rtpind.core.model import Host, Limits, Placement, Sched, Snapshot, Thread, ThreadId
from rtpind.core.offplace import Starts

if TYPE_CHECKING:
    from rtpind.core.decision import GuestDecision

#: A fight: this many repairs of one thread in this time …
FIGHT_REPAIRS = 3
FIGHT_WINDOW_S = 60.0
#: … is paused this long, doubling up to the second figure.
PAUSE_S = 300.0
PAUSE_MAX_S = 3600.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Where one thread should be: pCPUs and FIFO priority (0: not realtime).

    ``exclusive``: the pCPU was given out to it. ``withheld``: why a thread whose class says FIFO is not to have it
    now.
    """

    cpus: CpuSet
    priority: int = 0
    exclusive: bool = False
    withheld: str = ""

    def affine(self, now: Placement) -> bool:
        """Return whether the affinity is right."""
        return now.cpus == self.cpus

    def scheduled(self, now: Placement) -> bool:
        """Return whether the scheduling is right. DEADLINE always is: it may be stalld's boost of 3 s."""
        scheduling = now.scheduling
        if scheduling.sched is Sched.DEADLINE:
            return True
        if not self.priority:
            return not scheduling.realtime
        return scheduling.sched is Sched.FIFO and scheduling.priority == self.priority and scheduling.reset_on_fork

    def holds(self, now: Placement) -> bool:
        """Return whether the thread is where it should be."""
        return self.affine(now) and self.scheduled(now)


def conditions(host: Host) -> tuple[object, ...]:
    """Return the facts of a host that decide whether it lets a thread be placed."""
    return (host.online, host.rt_runtime_us, host.nice_capable)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A step the kernel refused or narrowed: asked again only when one of these differs (promise 3)."""

    wanted: Wanted
    observed: Placement
    limits: Limits | None
    conditions: tuple[object, ...]
    affinity: bool  # which call it was: affinity, else scheduling
    text: str

    def stands(self, thread: Thread, wanted: Wanted, host: Host) -> bool:
        """Return whether nothing has changed that could change the kernel's answer."""
        if self.affinity:
            same = (self.wanted.cpus, self.observed.cpus) == (wanted.cpus, thread.now.cpus)
        else:
            same = (self.wanted.priority, self.observed.scheduling) == (wanted.priority, thread.now.scheduling)
        return same and self.conditions == conditions(host) and self.limits == thread.limits


@dataclass(frozen=True, slots=True)
class Fight:
    """A thread that somebody else keeps moving: left alone until ``until`` (monotonic seconds)."""

    until: float
    length_s: float


@dataclass(frozen=True, slots=True)
class Memory:
    """All of it, by thread or by guest process; entries of dead threads go with :meth:`pruned`."""

    incumbents: Mapping[tuple[Process, str], ThreadId] = field(default_factory=dict)
    doubtful: frozenset[tuple[Process, str]] = frozenset()
    places: Mapping[ThreadId, Wanted] = field(default_factory=dict)  # as decided by the last pass
    verified: frozenset[ThreadId] = frozenset()  # seen on that place
    right_since: Mapping[Process, float] = field(default_factory=dict)  # vCPUs and iothreads affine since
    refused: Mapping[ThreadId, tuple[Refusal, ...]] = field(default_factory=dict)
    repairs: Mapping[ThreadId, tuple[float, ...]] = field(default_factory=dict)
    fights: Mapping[ThreadId, Fight] = field(default_factory=dict)
    owed: frozenset[ThreadId] = frozenset()  # FIFO that rtpind has yet to give, or took away itself
    said: frozenset[tuple[object, ...]] = frozenset()  # records that stand until what they say changes
    starts: Starts = field(default_factory=dict)  # off-place time
    decided: Mapping[Process, GuestDecision] = field(default_factory=dict)  # by the last pass: ``places`` is of these
    calm: frozenset[Process] = frozenset()  # of those: a pass that decides the same teaches nothing new of them

    def after_hotplug(self) -> Memory:
        """Return what is left of it when pCPUs have come or gone: the kernel sets the affinity of many threads then.

        In a cpuset that is all of them, to the whole set, whatever they had (seen with cgroup v2 on 6.1). So nobody has
        drifted, and what is put right is no part of a fight.
        """
        return replace(self, verified=frozenset(), repairs={}, calm=frozenset())

    def fighting(self, thread: ThreadId, now: float) -> bool:
        """Return whether the thread is paused because of a fight."""
        fight = self.fights.get(thread)
        return fight is not None and fight.until > now

    def tired(self, thread: ThreadId, now: float) -> bool:
        """Return whether one more repair of the thread would be a fight."""
        recent = [time for time in self.repairs.get(thread, ()) if now - time <= FIGHT_WINDOW_S]
        return len(recent) >= FIGHT_REPAIRS

    def next_pause(self, thread: ThreadId, now: float) -> Fight:
        """Return the pause that a fight now begins: twice the last one's length, unless that is long over."""
        last = self.fights.get(thread)
        if last is None or now - last.until > PAUSE_MAX_S:
            return Fight(now + PAUSE_S, PAUSE_S)
        length = min(2 * last.length_s, PAUSE_MAX_S)
        return Fight(now + length, length)

    def refusal(self, thread: Thread, wanted: Wanted, host: Host, *, affinity: bool) -> Refusal | None:
        """Return the refusal of that call on that thread that still stands."""
        for refusal in self.refused.get(thread.id, ()):
            if refusal.affinity is affinity and refusal.stands(thread, wanted, host):
                return refusal
        return None

    def split(self, processes: AbstractSet[Process], found: Iterable[GuestDecision]) -> tuple[Memory, Memory]:
        """Return what is remembered of some guests, as decided before and as ``found`` now, and of all others.

        What stands and what is measured is not divided: the others have it.
        """
        guests = [self.decided[process].guest for process in processes if process in self.decided]
        guests += [one.guest for one in found]
        ids = {thread.id for guest in guests for thread in guest.threads}
        theirs: dict[str, Any] = {name: _of(getattr(self, name), ids) for name in _BY_THREAD}
        theirs |= {name: _of(getattr(self, name), processes) for name in _BY_PROCESS}
        others: dict[str, Any] = {name: _but(getattr(self, name), ids) for name in _BY_THREAD}
        others |= {name: _but(getattr(self, name), processes) for name in _BY_PROCESS}
        keys = {key for key in (*self.incumbents, *self.doubtful) if key[0] in processes}
        for name in _BY_LABEL:
            theirs[name], others[name] = _of(getattr(self, name), keys), _but(getattr(self, name), keys)
        return Memory(**theirs), replace(self, **others)

    def joined(self, other: Memory) -> Memory:
        """Return what is remembered of some guests and of others."""
        names = (*_BY_THREAD, *_BY_PROCESS, *_BY_LABEL)
        return replace(self, **{name: getattr(self, name) | getattr(other, name) for name in names})

    def pruned(self, snapshot: Snapshot) -> Memory:
        """Return the memory without threads and guests that are gone."""
        alive = {thread.id for thread in snapshot.threads()}
        running = {guest.process for guest in snapshot.guests}
        return replace(
            self,
            incumbents={key: id_ for key, id_ in self.incumbents.items() if id_ in alive},
            doubtful=frozenset(key for key in self.doubtful if key[0] in running),
            places={id_: wanted for id_, wanted in self.places.items() if id_ in alive},
            verified=self.verified & alive,
            owed=self.owed & alive,
            right_since={key: since for key, since in self.right_since.items() if key in running},
            refused={id_: entries for id_, entries in self.refused.items() if id_ in alive},
            repairs={id_: times for id_, times in self.repairs.items() if id_ in alive},
            fights={id_: fight for id_, fight in self.fights.items() if id_ in alive},
            starts={process: start for process, start in self.starts.items() if process in running},
        )


#: What keys the parts of a memory have.
_BY_THREAD = ("places", "verified", "refused", "repairs", "fights", "owed")
_BY_PROCESS = ("right_since", "decided", "calm")
_BY_LABEL = ("incumbents", "doubtful")


def _of(part: Any, keys: AbstractSet[Any]) -> Any:
    return part & keys if isinstance(part, frozenset) else {key: part[key] for key in keys if key in part}


def _but(part: Any, keys: AbstractSet[Any]) -> Any:
    if isinstance(part, frozenset):
        return part - keys
    rest = dict(part)
    for key in keys:
        rest.pop(key, None)
    return rest
