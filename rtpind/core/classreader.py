# SPDX-License-Identifier: GPL-2.0-or-later
"""The ``classes`` of a policy file → GuestClass each, and what of them breaks promise 1 within a guest."""

from __future__ import annotations

from typing import Any

from rtpind.core.cpuset import CpuListError
from rtpind.core.document import Path
from rtpind.core.model import Role
from rtpind.core.policy import (
    HOUSEKEEPING,
    UNMANAGED,
    UNSAFE_PRIORITY,
    Drift,
    Entry,
    Exclusive,
    GuestClass,
    Ids,
    Share,
    WhenFull,
)
from rtpind.core.reading import Reading, parse_ids

_NUMBERED = (Role.VCPU, Role.IOTHREAD)


def read_class(reading: Reading, name: str, value: dict[str, Any]) -> GuestClass:
    """Read one class; what is wrong with it goes into ``reading``."""
    path: Path = ("classes", name)
    if name == UNMANAGED:
        reading.add(path, "'unmanaged' is built in", "give the class another name")
    emulator = _read_role(reading, path, Role.EMULATOR, value.get("emulator", {"pool": HOUSEKEEPING}))
    entries = dict.fromkeys(Role, emulator)  # a role that is not named follows emulator: it has the same entries
    for role in Role:
        if role in value and role is not Role.EMULATOR:
            entries[role] = _read_role(reading, path, role, value[role])
    made = GuestClass(
        name=name,
        entries=entries,
        unsafe=bool(value.get("unsafe", False)),
        drift=Drift(value["drift"]) if "drift" in value else None,
        when_full=WhenFull(value["when_full"]) if "when_full" in value else None,
    )
    for role in Role:
        if role in value:
            for number, entry in enumerate(entries[role]):
                _Check(reading, made, role, entry, entry_path(path, role, value[role], number)).run()
    return made


def entry_path(path: Path, role: Role, value: Any, number: int) -> Path:
    """Return where the entry of that number is written: a role has one, or a list of them."""
    return (*path, role, number) if isinstance(value, list) else (*path, role)


def _read_role(reading: Reading, path: Path, role: Role, value: Any) -> tuple[Entry, ...]:
    found: list[Entry] = []
    values = value if isinstance(value, list) else [value]
    if not values:
        reading.add((*path, role), "an empty list places nothing", "leave the role out, and it follows emulator")
        return (Entry(),)
    for number, each in enumerate(values):
        here = entry_path(path, role, value, number)
        if each is None:  # refused before
            continue
        entry = _read_entry(reading, here, each)
        clash = next((other for other in found if _overlap(entry.ids, other.ids)), None)
        if clash is not None and reading.sound(here):
            which = "the same numbers" if entry.ids is not None else "all that no other entry names"
            reading.add(here, f"an earlier entry of this role is for {which}", "ids may not overlap")
        found.append(entry)
    return tuple(found) or (Entry(),)


