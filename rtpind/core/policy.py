# SPDX-License-Identifier: GPL-2.0-or-later
"""The policy as values: pools, classes, rules. :mod:`rtpind.core.policyfile` makes one from a file's text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from rtpind.core.cpuset import CpuSet
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
class Entry:
    """How one role of a class is placed. ``priority`` 0: not realtime. ``share_with``: that vCPU's pCPU."""

    pool: str = HOUSEKEEPING
    exclusive: Exclusive | None = None
    share_with: int | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestClass:
    """How one kind of guest is treated; ``entries`` has every role."""

    name: str
    entries: Mapping[Role, Entry]
    unsafe: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """Which guests get which class; ``number`` counts from 1, ``line`` is where it stands."""

    number: int
    line: int
    class_name: str
    name: str | None = None
    uuid: str | None = None

    def matches(self, guest: Guest) -> bool:
        """Return whether every key of the rule matches ``guest``."""
        by_name = self.name is None or fnmatchcase(guest.name, self.name)
        return by_name and (self.uuid is None or fnmatchcase(guest.uuid.lower(), self.uuid.lower()))

    def __str__(self) -> str:
        keys = [f"{key}={value}" for key, value in (("name", self.name), ("uuid", self.uuid)) if value is not None]
        return f"guests[{self.number - 1}] {' '.join(keys)} → {self.class_name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """The whole policy file, checked."""

    mode: Mode = Mode.OBSERVE
    pools: Mapping[str, CpuList]
    classes: Mapping[str, GuestClass]
    rules: tuple[Rule, ...] = ()
    drift: Drift = Drift.WARN
    when_full: WhenFull = WhenFull.LEAVE
    uri: str = "qemu:///system"
    period_s: float = 10.0
    metrics_dir: str = ""

    def pool(self, name: str, host: Host) -> CpuSet:
        """Return the online pCPUs of a pool."""
        return pool_cpus(self.pools, name, host) & host.online

    def rule_for(self, guest: Guest) -> Rule | None:
        """Return the first rule that matches; None when there is none."""
        return next((rule for rule in self.rules if rule.matches(guest)), None)

    def class_of(self, rule: Rule | None) -> GuestClass | None:
        """Return the class that a rule names; None means hands off."""
        return None if rule is None else self.classes.get(rule.class_name)


def pool_cpus(pools: Mapping[str, CpuList], name: str, host: Host) -> CpuSet:
    """Return all pCPUs of a pool, offline ones too. ``housekeeping`` defaults to online minus isolated."""
    if name == HOUSEKEEPING and name not in pools:
        return host.online - host.isolated
    return pools[name].resolve(host)
