# SPDX-License-Identifier: GPL-2.0-or-later
"""What one pass teaches: memory before, what was seen, decided and done → memory after. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

from rtpind.core.audit import Outcome, Result, refusal_text
from rtpind.core.decision import Decision, GuestDecision
from rtpind.core.memory import FIGHT_WINDOW_S, Memory, Refusal, Wanted, conditions
from rtpind.core.model import Host, Placement, Snapshot, Thread, ThreadId
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
    only: Collection[str] | None = None,
) -> Memory:
    """Return what the daemon knows after a pass. ``finished``: monotonic seconds when the last step was read back.

    ``only``: UUIDs of the guests that were looked at, or decided anew; what is known of others is kept as it is, and
    so are, until all are looked at, entries of threads that have ended.
    """
    if only is None:
        memory = memory.pruned(snapshot)
    guests = [found for found in decision.guests if only is None or found.guest.uuid in only]
    threads = [thread for found in guests for thread in found.guest.threads]
    wanted = {id_: place for found in guests for id_, place in found.wanted.items()}
    after = {outcome.step.thread.id: outcome.after for outcome in outcomes if outcome.after is not None}
    applied = [outcome for outcome in outcomes if outcome.result is Result.APPLIED]
    # A thread that is held off its place without FIFO is still one that somebody moved.
    touched = {outcome.step.thread.id for outcome in applied if outcome.step.reason is not Reason.SAFETY}
    taught = replace(memory, refused=_refused(memory, snapshot.host, threads, wanted, outcomes))
    right = _right_since(taught, snapshot.host, guests, after, finished)
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
    return replace(
        taught,
        incumbents=_incumbents(memory, threads),
        doubtful=_doubtful(memory, guests),
        places=_places(memory, threads, wanted),
        verified=_verified(memory, snapshot.time, guests, right, wanted) - touched,
        right_since=right,
        repairs=repairs,
        fights=fights,
        owed=_owed(memory, threads, wanted, after, demoted),
    )


def _places(memory: Memory, threads: Iterable[Thread], wanted: Mapping[ThreadId, Wanted]) -> dict[ThreadId, Wanted]:
    found = dict(memory.places)
    for thread in threads:
        if thread.id in wanted:
            found[thread.id] = wanted[thread.id]
        else:
            found.pop(thread.id, None)
    return found


def _doubtful(memory: Memory, guests: Iterable[GuestDecision]) -> frozenset[tuple[tuple[int, int], str]]:
    processes = {found.guest.process for found in guests}
    kept = {entry for entry in memory.doubtful if entry[0] not in processes}
    return frozenset(kept).union(
        (found.guest.process, label) for found in guests for label in found.guest.doubtful + found.guest.contested
    )


def _incumbents(memory: Memory, threads: Iterable[Thread]) -> dict[tuple[tuple[int, int], str], ThreadId]:
    found = dict(memory.incumbents)
    for thread in threads:
        if thread.settled and thread.index is not None:
            found[((thread.id.pid, thread.id.pid_start), thread.label)] = thread.id
    return found


def _right_since(
    memory: Memory,
    host: Host,
    guests: Iterable[GuestDecision],
    after: Mapping[ThreadId, Placement],
    finished: float,
) -> dict[tuple[int, int], float]:
    """Return since when each guest's vCPUs and iothreads are all in place, at every look."""
    right = dict(memory.right_since)
    for found in guests:
        guest, placed = found.guest, found
        since = right.pop(guest.process, finished)
        if not found.state.managed or not found.wanted:
            continue
        if any(thread.id in after for thread in guest.threads):
            threads = tuple(replace(thread, now=after.get(thread.id, thread.now)) for thread in guest.threads)
            placed = replace(found, guest=replace(guest, threads=threads))
        if in_place(placed, memory, host):
            right[guest.process] = since if placed is found or in_place(found, memory, host) else finished
    return right


def _verified(
    memory: Memory,
    time: float,
    guests: Iterable[GuestDecision],
    right: Mapping[tuple[int, int], float],
    wanted: Mapping[ThreadId, Wanted],
) -> frozenset[ThreadId]:
    """Return the threads that were seen on the place that is still wanted."""
    found = set(memory.verified)
    for guest in guests:
        since = right.get(guest.guest.process)
        settled = since is not None and time - since >= SETTLED_S
        for thread in guest.guest.threads:
            place = wanted.get(thread.id)
            if place is None or memory.places.get(thread.id) != place:
                found.discard(thread.id)
            elif settled and place.holds(thread.now):
                found.add(thread.id)
    return frozenset(found)


def _refused(
    memory: Memory,
    host: Host,
    threads: Iterable[Thread],
    wanted: Mapping[ThreadId, Wanted],
    outcomes: Sequence[Outcome],
) -> dict[ThreadId, tuple[Refusal, ...]]:
    """Return the refusals that may still stand: those of threads not on their place, and the new ones."""
    found = dict(memory.refused)
    for thread in threads:
        entries, place = found.pop(thread.id, ()), wanted.get(thread.id)
        if place is not None and entries:
            off = not place.holds(thread.now)
            left = tuple(entry for entry in entries if off or entry.observed == thread.now)
            found |= {thread.id: left} if left else {}
    for outcome in outcomes:
        thread = outcome.step.thread
        if outcome.result not in (Result.REFUSED, Result.NARROWED) or thread.id not in wanted:
            continue
        affinity = outcome.step.cpus is not None
        new = Refusal(
            wanted=wanted[thread.id],
            observed=outcome.after or outcome.before,
            limits=outcome.limits,
            conditions=conditions(host),
            affinity=affinity,
            text=refusal_text(outcome, host),
        )
        others = tuple(entry for entry in found.get(thread.id, ()) if entry.affinity is not affinity)
        found[thread.id] = (*others, new)
    return found


def _repaired(memory: Memory, wanted: Mapping[ThreadId, Wanted], applied: Sequence[Outcome]) -> set[ThreadId]:
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
    wanted: Mapping[ThreadId, Wanted],
    after: Mapping[ThreadId, Placement],
    demoted: set[ThreadId],
) -> frozenset[ThreadId]:
    found = set(memory.owed)
    for thread in threads:
        place = wanted.get(thread.id)
        found.discard(thread.id)
        if place is None or not place.priority or place.scheduled(after.get(thread.id, thread.now)):
            continue
        fresh = memory.places.get(thread.id) != place
        if fresh or thread.id in demoted or thread.id in memory.owed:
            found.add(thread.id)
    return frozenset(found)
