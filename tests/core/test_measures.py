# SPDX-License-Identifier: GPL-2.0-or-later
"""What monitoring is told: repairs by thread, what the kernel refused, and every thread under one verdict."""

from __future__ import annotations

import pytest
from factories import cpus, fifo, find, guest, policy, put, snapshot

from rtpind.core.audit import Outcome, Result
from rtpind.core.ledger import Ledger
from rtpind.core.measures import Measures, Tally, by_verdict
from rtpind.core.memory import Memory
from rtpind.core.model import OTHER
from rtpind.core.placement import place
from rtpind.core.plan import Phase, Reason, Step
from rtpind.core.verdict import Verdict

GUEST = guest("rt-1", vcpus=2)


def outcome(label: str, result: Result, reason: Reason = Reason.DRIFT) -> Outcome:
    thread = find(GUEST, label)
    step = Step(phase=Phase.ENTER, thread=thread, reason=reason, cpus=cpus("2"))
    return Outcome(step=step, result=result, before=thread.now)


def test_a_thread_that_was_put_back_is_one_repair() -> None:
    """However many steps it took; each thread by itself, and pass after pass."""
    steps = [outcome("vcpu 0", Result.APPLIED), outcome("vcpu 0", Result.APPLIED), outcome("vcpu 1", Result.APPLIED)]
    once = Tally().plus(steps)

    assert once.repairs == 2
    assert once.plus(steps[:1]).repairs == 3
    assert once.plus([]) == once


@pytest.mark.parametrize("reason", set(Reason) - {Reason.DRIFT})
def test_what_nobody_had_moved_is_no_repair(reason: Reason) -> None:
    """Placing, a new policy, safety and release are not."""
    assert Tally().plus([outcome("vcpu 0", Result.APPLIED, reason)]) == Tally()


@pytest.mark.parametrize("result", set(Result) - {Result.APPLIED, Result.REFUSED, Result.NARROWED})
def test_what_was_not_asked_of_the_kernel_is_neither(result: Result) -> None:
    """What would be done, waits, is blocked at every pass, or has ended, is no event."""
    assert Tally().plus([outcome("vcpu 0", result)]) == Tally()


def test_refusals_are_counted_by_what_the_kernel_answered() -> None:
    """Each step that it refused, and each that it took a part of; both are there from the start."""
    assert Tally().refusals == {Result.REFUSED: 0, Result.NARROWED: 0}
    told = Tally().plus([outcome("vcpu 0", Result.REFUSED), outcome("vcpu 1", Result.REFUSED)])
    told = told.plus([outcome("emulator", Result.NARROWED)])

    assert (told.repairs, told.refusals) == (0, {Result.REFUSED: 2, Result.NARROWED: 1})


def test_every_thread_is_counted_under_its_verdict() -> None:
    """All of them once, and each verdict is there, with 0 if need be: a series that comes and goes alarms nobody."""
    placed = put(put(GUEST, {"emulator": "0-1", "iothread 1": "0-1", "vcpu 0": "2"}), {"vcpu 0": "2"}, fifo())
    placed = put(placed, {"vcpu 1": "3"}, OTHER)
    other = guest("other", pid=5000, vcpus=1, iothreads=0, on="0-1")
    seen = snapshot(placed, other)
    found = by_verdict(place(policy(), seen, Memory(), Ledger()), Memory(), seen)

    assert found.keys() == set(Verdict) == Measures().threads.keys()
    assert {verdict: count for verdict, count in found.items() if count} == {
        Verdict.OK: 3,
        Verdict.PENDING: 1,
        Verdict.UNMANAGED: 2,
    }
