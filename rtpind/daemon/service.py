# SPDX-License-Identifier: GPL-2.0-or-later
"""The loop: waits for events, signals and the timer, and has the reconciler do its passes.

Everything happens on this one thread; libvirt, the control socket and signal handlers only post into the inbox. So
no lock guards the state, and a libvirt that hangs delays nothing.
"""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rtpind.core.audit import Kind, Level, Record
from rtpind.core.ledger import EVERYONE, Process
from rtpind.core.model import Guest
from rtpind.core.policy import HOUSEKEEPING, Policy
from rtpind.daemon import commands, policysource
from rtpind.daemon.inbox import Inbox
from rtpind.daemon.reconcile import Reconciler, View
from rtpind.host import sched
from rtpind.host.control import Answer, ControlServer
from rtpind.host.details import Described
from rtpind.host.hypervisor import METADATA, Changed, Domain, Hypervisor, Listed, Lost
from rtpind.host.journal import notify, watchdog_s
from rtpind.host.pidfile import pid_of
from rtpind.host.udev import CpuEvents, CpusChanged, Unheard

#: Looks after an event: threads that begin late (nx-recovery at the first KVM_RUN, vhost, workers).
_FOLLOW_UPS_S = (0.05, 0.25, 1.0, 5.0)
#: The second look before FIFO, and the interval while libvirt still moves threads of a guest that starts.
_AGAIN_S = 0.003
_STARTING_S = 0.02
_ANSWER_S = 10.0


