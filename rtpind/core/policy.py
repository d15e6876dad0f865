# SPDX-License-Identifier: GPL-2.0-or-later
"""The policy as values: pools, classes, rules. :mod:`rtpind.core.policyfile` makes one from a file's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from rtpind.core.cpuset import NO_CPUS, CpuSet
from rtpind.core.model import Guest, Host, Role

HOUSEKEEPING = "housekeeping"
UNMANAGED = "unmanaged"

#: From here a vCPU competes with threaded interrupts, which are FIFO 50 (kernel/irq/manage.c).
UNSAFE_PRIORITY = 50


class Mode(StrEnum):
    """Whether anything is touched at all."""

    OBSERVE = "observe"
    ENFORCE = "enforce"


class Drift(StrEnum):
    """What is done with a thread that somebody moved."""

    REPAIR = "repair"
    WARN = "warn"
    IGNORE = "ignore"


class WhenFull(StrEnum):
    """What becomes of a guest for which there is no room."""

    DEGRADE = "degrade"
    LEAVE = "leave"


class Exclusive(StrEnum):
    """Whom a pCPU is exclusive to: one thread, or one role of one guest."""

    THREAD = "thread"
    GUEST = "guest"


class Siblings(StrEnum):
    """Who may run on the SMT siblings of a pCPU that is given out exclusively."""

    IDLE = "idle"  # nobody
    SAME_GUEST = "same-guest"
    IGNORE = "ignore"  # whoever comes


class Numa(StrEnum):
    """Whether a guest's pCPUs are on the NUMA nodes of its memory."""

    STRICT = "strict"  # always, where its nodes are known
    PREFERRED = "preferred"  # where there is room
    IGNORE = "ignore"


@dataclass(frozen=True, slots=True)
class CpuList:
    """A CPU list as written: terms that add or (``^``) take away; ``isolated`` is resolved at each look."""

    terms: tuple[tuple[bool, CpuSet | None], ...]  # (added, pCPUs); None is the isolated set

    def resolve(self, host: Host) -> CpuSet:
        """Return the pCPUs meant on ``host``, whether online or not. A list of only ``^`` is all but those."""
        cpus = CpuSet() if any(added for added, _ in self.terms) else host.possible
        for added, named in self.terms:
            if added:
                cpus |= host.isolated if named is None else named
        for added, named in self.terms:
            if not added:
                cpus -= host.isolated if named is None else named
        return cpus

    def named(self) -> CpuSet:
        """Return the pCPUs that are written down by number and added."""
        cpus = CpuSet()
        for added, named in self.terms:
            if added and named is not None:
                cpus |= named
        return cpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """A named set of pCPUs, and how those that are given out exclusively are chosen."""

    cpus: CpuList
    siblings: Siblings = Siblings.IGNORE
    numa: Numa = Numa.PREFERRED


@dataclass(frozen=True, slots=True)
class Ids:
    """Numbers of vCPUs or iothreads: those ``named``, or (``inverted``, written ``^0``) all others."""

    named: CpuSet
    inverted: bool = False

    def __contains__(self, index: int) -> bool:
        return (index in self.named) is not self.inverted

    def overlaps(self, other: Ids) -> bool:
        """Return whether some number is in both. Two inverted ones always have one in common."""
        if self.inverted and other.inverted:
            return True
        if self.inverted or other.inverted:
            some, but = (other, self) if self.inverted else (self, other)
            return bool(some.named - but.named)
        return bool(self.named & other.named)

    def __str__(self) -> str:
        return ("^" if self.inverted else "") + str(self.named)


