"""What is said in the journal: each kind of record, its words and its fields, and what stands until it changes."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from factories import cpus, fifo, find, guest, host, policy, put, snapshot

from rtpind.core.audit import (
    Kind,
    Level,
    Outcome,
    Result,
    of_outcome,
    of_start,
    protection_unknown,
    refusal_text,
)
from rtpind.core.cpuset import CpuSet
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory, Wanted
from rtpind.core.model import OTHER, Guest, Host, Limits, Placement, Snapshot
from rtpind.core.notices import fight, standing
from rtpind.core.offplace import OffPlace
from rtpind.core.placement import place
from rtpind.core.plan import Phase, Plan, Reason, Step, make
from rtpind.core.policy import Drift, Policy

GUEST = guest("rt-1", vcpus=1, iothreads=0, helpers=1)
VCPU = find(GUEST, "vcpu 0")
HOST = host()


def outcome(
    result: Result, *, scheduling: bool = False, reason: Reason = Reason.PLACE, error: int = 0, **more: object
) -> Outcome:
    step = Step(
        phase=Phase.PROMOTE if scheduling else Phase.ENTER,
        thread=VCPU,
        reason=reason,
        rule="guests[0]",
        cpus=None if scheduling else cpus("2"),
        scheduling=fifo() if scheduling else None,
    )
    return Outcome(step=step, result=result, before=VCPU.now, error=error, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scheduled", "end", "level", "result"),
    [(True, "", Level.INFO, "placed"), (False, "; not on its place yet", Level.NOTICE, "not-placed")],
)
def test_a_start_says_what_was_spent_off_place(scheduled: bool, end: str, level: Level, result: str) -> None:
    """Added up over the vCPUs, by affinity and by scheduling."""
    two = guest("rt-1", vcpus=3)
    right = OffPlace(0.0, 10**9, affine=True, scheduled=True, affinity_ns=1_500_000, scheduling_ns=2_000_000)
    record = of_start(two, {find(two, "vcpu 0").id: right, find(two, "vcpu 2").id: replace(right, scheduled=scheduled)})

    text = "rt-1: vCPU 0,2 started, at most 3.000 ms of CPU time off its pCPUs and 4.000 ms without its scheduling"
    assert (record.kind, record.level, record.message) == (Kind.STARTED, level, text + end)
    spent = {"VCPUS": "0,2", "OFF_AFFINITY_NS": "3000000", "OFF_SCHED_NS": "4000000", "RESULT": result}
    assert record.fields == spent | {"GUEST": "rt-1", "GUEST_UUID": two.uuid, "PID": str(two.pid)}


@pytest.mark.parametrize("result", [Result.VANISHED, Result.DEFERRED])
def test_what_is_nobody_s_fault_is_no_record(result: Result) -> None:
    """A thread that ended and FIFO that is not due yet are not written down."""
    assert of_outcome(outcome(result), GUEST, HOST) is None


def test_a_mask_that_was_overtaken_is_on_record() -> None:
    """The call was made (promise 9); what the thread has now is somebody else's."""
    record = of_outcome(outcome(Result.OVERTAKEN, after=Placement(cpus("0-7"))), GUEST, HOST)

    assert record is not None
    assert (record.kind, record.level) == (Kind.CHANGED, Level.INFO)
    assert "0-7 → 2 (place), overtaken: somebody has set another mask" in record.message
    assert (record.fields["RESULT"], record.fields["NEW_CPUS"]) == ("overtaken", "0-7")


def test_an_applied_step_says_who_what_from_to_and_why() -> None:
    """The fields hold guest, thread, old, wanted and new, reason, rule and result; the text is for people."""
    record = of_outcome(outcome(Result.APPLIED, after=Placement(cpus("2"))), GUEST, HOST)

    assert record is not None
    assert (record.kind, record.level) == (Kind.CHANGED, Level.INFO)
    assert record.message == f"rt-1: vcpu 0 (CPU 0/KVM, tid {VCPU.id.tid}): pCPU 0-7 → 2 (place)"
    assert record.fields == {
        "GUEST": "rt-1",
        "GUEST_UUID": GUEST.uuid,
        "PID": str(GUEST.pid),
        "ROLE": "vcpu",
        "INDEX": "0",
        "TID": str(VCPU.id.tid),
        "COMM": "CPU 0/KVM",
        "REASON": "place",
        "RULE": "guests[0]",
        "RESULT": "applied",
        "OLD_CPUS": "0-7",
        "WANTED_CPUS": "2",
        "NEW_CPUS": "2",
    }


