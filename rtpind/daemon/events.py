# SPDX-License-Identifier: GPL-2.0-or-later
"""Whatever tells the loop that it is time for a look: libvirt, the kernel, and the looks that follow a look.

No event decides anything. Each layer is optional, and says what is lost without it: the full pass finds all that
they would have told, only later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

from rtpind.core.audit import Kind, Level
from rtpind.core.ledger import Process
from rtpind.core.model import Guest
from rtpind.core.plan import LOOKS_APART, look_apart
from rtpind.core.policy import Policy
from rtpind.daemon.definitions import Definitions
from rtpind.daemon.inbox import Inbox
from rtpind.daemon.reconcile import Reconciler, View
from rtpind.host.details import Described
from rtpind.host.hypervisor import METADATA, STOPPED, Changed, Domain, Hypervisor, Listed, Lost
from rtpind.host.inotify import Appeared, Inotify, Moved, Regrouped, Saved
from rtpind.host.listener import Overran, Unheard
from rtpind.host.pidfile import pid_of
from rtpind.host.procevents import ProcEvents, Stirred
from rtpind.host.udev import CpuEvents, CpusChanged

#: Looks after an event: threads that begin late (nx-recovery at the first KVM_RUN, vhost, workers).
_FOLLOW_UPS_S = (0.0, 0.05, 0.25, 1.0, 5.0)
#: The interval while libvirt has not begun to move threads of a guest that starts.
_STARTING_S = 0.02
_WATCHED_S = 0.2  # where the kernel tells when it has
#: libvirt makes a vCPU's cgroup, moves the thread, which the kernel tells when it is over, and then sets its affinity,
#: which nobody tells: some 0.1 ms later (measured), or when libvirt has CPU time. The kernel shows the thread in its
#: cgroup before (the reset came 0.1 s after that on an emulated host), so nobody looks for that. The first look comes a
#: little after the move, the next ones at intervals of a millisecond, and then at most so late as to miss one part in
#: eight.
_WINDOW_S = 1.0
_RESET_S = 0.0003
_CLOSE_S = 0.001
_SPARING = 8
#: Looks because of new threads come at once after a calm, and ever more seldom at a guest that never stops.
_STIR_S, _STIR_MAX_S = 0.003, 0.2
_OVERRUN_S = 1.0

#: The names of the threads that tell of what cannot wait: the start of a guest.
URGENT = (Inotify.name, ProcEvents.name)

#: What is not heard without a layer, and what that means; {} is the policy's period.
_WITHOUT = {
    CpuEvents.name: (
        "about pCPUs cannot be heard ({}): one that goes offline or comes online is noticed at the next look at "
        "everything, within {}"
    ),
    Inotify.name: (
        "about libvirt's files cannot all be heard ({}): a guest may be placed only when libvirt says that it runs, "
        "and a vCPU or iothread that is plugged in within {}"
    ),
    ProcEvents.name: (
        "about threads cannot be heard ({}): one that begins without a word from libvirt, such as a vhost or io_uring "
        "worker, is placed at the next look at everything, within {}"
    ),
}

Event: TypeAlias = (
    Listed
    | Changed
    | Lost
    | Described
    | CpusChanged
    | Appeared
    | Saved
    | Regrouped
    | Moved
    | Stirred
    | Overran
    | Unheard
)
Say: TypeAlias = Callable[..., None]


class Events:
    """The sources of events, and what becomes of each.

    ``say``: sends a record (kind, text, level, fields). ``hurry``: has everything looked at in so many seconds.
    """

    def __init__(
        self,
        reconciler: Reconciler,
        inbox: Inbox[Any],
        say: Say,
        hurry: Callable[[float], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.libvirt = "connecting"
        self.lost = ""  # why libvirt is away, as last said
        self.listed = False  # before that, who runs is not known
        self._reconciler = reconciler
        self._inbox = inbox
        self._say = say
        self._hurry = hurry
        self._clock = clock
        self._hypervisor: Hypervisor
        self._definitions: Definitions
        self._cpus = CpuEvents(inbox.post)
        self._inotify = Inotify(inbox.post, reconciler.observer.proc)
        self._threads = ProcEvents(inbox.post)
        self._watched: dict[str, Process] = {}  # guests whose cgroup is watched
        self._pids: dict[int, str] = {}  # pid → UUID
        self._moving: dict[str, tuple[float, float]] = {}  # guests that libvirt moves threads of: since when, interval
        self._overrun = float("-inf")  # when events were last lost
        self._stirred: dict[str, tuple[float, float]] = {}  # when a guest is looked at for new threads, and after what

    def start(self, policy: Policy) -> None:
        """Begin to listen to everything; returns at once."""
        self._hypervisor = Hypervisor(policy.uri, self._inbox.post)
        self._definitions = Definitions(self._reconciler, self._hypervisor.describe)
        self._hypervisor.start()
        self._cpus.start()
        self._inotify.start()
        if policy.proc_events:
            self._threads.start()

    def stop(self) -> None:
        """Ask all sources to end; waits for none."""
        self._cpus.stop()
        self._inotify.stop()
        self._threads.stop()
        self._hypervisor.stop()

    def relist(self) -> None:
        """Ask libvirt who runs; the answer comes as an event."""
        if self.libvirt == "connected":
            self._hypervisor.relist()

    def take(self, event: Event) -> None:
        """Do what an event asks for: as good as always, have a guest looked at."""
        match event:
            case Listed(domains, fresh):
                self._listed(domains, fresh)
            case Changed():
                self._changed(event)
            case Described(uuid):
                if self._definitions.take(event):
                    self._inbox.look_in(0, uuid)
            case Lost():
                self._without_libvirt(event)
            case Unheard():
                self._without(event)
            case _:
                self._heard(event)

    def _heard(self, event: Appeared | Saved | Regrouped | Moved | Stirred | CpusChanged | Overran) -> None:
        """Take what the kernel tells."""
        match event:
            case Appeared(uuid, name):
                self._appeared(uuid, name)
            case Saved(name):
                for uuid in [uuid for uuid, known in self._reconciler.domains.items() if known == name]:
                    self._inbox.look_in(0, uuid)
            case Regrouped(uuid):
                self._moving[uuid] = (self._clock(), _WATCHED_S)
                self._inbox.look_in(0, uuid)  # it may have moved already
            case Moved(uuid):
                self._moving[uuid] = (self._clock(), _CLOSE_S)
                self._inbox.look_in(_RESET_S, uuid)
            case Stirred(pid, kernel):
                self._stir(pid, kernel)
            case CpusChanged():
                self._hurry(0)  # what is online now, and who has lost a pCPU, is said by the pass
            case Overran():
                self._overran()

    def passed(self, view: View, only: set[str] | None) -> None:
        """See to what follows a pass over all guests, or ``only`` some: who is watched, asked about, due again."""
        decided = [found for found in view.decision.guests if only is None or found.guest.uuid in only]
        now, took = self._clock(), view.snapshot.took
        acted = {step.thread.guest for step in view.plan.steps} if self._reconciler.enforcing else set()
        for found in decided:
            guest = found.guest
            self._watch(guest)
            since, interval = self._moving.get(guest.uuid, (float("-inf"), 0.0))
            if now - since < _WINDOW_S:
                if guest.uuid in acted:  # a thread has been moved, whether that was told or not
                    interval = _CLOSE_S
                    self._moving[guest.uuid] = (since, interval)
                self._inbox.look_in(max(interval, (now - since) / _SPARING, LOOKS_APART * took), guest.uuid)
            if guest.uuid not in view.plan.again:
                continue
            if guest.doubtful or found.unsettled:
                self._inbox.look_in(_WATCHED_S if guest.uuid in self._watched else _STARTING_S, guest.uuid)
            # In place, and only the second look is missing. A guest that is not in place waits for the period.
            right = self._reconciler.memory.right_since.get(guest.process)
            if self._reconciler.enforcing and right is not None:
                self._inbox.look_in(max(right + look_apart(took) - now, 0), guest.uuid)
        if only is None:
            self._forget(view)
        self._threads.watch(self._pids)
        self._definitions.want([found.guest for found in decided])

    def _watch(self, guest: Guest) -> None:
        """Have the kernel tell of new cgroups and threads of a guest that is seen for the first time."""
        self._pids[guest.pid] = guest.uuid
        if self._watched.get(guest.uuid) == guest.process:
            return
        main = next((thread for thread in guest.threads if thread.id.tid == guest.pid), None)
        home = None if main is None else self._reconciler.observer.cgroups.above(main.cgroup)
        if home is not None and self._inotify.watch(guest.uuid, home):
            self._watched[guest.uuid] = guest.process
            self._inbox.look_in(0, guest.uuid)  # at what happened in between

    def _forget(self, view: View) -> None:
        """Drop what is kept of guests that have gone, and windows that are over."""
        running, now = {guest.uuid: guest for guest in view.snapshot.guests}, self._clock()
        self._watched = {uuid: process for uuid, process in self._watched.items() if uuid in running}
        self._inotify.keep(running.keys())
        self._pids = {guest.pid: uuid for uuid, guest in running.items()}
        self._moving = {uuid: entry for uuid, entry in self._moving.items() if now - entry[0] < _WINDOW_S}
        self._stirred = {uuid: entry for uuid, entry in self._stirred.items() if uuid in running}
        self._definitions.drop_others(running)

    # --- events -----------------------------------------------------------------------------------------------

    def _listed(self, domains: tuple[Domain, ...], fresh: bool) -> None:
        self.listed = True
        known = self._reconciler.domains
        listed = {domain.uuid: domain.name for domain in domains}
        names = set(listed.values())
        # A list may be older than an event: what runs is dropped only when its process is gone.
        later = {uuid: name for uuid, name in known.items() if name not in names and pid_of(name) is not None}
        self._reconciler.domains = later | listed
        if fresh:
            self.libvirt = "connected"
            self._say(Kind.LIBVIRT, f"connected to libvirt, {len(domains)} guests run", Level.INFO)
            self._hurry(0)
            self._definitions.forget()
        for uuid in self._reconciler.domains.keys() - known.keys():
            self._inbox.look_in(0, uuid)

    def _changed(self, event: Changed) -> None:
        domain = event.domain
        if event.redefined:
            self._definitions.changed(domain)
        if event.what == METADATA:
            return
        if event.what == STOPPED:
            # Only the pid file's lock says whether it is gone; a reboot keeps the process (promise 4.4).
            self._inbox.look_in(0, domain.uuid)
            self._hurry(0.05)
            return
        # One guest for a name: it may have been undefined and defined anew, with another UUID.
        others = {uuid: name for uuid, name in self._reconciler.domains.items() if name != domain.name}
        self._reconciler.domains = others | {domain.uuid: domain.name}
        for seconds in _FOLLOW_UPS_S:
            self._inbox.look_in(seconds, domain.uuid)

    def _without_libvirt(self, lost: Lost) -> None:
        self.libvirt, self.lost = "away", lost.cure or lost.why
        text = f"libvirt is away ({lost.why}{'; ' if lost.cure else ''}{lost.cure}); "
        text += "the guests known are kept in place, and it is tried again"
        self._say(Kind.LIBVIRT, text, Level.WARNING)

    def _without(self, lost: Unheard) -> None:
        """Say what is lost with a layer. The proc connector takes a capability that the unit leaves out on purpose."""
        assert self._reconciler.policy is not None
        if lost.layer == Inotify.name:
            self._watched.clear()  # who still is watched is found out by watching anew
        text = _WITHOUT[lost.layer].format(lost.why, f"{self._reconciler.policy.period_s:g} s")
        level = Level.NOTICE if lost.layer == ProcEvents.name else Level.WARNING
        self._say(Kind.EVENTS, f"the kernel's events {text}", level, CAUSE=lost.why)

    def _overran(self) -> None:
        """Look at everything at once; at most every second where events never stop to be lost."""
        wait = max(self._overrun + _OVERRUN_S - self._clock(), 0)
        if not wait:
            self._overrun = self._clock()
        self._hurry(wait)

    def _appeared(self, uuid: str, name: str) -> None:
        """Take a guest that libvirt has not told of yet. What contradicts libvirt is left for libvirt to tell."""
        known = self._reconciler.domains
        if uuid not in known and name not in known.values():
            self._reconciler.domains = known | {uuid: name}
        self._inbox.look_in(0, uuid)

    def _stir(self, pid: int, kernel: bool) -> None:
        """Look at a guest with a new thread: one look for those that come together, and seldom where they never end."""
        uuid, now = self._pids.get(pid), self._clock()
        if uuid is None:
            return
        if kernel:
            self._reconciler.observer.scan_anew()
        due, after = self._stirred.get(uuid, (0.0, 0.0))
        if now >= due:
            after = _STIR_S if now - due > 2 * after else min(2 * after, _STIR_MAX_S)
            self._stirred[uuid] = (self._inbox.look_in(after, uuid), after)
