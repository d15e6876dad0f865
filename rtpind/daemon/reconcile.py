# SPDX-License-Identifier: GPL-2.0-or-later
"""One pass: observe → place → plan → apply → audit. Idempotent; no loop, no waiting; the loop is :mod:`.service`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from operator import is_

from rtpind.core import plan as planning
from rtpind.core.audit import Kind, Level, Outcome, Record, Result, guest_fields, of_outcome, of_start
from rtpind.core.decision import Decision
from rtpind.core.learn import learn
from rtpind.core.ledger import EVERYONE, HandsOff, Ledger, Off, Process
from rtpind.core.measures import Tally
from rtpind.core.memory import Memory
from rtpind.core.model import Guest, Snapshot, Thread
from rtpind.core.notices import fight, hotplug, standing
from rtpind.core.offplace import Reading, Starts, ended
from rtpind.core.placement import place
from rtpind.core.plan import Plan
from rtpind.core.policy import Mode, Policy
from rtpind.daemon.apply import Kernel, RealKernel, apply, pretend
from rtpind.daemon.observe import Observer
from rtpind.host.ledgerfile import LedgerFile


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a pass knows before it acts; also what status, plan and explain show."""

    snapshot: Snapshot
    decision: Decision
    plan: Plan


class Reconciler:
    """Holds what passes share: the policy, which guests run, the memory and the ledger."""

    def __init__(
        self,
        observer: Observer,
        ledger_file: LedgerFile,
        emit: Callable[[Record], None],
        *,
        kernel: Kernel | None = None,
        observe_only: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.observer = observer
        self.kernel = kernel or RealKernel(observer.proc, observer.cgroups)
        self.file = ledger_file
        self.emit = emit
        self.observe_only = observe_only
        self.clock = clock
        self.policy: Policy | None = None
        self.domains: dict[str, str] = {}  # UUID → name
        self.memory = Memory()
        self.ledger = Ledger()
        self._seen: Snapshot | None = None  # by the last pass
        self._decided: Decision | None = None  # by the last pass
        self.tally = Tally()
        self._kept: tuple[Ledger | None, tuple[Guest, ...]] = (None, ())  # a ledger that knows only of these guests
        self._unwritable = ""  # why the ledger could not be written, as last said

    def open_ledger(self) -> None:
        """Read the ledger; set a damaged one aside, on record."""
        self.ledger, trouble = self.file.read()
        if trouble:
            aside = self.file.set_aside()
            text = f"the ledger is unusable and was set aside as {aside}: {trouble}; what threads had before is unknown"
            self.emit(Record(Kind.LEDGER, text, Level.ERROR))
        self.memory = replace(self.memory, incumbents=self.ledger.incumbents())

    @property
    def enforcing(self) -> bool:
        """Whether passes act."""
        return self.policy is not None and self.policy.mode is Mode.ENFORCE and not self.observe_only

    @property
    def own_priority(self) -> int:
        """The FIFO priority of rtpind's own threads: 0 unless it acts, and above those of all guests as last seen."""
        if self.policy is None or not self.enforcing:
            return 0
        threads = self._seen.threads() if self._seen is not None else ()
        return self.policy.own_priority(max((thread.now.scheduling.priority for thread in threads), default=0))

    def view(self, only: Collection[str] | None = None, policy: Policy | None = None) -> View:
        """Look, and decide what should be done, by the running policy or another; changes nothing."""
        policy = policy or self.policy
        assert policy is not None
        while True:
            snapshot = self.observer.look(self.domains, self.memory, only)
            memory = self._remembered(snapshot)
            decision = place(policy, snapshot, memory, self.ledger, time.time(), self._decided)
            plan = planning.make(decision, snapshot, memory)
            acted = {step.thread.guest for step in plan.steps}
            if only is None or acted <= set(only):
                return View(snapshot=snapshot, decision=decision, plan=plan)
            only = acted.union(only)  # the others are as they were last seen, which is nothing to act on

    def run(self, only: Collection[str] | None = None) -> View:
        """Do one pass over all guests, or ``only`` some; returns what was found and planned."""
        assert self.policy is not None
        view = self.view(only)
        self.memory = self._remembered(view.snapshot)
        if self._seen is not None:
            for record in hotplug(self._seen, view.snapshot.host):
                self.emit(record)
        self._seen, self._decided = view.snapshot, view.decision
        readings: list[Reading] = []
        outcomes = self._act(view, readings)
        before = self.memory.starts
        self.memory = learn(self.memory, view.snapshot, view.decision, view.plan, outcomes, self.clock(), readings)
        self._say(view, outcomes)
        self._say_started(view.snapshot, before)
        if only is None:
            self._prune(view.snapshot)
        return view

    def _remembered(self, snapshot: Snapshot) -> Memory:
        """Return the memory by which a look is judged."""
        same = self._seen is None or self._seen.host.online == snapshot.host.online
        return self.memory if same else self.memory.after_hotplug()

    def _act(self, view: View, readings: list[Reading]) -> list[Outcome]:
        """Carry out the plan, as far as it is to be; add CPU times of vCPUs whose start is not over, read after it."""
        if not view.plan.steps:
            return []
        if not self.enforcing:
            return pretend(view.plan)
        if not self._record(view):
            return []
        return self._apply(view.plan, view.snapshot, readings)

    def _apply(self, plan: Plan, snapshot: Snapshot, readings: list[Reading] | None = None) -> list[Outcome]:
        guests = {guest.uuid: guest for guest in snapshot.guests}

        def say(outcome: Outcome) -> None:
            id_ = outcome.step.thread.id
            if readings is not None and outcome.after is not None and id_ in snapshot.ran:
                ran_ns = self.observer.proc.ran_ns(id_)
                if ran_ns is not None:
                    readings.append(Reading(id_, outcome.after, ran_ns))
            record = of_outcome(outcome, guests[outcome.step.thread.guest], snapshot.host)
            if record is not None and outcome.result is not Result.BLOCKED:  # that stands: see _say
                self.emit(record)

        outcomes = apply(plan, snapshot, self.kernel, say)
        self.tally = self.tally.plus(outcomes)
        return outcomes

    def _record(self, view: View) -> bool:
        """Write down what threads have before they are touched (promise 8); without that nothing is touched.

        With the first touch of a guest all its threads are, but for those that libvirt has yet to move: they are
        when they are touched themselves. So is a helper that began later: it inherited a place that rtpind gave,
        and what it had is what it would have inherited without rtpind, see :func:`rtpind.core.plan.release`.
        """
        touched = {step.thread.id for step in view.plan.steps if not step.gated}
        threads: list[Thread] = []
        for guest in view.snapshot.guests:
            if not any(thread.id in touched for thread in guest.threads):
                continue
            fresh = guest.process not in self.ledger.managed()
            main = self.ledger.originals.get(planning.main_thread(guest))
            for thread in guest.threads:
                if main is not None and planning.follows_main(thread):
                    threads += [replace(thread, now=main.placement)] if thread.id in touched else []
                elif thread.id in touched or (fresh and thread.settled):
                    threads.append(thread)
        return self._keep(self.ledger.recording(threads))

    def _keep(self, ledger: Ledger) -> bool:
        if ledger is self.ledger:
            return True
        try:
            self.file.write(ledger)
        except OSError as error:
            text = f"the ledger cannot be written ({error}); no thread is touched that is not in it"
            if text != self._unwritable:
                self.emit(Record(Kind.LEDGER, text, Level.ERROR))
            self._unwritable = text
            return False
        self._unwritable = ""
        self.ledger = ledger
        return True

    def _say(self, view: View, outcomes: list[Outcome]) -> None:
        """Send what stands now and did not before; remember what was said."""
        assert self.policy is not None
        guests = {guest.uuid: guest for guest in view.snapshot.guests}
        if self.enforcing:
            for thread in view.plan.fighters:
                self.emit(fight(thread, guests[thread.guest], self.memory.fights[thread.id].length_s))
        notices = dict(standing(view.snapshot, view.decision, view.plan, self.memory, outcomes))
        for key, record in notices.items():
            if key not in self.memory.said:
                self.emit(record)
        self.memory = replace(self.memory, said=frozenset(notices))

    def _say_started(self, snapshot: Snapshot, before: Starts) -> None:
        """Send the off-place time of vCPUs whose start is over as of this pass."""
        over = dict(ended(before, self.memory.starts))
        for guest in snapshot.guests if over else ():
            if guest.process in over:
                self.emit(of_start(guest, over[guest.process]))

    def _prune(self, snapshot: Snapshot) -> None:
        ledger, guests = self._kept
        same = len(snapshot.guests) == len(guests) and all(map(is_, snapshot.guests, guests))
        if same and ledger is self.ledger and not ledger.hands_off:
            return  # the same threads of the same guests
        seen = {guest.process for guest in snapshot.guests}
        gone = frozenset(process for process in self.ledger.processes() - seen if not self._alive(process))
        self._keep(self.ledger.pruned(snapshot, gone, time.time()))
        self._kept = (None if self.ledger.processes() - seen else self.ledger, snapshot.guests)

    def _alive(self, process: Process) -> bool:
        try:
            return self.observer.proc.stat(process[0]).start == process[1]
        except (FileNotFoundError, ProcessLookupError):
            return False  # anything else says nothing about it: its originals are kept

    def release(self, names: Collection[str]) -> dict[str, str]:
        """Put guests (names or UUIDs; none: all) back and leave them alone. Return name → what became of it."""
        snapshot = self.observer.look(self.domains, self.memory)
        guests = self._named(snapshot, names)
        off = {guest.uuid: Off(HandsOff.RELEASED, guest.process) for guest in guests}
        # First hands off, then put back: a crash in between must not lead to placing it again.
        if not self._keep(replace(self.ledger, hands_off={**self.ledger.hands_off, **off})):
            return {guest.name: "not released: the ledger cannot be written" for guest in guests}
        plan = planning.release(guests, self.ledger)
        outcomes = self._apply(plan, snapshot)
        failed = {o.step.thread.guest for o in outcomes if o.result in (Result.REFUSED, Result.NARROWED)}
        steps = {guest.uuid: sum(o.done and o.step.thread.guest == guest.uuid for o in outcomes) for guest in guests}
        ledger = self.ledger
        said: dict[str, str] = {}
        for guest in guests:
            if guest.uuid in failed:
                said[guest.name] = "released, but not every thread could be put back (see the journal)"
            else:
                ledger = ledger.without(guest.process)
                said[guest.name] = f"released, {steps[guest.uuid]} changes"
            self._say_hands(guest, said[guest.name], "released")
        self._keep(ledger)
        return said

    def pause(self, names: Collection[str], seconds: float | None) -> dict[str, str]:
        """Leave guests as they are, for ``seconds`` or until managed again; no names: all, also those to come."""
        snapshot = self.observer.look(self.domains, self.memory)
        until = None if seconds is None else time.time() + seconds
        guests = self._named(snapshot, names)
        off = {guest.uuid: Off(HandsOff.PAUSED, guest.process, until) for guest in guests}
        if not names:
            off = {EVERYONE: Off(HandsOff.PAUSED, None, until)}
        kept = {
            uuid: entry
            for uuid, entry in self.ledger.hands_off.items()
            if entry.kind is HandsOff.RELEASED and (uuid not in off or entry.process == off[uuid].process)
        }
        if not self._keep(replace(self.ledger, hands_off={**self.ledger.hands_off, **off, **kept})):
            return {guest.name: "not paused: the ledger cannot be written" for guest in guests}
        return self._answer(guests, "paused", everyone=not names)

    def manage(self, names: Collection[str]) -> dict[str, str]:
        """Manage guests again that were released or paused; no names: all."""
        snapshot = self.observer.look(self.domains, self.memory)
        guests = self._named(snapshot, names)
        if names and EVERYONE in self.ledger.hands_off:
            raise LookupError("every guest is paused; rtpinctl manage without a name ends that")
        back = {guest.uuid for guest in guests} | (set() if names else set(self.ledger.hands_off))
        kept = {uuid: off for uuid, off in self.ledger.hands_off.items() if uuid not in back}
        if not self._keep(replace(self.ledger, hands_off=kept)):
            return {guest.name: "not managed: the ledger cannot be written" for guest in guests}
        return self._answer(guests, "managed", everyone=not names)

    def _answer(self, guests: Iterable[Guest], what: str, *, everyone: bool) -> dict[str, str]:
        said = {guest.name: what for guest in guests}
        for guest in guests:
            self._say_hands(guest, what, what)
        return said or ({"every guest": what} if everyone else {})

    def _say_hands(self, guest: Guest, text: str, result: str) -> None:
        fields = guest_fields(guest) | {"RESULT": result, "REASON": "rtpinctl"}
        self.emit(Record(Kind.RELEASED, f"{guest.name}: {text}", Level.NOTICE, fields))

    @staticmethod
    def _named(snapshot: Snapshot, names: Collection[str]) -> list[Guest]:
        """Return the guests named; raises LookupError for a name that is not there."""
        found = {name: guest for guest in snapshot.guests for name in (guest.name, guest.uuid)}
        missing = sorted(name for name in names if name not in found)
        if missing:
            raise LookupError(f"no running guest is called {', '.join(missing)}")
        chosen = {found[name].uuid for name in names} if names else {guest.uuid for guest in snapshot.guests}
        return [guest for guest in snapshot.guests if guest.uuid in chosen]