@pytest.mark.parametrize(
    ("reason", "level"), [(Reason.DRIFT, Level.NOTICE), (Reason.SAFETY, Level.NOTICE), (Reason.RELEASE, Level.INFO)]
)
def test_repairs_stand_out(reason: Reason, level: Level) -> None:
    """Drift and safety are notices, ordinary work is info; scheduling has fields of its own."""
    after = Placement(cpus("2"), fifo())
    record = of_outcome(outcome(Result.APPLIED, scheduling=True, reason=reason, after=after), GUEST, HOST)

    assert record is not None
    assert record.level is level
    shown = {name: record.fields[name] for name in ("OLD_SCHED", "WANTED_SCHED", "NEW_SCHED")}
    assert shown == {"OLD_SCHED": "other", "WANTED_SCHED": "fifo:1", "NEW_SCHED": "fifo:1"}


def test_what_would_be_done_is_a_kind_of_its_own() -> None:
    """In mode observe the record says would, and has no new value."""
    record = of_outcome(outcome(Result.WOULD, scheduling=True), GUEST, HOST)

    assert record is not None
    assert record.kind is Kind.WOULD
    assert "would other → fifo:1 (place)" in record.message
    assert "NEW_SCHED" not in record.fields


def test_a_refusal_has_errno_and_cause() -> None:
    """What the kernel refused is a warning with its errno, and the cause as a field."""
    record = of_outcome(outcome(Result.REFUSED, error=errno.EINVAL), GUEST, HOST)

    assert record is not None
    assert (record.kind, record.level) == (Kind.REFUSED, Level.WARNING)
    assert (record.fields["ERRNO"], record.fields["RESULT"]) == (str(errno.EINVAL), "refused")
    assert record.fields["CAUSE"] == "EINVAL: the kernel does not let it move"


FENCED = Limits(fence=cpus("0-1"), fenced_by="/machine/guest/vcpu0")
NO_BUDGET = Limits(rt_budget_us=0)


@pytest.mark.parametrize(
    ("made", "on", "text"),
    [
        (outcome(Result.BLOCKED, beside="emulator (worker)"), HOST, "emulator (worker) can run there too"),
        (outcome(Result.REFUSED, error=errno.EINVAL, limits=FENCED), HOST, "/machine/guest/vcpu0 allows only pCPU 0-1"),
        (outcome(Result.NARROWED, limits=Limits(fence=cpus("0-7"))), HOST, "the kernel kept another mask"),
        (outcome(Result.REFUSED, error=errno.EPERM), HOST, "a security module forbids it"),
        (outcome(Result.REFUSED, error=errno.EPERM), host(nice_capable=False), "lacks CAP_SYS_NICE"),
        (outcome(Result.REFUSED, scheduling=True, error=errno.EINVAL), HOST, "EINVAL"),
        (outcome(Result.NARROWED, scheduling=True), HOST, "the kernel kept another scheduling"),
        (outcome(Result.REFUSED, scheduling=True, error=errno.EPERM), host(nice_capable=False), "lacks CAP_SYS_NICE"),
        (outcome(Result.REFUSED, scheduling=True, error=errno.EPERM), HOST, "SELinux"),
        (
            outcome(Result.REFUSED, scheduling=True, error=errno.EPERM, limits=NO_BUDGET),
            host(rt_group_sched=True, rt_runtime_us=-1),
            "SELinux",
        ),
        (
            outcome(Result.REFUSED, scheduling=True, error=errno.EPERM, limits=NO_BUDGET),
            host(rt_group_sched=True, rt_runtime_us=950000),
            "RT_GROUP_SCHED: its cpu cgroup has no realtime budget",
        ),
    ],
)
def test_each_refusal_names_its_cause(made: Outcome, on: Host, text: str) -> None:
    """Capability, cpuset, RT_GROUP_SCHED and security modules are told apart."""
    assert text in refusal_text(made, on)


