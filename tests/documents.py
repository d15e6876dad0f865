"""Documents of rtpinctl over a hand-made host, and the check of a document against the schema that ships."""

from __future__ import annotations

from dataclasses import replace

import factories
import jsonschema

from rtpind import schemas
from rtpind.core import plan as planning
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import Kind
from rtpind.core.placement import place
from rtpind.daemon import report

OTHERS = {"TuneD scheduler plugin": "on (x)!it moves", "irqbalance": "not running"}
DAEMON = {"pid": 1, "mode": "enforce", "policy": "/etc/x", "libvirt": "connected", "passes": 0, "faults": 0}

#: No pCPU of its own for anybody: it is good on every host, and touches no guest.
POLICY = """\
version: 1
pools: {housekeeping: "0"}
classes:
  calm: {vcpu: {pool: housekeeping}}
guests:
  - {name: "rtpind-no-such-guest", class: calm}
"""


def validate(name, document):
    """Fail unless the document follows the shipped schema."""
    jsonschema.Draft202012Validator(schemas.load(name)).validate(document)


class Made:
    """Documents over a hand-made host: rt-1 placed, rt-2 without room, other unmanaged, and odd names."""

    def __init__(self):
        odd = factories.thread(index=7, comm="[/x] \x1b[31m\n:cat:", on="0-7", scheduling=factories.fifo(2))
        foreign = factories.thread(index=8, comm="virtiofsd", kind=Kind.PROCESS)
        self.host = factories.host(isolated="2-5", online="0-5")
        self.policy = factories.policy(on=self.host)
        guests = (
            factories.guest("rt-1", pits=1, vhosts=1, extra=(odd, foreign), on="0-5"),
            factories.guest("rt-" + "long" * 40 + "[bold]", pid=2000, vcpus=8, on="0-5"),
            factories.guest("other", pid=3000, on="2"),
        )
        self.snapshot = factories.snapshot(*guests, host=self.host)
        self.memory = Memory()
        self.decision = place(self.policy, self.snapshot, self.memory, Ledger())
        self.steps = planning.make(self.decision, self.snapshot, self.memory)

    def status(self, **changes):
        known = {
            "others": OTHERS,
            "policy": self.policy,
            "decision": self.decision,
            "memory": self.memory,
            "daemon": DAEMON,
        }
        return report.status(self.snapshot, **(known | changes))

    def bare(self):
        """Return the status without a policy and a daemon."""
        return report.status(self.snapshot, others=OTHERS)

    def plan(self):
        return report.plan(self.steps, self.snapshot, self.decision, self.policy)

    def explain(self, number=0):
        """Return the explanation of one guest, in the order of the snapshot."""
        uuid = self.snapshot.guests[number].uuid
        found = next(guest for guest in self.decision.guests if guest.guest.uuid == uuid)
        return report.explain(found, self.decision, self.policy, self.snapshot)

    def placed(self):
        """Return the same, after the kernel took every wanted placement."""
        made = Made()
        made.snapshot = factories.applied(self.snapshot, self.decision)
        made.memory = replace(self.memory, places=self.decision.wanted(), verified=frozenset(self.decision.wanted()))
        made.decision = place(self.policy, made.snapshot, made.memory, Ledger())
        made.steps = planning.make(made.decision, made.snapshot, made.memory)
        return made