def _overlap(one: Ids | None, other: Ids | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.overlaps(other)


def _read_entry(reading: Reading, path: Path, value: dict[str, Any]) -> Entry:
    pool, share, cputune = value.get("pool"), value.get("share_with"), "from" in value
    if pool is not None and pool != HOUSEKEEPING and pool not in reading.pools:
        known = ", ".join(sorted({HOUSEKEEPING, *reading.pools}))
        if not reading.known("pools", pool):
            reading.add((*path, "pool"), f"there is no pool '{pool}'", f"pools here: {known}")
    elif pool is None and share is None and not cputune and reading.sound(path):
        reading.add(path, "needs a pool", "or share_with: {vcpu: 0}")
    if share is not None and ("pool" in value or "exclusive" in value):
        reading.add((*path, "share_with"), "share_with takes another's pCPU; pool and exclusive do not go with it")
    if "priority" in value and "scheduler" not in value and reading.sound(path):
        reading.add((*path, "priority"), "a priority without a scheduler has no effect", "add scheduler: fifo")
    if cputune and {"exclusive", "scheduler", "share_with"} & set(value):
        hint = "pool is where a vCPU floats that <cputune> does not pin"
        reading.add((*path, "from"), "pCPUs and scheduler are those of <cputune>; only ids and pool go with it", hint)
    if "missing_ids" in value and "ids" not in value and reading.sound(path):
        reading.add((*path, "missing_ids"), "there are no ids that could be missing", "leave it out")
    return Entry(
        ids=_read_ids(reading, (*path, "ids"), value["ids"]) if "ids" in value else None,
        pool=pool or (HOUSEKEEPING if share is not None or cputune else ""),  # "" never leaves: it is a problem
        exclusive=Exclusive(value["exclusive"]) if "exclusive" in value else None,
        share_with=None if share is None else _read_share(reading, (*path, "share_with"), share),
        priority=int(value.get("priority", 1)) if "scheduler" in value else 0,
        cputune=cputune,
        clip=value.get("missing_ids") == "clip",
    )


def _read_ids(reading: Reading, path: Path, value: Any) -> Ids | None:
    try:
        return parse_ids(value)
    except CpuListError as error:
        reading.add(path, f"not a list of numbers: {error}", 'write 0, "0-1", or "^0" for all but 0')
        return None


def _read_share(reading: Reading, path: Path, value: Any) -> Share:
    if isinstance(value, str):
        return Share(Role(value))
    if len(value) != 1:
        if reading.sound(path):
            reading.add(path, "name one thread", "share_with: {vcpu: 0}, or share_with: emulator")
        return Share(Role.VCPU, 0)
    ((role, index),) = value.items()
    return Share(Role(role), index)


class _Check:
    """One written entry against the rest of its class: promise 1 within a guest, promise 7's priority."""

    def __init__(self, reading: Reading, made: GuestClass, role: Role, entry: Entry, path: Path) -> None:
        self.reading = reading
        self.made = made
        self.role = role
        self.entry = entry
        self.path = path

    def add(self, key: str, message: str, hint: str = "") -> None:
        self.reading.add((*self.path, key), message, hint)

    def run(self) -> None:
        entry, role = self.entry, self.role
        if entry.ids is not None and role not in _NUMBERED:
            self.add("ids", f"{role} threads have no numbers", "only vCPUs and iothreads do")
        if entry.cputune and role is not Role.VCPU:
            self.add("from", "only vCPUs are taken from <cputune>", "give this role a pool")
        elif entry.share_with is not None:
            self.sharing(entry.share_with)
        elif entry.cputune or not self.reading.sound(self.path):
            pass
        elif entry.priority and entry.exclusive is not Exclusive.THREAD:
            what = "several FIFO threads on one pCPU" if entry.exclusive else "FIFO threads that float"
            self.add("scheduler", f"{what} would starve each other", "say exclusive: thread")
        if entry.priority and role is Role.EMULATOR:
            self.add(
                "scheduler",
                "emulator is also every thread rtpind does not know: it never gets FIFO",
                "leave scheduler and priority out",
            )
        unsafe = self.made.unsafe or not self.reading.sound(("classes", self.made.name, "unsafe"))
        if entry.priority >= UNSAFE_PRIORITY and not unsafe:
            self.add(
                "priority",
                f"{entry.priority} is as high as the host's interrupt threads (50) and can freeze it",
                "1 is usual; else say unsafe: true in the class",
            )

    def sharing(self, share: Share) -> None:
        """Check whose pCPU the entry joins: that there is one, and that neither starves the other."""
        if not self.reading.sound(self.path) or not self.reading.sound(("classes", self.made.name, share.role)):
            return
        found = self.made.entry(share.role, share.index)
        wanted = Exclusive.GUEST if share.index is None else Exclusive.THREAD
        if found is self.entry or self.made.follows(share.role) is self.role:
            self.add("share_with", f"{self.role} would share with itself", "name another role")
        elif found is not None and (found.cputune or found.exclusive is wanted):
            self.starving(share, found)
            if found.cputune and not self.entry.cputune:
                fifo = f"FIFO {self.entry.priority} or higher" if self.entry.priority else "FIFO"
                what = f"where <cputune> makes {share} {fifo}, it gets none while the {self.role} can run on its pCPU"
                hint = "share with a vCPU that is not realtime in the XML, or give this role a pool"
                self.reading.add((*self.path, "share_with"), what, hint, warning=True)
        else:
            self.add("share_with", f"{share} has no pCPU of its own to share", f"{share.role}: exclusive: {wanted}")

    def starving(self, share: Share, other: Entry) -> None:
        """Check promise 1 between the entry and the one whose pCPU it joins."""
        mine, theirs = self.entry.priority, other.priority
        whose = "vCPU" if share.role is Role.VCPU else str(share.role)
        if theirs and theirs >= max(mine, 1):
            what = f"the {self.role} would share a pCPU with a FIFO {whose} of its guest and starve"
            what += ": the guest never boots" if share.role is Role.VCPU else ""
            self.add("share_with", what, f"take FIFO from the {whose}, or give this role a pool of its own")
        elif self.role is Role.VCPU and mine and mine >= max(theirs, 1):
            what = f"the {share.role} would share its pCPU with a FIFO vCPU of its guest and starve"
            self.add("share_with", f"{what}: the guest never boots", "take FIFO from the vCPU, or give it a pool")
