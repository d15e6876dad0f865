# SPDX-License-Identifier: GPL-2.0-or-later
"""What outlives the daemon: what threads had before it touched them, and which guests it leaves alone.

A value with its plain-data form; :mod:`rtpind.host.ledgerfile` keeps it on disk.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cache
from typing import Any

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import Guest, Placement, Sched, Scheduling, Snapshot, Thread, ThreadId

VERSION = 1

#: More originals than any host has guest threads; what is beyond is a fault, not data.
MAX_ENTRIES = 200_000

#: hands_off key that stands for every guest.
EVERYONE = "*"

Process = tuple[int, int]


class HandsOff(StrEnum):
    """Why a guest is left alone: put back by ``release``, or held by ``pause``."""

    RELEASED = "released"
    PAUSED = "paused"


@dataclass(frozen=True, slots=True)
class Off:
    """A guest left alone: until it stops (``until`` None) or until that wall-clock second."""

    kind: HandsOff
    process: Process | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Original:
    """What one thread had before the first touch, and which thread of which guest it was."""

    guest: str
    label: str
    placement: Placement


@dataclass(frozen=True, slots=True)
class Ledger:
    """Originals by thread, and the guests left alone by UUID."""

    originals: Mapping[ThreadId, Original] = field(default_factory=dict)
    hands_off: Mapping[str, Off] = field(default_factory=dict)

    def managed(self) -> frozenset[Process]:
        """Return the guest processes of which any thread was touched."""
        return frozenset((thread.pid, thread.pid_start) for thread in self.originals)

    def incumbents(self) -> dict[tuple[Process, str], ThreadId]:
        """Return which thread was (process, label), for :func:`rtpind.core.identify.identify`."""
        return {((thread.pid, thread.pid_start), entry.label): thread for thread, entry in self.originals.items()}

    def off(self, guest: Guest, now: float) -> Off | None:
        """Return why ``guest`` is left alone at wall-clock second ``now``; None when it is not."""
        for key in (guest.uuid, EVERYONE):
            found = self.hands_off.get(key)
            if found is None or (found.until is not None and found.until <= now):
                continue
            if found.process is None or found.process == guest.process:
                return found
        return None

    def recording(self, threads: Iterable[Thread]) -> Ledger:
        """Return the ledger with the present placement of ``threads``; the first record of a thread stands."""
        new = {
            thread.id: Original(thread.guest, thread.label, thread.now)
            for thread in threads
            if thread.id not in self.originals
        }
        return self if not new else replace(self, originals={**self.originals, **new})

    def without(self, process: Process) -> Ledger:
        """Return the ledger without the originals of one guest process, after they were put back."""
        kept = {id_: entry for id_, entry in self.originals.items() if (id_.pid, id_.pid_start) != process}
        return replace(self, originals=kept)

    def pruned(self, snapshot: Snapshot, gone: frozenset[Process], now: float) -> Ledger:
        """Return the ledger without dead threads, stopped guests and pauses that are over.

        ``gone``: processes that are known to have ended. A guest that is merely not in ``snapshot`` (libvirt is
        away) keeps its entries.
        """
        alive = {thread.id for thread in snapshot.threads()}
        seen = {guest.process for guest in snapshot.guests}
        originals = {
            id_: entry
            for id_, entry in self.originals.items()
            if (process := (id_.pid, id_.pid_start)) not in gone and (id_ in alive or process not in seen)
        }
        hands_off = {
            uuid: off
            for uuid, off in self.hands_off.items()
            if off.process not in gone and (off.until is None or off.until > now)
        }
        if len(originals) == len(self.originals) and len(hands_off) == len(self.hands_off):
            return self
        return Ledger(originals, hands_off)

    def processes(self) -> frozenset[Process]:
        """Return every guest process that the ledger knows of."""
        return self.managed() | {off.process for off in self.hands_off.values() if off.process is not None}


def dump(ledger: Ledger) -> dict[str, Any]:
    """Return the ledger as plain data for JSON."""
    text = cache(CpuSet.__str__)  # most threads had one of a few masks
    return {
        "version": VERSION,
        "originals": [
            [
                *(id_.pid, id_.pid_start, id_.tid, id_.start, entry.guest, entry.label),
                text(entry.placement.cpus),
                str(entry.placement.scheduling.sched),
                entry.placement.scheduling.priority,
                entry.placement.scheduling.reset_on_fork,
            ]
            for id_, entry in sorted(ledger.originals.items())
        ],
        "hands_off": {
            uuid: {"kind": str(off.kind), "process": off.process and [*off.process], "until": off.until}
            for uuid, off in sorted(ledger.hands_off.items())
        },
    }


def load(data: Any) -> Ledger:
    """Return the ledger from plain data. Raises ValueError on anything that :func:`dump` does not write."""
    try:
        if data["version"] != VERSION or len(data["originals"]) > MAX_ENTRIES:
            raise ValueError(f"version {data['version']}, {len(data['originals'])} entries")
        originals = {}
        for pid, pid_start, tid, start, guest, label, cpus, sched, priority, reset in data["originals"]:
            id_ = ThreadId(int(pid), int(pid_start), int(tid), int(start))
            scheduling = Scheduling(Sched(sched), int(priority), bool(reset))
            originals[id_] = Original(str(guest), str(label), Placement(CpuSet.parse(cpus), scheduling))
        hands_off = {}
        for uuid, off in data["hands_off"].items():
            process = None if off["process"] is None else (int(off["process"][0]), int(off["process"][1]))
            until = None if off["until"] is None else float(off["until"])
            hands_off[str(uuid)] = Off(HandsOff(off["kind"]), process, until)
    except (LookupError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a ledger: {type(error).__name__}: {error}") from error
    ledger = Ledger(originals, hands_off)
    if dump(ledger) != data:
        raise ValueError("not a ledger: values that rtpind does not write")
    return ledger
