# SPDX-License-Identifier: GPL-2.0-or-later
"""What one pass teaches: memory before, what was seen, decided and done → memory after. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from rtpind.core.audit import Outcome, Result, refusal_text
from rtpind.core.decision import Decision, GuestDecision
from rtpind.core.memory import FIGHT_WINDOW_S, Memory, Refusal, Wanted, conditions
from rtpind.core.model import Placement, Snapshot, Thread, ThreadId
from rtpind.core.offplace import Reading, Starts, account
from rtpind.core.plan import Phase, Plan, Reason, in_place

#: A guest must have been right this long before a thread found elsewhere counts as moved by somebody: while a
#: guest starts, libvirt itself still sets affinities.
SETTLED_S = 0.1


def learn(
    memory: Memory,
    snapshot: Snapshot,
    decision: Decision,
    plan: Plan,
    outcomes: Sequence[Outcome],
    finished: float,
    readings: Sequence[Reading] = (),
) -> Memory:
    """Return what the daemon knows after a pass.

    ``finished``: monotonic seconds when the last step was read back. ``readings``: CPU times after steps on vCPUs.
    """
    # No plan has a step for a calm guest: everybody with a place is on it.
    loud = tuple(
        found
        for found in decision.guests
        if (process := found.guest.process) not in memory.calm or memory.decided[process] is not found
    )
    gone = memory.decided.keys() - {found.guest.process for found in decision.guests}
    starts = account(memory.starts, snapshot, decision, readings)
    if gone:
        starts = {process: start for process, start in starts.items() if process not in gone}
    if len(loud) == len(decision.guests):
        taught = _taught(memory.pruned(snapshot), snapshot, decision, plan, outcomes, finished, starts)
    elif not loud and not gone:
        taught = memory
    else:  # what is known of the others stands
        theirs, others = memory.split(gone | {found.guest.process for found in loud}, loud)
        part = replace(snapshot, guests=tuple(found.guest for found in loud))
        theirs = theirs.pruned(part)
        taught = others.joined(_taught(theirs, part, replace(decision, guests=loud), plan, outcomes, finished, starts))
    return taught if taught.starts is starts else replace(taught, starts=starts)


def _taught(
    memory: Memory,
    snapshot: Snapshot,
    decision: Decision,
    plan: Plan,
    outcomes: Sequence[Outcome],
    finished: float,
    starts: Starts,
) -> Memory:
    """Return what a pass over all these guests leaves of what was known of them, and adds to it."""
    wanted = decision.wanted()
    after = {outcome.step.thread.id: outcome.after for outcome in outcomes if outcome.after is not None}
    applied = [outcome for outcome in outcomes if outcome.result is Result.APPLIED]
    # A thread that is held off its place without FIFO is still one that somebody moved.
    touched = {outcome.step.thread.id for outcome in applied if outcome.step.reason is not Reason.SAFETY}
    refused = _refused(memory, snapshot, wanted, outcomes)
    taught = replace(memory, refused=refused)
    right = _right_since(taught, snapshot, decision, after, finished)
    demoted = {outcome.step.thread.id for outcome in applied if outcome.step.phase is Phase.DEMOTE}
    repaired = _repaired(memory, wanted, applied)
    fights = dict(memory.fights)
    repairs = dict(memory.repairs)
    for id_ in repaired:
        recent = tuple(time for time in repairs.get(id_, ()) if finished - time <= FIGHT_WINDOW_S)
        repairs[id_] = (*recent, finished)
    for thread in plan.fighters:
        fights[thread.id] = memory.next_pause(thread.id, finished)
        repairs.pop(thread.id, None)
    taught = replace(
        taught,
        incumbents=_incumbents(memory, snapshot.threads()),
        doubtful=frozenset(
            (guest.process, label) for guest in snapshot.guests for label in guest.doubtful + guest.contested
        ),
        places=wanted,
        verified=_verified(memory, snapshot, decision, right, wanted, starts) - touched,
        right_since=right,
        repairs=repairs,
        fights=fights,
        owed=_owed(memory, snapshot.threads(), wanted, after, demoted),
        decided={found.guest.process: found for found in decision.guests},
    )
    return replace(taught, calm=frozenset(found.guest.process for found in decision.guests if _calm(found, taught)))


def _calm(found: GuestDecision, memory: Memory) -> bool:
    """Return whether learning of the same decision once more, when nothing was done, would change nothing."""
    if any(thread.id in memory.refused for thread in found.guest.threads):
        return False
    return not found.wanted or (found.at_rest and memory.verified.issuperset(found.wanted))


def _incumbents(memory: Memory, threads: Iterable[Thread]) -> dict[tuple[tuple[int, int], str], ThreadId]:
    found = dict(memory.incumbents)
    for thread in threads:
        if thread.settled and thread.index is not None:
            found[((thread.id.pid, thread.id.pid_start), thread.label)] = thread.id
    return found


def _right_since(
    memory: Memory,
    snapshot: Snapshot,
    decision: Decision,
    after: dict[ThreadId, Placement],
    finished: float,
) -> dict[tuple[int, int], float]:
    """Return since when each guest's vCPUs and iothreads are all in place, at every look."""
    found: dict[tuple[int, int], float] = {}
    for guest in decision.guests:
        process = guest.guest.process
        if guest.state.managed and guest.wanted and in_place(guest, memory, snapshot.host, after):
            were = in_place(guest, memory, snapshot.host)
            found[process] = memory.right_since.get(process, finished) if were else finished
    return found