@pytest.mark.parametrize(
    ("facts", "advised"),
    [
        ({"fair_server": None, "guards": None}, False),
        ({"fair_server": CpuSet(), "guards": dict.fromkeys(range(8), 1)}, False),
        ({"fair_server": CpuSet(), "guards": dict.fromkeys(range(8), 2)}, True),
        ({"fair_server": CpuSet(range(8)), "guards": None}, True),
    ],
    ids=["unknown", "guards not above", "guards above", "fair server"],
)
def test_no_throttling_is_advised_only_where_the_host_survives_it(facts: dict[str, object], advised: bool) -> None:
    """-1 is named as a cure only where a fair server or higher kernel threads are known to protect the pCPU."""
    on = host(rt_group_sched=True, rt_runtime_us=950000, **facts)
    made = outcome(Result.REFUSED, scheduling=True, error=errno.EPERM, limits=NO_BUDGET)

    assert ("sched_rt_runtime_us=-1" in refusal_text(made, on)) is advised


@pytest.mark.parametrize(
    ("facts", "unknown"),
    [
        ({"fair_server": None, "throttles": False, "rt_runtime_us": 950000}, True),
        ({"fair_server": None, "throttles": True, "rt_runtime_us": -1}, True),
        ({"fair_server": None, "throttles": True, "rt_runtime_us": 950000}, False),
        ({"fair_server": CpuSet(), "throttles": False, "rt_runtime_us": -1}, False),
    ],
)
def test_what_cannot_be_read_is_said(facts: dict[str, object], unknown: bool) -> None:
    """A fair server that cannot be read counts as on; that is said where nothing else is known to protect."""
    assert bool(protection_unknown(host(**facts))) is unknown


# What stands


def notices(
    found: Guest,
    snap: Snapshot,
    by: Policy,
    *,
    plan: Plan | None = None,
    outcomes: list[Outcome] | None = None,
    ledger: Ledger | None = None,
    memory: Memory | None = None,
) -> list[tuple[Kind, str]]:
    memory = memory or Memory()
    decision = place(by, snap, memory, ledger or Ledger())
    plan = plan or make(decision, snap, memory)
    assert found.uuid in {entry.guest.uuid for entry in decision.guests}
    found_notices = standing(snap, decision, plan, memory, outcomes or [])
    return [(record.kind, record.message) for _, record in found_notices]


@pytest.mark.parametrize(
    ("when_full", "text"), [("degrade", "floats in housekeeping without FIFO"), ("leave", "left as it is")]
)
def test_a_guest_without_room_is_said(when_full: str, text: str) -> None:
    """Not placed: the pool that is full, and what becomes of the guest."""
    by = policy(
        """
version: 1
pools: {housekeeping: 0-1, realtime: "2"}
classes: {realtime: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}}}
guests: [{name: "*", class: realtime}]
when_full: """
        + when_full
    )
    two = guest("rt-1", vcpus=2)

    said = notices(two, snapshot(two), by)

    assert (Kind.NOT_PLACED, f"rt-1: not placed: no free pCPU in 'realtime' for vcpu 1; {text}") in said


def test_an_unclaimed_guest_and_a_contested_id_are_said() -> None:
    """A guest whose rule is gone, and a vCPU that two threads claim to be."""
    found = replace(guest("other"), contested=("vcpu 1",))

    said = notices(found, snapshot(found), policy(), ledger=Ledger().recording(found.threads))

    assert [kind for kind, _ in said] == [Kind.UNCLAIMED, Kind.CONTESTED]
    assert "two threads claim to be vcpu 1" in said[1][1]


