# SPDX-License-Identifier: GPL-2.0-or-later
"""What all experiments share: the stage of the demonstration, guests under a contender, CPU hogs, turns."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import libvirt

from bench.contenders import Contender, cputune
from bench.guests import Place
from bench.results import Table, load_average
from demo.guests import Guest
from demo.measure import cpu_time
from demo.stage import Stage, end

#: Of guests and files; short, see :meth:`Bench.name`.
PREFIX = "rtpind-side"
HOGS = 4


@dataclass
class Bench:
    """One run. ``kind`` is what guests are: kvm, or qemu (TCG)."""

    stage: Stage
    kind: str
    contenders: tuple[Contender, ...]
    _numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))

    @property
    def fifo(self) -> Place:
        """A realtime guest's place: one pCPU for its vCPU alone, at FIFO 1 where this host allows that."""
        one = frozenset({max(self.stage.realtime)})
        return Place(one, self.stage.housekeeping, 1 if self.stage.fifo else 0)

    @property
    def shared(self) -> Place:
        """A place without FIFO, which more vCPUs than one can have: hot-plugged ones, those of many guests."""
        return Place(self.fifo.vcpus, self.stage.housekeeping)

    def name(self) -> str:
        """Return a name that no other guest of this run had; short, as QEMU's files have only 20 letters of it."""
        return f"g{next(self._numbers):04}"

    def start(self, name: str, contender: Contender, place: Place, **wanted: Any) -> Guest:
        """Start a guest under a contender; without firmware, so that it does nothing else than it should.

        Raises libvirt.libvirtError when the start fails.
        """
        vcpus, iothreads = wanted.get("max_vcpus") or wanted.get("vcpus", 1), wanted.get("iothreads", 0)
        tune = cputune(place, vcpus, iothreads) if contender.cputune else ""
        return self.stage.start(name, **({"kind": self.kind, "firmware": False} | wanted), cputune=tune)

    @contextlib.contextmanager
    def guest(self, contender: Contender, place: Place, **wanted: Any) -> Iterator[Guest]:
        """Start a guest, and end it."""
        guest = self.start(self.name(), contender, place, **wanted)
        try:
            yield guest
        finally:
            self.end(guest)

    def end(self, guest: Guest) -> None:
        """End a guest and forget it."""
        guest.destroy()
        if self.stage.lab is not None:
            self.stage.lab.guests.pop(guest.uuid, None)

    @contextlib.contextmanager
    def hogs(self, count: int = HOGS) -> Iterator[None]:
        """Have CPU hogs on all pCPUs."""
        hogs = [self.stage.spawn("sh", "-c", "while :; do :; done", f"{PREFIX}-hog") for _ in range(count)]
        try:
            yield
        finally:
            for hog in hogs:
                end(hog)

    def rounds(self, table: Table, count: int, turn: Callable[[Contender], None], *, process: bool = False) -> None:
        """Give every contender its turn, in another order each round; what a turn loses is written down.

        ``process``: only those of whom something runs all the time, and nothing.
        """
        able = [one for one in self.contenders if not process or one.process or one.name == "nothing"]
        for number in range(count if able else 0):
            shift = number % len(able)
            for contender in able[shift:] + able[:shift]:
                table.load.append(load_average())
                stolen, total = cpu_time()
                try:
                    turn(contender)
                except (OSError, RuntimeError, libvirt.libvirtError, subprocess.SubprocessError) as error:
                    table.lose(contender.name, error)
                stolen_now, total_now = cpu_time()
                table.steal.append((stolen_now - stolen) / max(total_now - total, 1))
                print(f"{table.key}: round {number + 1} of {count}: {contender.name}", file=sys.stderr)