@dataclass(frozen=True, slots=True)
class Signalled:
    """A signal arrived."""

    number: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A command asks something; the answer goes into ``reply``."""

    request: Answer
    reply: queue.SimpleQueue[Answer] = field(default_factory=queue.SimpleQueue)
    given_up: threading.Event = field(default_factory=threading.Event)


#: Whatever the inbox may hold.
Item: TypeAlias = Signalled | Asked | Listed | Changed | Lost | Described | CpusChanged | Unheard


class Service:
    """One run of the daemon."""

    def __init__(self, reconciler: Reconciler, policy_path: Path) -> None:
        self._reconciler = reconciler
        self._path = policy_path
        self._inbox: Inbox[Item] = Inbox()
        self._control = ControlServer(self._answer_from_thread, reconciler.file.directory)
        self._cpus = CpuEvents(self._inbox.post)
        self._hypervisor: Hypervisor | None = None
        self._libvirt = "connecting"
        self._stopping = False
        self._full_due = 0.0
        self._status = ""
        self._counts = "no pass yet"
        self._listed_once = False
        self._asked: dict[str, Process] = {}  # guests whose definition libvirt was asked for …
        self._untold: dict[str, Described] = {}  # … and what kept it from telling, as last said
        self._faults = 0
        self._passes = 0

    # --- from other threads: only post -----------------------------------------------------------------------

    def _answer_from_thread(self, request: Answer) -> Answer:
        asked = Asked(request)
        self._inbox.post(asked)
        try:
            return asked.reply.get(timeout=_ANSWER_S)
        except queue.Empty:
            asked.given_up.set()  # what was answered with an error must not happen later
            return {"error": "the daemon is busy"}

    def _on_signal(self, number: int, _frame: object) -> None:
        self._inbox.post(Signalled(number))

    # --- the loop ---------------------------------------------------------------------------------------------

    def run(self, policy: Policy) -> int:
        """Run until SIGTERM or SIGINT; return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)
        self._adopt(policy)
        self._hypervisor = Hypervisor(policy.uri, self._inbox.post)
        self._hypervisor.start()
        self._cpus.start()
        self._control.start()
        self._say(Kind.DAEMON, f"started, {self._mode()}, policy {self._path}", Level.NOTICE)
        notify(READY="1", STATUS=f"{self._mode()}; connecting to libvirt")
        patience = watchdog_s()
        longest = patience / 3 if patience else 3600.0
        while not self._stopping:
            notify(WATCHDOG="1")
            period = self._policy().period_s
            wait = min(longest, max(self._full_due - time.monotonic(), 0), period)
            self._turn(self._inbox.wait(wait))
        notify(STOPPING="1", STATUS="stopping; guests stay as they are")
        self._say(Kind.DAEMON, "stopped; guests stay as they are", Level.NOTICE)
        self._control.stop()
        self._cpus.stop()
        self._hypervisor.stop()
        return 0

    def _turn(self, items: list[Item]) -> None:
        """Take what was posted, then do the passes that are due."""
        for item in items:
            self._survive(self._take, item)
        due = self._inbox.take_due() & self._reconciler.domains.keys()
        if time.monotonic() >= self._full_due:
            self._survive(self._full)
        elif due and self._listed_once:  # else the other guests are not known, and their pCPUs would be given out
            self._survive(self._pass, due)

    def _survive(self, do: Callable[..., None], *what: object) -> None:
        """Do one thing. The one place where a fault is caught: guests stay managed whatever one thing trips over."""
        try:
            do(*what)
        except Exception as error:
            self._faults += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"a fault in rtpind, one step was given up: {error!r} at {where.filename}:{where.lineno}"
            self._say(Kind.FAULT, text, Level.ERROR)

    def _take(self, item: Item) -> None:
        match item:
            case Signalled(number):
                if number == signal.SIGHUP:
                    self._reload()
                else:
                    self._stopping = True
            case Asked(request, reply, given_up):
                if given_up.is_set():
                    return
                answer: Answer = {"error": "a fault in rtpind; see the journal"}
                try:
                    if self._listed_once:
                        answer = commands.answer(request, self._reconciler, self._about())
                    else:
                        answer = {"error": "libvirt has not answered yet: rtpind does not know which guests run"}
                finally:
                    reply.put(answer)
                if request.get("do") not in commands.LOOKS:
                    self._full_due = 0.0
            case Listed(domains, fresh):
                self._listed(domains, fresh)
            case Changed():
                self._changed(item)
            case Described():
                self._described(item)
            case CpusChanged() | Unheard():
                self._hotplugged(item)
            case Lost(why):
                self._libvirt = "away"
                text = f"libvirt is away ({why}); the guests known are kept in place, and it is tried again"
                self._say(Kind.LIBVIRT, text, Level.WARNING)
                self._tell()

    def _full(self) -> None:
        """Look at everything, and have libvirt asked who runs: the net under all events."""
        assert self._hypervisor is not None
        self._full_due = time.monotonic() + self._policy().period_s
        if self._libvirt == "connected":
            self._hypervisor.relist()
        if self._listed_once:  # before that there is nothing to look at, and nothing to forget
            self._pass(None)
            self._passes += 1

    def _pass(self, only: set[str] | None) -> None:
        view = self._reconciler.run(only)
        for guest in view.snapshot.guests:
            if guest.uuid not in view.plan.again:
                continue
            if guest.starting or guest.doubtful or any(not thread.settled for thread in guest.threads):
                self._inbox.look_in(_STARTING_S, guest.uuid)
            # In place, and only the second look is missing. A guest that is not in place waits for the period.
            if self._reconciler.enforcing and guest.process in self._reconciler.memory.right_since:
                self._inbox.look_in(_AGAIN_S, guest.uuid)
        self._ask_about(view.snapshot.guests)
        self._tell(view)

    def _ask_about(self, guests: Iterable[Guest]) -> None:
        """Have libvirt asked once for the definition of each guest that is new, or is another process than before."""
        before, self._asked = self._asked, {guest.uuid: guest.process for guest in guests}
        self._untold = {uuid: item for uuid, item in self._untold.items() if uuid in self._asked}
        for uuid, process in self._asked.items() - before.items():
            self._describe(uuid, process)

    def _describe(self, uuid: str, process: Process) -> None:
        assert self._hypervisor is not None
        self._asked[uuid] = process
        self._hypervisor.describe(uuid, process)

    # --- events -----------------------------------------------------------------------------------------------

    def _listed(self, domains: tuple[Domain, ...], fresh: bool) -> None:
        self._listed_once = True
        known = self._reconciler.domains
        listed = {domain.uuid: domain.name for domain in domains}
        names = set(listed.values())
        # A list may be older than an event: what runs is dropped only when its process is gone.
        later = {uuid: name for uuid, name in known.items() if name not in names and pid_of(name) is not None}
        self._reconciler.domains = later | listed
        if fresh:
            self._libvirt = "connected"
            self._say(Kind.LIBVIRT, f"connected to libvirt, {len(domains)} guests run", Level.INFO)
            self._full_due = 0.0
            self._asked = {}  # what changed while libvirt was away nobody has told
        for uuid in self._reconciler.domains.keys() - known.keys():
            self._inbox.look_in(0, uuid)

    def _changed(self, item: Changed) -> None:
        domain = item.domain
        if item.redefined:
            process = self._reconciler.observer.process_of(domain.name)
            if process is not None:
                self._describe(domain.uuid, process)
        if item.what == METADATA:
            return
        if item.what == "stopped":
            # Only the pid file's lock says whether it is gone; a reboot keeps the process (promise 4.4).
            self._inbox.look_in(0, domain.uuid)
            self._full_due = min(self._full_due, time.monotonic() + 0.05)
            return
        # One guest for a name: it may have been undefined and defined anew, with another UUID.
        others = {uuid: name for uuid, name in self._reconciler.domains.items() if name != domain.name}
        self._reconciler.domains = others | {domain.uuid: domain.name}
        for seconds in (0.0, *_FOLLOW_UPS_S):
            self._inbox.look_in(seconds, domain.uuid)

    def _described(self, item: Described) -> None:
        """Take a guest's traits, if it still is the process that it was when libvirt was asked.

        Then it was that process all the while, so that the answer is about no other. If not, the next look asks anew.
        """
        name = self._reconciler.domains.get(item.uuid)
        if name is None or self._reconciler.observer.process_of(name) != item.process:
            return
        if item.traits is None:
            if self._untold.get(item.uuid) != item:
                text = f"{name}: libvirt does not tell its definition ({item.trouble}); it is managed without"
                self._say(Kind.LIBVIRT, text, Level.WARNING, GUEST=name, GUEST_UUID=item.uuid, CAUSE=item.trouble)
            self._untold[item.uuid] = item
        elif self._reconciler.observer.describe(item.uuid, item.process, item.traits):
            self._inbox.look_in(0, item.uuid)

    def _hotplugged(self, item: CpusChanged | Unheard) -> None:
        """Look at everything at once: what is online now, and who has lost a pCPU, is said by the pass."""
        if isinstance(item, CpusChanged):
            self._adopt(self._policy())  # the housekeeping pool may be another one
            self._full_due = 0.0
            return
        text = (
            f"the kernel's events about pCPUs cannot be heard ({item.why}): one that goes offline or comes online is "
        )
        text += f"noticed at the next look at everything, within {self._policy().period_s:g} s"
        self._say(Kind.HOTPLUG, text, Level.WARNING, CAUSE=item.why)

    def _reload(self) -> None:
        """Read the policy again; a bad one is refused and the running one stays (promise 6)."""
        notify(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))
        host = self._reconciler.observer.host()
        policy, problems = policysource.read(self._path, host)
        for problem in problems:
            kind, level = (Kind.POLICY, Level.WARNING) if problem.warning else (Kind.POLICY_BAD, Level.ERROR)
            self._say(kind, problem.text(str(self._path)), level, LINE=str(problem.line), REASON="reload")
        if policy is None:
            self._say(Kind.POLICY_BAD, f"{self._path} has problems; the running policy stays", Level.ERROR)
        else:
            if policy.uri != self._policy().uri:
                self._say(Kind.POLICY, "daemon: uri takes effect when rtpind is restarted", Level.WARNING)
            self._adopt(policy)
            self._say(Kind.POLICY, f"{self._path} read again, {self._mode()}", Level.NOTICE)
            self._full_due = 0.0
        notify(READY="1")

    def _adopt(self, policy: Policy) -> None:
        self._reconciler.policy = policy
        host = self._reconciler.observer.host()
        own = policy.pool(HOUSEKEEPING, host)
        if own:
            for thread in threading.enumerate():
                if thread.native_id is not None and os.sched_getaffinity(thread.native_id) != set(own):
                    sched.set_affinity(thread.native_id, own)

    def _about(self) -> Mapping[str, Any]:
        return {
            "pid": os.getpid(),
            "mode": self._mode(),
            "policy": str(self._path),
            "libvirt": self._libvirt,
            "passes": self._passes,
            "faults": self._faults,
        }

    # --- telling ----------------------------------------------------------------------------------------------

    def _policy(self) -> Policy:
        policy = self._reconciler.policy
        assert policy is not None
        return policy

    def _mode(self) -> str:
        if EVERYONE in self._reconciler.ledger.hands_off:
            return "paused"
        return "enforce" if self._reconciler.enforcing else "observe"

    def _say(self, kind: Kind, text: str, level: Level, **fields: str) -> None:
        self._reconciler.emit(Record(kind, text, level, fields))

    def _tell(self, view: View | None = None) -> None:
        """Keep systemctl's status line true; says nothing when it has not changed."""
        if view is not None:
            managed = sum(guest.state.managed for guest in view.decision.guests)
            unplaced = sum(str(guest.state) in ("degraded", "left", "refused") for guest in view.decision.guests)
            wanted = sum(len(guest.wanted) for guest in view.decision.guests)
            self._counts = f"{managed} of {len(view.decision.guests)} guests managed, {wanted} threads"
            self._counts += f", {unplaced} without room" if unplaced else ""
        status = f"{self._mode()}; {self._counts}; libvirt {self._libvirt}"
        if status != self._status:
            self._status = status
            notify(STATUS=status)
