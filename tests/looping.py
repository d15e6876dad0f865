"""The service with a simulated host and libvirt, for tests of its loop; nothing listens to this host."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from factories import PID, guest, host, policy, uuid_of
from simulated import World

from rtpind.core.audit import Kind, Record
from rtpind.core.ledger import Process
from rtpind.core.model import Traits
from rtpind.core.policy import Mode
from rtpind.daemon.definitions import Definitions
from rtpind.daemon.reconcile import Reconciler
from rtpind.daemon.service import Service
from rtpind.host.hypervisor import Domain
from rtpind.host.ledgerfile import LedgerFile

UUID, NAME = uuid_of(PID), "rt-1"
DOMAIN = Domain(UUID, NAME)


class Hypervisor:
    """Notes what it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Process]] = []
        self.lists = 0

    def describe(self, uuid: str, process: Process) -> None:
        self.asked.append((uuid, process))

    def relist(self) -> None:
        self.lists += 1

    def take(self) -> list[Process]:
        """Return which processes were asked about since the last time."""
        found, self.asked = [process for _, process in self.asked], []
        return found


class Observer(World):
    """A world whose guests can be described."""

    def __init__(self, *guests: Any) -> None:
        super().__init__(host(), list(guests))
        self.cgroups = SimpleNamespace(above=lambda path: f"/cgroups{path}")
        self.anew = 0  # how often it was to search for new kernel threads
        self.known: list[tuple[str, Process, Traits]] = []

    def process_of(self, name: str) -> Process | None:
        return next((one.process for one in self.guests if one.name == name), None)

    def scan_anew(self) -> None:
        self.anew += 1

    def describe(self, uuid: str, process: Process, traits: Traits) -> bool:
        news = (uuid, process, traits) not in self.known
        self.known.append((uuid, process, traits))
        return news


class Watches:
    """What listens to the kernel: notes what it is to watch. ``deaf``: it cannot."""

    def __init__(self) -> None:
        self.deaf = False
        self.places: list[tuple[str, str]] = []
        self.pids: set[int] = set()
        self.kept: set[str] = set()

    def keep(self, uuids: Any) -> None:
        self.kept = set(uuids)

    def watch(self, what: Any, place: str = "") -> bool:
        if place and not self.deaf:
            self.places.append((what, place))
        elif not place:
            self.pids = set(what)
        return not self.deaf


class OnPaper(Service):
    """The service, which does not move the threads of the test."""

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self.adopted: list[tuple[str, int, int]] = []
        house: Any = SimpleNamespace(
            keep=lambda cpus, priority=0, urgent=(): self.adopted.append((str(cpus), priority, len(urgent))),
            forget=lambda: None,
        )
        self._house = house


class Loop:
    """The service with a simulated host and libvirt; each turn takes some items and does what is due."""

    def __init__(self, directory: Path) -> None:
        self.records: list[Record] = []
        self.world = Observer(guest(NAME))
        observer: Any = self.world
        file = LedgerFile(directory)
        reconciler = Reconciler(observer, file, self.records.append, kernel=self.world, clock=self.world.clock)
        reconciler.policy = replace(policy(), mode=Mode.OBSERVE)  # else the second looks before FIFO come in between
        self.libvirt: Any = Hypervisor()
        self.service = OnPaper(reconciler, directory / "policy.yaml")
        events: Any = self.service._events
        self.watches = events._inotify = events._threads = Watches()
        events._hypervisor = self.libvirt
        events._definitions = Definitions(reconciler, self.libvirt.describe)

    def turn(self, *items: Any) -> None:
        self.service._turn(list(items))

    def full(self) -> None:
        self.service._full_due = 0.0
        self.turn()

    def said(self, kind: Kind) -> list[str]:
        return [record.message for record in self.records if record.kind is kind]