def _verified(
    memory: Memory,
    snapshot: Snapshot,
    decision: Decision,
    right: dict[tuple[int, int], float],
    wanted: dict[ThreadId, Wanted],
    starts: Starts,
) -> frozenset[ThreadId]:
    """Return the threads that were seen on the place that is still wanted.

    Not those that libvirt places itself, while one of the guest's vCPUs is being started: its reset of an affinity can
    come 0.1 s and more after it has moved the thread (seen on an emulated host).
    """
    found = {id_ for id_ in memory.verified if id_ in wanted and memory.places.get(id_) == wanted[id_]}
    for guest in decision.guests:
        since = right.get(guest.guest.process)
        if since is None or snapshot.time - since < SETTLED_S:
            continue
        start = starts.get(guest.guest.process)
        starting = start is not None and bool(start.open)
        for thread in guest.guest.threads:
            place = wanted.get(thread.id)
            if starting and thread.index is not None:
                continue
            if place is not None and memory.places.get(thread.id) == place and place.holds(thread.now):
                found.add(thread.id)
    return frozenset(found)


def _refused(
    memory: Memory, snapshot: Snapshot, wanted: dict[ThreadId, Wanted], outcomes: Sequence[Outcome]
) -> dict[ThreadId, tuple[Refusal, ...]]:
    """Return the refusals that may still stand: those of threads not on their place, and the new ones."""
    now = {thread.id: thread.now for thread in snapshot.threads()}
    found = {
        id_: tuple(entry for entry in entries if entry.observed == now[id_] or not wanted[id_].holds(now[id_]))
        for id_, entries in memory.refused.items()
        if id_ in wanted
    }
    found = {id_: entries for id_, entries in found.items() if entries}
    for outcome in outcomes:
        thread = outcome.step.thread
        if outcome.result not in (Result.REFUSED, Result.NARROWED) or thread.id not in wanted:
            continue
        affinity = outcome.step.cpus is not None
        new = Refusal(
            wanted=wanted[thread.id],
            observed=outcome.after or outcome.before,
            limits=outcome.limits,
            conditions=conditions(snapshot.host),
            affinity=affinity,
            text=refusal_text(outcome, snapshot.host),
        )
        others = tuple(entry for entry in found.get(thread.id, ()) if entry.affinity is not affinity)
        found[thread.id] = (*others, new)
    return found


def _repaired(memory: Memory, wanted: dict[ThreadId, Wanted], applied: Sequence[Outcome]) -> set[ThreadId]:
    """Return the threads that were put back on a place they had already: what a fight is counted by.

    FIFO that rtpind owed anyway is no repair, nor is a demotion for safety.
    """
    return {
        id_
        for outcome in applied
        if (id_ := outcome.step.thread.id) in memory.places
        and memory.places[id_] == wanted.get(id_)
        and outcome.step.reason is not Reason.SAFETY
        and not (outcome.step.phase is Phase.PROMOTE and id_ in memory.owed)
    }


def _owed(
    memory: Memory,
    threads: Iterable[Thread],
    wanted: dict[ThreadId, Wanted],
    after: dict[ThreadId, Placement],
    demoted: set[ThreadId],
) -> frozenset[ThreadId]:
    found: set[ThreadId] = set()
    for thread in threads:
        place = wanted.get(thread.id)
        if place is None or not place.priority or place.scheduled(after.get(thread.id, thread.now)):
            continue
        fresh = memory.places.get(thread.id) != place
        if fresh or thread.id in demoted or thread.id in memory.owed:
            found.add(thread.id)
    return frozenset(found)
