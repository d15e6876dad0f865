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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from rtpind.core.audit import Kind, Level, Record
from rtpind.core.decision import Decision
from rtpind.core.ledger import EVERYONE
from rtpind.core.measures import Measures, by_verdict
from rtpind.core.model import Host
from rtpind.core.policy import HOUSEKEEPING, Policy
from rtpind.daemon import commands, policysource
from rtpind.daemon.events import URGENT, Event, Events
from rtpind.daemon.house import Housekeeper, OwnThreads
from rtpind.daemon.inbox import Backoff, Inbox
from rtpind.daemon.reconcile import Reconciler, View
from rtpind.host.control import Answer, ControlServer
from rtpind.host.journal import notify, watchdog_s
from rtpind.host.metrics import Metrics, Unwritten

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
Item: TypeAlias = Signalled | Asked | Unwritten | Event


class Service:
    """One run of the daemon."""

    def __init__(self, reconciler: Reconciler, policy_path: Path) -> None:
        self._reconciler = reconciler
        self._path = policy_path
        self._inbox: Inbox[Item] = Inbox()
        self._control = ControlServer(self._answer_from_thread, reconciler.file.directory)
        self._events = Events(reconciler, self._inbox, self._say, self._hurry)
        self._house = Housekeeper(OwnThreads(reconciler.observer.proc), reconciler.emit)
        self._metrics = Metrics(self._inbox.post)
        self._measures = Measures()
        self._stopping = False
        self._full_due = 0.0
        self._status = ""
        self._counts = "no pass yet"
        self._counted: Decision | None = None
        self._faults = 0
        self._backoff = Backoff()
        self._passes = 0

    # --- from other threads: only post -----------------------------------------------------------------------

    def _answer_from_thread(self, request: Answer, trusted: bool) -> Answer:
        if not trusted and not commands.only_looks(request):
            return {"error": "only root and the daemon's own user may change something"}
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
        self._publish()
        self._events.start(policy)
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
        self._events.stop()
        return 0

    def _turn(self, items: list[Item]) -> None:
        """Take what was posted, then do the passes that are due."""
        done = [self._survive(self._take, item) or isinstance(item, Asked) for item in items]
        due = self._inbox.take_due() & self._reconciler.domains.keys()
        if time.monotonic() >= self._full_due:
            done = [self._survive(self._full)]
        elif due and self._events.listed:  # else the other guests are not known, and their pCPUs would be given out
            done.append(self._survive(self._pass, due))
        if not all(done):  # a look at everything makes up for what was due
            self._hurry(self._backoff.next_s(self._policy().period_s))

    def _survive(self, do: Callable[..., object], *what: object) -> bool:
        """Do one thing; return whether it was done. The one place where a fault is caught: guests stay managed."""
        try:
            do(*what)
            return True
        except Exception as error:
            self._faults += 1
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {error}"  # of an OSError, that names the file, and repr() does not
            text = f"a fault in rtpind, one step was given up: {told} at {where.filename}:{where.lineno}"
            self._say(Kind.FAULT, text, Level.ERROR)
            return False

    def _take(self, item: Item) -> None:
        match item:
            case Signalled(number):
                if number == signal.SIGHUP:
                    self._reload()
                else:
                    self._stopping = True
            case Asked():
                self._asked(item)
            case Unwritten(path, why):
                text = f"the metrics cannot be written to {path}: {why}; guests are managed all the same"
                self._say(Kind.METRICS, text, Level.WARNING)
            case _:
                self._events.take(item)
                self._tell()

    def _asked(self, asked: Asked) -> None:
        """Answer a command, unless it has given up waiting."""
        if asked.given_up.is_set():
            return
        if not commands.only_looks(asked.request):
            self._full_due = 0.0  # also after a fault: half of it may be done
        answer: Answer = {"error": "a fault in rtpind; see the journal"}
        try:
            if self._events.listed:
                answer = commands.answer(asked.request, self._reconciler, self._about())
            else:
                why = f" ({self._events.lost})" if self._events.lost else ""
                error = f"libvirt has not answered yet{why}: rtpind does not know which guests run"
                answer = {"error": error, "daemon": self._about()}
        finally:
            asked.reply.put(answer)

    def _full(self) -> None:
        """Look at everything, and have libvirt asked who runs: the net under all events."""
        self._full_due = time.monotonic() + self._policy().period_s
        self._events.relist()
        if self._events.listed:  # before that there is nothing to look at, and nothing to forget
            began = time.monotonic()
            view = self._pass(None)
            self._measure(view, time.monotonic() - began)
            self._keep_house(view.snapshot.host)
            self._passes += 1

    def _pass(self, only: set[str] | None) -> View:
        view = self._reconciler.run(only)
        self._events.passed(view, only)
        self._count(view.decision)
        self._tell()
        return view

    def _hurry(self, seconds: float) -> None:
        self._full_due = min(self._full_due, time.monotonic() + seconds)

    # --- the policy -------------------------------------------------------------------------------------------

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
            for key in ("uri", "proc_events"):
                if getattr(policy, key) != getattr(self._policy(), key):
                    self._say(Kind.POLICY, f"daemon: {key} takes effect when rtpind is restarted", Level.WARNING)
            self._adopt(policy)
            self._say(Kind.POLICY, f"{self._path} read again, {self._mode()}", Level.NOTICE)
            self._full_due = 0.0
        self._measures = replace(self._measures, loaded=policy is not None)
        self._publish()
        notify(READY="1")

    def _adopt(self, policy: Policy) -> None:
        self._reconciler.policy = policy
        self._measures = replace(self._measures, policy=str(self._path), loaded_at=time.time())
        self._house.forget()
        # Realtime from the first full pass on, so that the threads that begin before do not inherit that.
        self._house.keep(policy.pool(HOUSEKEEPING, self._reconciler.observer.host()))

    def _keep_house(self, host: Host) -> None:
        """Keep rtpind's own threads where they belong: while it enforces, the loop and who tells of starts are FIFO.

        Not those that talk to others: FIFO takes no turns, and of two threads in libvirt's library, both FIFO on one
        pCPU, one spun for 19 s while the other never ran (seen), until the connection was given up.
        """
        urgent = {
            thread.native_id or 0
            for thread in threading.enumerate()
            if thread is threading.main_thread() or thread.name in URGENT
        }
        self._house.keep(self._policy().pool(HOUSEKEEPING, host), self._reconciler.own_priority, urgent)

    def _about(self) -> Mapping[str, Any]:
        return {
            "pid": os.getpid(),
            "mode": self._mode(),
            "policy": str(self._path),
            "libvirt": self._events.libvirt,
            "passes": self._passes,
            "faults": self._faults,
        }

    # --- metrics ----------------------------------------------------------------------------------------------

    def _measure(self, view: View, took_s: float) -> None:
        """Take the measures of a full pass, if anybody wants them."""
        if self._policy().metrics_dir:
            threads = by_verdict(view.decision, self._reconciler.memory, view.snapshot)
            self._measures = replace(self._measures, threads=threads, passed_at=time.time(), pass_s=took_s)
        self._publish()

    def _publish(self) -> None:
        """Have the measures written where the policy in force says; withdraw the file where it says so no more."""
        measures = replace(self._measures, tally=self._reconciler.tally, mode=self._mode())
        self._metrics.write(self._policy().metrics_dir, measures)

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

    def _count(self, decision: Decision) -> None:
        if decision is self._counted:
            return
        self._counted = decision
        managed = sum(guest.state.managed for guest in decision.guests)
        unplaced = sum(str(guest.state) in ("degraded", "left", "refused") for guest in decision.guests)
        wanted = sum(len(guest.wanted) for guest in decision.guests)
        self._counts = f"{managed} of {len(decision.guests)} guests managed, {wanted} threads"
        self._counts += f", {unplaced} without room" if unplaced else ""

    def _tell(self) -> None:
        """Keep systemctl's status line true; says nothing when it has not changed."""
        status = f"{self._mode()}; {self._counts}; libvirt {self._events.libvirt}"
        if status != self._status:
            self._status = status
            notify(STATUS=status)
