"""The documents, as pure functions of hand-made hosts and guests."""

from dataclasses import replace

import factories
import pytest
from documents import DAEMON, OTHERS, validate

from rtpind.core.cpuset import CpuSet
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory
from rtpind.core.model import Role
from rtpind.core.offplace import OffPlace, Start
from rtpind.core.placement import place
from rtpind.core.topology import Topology
from rtpind.daemon import report

NAMES = [
    "isolated",
    "helper pool in isolated set",
    "RT throttling",
    "fair server",
    "RT_GROUP_SCHED",
    "SMT siblings across pools",
    "TuneD scheduler plugin",
    "irqbalance",
]

POOLS = """
version: 1
pools: {housekeeping: "0-1", helpers: "HELPERS", realtime: "4-7"}
classes:
  realtime:
    vcpu: {pool: realtime, exclusive: thread}
    emulator: {pool: helpers}
guests:
  - {name: "rt-*", class: realtime}
"""


def fact(name, policy=None, others=OTHERS, **facts):
    """Return value and warning of one fact of a host."""
    found = {entry["name"]: entry for entry in report.facts(factories.host(**facts), policy, others)}
    assert list(found) == NAMES
    return found[name]["value"], bool(found[name]["warning"])


@pytest.mark.parametrize(
    ("name", "facts", "value", "warned"),
    [
        ("isolated", {"isolated": "2-7"}, "2-7", False),
        ("isolated", {"isolated": ""}, "none", False),
        ("RT throttling", {}, "950000 us per s", True),
        ("RT throttling", {"rt_runtime_us": -1}, "off", False),
        ("RT throttling", {"throttles": False}, "off", False),
        ("RT throttling", {"throttles": None}, "950000 us per s", True),
        ("RT throttling", {"rt_runtime_us": None}, "unknown", False),
        ("RT throttling", {"rt_runtime_us": None, "throttles": False}, "off", False),
        ("fair server", {"fair_server": CpuSet()}, "none", False),
        ("fair server", {"fair_server": CpuSet([1, 2])}, "on for pCPU 1-2", False),
        ("fair server", {"fair_server": None}, "unknown (debugfs cannot be read); it counts as on", False),
        ("RT_GROUP_SCHED", {}, "no", False),
        ("RT_GROUP_SCHED", {"rt_group_sched": True}, "yes", True),
        ("RT_GROUP_SCHED", {"rt_group_sched": True, "rt_runtime_us": -1}, "yes", False),
        ("RT_GROUP_SCHED", {"rt_group_sched": None}, "unknown", False),
        ("SMT siblings across pools", {"topology": Topology()}, "no", False),
        ("SMT siblings across pools", {"topology": Topology(cores={2: CpuSet([2, 3])})}, "no", False),
        (
            "SMT siblings across pools",
            {"topology": Topology(cores={4: CpuSet([0, 4])})},
            "pCPU 4",
            True,
        ),
        ("helper pool in isolated set", {}, "no", False),
    ],
)
def test_a_fact_is_said_with_its_danger(name, facts, value, warned):
    """Each of the host's facts has its words, and a warning just where it endangers realtime guests."""
    assert fact(name, **facts) == (value, warned)


@pytest.mark.parametrize(
    ("helpers", "name", "value", "warned"),
    [
        ("0-1", "helper pool in isolated set", "no", False),
        ("2-3", "helper pool in isolated set", "pCPU 2-3", True),
        ("0-1", "SMT siblings across pools", "pCPU 4", True),
        ("2-3", "SMT siblings across pools", "pCPU 4,7", True),
    ],
)
def test_the_facts_look_at_the_policys_pools(helpers, name, value, warned):
    """With a policy it is its pools that count: where helpers float, and what lies beside what is given out."""
    host = {"topology": Topology(cores={4: CpuSet([0, 4]), 7: CpuSet([3, 7])})}
    policy = factories.policy(POOLS.replace("HELPERS", helpers), on=factories.host(isolated="4-7"))

    assert fact(name, policy, **host) == (value, warned)


def test_the_last_two_facts_come_from_outside():
    """Text before the mark is the value, text behind it the warning."""
    others = {"TuneD scheduler plugin": "on (p)!moves: a!b", "irqbalance": "not running"}
    found = report.facts(factories.host(), None, others)[6:]

    assert found == [
        {"name": "TuneD scheduler plugin", "value": "on (p)", "warning": "moves: a!b"},
        {"name": "irqbalance", "value": "not running", "warning": ""},
    ]


def test_every_document_follows_its_schema(made):
    """Status with and without a policy and a daemon, before and after placing; plan and explain of every guest."""
    for one in (made, made.placed()):
        validate("status", one.status())
        validate("status", one.status(daemon=None))
        validate("status", one.bare())
        validate("plan", one.plan())
        for number in range(3):
            validate("explain", one.explain(number))
        wrong = report.not_ok(one.status())
        validate("verify", {"version": report.VERSION, "ok": not wrong, "threads": wrong})


