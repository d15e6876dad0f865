# SPDX-License-Identifier: GPL-2.0-or-later
"""Conditions that stand for a while → records, said once and again only when they change (promise 9). Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rtpind.core.audit import (
    Kind,
    Level,
    Outcome,
    Record,
    Result,
    guest_fields,
    of_outcome,
    protection_unknown,
    thread_fields,
)
from rtpind.core.decision import Decision, GuestDecision, State
from rtpind.core.memory import Memory
from rtpind.core.model import Guest, Host, Snapshot, Thread
from rtpind.core.plan import Plan
from rtpind.core.policy import Drift
from rtpind.core.verdict import Verdict, judge

Notice = tuple[tuple[object, ...], Record]


def standing(
    snapshot: Snapshot, decision: Decision, plan: Plan, memory: Memory, outcomes: Sequence[Outcome]
) -> Iterator[Notice]:
    """Yield (what makes it the same condition, its record) for everything that stands as of this pass."""
    guests = {guest.guest.uuid: guest.guest for guest in decision.guests}
    for found in decision.guests:
        yield from _of_guest(found)
        if found.in_order and not any(thread.id in memory.fights for thread in found.guest.threads if memory.fights):
            continue  # every thread of it is ok
        for thread in found.guest.threads:
            yield from _of_thread(thread, found, decision, memory, snapshot)
    for outcome in outcomes:
        # What was not done is found anew at each pass; what was done is said as it happens.
        if outcome.result in (Result.WOULD, Result.BLOCKED):
            step = outcome.step
            record = of_outcome(outcome, guests[step.thread.guest], snapshot.host)
            assert record is not None
            key = (str(outcome.result), step.thread.id, step.cpus, step.scheduling, outcome.before, outcome.beside)
            yield key, record
    drifts = {guest.guest.uuid: guest.drift for guest in decision.guests}
    for thread, wanted in plan.drifted:
        guest, drift = guests[thread.guest], drifts[thread.guest]
        if drift is not Drift.IGNORE:
            text = f"{_who(thread, guest)}: moved by somebody: pCPU {thread.now.cpus} {thread.now.scheduling}, "
            text += f"its place is pCPU {wanted.cpus}" + (f" fifo:{wanted.priority}" if wanted.priority else "")
            fields = thread_fields(thread, guest) | {
                "OLD_CPUS": str(thread.now.cpus),
                "WANTED_CPUS": str(wanted.cpus),
                "OLD_SCHED": str(thread.now.scheduling),
                "REASON": "drift",
                "RESULT": "repair" if drift is Drift.REPAIR else "warn",
            }
            yield (
                ("drift", thread.id, wanted),
                Record(kind=Kind.DRIFT, message=text, level=Level.WARNING, fields=fields),
            )
    unknown = protection_unknown(snapshot.host)
    if unknown and any(wanted.priority for wanted in decision.wanted().values()):
        yield ("protection", unknown), Record(kind=Kind.FIFO_WITHHELD, message=unknown, level=Level.NOTICE)


#: What a guest without the place that its class asks for has in its stead.
_LOST = {
    State.CROWDED: "placed with a step lost: {}",
    State.REMOTE: "placed with a step lost: {}",
    State.DEGRADED: "not placed: {}; floats in housekeeping without FIFO",
    State.LEFT: "not placed: {}; left as it is",
    State.REFUSED: "not placed: {}; left as it is",
}


_SAID = (*_LOST, State.UNCLAIMED)


def _of_guest(found: GuestDecision) -> Iterator[Notice]:
    guest, key = found.guest, (found.guest.uuid, found.guest.process)
    if found.state not in _SAID and not guest.contested:
        return
    fields = guest_fields(guest) | {"RULE": found.rule, "REASON": found.reason, "RESULT": str(found.state)}
    if found.state in _LOST:
        text = f"{guest.name}: {_LOST[found.state].format(found.reason)}"
        yield ("guest", *key, text), Record(kind=Kind.NOT_PLACED, message=text, level=Level.WARNING, fields=fields)
    if found.state is State.UNCLAIMED:
        text = f"{guest.name}: {found.reason}; it keeps its pCPUs until it stops"
        yield ("guest", *key, text), Record(kind=Kind.UNCLAIMED, message=text, level=Level.NOTICE, fields=fields)
    for label in guest.contested:
        text = f"{guest.name}: two threads claim to be {label}; neither is treated as one"
        yield ("contested", *key, label), Record(kind=Kind.CONTESTED, message=text, level=Level.ERROR, fields=fields)


def _of_thread(
    thread: Thread, found: GuestDecision, decision: Decision, memory: Memory, snapshot: Snapshot
) -> Iterator[Notice]:
    verdict, why = judge(thread, found, decision, memory, snapshot)
    if verdict not in (Verdict.INTRUDER, Verdict.NO_FIFO, Verdict.NOT_PLACED):
        return
    fields = thread_fields(thread, found.guest) | {"RULE": found.rule, "CAUSE": why, "RESULT": str(verdict)}
    text = f"{_who(thread, found.guest)}: {why}"
    if verdict is Verdict.INTRUDER:
        yield ("intruder", thread.id, why), Record(Kind.INTRUDER, text, Level.WARNING, fields)
    elif verdict is Verdict.NO_FIFO and memory.refused.get(thread.id) is None:
        yield ("no-fifo", thread.id, why), Record(Kind.FIFO_WITHHELD, f"{text}: no FIFO", Level.WARNING, fields)
    elif verdict is Verdict.NOT_PLACED and thread.id in found.roomless:
        yield ("roomless", thread.id), Record(Kind.NOT_PLACED, f"{text}: no free pCPU", Level.WARNING, fields)


def hotplug(before: Snapshot, host: Host) -> Iterator[Record]:
    """Yield a record of the pCPUs that came or went since ``before``, and one of each thread that lost its last one."""
    gone, come = before.host.online - host.online, host.online - before.host.online
    fields = {"OLD_CPUS": str(before.host.online), "NEW_CPUS": str(host.online)}
    if come:
        yield Record(Kind.HOTPLUG, f"pCPU {come} came online", Level.NOTICE, fields)
    if gone:
        yield Record(Kind.HOTPLUG, f"pCPU {gone} went offline", Level.WARNING, fields)
    for guest in before.guests if gone else ():
        for thread in guest.threads:
            had = thread.now.cpus & before.host.online
            if had and had <= gone:
                text = f"{_who(thread, guest)}: its pCPU {had} went offline; the kernel has put it elsewhere"
                of_thread = thread_fields(thread, guest) | {"OLD_CPUS": str(had)}
                yield Record(Kind.HOTPLUG, text, Level.WARNING, of_thread)


def fight(thread: Thread, guest: Guest, length_s: float) -> Record:
    """Return the record of a fight that begins."""
    text = (
        f"{_who(thread, guest)}: something else moves it as often as rtpind puts it back; left alone for "
        f"{length_s / 60:.0f} min, without FIFO where it is off its place (rtpinctl status shows it; look for TuneD, "
        "a hook script or a cron job)"
    )
    fields = thread_fields(thread, guest) | {"REASON": "fight", "RESULT": "paused"}
    return Record(kind=Kind.FIGHT, message=text, level=Level.ERROR, fields=fields)


def _who(thread: Thread, guest: Guest) -> str:
    return f"{guest.name}: {thread.label} ({thread.comm}, tid {thread.id.tid})"