def test_an_intruder_is_said() -> None:
    """A guest without a rule whose threads may run on a pCPU that was given out."""
    mine, stranger = guest("rt-1", vcpus=1), guest("other", pid=5000, vcpus=1, iothreads=0)

    said = notices(mine, snapshot(mine, stranger), policy())

    assert [kind for kind, text in said if text.startswith("other")] == [Kind.INTRUDER, Kind.INTRUDER]


def test_withheld_fifo_is_said() -> None:
    """Promise 7 withholds FIFO where nothing protects the host, with the reason."""
    on = host(rt_runtime_us=-1, throttles=True, fair_server=CpuSet(), guards=dict.fromkeys(range(8), 0))
    found = put(guest("rt-1", vcpus=1), {"vcpu 0": "2", "emulator": "0-1", "iothread 1": "0-1"})

    said = notices(found, snapshot(found, host=on), policy(on=on))

    assert [kind for kind, _ in said] == [Kind.FIFO_WITHHELD]
    assert "nothing protects the host on pCPU 2" in said[0][1]


def test_unknown_protection_is_said_where_fifo_is_given() -> None:
    """One record for the host, only when some thread is to be FIFO."""
    on = host(rt_runtime_us=-1, throttles=True, fair_server=None)
    found, other = guest("rt-1", vcpus=1), guest("other")

    assert Kind.FIFO_WITHHELD in [kind for kind, _ in notices(found, snapshot(found, host=on), policy(on=on))]
    assert notices(other, snapshot(other, host=on), policy(on=on)) == []


def test_a_vcpu_without_room_is_said() -> None:
    """The hot-plugged vCPU of a placed guest, when the pool is full."""
    by = policy("""
version: 1
pools: {housekeeping: 0-1, realtime: "2"}
classes: {realtime: {vcpu: {pool: realtime, exclusive: thread}}}
guests: [{name: "*", class: realtime}]
when_full: degrade
""")
    found = put(guest("rt-1", vcpus=2, iothreads=0), {"vcpu 0": "2", "vcpu 1": "0-1", "emulator": "0-1"})
    ledger = Ledger().recording([find(found, "vcpu 0")])

    said = notices(found, snapshot(found), by, ledger=ledger)

    assert [kind for kind, _ in said] == [Kind.NOT_PLACED]
    assert "vcpu 1" in said[0][1]


@pytest.mark.parametrize("drift", list(Drift))
@pytest.mark.parametrize("priority", [0, 1])
def test_drift_is_said_unless_it_is_ignored(drift: Drift, priority: int) -> None:
    """Where the thread is, and where its place is; nothing with drift: ignore."""
    found = guest("rt-1", vcpus=1)
    plan = Plan(drifted=((find(found, "vcpu 0"), Wanted(cpus("2"), priority)),))

    said = notices(found, snapshot(found), replace(policy(), drift=drift), plan=plan)

    assert [kind for kind, _ in said] == ([] if drift is Drift.IGNORE else [Kind.DRIFT])
    assert all(text.endswith("its place is pCPU 2" + " fifo:1" * priority) for _, text in said)


def test_what_is_not_done_stands_until_it_changes() -> None:
    """Would and blocked steps have a key by which they are said once; applied ones are said as they happen."""
    found = guest("rt-1", vcpus=1)
    made = [outcome(Result.WOULD), outcome(Result.BLOCKED, scheduling=True, beside="x"), outcome(Result.APPLIED)]
    made = [replace(one, step=replace(one.step, thread=find(found, "vcpu 0"))) for one in made]

    said = notices(found, snapshot(found), policy(), plan=Plan(), outcomes=made)

    assert [kind for kind, _ in said] == [Kind.WOULD, Kind.REFUSED]


def test_a_fight_is_said_loudly() -> None:
    """The record of a fight is an error that says for how long, and what to look for."""
    record = fight(VCPU, GUEST, 600.0)

    assert (record.kind, record.level) == (Kind.FIGHT, Level.ERROR)
    assert "left alone for 10 min" in record.message
    assert record.fields["REASON"] == "fight"
    assert OTHER not in record.fields.values()