@dataclass(frozen=True, slots=True)
class Share:
    """Whose pCPU a role joins: of one thread (``index``) or of a role that has one for the guest (None)."""

    role: Role
    index: int | None = None

    def __str__(self) -> str:
        return str(self.role) if self.index is None else f"{self.role} {self.index}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """How the threads of a role, or those of them in ``ids``, are placed. ``priority`` 0: not realtime.

    ``cputune``: keep what the guest's own <cputune> says of a thread; the rest of the entry is for what it does not
    pin. ``clip``: that the guest has not all of ``ids`` is no fault.
    """

    ids: Ids | None = None  # None: all that no other entry of the role names
    pool: str = HOUSEKEEPING
    exclusive: Exclusive | None = None
    share_with: Share | None = None
    priority: int = 0
    cputune: bool = False
    clip: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestClass:
    """How one kind of guest is treated. ``entries`` has every role; a role that is not named has emulator's tuple.

    ``drift`` and ``when_full``: None is the policy's.
    """

    name: str
    entries: Mapping[Role, tuple[Entry, ...]]
    unsafe: bool = False
    drift: Drift | None = None
    when_full: WhenFull | None = None

    def entry(self, role: Role, index: int | None) -> Entry | None:
        """Return the entry of a thread; None where no entry covers it."""
        rest = None
        for entry in self.entries[role]:
            if entry.ids is None:
                rest = entry
            elif index is not None and index in entry.ids:
                return entry
        return rest

    @property
    def by_cputune(self) -> bool:
        """Whether the guest's own <cputune> decides where its vCPUs are."""
        return any(entry.cputune for entry in self.entries[Role.VCPU])

    def every(self) -> tuple[tuple[Role, Entry], ...]:
        """Return each (role, entry) of the class."""
        return tuple((role, entry) for role, entries in self.entries.items() for entry in entries)

    def follows(self, role: Role) -> Role:
        """Return the role whose entry this one has: emulator for one that is not named."""
        return Role.EMULATOR if self.entries[role] is self.entries[Role.EMULATOR] else role

    def misfit(self, guest: Guest) -> str:
        """Return why a guest is not of a shape that the class is for; "" when it is."""
        for role in (Role.VCPU, Role.IOTHREAD):
            if self.follows(role) is not role:
                continue
            have = CpuSet(thread.index for thread in guest.threads if thread.role is role and thread.index is not None)
            for entry in self.entries[role]:
                lacking = NO_CPUS if entry.ids is None or entry.clip else entry.ids.named - have
                if lacking:
                    return f"class {self.name} names {role} {lacking}, which the guest does not have"
            bare = CpuSet(index for index in have if self.entry(role, index) is None)
            if bare:
                return f"no entry of class {self.name} covers {role} {bare}"
        return ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which guests get which class; ``number`` counts from 1, ``line`` is where it stands.

    ``name``, ``uuid``, ``flavor``, ``project``, ``partition`` are globs; ``has`` is what the guest's definition must
    have. ``pcpus``: fixed pCPUs for its exclusive vCPUs, in their order.
    """

    number: int
    line: int
    class_name: str
    name: str | None = None
    uuid: str | None = None
    flavor: str | None = None
    project: str | None = None
    partition: str | None = None
    has: frozenset[str] = frozenset()
    pcpus: tuple[int, ...] = ()

    def matches(self, guest: Guest) -> bool | None:
        """Return whether every key matches ``guest``; None where that rests on what libvirt has not told yet."""
        if self.name is not None and not fnmatchcase(guest.name, self.name):
            return False
        if self.uuid is not None and not fnmatchcase(guest.uuid.lower(), self.uuid.lower()):
            return False
        if not self.by_traits:
            return True
        traits = guest.traits
        if traits is None:
            return None
        globs = (
            (self.flavor, (traits.flavor,)),
            (self.project, traits.projects),
            (self.partition, (traits.partition,)),
        )
        return self.has <= traits.has and all(
            glob is None or any(word and fnmatchcase(word, glob) for word in words) for glob, words in globs
        )

    @property
    def by_traits(self) -> bool:
        """Whether the rule asks for more than name and UUID."""
        return bool(self.has) or any(glob is not None for glob in (self.flavor, self.project, self.partition))

    def __str__(self) -> str:
        keys = [f"{key}={value}" for key in GLOBS if (value := getattr(self, key)) is not None]
        keys += [f"has={name}" for name in sorted(self.has)]
        return f"guests[{self.number - 1}] {' '.join(keys)} → {self.class_name}"


#: The keys of a rule that are globs.
GLOBS = ("name", "uuid", "flavor", "project", "partition")


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The whole policy file, checked."""

    mode: Mode = Mode.OBSERVE
    pools: Mapping[str, Pool]
    classes: Mapping[str, GuestClass]
    rules: tuple[Rule, ...] = ()
    drift: Drift = Drift.WARN
    when_full: WhenFull = WhenFull.LEAVE
    uri: str = "qemu:///system"
    period_s: float = 10.0
    proc_events: bool = True
    metrics_dir: str = ""
    priority: int | None = None  # of the daemon itself; None: one above all that it gives

    def own_priority(self, highest: int = 0) -> int:
        """Return the FIFO priority of the daemon itself, 0 for none; ``highest``: that of all guests' threads, as seen.

        By default it is above every thread that it may have to take off a housekeeping pCPU, where it runs itself, and
        below the kernel's interrupt threads.
        """
        if self.priority is not None:
            return self.priority
        entries = [entry for one in self.reached() for _, entry in one.every()]
        given = max((max(entry.priority, 1 if entry.cputune else 0) for entry in entries), default=0)
        return min(max(given, highest) + 1, UNSAFE_PRIORITY - 1)

    def pool(self, name: str, host: Host) -> CpuSet:
        """Return the online pCPUs of a pool."""
        return pool_cpus(self.pools, name, host) & host.online

    def rule_for(self, guest: Guest) -> Rule | None:
        """Return the first rule that matches, or that may (then its ``matches`` is None); None when there is none."""
        return next((rule for rule in self.rules if rule.matches(guest) is not False), None)

    def class_of(self, rule: Rule | None) -> GuestClass | None:
        """Return the class that a rule names; None means hands off."""
        return None if rule is None else self.classes.get(rule.class_name)

    def reached(self) -> tuple[GuestClass, ...]:
        """Return the classes that some rule names."""
        names = {rule.class_name for rule in self.rules}
        return tuple(class_ for name, class_ in sorted(self.classes.items()) if name in names)


def pool_cpus(pools: Mapping[str, Pool], name: str, host: Host) -> CpuSet:
    """Return all pCPUs of a pool, offline ones too. ``housekeeping`` defaults to online minus isolated."""
    if name == HOUSEKEEPING and name not in pools:
        return host.online - host.isolated
    return pools[name].cpus.resolve(host)
