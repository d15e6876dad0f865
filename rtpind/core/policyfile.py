# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of a policy file → Policy, or every problem at once.

:mod:`rtpind.core.yamlform` checks the file's form first. What is checked here is meaning: that names exist, that
lists are pCPUs of this host, and that no class breaks promise 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from rtpind.core.classreader import read_class
from rtpind.core.cpuset import CpuListError, CpuSet
from rtpind.core.document import Path, Problem, dotted
from rtpind.core.model import Host, Role
from rtpind.core.policy import (
    GLOBS,
    HOUSEKEEPING,
    UNMANAGED,
    CpuList,
    Drift,
    Entry,
    GuestClass,
    Mode,
    Numa,
    Policy,
    Pool,
    Rule,
    Siblings,
    WhenFull,
    pool_cpus,
)
from rtpind.core.reading import Reading, parse_cpus, parse_order
from rtpind.core.yamlform import read

_UUID_GLOB = re.compile(r"[0-9a-fA-F\-*?\[\]!]+", re.ASCII)
_TIME_S = {"ms": 0.001, "s": 1.0, "m": 60.0}


def load(text: str, host: Host, *, strict: bool = False) -> tuple[Policy | None, list[Problem]]:
    """Read a policy file's text for one host.

    Returns the policy, or None when there is any problem that is no warning; and all problems and warnings in
    the order of their lines. ``strict`` makes a pCPU that ``host`` cannot have a problem; else it is a warning,
    so that a daemon on a host that lost a pCPU still runs. Never raises.
    """
    document, problems = read(text)
    if document is None:
        return None, sorted(problems)
    reader = _Reader(document, host, strict=strict)
    policy = reader.policy()
    found = sorted({*problems, *reader.problems})
    return (None if any(not problem.warning for problem in found) else policy), found


