# SPDX-License-Identifier: GPL-2.0-or-later
"""How guests are defined: has libvirt asked once for each, and gives what it tells to the observer.

A definition belongs to one run of a guest (a process): who is another process by now is asked for anew.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from rtpind.core.audit import Kind, Level, Record
from rtpind.core.ledger import Process
from rtpind.core.model import Guest
from rtpind.daemon.reconcile import Reconciler
from rtpind.host.details import Described
from rtpind.host.hypervisor import Domain


class Definitions:
    """What was asked and told. ``ask``: has libvirt asked about (UUID, process), and returns at once."""

    def __init__(self, reconciler: Reconciler, ask: Callable[[str, Process], None]) -> None:
        self._reconciler = reconciler
        self._ask = ask
        self._asked: dict[str, Process] = {}
        self._untold: dict[str, Described] = {}  # what kept libvirt from telling, as last said

    def want(self, guests: Iterable[Guest]) -> None:
        """Ask about each guest that is new, or is another process than before."""
        for guest in guests:
            if self._asked.get(guest.uuid) != guest.process:
                self._asked[guest.uuid] = guest.process
                self._ask(guest.uuid, guest.process)

    def drop_others(self, uuids: Collection[str]) -> None:
        """Drop what is kept of guests that do not run."""
        self._asked = {uuid: process for uuid, process in self._asked.items() if uuid in uuids}
        self._untold = {uuid: item for uuid, item in self._untold.items() if uuid in uuids}

    def forget(self) -> None:
        """Ask about everybody again: what changed while libvirt was away nobody has told."""
        self._asked = {}

    def changed(self, domain: Domain) -> None:
        """Ask about a guest whose definition may have changed."""
        process = self._reconciler.observer.process_of(domain.name)
        if process is not None:
            self._asked[domain.uuid] = process
            self._ask(domain.uuid, process)

    def take(self, item: Described) -> bool:
        """Take what was told, and return whether it is news.

        Only if the guest still is the process that it was when libvirt was asked: then it was that all the while, and
        the answer is about no other. If not, the next look asks anew.
        """
        name = self._reconciler.domains.get(item.uuid)
        if name is None or self._reconciler.observer.process_of(name) != item.process:
            return False
        if item.traits is not None:
            return self._reconciler.observer.describe(item.uuid, item.process, item.traits)
        if self._untold.get(item.uuid) != item:
            what = "its definition cannot be read" if item.unreadable else "libvirt does not tell its definition"
            text = f"{name}: {what} ({item.trouble}); rules and classes that ask for it leave the guest alone"
            fields = {"GUEST": name, "GUEST_UUID": item.uuid, "CAUSE": item.trouble}
            self._reconciler.emit(Record(Kind.LIBVIRT, text, Level.WARNING, fields))
        self._untold[item.uuid] = item
        return item.unreadable and self._reconciler.observer.describe(item.uuid, item.process, item.trouble)
