# SPDX-License-Identifier: GPL-2.0-or-later
"""The text of a policy file → Policy, or every problem at once.

:mod:`rtpind.core.yamlform` checks the file's form first. What is checked here is meaning: that names exist, that
lists are pCPUs of this host, and that no class breaks promise 1.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from rtpind.core.cpuset import CpuListError, CpuSet
from rtpind.core.document import Document, Path, Problem, dotted
from rtpind.core.model import Host, Role
from rtpind.core.policy import (
    HOUSEKEEPING,
    UNMANAGED,
    UNSAFE_PRIORITY,
    CpuList,
    Drift,
    Entry,
    Exclusive,
    GuestClass,
    Mode,
    Policy,
    Rule,
    WhenFull,
    pool_cpus,
)
from rtpind.core.yamlform import read

_LEADING_ZERO = re.compile(r"(?<!\d)0\d", re.ASCII)
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
    reader = _Reader(document, host, strict)
    policy = reader.policy()
    found = sorted({*problems, *reader.problems})
    return (None if any(not problem.warning for problem in found) else policy), found


def parse_cpus(value: Any) -> CpuList:
    """Read a CPU list: a number, a text, or a list of both. Raises CpuListError."""
    terms: list[tuple[bool, CpuSet | None]] = []
    for part in value if isinstance(value, list) else [value]:
        for item in str(part).split(","):
            word = item.strip()
            added = not word.startswith("^")
            word = word.removeprefix("^").strip()
            if not word:
                raise CpuListError("an empty item")
            if _LEADING_ZERO.search(word):
                raise CpuListError(f"{word!r} has a leading zero")
            terms.append((added, None if word == "isolated" else CpuSet.parse(word)))
    if not terms:
        raise CpuListError("an empty list")
    return CpuList(tuple(terms))


class _Reader:
    """One reading of one document: collects problems while it builds the policy."""

    def __init__(self, document: Document, host: Host, strict: bool) -> None:
        self.document = document
        self.data: dict[str, Any] = document.data
        self.host = host
        self.strict = strict
        self.problems: list[Problem] = []
        self.pools: dict[str, CpuList] = {}

    def add(self, path: Path, message: str, hint: str = "", *, warning: bool = False) -> None:
        self.problems.append(self.document.problem(path, message, hint, warning=warning))

    def policy(self) -> Policy:
        for name, value in self.section("pools").items():
            self.read_pool(name, value)
        classes = {name: self.read_class(name, value) for name, value in self.section("classes").items()}
        rules = tuple(self.read_rules())
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
            metrics_dir=daemon.get("metrics_dir", ""),
        )

    def section(self, name: str) -> dict[str, Any]:
        """Return a top-level mapping; one that is there but empty (all commented out) is an empty one."""
        return self.data.get(name) or {}

    def known(self, section: str, name: str) -> bool:
        """Return whether ``name`` is written in that section, or the section itself was refused or is misspelt."""
        if section in self.data:
            return self.written(section, name)
        refused = [str(path[0]) for path in self.document.refused if len(path) == 1]
        return bool(difflib.get_close_matches(section, refused, 1))

    def usable(self, pool: str) -> bool:
        """Return whether a pool's pCPUs are known; where not, that has been said."""
        if pool == HOUSEKEEPING and not self.known("pools", pool):
            return True
        return pool in self.pools and bool(self.pools[pool].terms)

    def sound(self, path: Path) -> bool:
        """Return whether nothing at or below ``path`` was refused; else what follows from it is not worth saying."""
        return not any(bad[: len(path)] == path for bad in self.document.refused)

    def written(self, *path: str | int) -> bool:
        """Return whether the file has that key, even with a value that was refused."""
        return path in self.document.lines

    def read_period(self, text: str) -> float:
        unit = text.lstrip("0123456789")
        seconds = int(text.removesuffix(unit)) * _TIME_S[unit]
        if not 0.05 <= seconds <= 3600:
            self.add(("daemon", "period"), f"{text!r} is out of range", "50ms to 60m")
        return seconds

    def read_pool(self, name: str, value: Any) -> None:
        path: Path = ("pools", name)
        if isinstance(value, dict):
            value, path = value.get("cpus"), (*path, "cpus")
        if value is None or not self.sound(path):
            return  # refused before
        try:
            cpus = parse_cpus(value)
        except CpuListError as error:
            self.add(path, f"not a CPU list: {error}", 'write 3, "2-7,^4", "isolated,^7" or a list of them')
            self.pools[name] = CpuList(())  # known, so that no class is told that it does not exist
            return
        self.pools[name] = cpus
        missing = cpus.named() - self.host.possible
        offline = (cpus.named() & self.host.possible) - self.host.online
        if missing:
            hint = f"possible here: {self.host.possible}"
            self.add(path, f"this host cannot have pCPU {missing}", hint, warning=not self.strict)
        if offline:
            self.add(path, f"pCPU {offline} is offline", "the pool goes without it", warning=True)

    def read_class(self, name: str, value: dict[str, Any]) -> GuestClass:
        path: Path = ("classes", name)
        if name == UNMANAGED:
            self.add(path, "'unmanaged' is built in", "give the class another name")
        unsafe = bool(value.get("unsafe", False))
        emulator = self.read_entry((*path, "emulator"), value.get("emulator", {"pool": HOUSEKEEPING}))
        entries = dict.fromkeys(Role, emulator)  # a role that is not named follows emulator: it has the same entry
        for role in Role:
            if role in value and role is not Role.EMULATOR:
                entries[role] = self.read_entry((*path, role), value[role])
        made = GuestClass(name=name, entries=entries, unsafe=unsafe)
        for role in Role:
            if role in value:
                self.check_entry((*path, role), role, made)
        return made

    def read_entry(self, path: Path, value: dict[str, Any]) -> Entry:
        pool = value.get("pool")
        if pool is not None and pool != HOUSEKEEPING and pool not in self.pools:
            known = ", ".join(sorted({HOUSEKEEPING, *self.pools}))
            if not self.known("pools", pool):
                self.add((*path, "pool"), f"there is no pool '{pool}'", f"pools here: {known}")
        elif pool is None and "share_with" not in value and self.sound(path):
            self.add(path, "needs a pool", "or share_with: {vcpu: 0}")
        if "share_with" in value and ("pool" in value or "exclusive" in value):
            self.add((*path, "share_with"), "share_with takes the vCPU's pCPU; pool and exclusive do not go with it")
        if "priority" in value and "scheduler" not in value and self.sound(path):
            self.add((*path, "priority"), "a priority without a scheduler has no effect", "add scheduler: fifo")
        return Entry(
            pool=pool or (HOUSEKEEPING if "share_with" in value else ""),  # "" never leaves: it is a problem
            exclusive=Exclusive(value["exclusive"]) if "exclusive" in value else None,
            share_with=value["share_with"].get("vcpu", 0) if "share_with" in value else None,
            priority=int(value.get("priority", 1)) if "scheduler" in value else 0,
        )

    def check_entry(self, path: Path, role: Role, made: GuestClass) -> None:
        """Check one written entry against the rest of its class: promise 1 within a guest, promise 7's priority."""
        entry, vcpu = made.entries[role], made.entries[Role.VCPU]
        if not self.sound(path) or not self.sound((*path[:-1], Role.VCPU)):
            pass
        elif entry.share_with is not None:
            if role is Role.VCPU:
                self.add((*path, "share_with"), "vCPUs do not share; other roles share with them")
            elif vcpu.exclusive is not Exclusive.THREAD:
                self.add((*path, "share_with"), "only an exclusive vCPU has a pCPU to share", "vcpu: exclusive: thread")
            elif vcpu.priority >= max(entry.priority, 1):
                self.add(
                    (*path, "share_with"),
                    f"the {role} would share a pCPU with a FIFO vCPU of its guest and starve: the guest never boots",
                    "take FIFO from the vCPU, or give this role a pool of its own",
                )
        elif entry.priority and entry.exclusive is not Exclusive.THREAD:
            what = "several FIFO threads on one pCPU" if entry.exclusive else "FIFO threads that float"
            self.add((*path, "scheduler"), f"{what} would starve each other", "say exclusive: thread")
        if entry.priority and role is Role.EMULATOR:
            self.add(
                (*path, "scheduler"),
                "emulator is also every thread rtpind does not know: it never gets FIFO",
                "leave scheduler and priority out",
            )
        if entry.priority >= UNSAFE_PRIORITY and not made.unsafe and self.sound((*path[:-1], "unsafe")):
            self.add(
                (*path, "priority"),
                f"{entry.priority} is as high as the host's interrupt threads (50) and can freeze it",
                "1 is usual; else say unsafe: true in the class",
            )

    def read_rules(self) -> Iterator[Rule]:
        seen_all: int | None = None
        for number, value in enumerate(self.data.get("guests") or []):
            if value is None or "class" not in value:
                continue  # refused before
            path: Path = ("guests", number)
            line = self.document.line(path)
            name, uuid = value.get("name"), value.get("uuid")
            if (self.written(*path, "name") and name is None) or (self.written(*path, "uuid") and uuid is None):
                continue
            rule = Rule(number=number + 1, line=line, class_name=value["class"], name=name, uuid=uuid)
            if rule.uuid is not None and not _UUID_GLOB.fullmatch(rule.uuid):
                self.add((*path, "uuid"), f"{rule.uuid!r} can match no UUID", "hexadecimal digits, -, * and ?")
            if rule.class_name != UNMANAGED and not self.known("classes", rule.class_name):
                known = ", ".join(sorted({UNMANAGED, *self.section("classes")}))
                self.add((*path, "class"), f"there is no class '{rule.class_name}'", f"classes here: {known}")
            if rule.name is None and rule.uuid is None:
                self.add(path, "matches nothing by itself", 'add name: or uuid:; for every guest, name: "*"')
            elif seen_all is not None:
                self.add(path, f"never reached: the rule on line {seen_all} matches every guest", warning=True)
            elif {rule.name, rule.uuid} in ({"*"}, {"*", None}):
                seen_all = line
            yield rule

    def check_reach(self, classes: Mapping[str, GuestClass], rules: tuple[Rule, ...]) -> None:
        """Check the pools that some rule reaches: not empty, and none both exclusive and floating."""
        reached = {rule.class_name for rule in rules} & set(classes)
        used: dict[str, Path] = {}  # by a class that a rule names, and where that is written
        owned: dict[str, Path] = {}  # those of them that are given out exclusively
        floats: dict[str, Path] = {}  # those that threads float in
        for name in sorted(reached):
            for role, entry in classes[name].entries.items():
                paths: tuple[Path, ...] = (("classes", name, role), ("classes", name, Role.EMULATOR), ("classes", name))
                path = next(path for path in paths if self.written(*path))
                if entry.share_with is not None or not self.usable(entry.pool) or not self.sound(path):
                    continue
                used.setdefault(entry.pool, path)
                (owned if entry.exclusive else floats).setdefault(entry.pool, path)
        for name in sorted({HOUSEKEEPING, *self.pools}):
            if self.usable(name) and not pool_cpus(self.pools, name, self.host):
                what = f"the pool '{name}' is empty on this host" + (
                    f", and {dotted(used[name])} needs it" if name in used else ""
                )
                hint = f"isolated here: {self.host.isolated or 'none'}, online: {self.host.online}"
                needed = name in used or (name == HOUSEKEEPING and bool(reached))
                self.add(("pools", name), what, hint, warning=not needed)
        for own, where in sorted(owned.items()):
            for other in sorted(filter(self.usable, {HOUSEKEEPING, *floats})):
                common = pool_cpus(self.pools, own, self.host) & pool_cpus(self.pools, other, self.host)
                if common:
                    user = dotted(floats[other]) if other in floats else "the host"
                    self.collision(own, other, where, common, user)

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
