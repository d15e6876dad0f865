# SPDX-License-Identifier: GPL-2.0-or-later
"""What monitoring is told: counts of what passes did, and how threads stand. Values that a pass has anyway."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rtpind.core.audit import Outcome, Result
from rtpind.core.decision import Decision
from rtpind.core.memory import Memory
from rtpind.core.model import Snapshot
from rtpind.core.plan import Reason
from rtpind.core.verdict import Verdict, judge

#: What the kernel answered. ``blocked`` is no answer and stands at every pass: it is a verdict, no event.
REFUSALS = (Result.NARROWED, Result.REFUSED)


@dataclass(frozen=True, slots=True)
class Tally:
    """What happened since the daemon started."""

    repairs: int = 0
    refusals: Mapping[Result, int] = field(default_factory=lambda: dict.fromkeys(REFUSALS, 0))

    def plus(self, outcomes: Iterable[Outcome]) -> Tally:
        """Return the tally after one pass: a thread put back is one repair, however many steps that took."""
        outcomes = tuple(outcomes)
        repaired = {one.step.thread.id for one in outcomes if one.done and one.step.reason is Reason.DRIFT}
        answers = Counter(one.result for one in outcomes)
        return Tally(
            repairs=self.repairs + len(repaired),
            refusals={result: count + answers[result] for result, count in self.refusals.items()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measures:
    """Everything that is told. Times are seconds since 1970, 0 for never."""

    threads: Mapping[Verdict, int] = field(default_factory=lambda: dict.fromkeys(Verdict, 0))
    tally: Tally = Tally()
    passed_at: float = 0.0
    pass_s: float = 0.0
    mode: str = ""
    policy: str = ""
    loaded_at: float = 0.0
    loaded: bool = True  # whether the last attempt to read the policy was good


def by_verdict(decision: Decision, memory: Memory, snapshot: Snapshot) -> dict[Verdict, int]:
    """Return how many threads there are of each verdict, all of them named."""
    found = dict.fromkeys(Verdict, 0)
    for guest in decision.guests:
        for thread in guest.guest.threads:
            found[judge(thread, guest, decision, memory, snapshot)[0]] += 1
    return found