def test_explain_tells_where_the_memory_is_and_who_is_away_from_it():
    """Whatever the pool asks for; nothing where it is not known."""
    on = factories.host(topology=Topology.built(2, 4))
    guest = factories.guest(nodes=CpuSet([1]))
    policy = factories.policy(factories.REALTIME.replace("isolated", "[3, 4]"))

    def memory(one):
        decision = place(policy, factories.snapshot(one, host=on), Memory(), Ledger())
        found = report.explain(decision.guests[0], decision, policy, factories.snapshot(one, host=on))
        validate("explain", found)
        return found["memory"]

    assert memory(guest) == {"nodes": "1", "cpus": "4-7", "away": ["vcpu 0", "emulator", "iothread 1"]}
    assert memory(replace(guest, nodes=CpuSet())) == {"nodes": "", "cpus": "", "away": []}


def test_a_status_without_a_policy_judges_nothing(made):
    """Then there are threads, places and hazards, and nothing wanted."""
    found = made.bare()

    assert (found["policy"], found["daemon"]) == (False, None)
    assert {guest["state"] for guest in found["guests"]} == {None}
    threads = [thread for guest in found["guests"] for thread in guest["threads"]]
    assert {(thread["verdict"], thread["wanted_cpus"], thread["wanted_scheduling"]) for thread in threads} == {
        (None, None, None)
    }
    assert any("leaked" in text for thread in threads for text in thread["hazards"])


def test_a_status_tells_off_place_time(made):
    """Of the vCPUs of which it is known, while a start lasts and afterwards; of no other thread."""
    one = made.snapshot.guests[-1]
    vcpus = [thread.id for thread in one.threads if thread.role is Role.VCPU]
    spent = OffPlace(0.0, 10, affine=True, scheduled=False, affinity_ns=4, scheduling_ns=5)
    start = Start(True, open={vcpus[0]: spent}, over={vcpus[1]: None})
    document = made.status(memory=Memory(starts={one.process: start}))

    validate("status", document)
    found = {thread["tid"]: thread["off_place"] for guest in document["guests"] for thread in guest["threads"]}
    assert found.pop(vcpus[0].tid) == {"affinity_ns": 4, "scheduling_ns": 5}
    assert set(found.values()) == {None}


def test_a_status_tells_each_guest_apart(made):
    """Who is placed, who has no room and who is nobody's business, each with its threads' verdicts."""
    placed, full, other = sorted(made.placed().status()["guests"], key=lambda guest: guest["pid"])

    assert (placed["state"], placed["class"], placed["reason"]) == ("placed", "realtime", "")
    assert [thread["verdict"] for thread in placed["threads"] if thread["role"] == "vcpu"] == ["ok", "ok"]
    assert (full["state"], bool(full["reason"])) == ("degraded", True)
    assert {thread["verdict"] for thread in full["threads"] if thread["role"] == "vcpu"} == {"not-placed"}
    assert (other["state"], other["rule"]) == ("unmanaged", "")


def test_threads_are_shown_vcpus_first(made):
    """The order is vCPU, emulator, iothread, vhost, pit; within a role by number."""
    roles = [thread["role"] for thread in made.status()["guests"][0]["threads"]]

    assert list(dict.fromkeys(roles)) == [str(role) for role in Role if str(role) in roles]
    numbers = [thread["index"] for thread in made.status()["guests"][0]["threads"] if thread["role"] == "vcpu"]
    assert numbers == sorted(numbers)


def test_not_ok_lists_managed_threads_alone(made):
    """A thread that nobody manages is not wrong; one without room is."""
    document = made.placed().status()
    names = {thread["guest"] for thread in report.not_ok(document)}

    assert names == {guest["name"] for guest in document["guests"] if guest["state"] == "degraded"}
    assert report.not_ok(made.bare()) == []


def test_a_plan_shows_its_steps_in_their_order(made):
    """Each step names its thread, what changes, from what to what, and why; a host in place has none."""
    document = made.plan()
    phases = [step["phase"] for step in document["steps"]]

    assert phases == sorted(phases)
    assert {step["what"] for step in document["steps"]} == {"affinity", "scheduling"}
    vcpu = next(
        step
        for step in document["steps"]
        if (step["guest"], step["role"], step["what"]) == ("rt-1", "vcpu", "affinity")
    )
    assert (vcpu["from"], vcpu["reason"]) == ("0-5", "place")
    assert vcpu["to"] in ("2", "3", "4", "5")
    assert len(document["guests"]) == 3


def test_an_explanation_names_rules_pools_and_owners(made):
    """Which rule matched, what the pool has, who holds each pCPU and what an unmanaged guest blocks."""
    placed, other = made.explain(0), made.explain(2)

    assert [rule["matches"] for rule in placed["considered"]] == [True]
    pools = {pool["pool"]: pool for pool in placed["pools"]}
    assert set(pools) == {"housekeeping", "realtime"}
    taken = pools["realtime"]["taken"]
    assert sorted(taken.values()) == ["rt-1: vcpu 0", "rt-1: vcpu 1"]
    assert "2" in pools["realtime"]["blocked"]
    assert "2" not in taken
    assert [rule["matches"] for rule in other["considered"]] == [False]
    assert other["pools"] == []


def test_a_document_is_a_function_of_its_input(made):
    """The same snapshot gives the same document, and the caller's own values are not changed."""
    about = dict(DAEMON)
    memory = replace(Memory(), said=frozenset())

    assert made.status(daemon=about, memory=memory) == made.status(daemon=about, memory=memory)
    assert about == DAEMON
    assert made.status(daemon=about)["daemon"] is not about