class _Reader(Reading):
    """Builds the policy section by section."""

    def policy(self) -> Policy:
        for name, value in self.section("pools").items():
            self.read_pool(name, value)
        classes = {name: read_class(self, name, value) for name, value in self.section("classes").items()}
        rules = tuple(self.read_rules(classes))
        self.check_reach(classes, rules)
        daemon = self.section("daemon")
        return Policy(
            mode=Mode(self.data.get("mode", Mode.OBSERVE)),
            pools=self.pools,
            classes=classes,
            rules=rules,
            drift=Drift(self.data.get("drift", Drift.WARN)),
            when_full=WhenFull(self.data.get("when_full", WhenFull.LEAVE)),
            uri=daemon.get("uri", "qemu:///system"),
            period_s=self.read_period(daemon.get("period", "10s")),
            proc_events=daemon.get("proc_events", "auto") == "auto",
            metrics_dir=daemon.get("metrics_dir", ""),
            priority=daemon.get("priority"),
        )

    def read_period(self, text: str) -> float:
        unit = text.lstrip("0123456789")
        seconds = int(text.removesuffix(unit)) * _TIME_S[unit]
        if not 0.05 <= seconds <= 3600:
            self.add(("daemon", "period"), f"{text!r} is out of range", "50ms to 60m")
        return seconds

    def read_pool(self, name: str, value: Any) -> None:
        path: Path = ("pools", name)
        options: dict[str, str] = {}
        if isinstance(value, dict):
            options, value, path = value, value.get("cpus"), (*path, "cpus")
        if value is None or not self.sound(path):
            return  # refused before
        try:
            cpus = parse_cpus(value)
        except CpuListError as error:
            self.add(path, f"not a CPU list: {error}", 'write 3, "2-7,^4", "isolated,^7" or a list of them')
            self.pools[name] = Pool(cpus=CpuList(()))  # known, so that no class is told that it does not exist
            return
        siblings, numa = options.get("siblings", Siblings.IGNORE), options.get("numa", Numa.PREFERRED)
        self.pools[name] = Pool(cpus=cpus, siblings=Siblings(siblings), numa=Numa(numa))
        missing = cpus.named() - self.host.possible
        offline = (cpus.named() & self.host.possible) - self.host.online
        if missing:
            hint = f"possible here: {self.host.possible}"
            self.add(path, f"this host cannot have pCPU {missing}", hint, warning=not self.strict)
        if offline:
            self.add(path, f"pCPU {offline} is offline", "the pool goes without it", warning=True)

    def read_rules(self, classes: Mapping[str, GuestClass]) -> Iterator[Rule]:
        seen_all: int | None = None
        for number, value in enumerate(self.data.get("guests") or []):
            if value is None or "class" not in value:
                continue  # refused before
            path: Path = ("guests", number)
            line = self.document.line(path)
            globs = {key: value.get(key) for key in GLOBS}
            if any(self.written(*path, key) and globs[key] is None for key in GLOBS) or not self.sound((*path, "has")):
                continue
            has = value.get("has", [])
            rule = Rule(
                number=number + 1,
                line=line,
                class_name=value["class"],
                has=frozenset([has] if isinstance(has, str) else has),
                pcpus=self.read_pcpus((*path, "pcpus"), value, classes.get(value["class"])),
                **globs,
            )
            if rule.uuid is not None and not _UUID_GLOB.fullmatch(rule.uuid):
                self.add((*path, "uuid"), f"{rule.uuid!r} can match no UUID", "hexadecimal digits, -, * and ?")
            if rule.class_name != UNMANAGED and not self.known("classes", rule.class_name):
                known = ", ".join(sorted({UNMANAGED, *self.section("classes")}))
                self.add((*path, "class"), f"there is no class '{rule.class_name}'", f"classes here: {known}")
            if not rule.has and not any(globs.values()):
                self.add(path, "matches nothing by itself", 'add name: or uuid:; for every guest, name: "*"')
            elif seen_all is not None:
                self.add(path, f"never reached: the rule on line {seen_all} matches every guest", warning=True)
            elif not rule.has and set(globs.values()) == {"*", None} and not rule.by_traits:
                seen_all = line
            yield rule

    def read_pcpus(self, path: Path, value: Mapping[str, Any], class_: GuestClass | None) -> tuple[int, ...]:
        """Read the fixed pCPUs of a rule: each must be in the pool of the vCPU that it is for."""
        if "pcpus" not in value:
            return ()
        try:
            pcpus = parse_order(value["pcpus"])
        except CpuListError as error:
            self.add(path, f"not pCPUs in their order: {error}", 'write 6, "6-7" or [7, 6]')
            return ()
        if class_ is not None and self.sound(("classes", class_.name)):
            self.check_pcpus(path, pcpus, class_)
        return pcpus

    def check_pcpus(self, path: Path, pcpus: tuple[int, ...], class_: GuestClass) -> None:
        """Check each pCPU against the pool from which its vCPU is given one, and that there is such a vCPU."""
        named = [max(entry.ids.named, default=0) for entry in class_.entries[Role.VCPU] if entry.ids is not None]
        entries = ((index, class_.entry(Role.VCPU, index)) for index in range(max(named, default=0) + len(pcpus) + 1))
        own = [(index, entry.pool) for index, entry in entries if entry is not None and entry.exclusive is not None]
        wrong: dict[str, list[tuple[int, int]]] = {}
        for cpu, (index, pool) in zip(pcpus, own, strict=False):
            if self.usable(pool) and cpu not in pool_cpus(self.pools, pool, self.host):
                wrong.setdefault(pool, []).append((cpu, index))
        for pool, found in sorted(wrong.items()):
            cpus, indices = (CpuSet(numbers) for numbers in zip(*found, strict=True))
            there = pool_cpus(self.pools, pool, self.host) or "none"
            self.add(path, f"pCPU {cpus} is not in '{pool}', which vcpu {indices} has its own from", f"there: {there}")
        if not own:
            self.add(path, f"class '{class_.name}' gives vCPUs no pCPUs of their own", "vcpu: exclusive: thread")
        elif pcpus[len(own) :]:
            what = f"pCPU {CpuSet(pcpus[len(own) :])} is for nobody"
            hint = f"class '{class_.name}' gives no more than {len(own)} vCPUs a pCPU of their own"
            self.add(path, what, hint, warning=True)

    def check_reach(self, classes: Mapping[str, GuestClass], rules: tuple[Rule, ...]) -> None:
        """Check the pools that some rule reaches: not empty, and none both exclusive and floating."""
        reached = {rule.class_name for rule in rules} & set(classes)
        used: dict[str, Path] = {}  # by a class that a rule names, and where that is written
        owned: dict[str, Path] = {}  # those of them that are given out exclusively
        floating: set[str] = set()
        floats: dict[str, Path] = {}  # those that helpers float in; a vCPU that floats keeps off what is given out
        for name in sorted(reached):
            for role, number, entry in _numbered(classes[name]):
                path = self.place_of(name, role, number)
                if entry.share_with is not None or not self.usable(entry.pool) or not self.sound(path):
                    continue
                used.setdefault(entry.pool, path)
                if entry.exclusive:
                    owned.setdefault(entry.pool, path)
                    continue
                if not entry.priority:  # else it may not float at all
                    floating.add(entry.pool)
                    self.check_balance(entry.pool, path)
                if role is not Role.VCPU:
                    floats.setdefault(entry.pool, path)
        self.check_empty(used, needed=bool(reached))
        if reached and HOUSEKEEPING in self.pools and HOUSEKEEPING not in floating:  # who finds no room floats there
            self.check_balance(HOUSEKEEPING, ("pools", HOUSEKEEPING))
        for own, where in sorted(owned.items()):
            for other in sorted(filter(self.usable, {HOUSEKEEPING, *floats})):
                common = pool_cpus(self.pools, own, self.host) & pool_cpus(self.pools, other, self.host)
                if common:
                    user = dotted(floats[other]) if other in floats else "the host"
                    self.collision(own, other, where, common, user)

    def check_empty(self, used: Mapping[str, Path], *, needed: bool) -> None:
        """Check that no pool is empty: a problem of those in use, and of housekeeping where it is ``needed``."""
        for name in sorted({HOUSEKEEPING, *self.pools}):
            if self.usable(name) and not pool_cpus(self.pools, name, self.host):
                what = f"the pool '{name}' is empty on this host" + (
                    f", and {dotted(used[name])} needs it" if name in used else ""
                )
                hint = f"isolated here: {self.host.isolated or 'none'}, online: {self.host.online}"
                problem = name in used or (name == HOUSEKEEPING and needed)
                self.add(("pools", name), what, hint, warning=not problem)

    def place_of(self, name: str, role: Role, number: int) -> Path:
        """Return where an entry is written: itself, its role, the emulator that the role follows, or the class."""
        path: Path = ("classes", name)
        places: tuple[Path, ...] = ((*path, role, number), (*path, role), (*path, Role.EMULATOR), path)
        return next(place for place in places if self.written(*place))

    def check_balance(self, pool: str, path: Path) -> None:
        """Check that threads do not float over several isolated pCPUs: the kernel leaves all of them on the first."""
        isolated = pool_cpus(self.pools, pool, self.host) & self.host.isolated
        if len(isolated) > 1:
            message = f"threads would float over pCPU {isolated} of '{pool}', which are isolated"
            hint = "the kernel does not balance there, and all would pile up on one: say exclusive, or another pool"
            self.add(path, message, hint)

    def collision(self, own: str, other: str, where: Path, common: CpuSet, user: str) -> None:
        if own == other:
            message = f"the pool '{own}' is exclusive here, and threads of {user} float in it"
            self.add(where, message, "a pool is one or the other: make two pools")
        elif other == HOUSEKEEPING and HOUSEKEEPING not in self.pools:
            message = f"pCPU {common} of '{own}' is housekeeping, which by default is all that is not isolated"
            self.add(where, message, "isolate it (isolcpus=), or set pools: housekeeping:")
        else:
            message = (
                f"pCPU {common} is in '{own}', which is exclusive here, and in '{other}', where threads of {user} float"
            )
            self.add(where, message, "pools of these two kinds may not overlap")


def _numbered(class_: GuestClass) -> Iterator[tuple[Role, int, Entry]]:
    """Yield each entry of a class, with its number in its role."""
    for role, entries in class_.entries.items():
        for number, entry in enumerate(entries):
            yield role, number, entry
