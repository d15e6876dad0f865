# SPDX-License-Identifier: GPL-2.0-or-later
"""Every placement scheme of the field, as a class: where each thread is to be, and what is refused."""

from dataclasses import replace
from pathlib import Path

import factories
import pytest
from factories import applied, cpus, fifo, find, guest, host, put, snapshot

from rtpind.core.cpuset import CpuSet
from rtpind.core.decision import State
from rtpind.core.ledger import Ledger
from rtpind.core.memory import Memory, Wanted
from rtpind.core.model import Limits, Role, Traits
from rtpind.core.notices import standing
from rtpind.core.placement import place
from rtpind.core.plan import Plan
from rtpind.core.policyfile import load
from rtpind.core.topology import Topology
from rtpind.core.traits import parse
from rtpind.core.verdict import Verdict, judge

HOST = host()


def policy(classes, *, pools="realtime: 2-7", rules='{name: "*", class: c}', when_full="degrade", on=HOST):
    """Return a policy of one class ``c`` (or more), which must have no problem."""
    text = f"version: 1\nmode: enforce\npools:\n  {pools}\nclasses:\n  {classes}\nguests:\n  - {rules}\n"
    return factories.policy(text + f"when_full: {when_full}\n", on=on)


def decide(by, *guests, on=HOST, memory=None, ledger=None):
    return place(by, snapshot(*guests, host=on), memory or Memory(), ledger or Ledger())


def where(decision, name="rt-1"):
    """Return label → ``pCPUs`` or ``pCPUs fifo:N`` of a guest; one text where all threads of a label agree."""
    (found,) = [each for each in decision.guests if each.guest.name == name]
    places = {}
    for one in found.guest.threads:
        wanted = found.wanted.get(one.id)
        if wanted is not None:
            text = str(wanted.cpus) + (f" fifo:{wanted.priority}" if wanted.priority else "")
            assert places.setdefault(one.label, text) == text
    return places


def state(decision, name="rt-1"):
    (found,) = [each for each in decision.guests if each.guest.name == name]
    return found.state, found.reason


# Entries by their numbers


def test_emulator_beside_a_vcpu_that_is_not_realtime():
    """Nova's hw:cpu_realtime_mask=^0: vCPU 0 and all helpers on one pCPU, the other vCPUs alone at FIFO."""
    by = policy(
        """c:
    vcpu:
      - {ids: 0, pool: realtime, exclusive: thread}
      - {pool: realtime, exclusive: thread, scheduler: fifo}
    emulator: {share_with: {vcpu: 0}}"""
    )

    assert where(decide(by, guest(vcpus=3, vhosts=1))) == {
        "emulator": "2", "vcpu 0": "2", "vcpu 1": "3 fifo:1", "vcpu 2": "4 fifo:1", "iothread 1": "2", "vhost": "2",
    }  # fmt: skip


def test_all_but_some_are_an_entry_too():
    """With ^0 for FIFO, vCPU 0 is the rest."""
    by = policy(
        """c:
    vcpu:
      - {ids: "^0", pool: realtime, exclusive: thread, scheduler: fifo}
      - {pool: housekeeping}"""
    )

    assert where(decide(by, guest())) == {
        "emulator": "0-1", "vcpu 0": "0-1", "vcpu 1": "2 fifo:1", "iothread 1": "0-1",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("vcpu", "vcpus", "reason"),
    [
        ("{ids: 0, pool: realtime, exclusive: thread}", 1, ""),
        ("{ids: 0, pool: realtime, exclusive: thread}", 2, "no entry of class c covers vcpu 1"),
        ("{ids: 1-2, pool: realtime, exclusive: thread}", 2, "class c names vcpu 2, which the guest does not have"),
        ('{ids: "^3", pool: realtime, exclusive: thread}', 3, "class c names vcpu 3, which the guest does not have"),
        ("{ids: 0-3, pool: realtime, exclusive: thread, missing_ids: clip}", 2, ""),
    ],
)
def test_a_guest_of_another_shape_is_refused(vcpu, vcpus, reason):
    """A vCPU without an entry, and an entry without its vCPU, refuse the guest; clip allows the latter."""
    one = guest(vcpus=vcpus, iothreads=0)
    by = policy(f"c: {{vcpu: {vcpu}}}")

    decision = decide(by, one)

    assert state(decision) == ((State.REFUSED if reason else State.PLACED), reason)
    assert bool(where(decision)) is not bool(reason)
    if reason:
        judged = judge(one.threads[0], decision.guests[0], decision, Memory(), snapshot(one))
        assert judged == (Verdict.NOT_PLACED, reason)


def test_a_placed_guest_that_loses_its_shape_stays_placed():
    """A vCPU that is unplugged, or plugged in without an entry, costs the other vCPUs nothing."""
    by = policy("c: {vcpu: {ids: 0-1, pool: realtime, exclusive: thread, scheduler: fifo}}")
    memory = Memory(places=decide(by, guest()).wanted())

    assert where(decide(by, guest(vcpus=1), memory=memory))["vcpu 0"] == "2 fifo:1"
    grown = decide(by, guest(vcpus=3), memory=memory)
    assert where(grown)["vcpu 1"] == "3 fifo:1"
    assert where(grown)["vcpu 2"] == "0-1"
    assert grown.guests[0].roomless == {find(guest(vcpus=3), "vcpu 2").id}


# Whose pCPU


def test_iothreads_at_fifo_on_pcpus_of_their_own():
    """Any role with its own scheduling can have pCPUs of its own."""
    by = policy(
        """c:
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}
    iothread: {pool: realtime, exclusive: thread, scheduler: fifo, priority: 2}"""
    )

    assert where(decide(by, guest(vcpus=1, iothreads=2))) == {
        "vcpu 0": "2 fifo:1", "iothread 1": "3 fifo:2", "iothread 2": "4 fifo:2", "emulator": "0-1",
    }  # fmt: skip


def test_the_pit_beside_vcpu_0_and_above_it():
    """As KubeVirt does: the timer's thread on vCPU 0's pCPU, with a higher priority."""
    by = policy(
        """c:
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}
    pit: {share_with: {vcpu: 0}, scheduler: fifo, priority: 2}"""
    )

    assert where(decide(by, guest(vcpus=1, pits=1, iothreads=0))) == {
        "vcpu 0": "2 fifo:1", "pit": "2 fifo:2", "emulator": "0-1",
    }  # fmt: skip


def test_a_role_joins_another_role_s_pcpu():
    """A vhost worker with the emulator's pCPU, and one with an iothread's."""
    by = policy(
        """c:
    vcpu: {pool: realtime, exclusive: thread}
    emulator: {pool: realtime, exclusive: guest}
    iothread: {pool: realtime, exclusive: thread}
    vhost: {share_with: emulator}
    pit: {share_with: {iothread: 1}}"""
    )

    assert where(decide(by, guest(vcpus=1, vhosts=1, pits=1))) == {
        "vcpu 0": "2", "emulator": "3", "iothread 1": "4", "vhost": "3", "pit": "4",
    }  # fmt: skip


def test_sharing_with_a_thread_that_is_not_there_is_no_room():
    """A guest without the iothread to share with floats."""
    by = policy(
        """c:
    vcpu: {pool: realtime, exclusive: thread}
    iothread: {pool: realtime, exclusive: thread}
    vhost: {share_with: {iothread: 2}}"""
    )

    decision = decide(by, guest(vhosts=1))

    assert state(decision) == (State.DEGRADED, "vhost is to share with iothread 2, which the guest does not have")
    assert state(decide(by, guest())) == (State.PLACED, "")  # who has no vhost worker has nobody to share


# The guest's own <cputune>

XML = Traits(pins={0: cpus("4"), 1: cpus("5")}, realtime={1: 3}, has=frozenset({"vcpusched"}))
CPUTUNE = "c: {vcpu: {from: cputune}, emulator: {pool: housekeeping}}"


def test_the_guests_own_cputune_is_kept_and_what_it_lacks_is_added():
    """Pins and priority are the guest's; the helpers, which it does not pin, go to the pool."""
    decision = decide(policy(CPUTUNE), guest(traits=XML), guest("free", pid=2000, traits=Traits()))

    assert where(decision) == {"vcpu 0": "4", "vcpu 1": "5 fifo:3", "emulator": "0-1", "iothread 1": "0-1"}
    assert where(decision, "free") == {"vcpu 0": "0-1", "vcpu 1": "0-1", "emulator": "0-1", "iothread 1": "0-1"}
    assert set(decision.owners) == {4, 5}


@pytest.mark.parametrize(
    ("name", "isolated", "vcpus"),
    [
        ("nova-realtime", "4-15,20-31", ["26", "27 fifo:1", "28 fifo:1", "29 fifo:1"]),
        ("nova-isolate", "4-15,20-31", ["10", "11 fifo:1", "12 fifo:1", "13 fifo:1"]),
        ("nova-shared", "4-15,20-31", ["0-3,16-19", "0-3,16-19"]),
        ("seapath", "2-31", ["2 fifo:1", "3 fifo:1"]),
    ],
)
def test_what_clouds_write_is_kept(name, isolated, vcpus):
    """The vCPUs are where Nova or SEAPATH had libvirt pin them, at their priority; who is not pinned floats."""
    traits = parse((Path(__file__).parent / "domains" / f"{name}.xml").read_text(encoding="utf-8"))
    on = host(online="0-31", isolated=isolated)
    by = policy(CPUTUNE, pools=f"realtime: {isolated!r}", on=on)

    found = where(decide(by, guest(vcpus=len(vcpus), traits=traits), on=on))

    assert [found[f"vcpu {index}"] for index in range(len(vcpus))] == vcpus
    assert found["emulator"] == str(on.online - on.isolated)


def test_what_a_cputune_holds_is_not_given_to_others():
    """Exclusive places keep off pinned ones."""
    by = policy(
        f"{CPUTUNE}\n  d: {{vcpu: {{pool: realtime, exclusive: thread}}}}",
        rules='{name: "rt-*", class: c}\n  - {name: "*", class: d}',
    )
    pins = Traits(pins={0: cpus("2"), 1: cpus("3-4"), 2: cpus("5-6")}, realtime={1: 1})

    pinned = put(guest(vcpus=3, traits=pins), {"vcpu 0": "2"})
    decision = decide(by, pinned, guest("own", pid=500, vcpus=1))

    assert [where(decision)[f"vcpu {index}"] for index in range(3)] == ["2", "3-4", "5-6"]
    assert where(decision, "own")["vcpu 0"] == "7"
    assert decision.blocked == {cpu: f"rt-1: vcpu {vcpu} (<cputune>)" for cpu, vcpu in ((3, 1), (4, 1), (5, 2), (6, 2))}


def test_cputunes_that_collide_get_no_fifo_there():
    """Two guests pinned to one pCPU: the older has it, the younger's vCPU is with its helpers, and says why."""
    young = guest("young", pid=2000, start=900, traits=XML)

    decision = decide(policy(CPUTUNE), young, guest(traits=XML))

    assert where(decision)["vcpu 1"] == "5 fifo:3"
    assert where(decision, "young")["vcpu 1"] == "0-1"
    withheld = decision.wanted()[find(young, "vcpu 1").id].withheld
    assert withheld == "pCPU 5, to which its <cputune> pins it, is somebody else's"
    assert decision.guests[1].roomless == {find(young, f"vcpu {index}").id for index in (0, 1)}


@pytest.mark.parametrize(("pin", "place"), [("0", "0"), ("2-3", "2-3"), ("9", "0-1")])
def test_promises_hold_for_cputune_too(pin, place):
    """No FIFO on housekeeping, nor on pCPUs that it has not to itself; a pin on what is not online pins nothing."""
    traits = Traits(pins={0: cpus(pin)}, realtime={0: 1})

    found = where(decide(policy(CPUTUNE), guest(vcpus=1, traits=traits)))

    assert found["vcpu 0"] == place


def test_a_helper_can_share_with_a_pinned_vcpu():
    """The pCPU of a vCPU that <cputune> pins can be joined."""
    text = "{vcpu: {from: cputune}, emulator: {share_with: {vcpu: 0}}}"
    by, warned = load(f'version: 1\nclasses: {{c: {text}}}\nguests: [{{name: "*", class: c}}]', HOST)

    assert [problem.warning for problem in warned] == [True]  # where the XML makes that vCPU FIFO
    assert where(decide(by, guest(traits=XML, iothreads=0)))["emulator"] == "4"


def test_nothing_is_decided_before_the_definition_is_known():
    """Until libvirt has told a guest's <cputune>, its threads stay as they are, and nobody gets what they have."""
    by = policy(
        f"{CPUTUNE}\n  d: {{vcpu: {{pool: realtime, exclusive: thread}}}}",
        rules='{name: "rt-*", class: c}\n  - {name: "*", class: d}',
    )
    waiting = put(guest(), {"vcpu 0": "2"})

    decision = decide(by, waiting, guest("own", pid=2000))

    assert where(decision) == {}
    assert where(decision, "own")["vcpu 0"] == "3"
    found = next(each for each in decision.guests if each.guest.name == "rt-1")
    assert (found.pending, found.reason) == (True, "libvirt has not told its definition yet")
    judged = judge(waiting.threads[0], found, decision, Memory(), snapshot(waiting))
    assert judged == (Verdict.PENDING, found.reason)


# Rules by more than the name


@pytest.mark.parametrize(
    ("keys", "matches"),
    [
        ('flavor: "rt.*"', True),
        ("flavor: big", False),
        ("project: lab", True),
        ("partition: /machine/*", True),
        ("partition: /machine", False),
        ("has: vcpusched", True),
        ("has: [vcpusched, hugepages]", True),
        ("has: [vcpusched, locked]", False),
        ('name: "rt-*", has: locked', False),
        ('name: "other", has: vcpusched', False),
        ('uuid: "f*", has: vcpusched', False),
    ],
)
def test_rules_match_what_libvirt_knows(keys, matches):
    """Nova's flavor and project, the partition, and what the guest's definition has; all keys of a rule."""
    traits = Traits(
        flavor="rt.small", project="lab", partition="/machine/rt", has=frozenset({"vcpusched", "hugepages"})
    )
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread}}", rules=f"{{{keys}, class: c}}")

    decided = decide(by, guest(traits=traits)).guests[0]

    assert decided.state is (State.PLACED if matches else State.UNMANAGED)


def test_a_definition_that_cannot_be_read_is_not_waited_for():
    """What asks for it leaves the guest as it is, and says so; what goes by the name alone places it."""
    rules = '{flavor: "x", class: c}\n  - {name: "*", class: by-name}'
    by = policy("by-name: {vcpu: {pool: realtime, exclusive: thread}}\n  c: {vcpu: {from: cputune}}", rules=rules)
    one = guest(unreadable="not XML")
    reason = "its definition, which this rule or class asks for, cannot be read: not XML"

    refused = decide(by, one)

    assert state(refused) == (State.REFUSED, reason)
    assert where(refused) == {}
    judged = judge(find(one, "vcpu 0"), refused.guests[0], refused, Memory(), snapshot(one))
    assert judged == (Verdict.NOT_PLACED, reason)
    assert where(decide(factories.policy(), one))["vcpu 0"] == "2 fifo:1"
    assert state(decide(policy("c: {vcpu: {from: cputune}}"), one)) == (State.REFUSED, reason)
    starting = replace(one, young=True, threads=one.threads[:1])
    assert state(decide(by, starting))[0] is State.PLACED


def test_a_rule_that_may_match_is_waited_for():
    """A guest of which libvirt has not told is left alone until it has, unless an earlier rule matches."""
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread}}", rules='{flavor: "rt.*", class: c}')
    first = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread}}",
        rules='{name: "rt-*", class: c}\n  - {flavor: "rt.*", class: c}',
    )
    hands_off = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread}}",
        rules='{has: locked, class: unmanaged}\n  - {name: "*", class: c}',
    )

    assert decide(by, guest()).guests[0].pending
    assert decide(hands_off, guest()).guests[0].pending
    assert where(decide(first, guest()))["vcpu 0"] == "2"


def test_rules_say_their_keys():
    """A rule is named by what it asks for."""
    by = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread}}",
        rules='{name: "a*", flavor: f, has: [locked, hugepages], pcpus: 6, class: c}',
    )

    assert str(by.rules[0]) == "guests[0] name=a* flavor=f has=hugepages has=locked → c"


def test_fixed_pcpus_in_the_order_of_the_vcpus():
    """A rule's pcpus are for the exclusive vCPUs in their order; further vCPUs get any."""
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread}}", rules='{name: "*", pcpus: [7, "3"], class: c}')

    decision = decide(by, guest(vcpus=3), guest("late", pid=2000, start=900, vcpus=1))

    assert [where(decision)[f"vcpu {index}"] for index in range(3)] == ["7", "3", "2"]
    assert state(decision, "late") == (State.DEGRADED, "no free pCPU among 7 of 'realtime' for vcpu 0")


def test_a_place_that_the_rule_no_longer_wants_is_left():
    """When pcpus changes, the vCPU moves."""
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread}}", rules='{name: "*", pcpus: 7, class: c}')
    one = put(guest(vcpus=1), {"vcpu 0": "3"})
    memory = Memory(places={find(one, "vcpu 0").id: Wanted(cpus("3"), exclusive=True)})

    assert where(decide(by, one, memory=memory))["vcpu 0"] == "7"


# What a class says itself


def test_a_class_has_its_own_drift_and_when_full():
    """Per class, in place of the policy's."""
    by = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread}, drift: ignore, when_full: leave}\n"
        "  d: {vcpu: {pool: realtime, exclusive: thread}}",
        pools="realtime: 2",
        rules='{name: "rt-*", class: c}\n  - {name: "*", class: d}',
    )

    decision = decide(by, guest(vcpus=1), guest("rt-2", pid=2000, vcpus=1, start=900))

    assert decision.guests[0].drift == "ignore"
    assert state(decision, "rt-2")[0] is State.LEFT
    other = decide(by, guest(vcpus=1), guest("x", pid=2000, vcpus=1, start=900))
    assert state(other, "x")[0] is State.DEGRADED
    assert other.guests[1].drift == by.drift


# Topology

SMT = Topology.built(2, 4, 2)  # 0-3,8-11 and 4-7,12-15; siblings n and n+8
BIG = {"online": "0-15", "isolated": "1-7,9-15", "topology": SMT}


def smt(siblings="ignore", numa="preferred", **kwargs):
    return policy(
        "c: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}}",
        pools=f'realtime: {{cpus: "1-7,9-15", siblings: {siblings}, numa: {numa}}}',
        on=host(**BIG),
        **kwargs,
    )


def vcpus_of(decision, name="rt-1"):
    found = where(decision, name)
    return [found[f"vcpu {index}"].removesuffix(" fifo:1") for index in range(sum(label[0] == "v" for label in found))]


@pytest.mark.parametrize(
    ("siblings", "vcpus", "threads", "cpus_"),
    [
        ("ignore", 2, 1, ["1", "2"]),  # two cores, though one would do
        ("ignore", 4, 1, ["1", "2", "3", "9"]),
        ("ignore", 2, 2, ["1", "9"]),  # as the guest's own two threads
        ("ignore", 3, 2, ["1", "9", "2"]),
        ("same-guest", 2, 1, ["1", "9"]),
        ("same-guest", 3, 1, ["1", "9", "2"]),
        ("idle", 2, 1, ["1", "2"]),
        ("idle", 3, 2, ["1", "2", "3"]),
        ("idle", 4, 1, ["4", "5", "6", "7"]),  # the first socket has only three whole cores
    ],
)
def test_siblings_are_used_as_the_pool_says(siblings, vcpus, threads, cpus_):
    """Idle siblings, siblings of the same guest, or whoever comes; pairs for a guest that has threads itself."""
    one = guest(vcpus=vcpus, traits=Traits(threads=threads))

    assert vcpus_of(decide(smt(siblings), one, on=host(**BIG))) == cpus_


@pytest.mark.parametrize(
    ("siblings", "taken"), [("idle", ["2", "3"]), ("same-guest", ["2", "10"]), ("ignore", ["2", "3"])]
)
def test_another_guest_keeps_off_the_siblings(siblings, taken):
    """Of a guest with one vCPU the other sibling is nobody's, unless siblings are ignored."""
    decision = decide(smt(siblings), guest(vcpus=1), guest("two", pid=2000, start=900), on=host(**BIG))

    assert vcpus_of(decision) == ["1"]
    assert vcpus_of(decision, "two") == taken


def test_a_step_is_lost_before_the_place_and_got_back_when_there_is_room():
    """Siblings idle, then siblings shared, then housekeeping without FIFO; each is said; a core comes with room."""
    by, on = smt("idle"), host(**BIG)
    first = guest("a", vcpus=6, start=400)
    crowded = decide(by, first, guest("b", pid=2000, vcpus=2), on=on)

    assert (state(crowded, "a")[0], vcpus_of(crowded, "b")) == (State.PLACED, ["7", "15"])
    assert state(crowded, "b") == (
        State.CROWDED, "no core with idle siblings in 'realtime' for vcpu 0, vcpu 1: others may run beside it",
    )  # fmt: skip
    memory = Memory(places=crowded.wanted())
    seen = applied(snapshot(first, guest("b", pid=2000, vcpus=2), host=on), crowded)
    kept = place(by, seen, memory, Ledger())
    assert kept.wanted() == crowded.wanted()
    of_b = next(each for each in kept.guests if each.guest.name == "b")
    vcpu = find(of_b.guest, "vcpu 0")
    assert judge(vcpu, of_b, kept, memory, seen)[0] is Verdict.NOT_PLACED

    alone = place(by, replace(seen, guests=seen.guests[1:]), memory, Ledger())

    assert state(alone, "b") == (State.PLACED, "")
    assert vcpus_of(alone, "b") == ["7", "4"]  # who need not move does not


@pytest.mark.parametrize(
    ("vcpus", "places", "why"),
    [
        (2, ["1", "2"], ""),
        (3, ["1", "2", "9"], "vcpu 0, vcpu 2"),
        (4, ["1", "2", "9", "10"], "vcpu 0, vcpu 1, vcpu 2, vcpu 3"),
    ],
)
def test_who_comes_late_may_use_what_is_idle_for_its_own_guest(vcpus, places, why):
    """As if it had been there at once; who is placed does not move, and of whom no sibling is used keeps it idle."""
    by, on = smt("idle"), host(online="0-2,8-10", isolated="1-2,9-10", topology=SMT)
    memory = Memory(places=decide(by, guest(vcpus=2), on=on).wanted())

    late = decide(by, guest(vcpus=vcpus), on=on, memory=memory)

    lost = f"no core with idle siblings in 'realtime' for {why}: others may run beside it" if why else ""
    assert state(late) == (State.CROWDED if why else State.PLACED, lost)
    assert vcpus_of(late) == places
    for step in (Memory(places=late.wanted()), Memory()):  # again, and for a daemon that was started anew
        seen = applied(snapshot(guest(vcpus=vcpus), host=on), late)
        again = place(by, seen, step, Ledger())
        assert (state(again), vcpus_of(again)) == (state(late), places)


def test_who_comes_late_to_a_fixed_pcpu_costs_nobody_a_step():
    """Where a place elsewhere leaves all their siblings idle, that is taken at once, and not in a second step."""
    on = host(online="0-9", isolated="1-4,6-9", topology=Topology.built(1, 5, 2))  # siblings n and n+5
    by = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}}",
        pools="realtime: {cpus: isolated, siblings: idle}",
        rules='{name: "*", class: c, pcpus: "6"}',
        on=on,
    )
    whole = guest(vcpus=3)
    first = replace(whole, threads=tuple(one for one in whole.threads if one.label != "vcpu 0"))
    before = applied(snapshot(first, host=on), decide(by, first, on=on)).guests[0]
    now = {one.id: one for one in before.threads}
    late = replace(whole, threads=tuple(now.get(one.id, one) for one in whole.threads))

    found = decide(by, late, on=on, memory=Memory(places=decide(by, first, on=on).wanted()))

    assert (state(found), vcpus_of(found)) == ((State.PLACED, ""), ["6", "3", "2"])
    again = place(by, applied(snapshot(late, host=on), found), Memory(places=found.wanted()), Ledger())
    assert again.wanted() == found.wanted()


def test_where_no_idle_sibling_helps_no_step_is_lost():
    """A vCPU for which there is no pCPU at all costs the others nothing: not their places, nor their idle siblings."""
    by, on = smt("idle"), host(online="0-2,8", isolated="1-2", topology=SMT)
    memory = Memory(places=decide(by, guest(vcpus=2), on=on).wanted())

    late = decide(by, guest(vcpus=3), on=on, memory=memory)

    assert (state(late), vcpus_of(late)) == ((State.PLACED, ""), ["1", "2", "0,8"])


def test_with_leave_no_step_is_lost():
    """A class that wants idle siblings or nothing gets nothing."""
    by, on = smt("idle", when_full="leave"), host(**BIG)

    decision = decide(by, guest("a", vcpus=6, start=400, on="0-15"), guest("b", pid=2000, vcpus=2, on="0-15"), on=on)

    assert state(decision, "b") == (State.LEFT, "no free core in 'realtime' for vcpu 1")


def test_a_core_that_the_host_or_helpers_use_is_not_idle():
    """The sibling of a housekeeping pCPU is given out last."""
    on = host(online="0-15", isolated="1-15", topology=SMT)
    by = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread}}", pools="realtime: {cpus: isolated, siblings: idle}", on=on
    )

    assert vcpus_of(decide(by, guest(vcpus=3), on=on)) == ["1", "2", "3"]
    assert "8" not in vcpus_of(decide(by, guest(vcpus=7), on=on))


def test_guests_are_close_together_and_fill_what_is_begun():
    """A guest stays within one L3 cache where it can, in the fullest that has room; a large one still fits later."""
    on = host(online="0-15", isolated="1-15", topology=Topology.built(2, 8, caches=2))
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread}}", pools="realtime: isolated", on=on)

    decision = decide(
        by,
        guest("a", vcpus=2, start=1),
        guest("b", pid=2000, vcpus=4, start=2),
        guest("c", pid=3000, vcpus=1, start=3),
        guest("d", pid=4000, vcpus=8, start=4),
        on=on,
    )

    assert vcpus_of(decision, "a") == ["1", "2"]
    assert vcpus_of(decision, "b") == ["4", "5", "6", "7"]
    assert vcpus_of(decision, "c") == ["3"]
    assert vcpus_of(decision, "d") == [str(cpu) for cpu in range(8, 16)]


def test_a_vcpu_that_is_plugged_in_stays_close_to_its_guest():
    """The third vCPU goes to the cache of the first two, though another is fuller."""
    on = host(online="0-15", isolated="1-15", topology=Topology.built(2, 8, caches=2))
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread}}", pools="realtime: isolated", on=on)
    one = put(guest(), {"vcpu 0": "8", "vcpu 1": "9"})
    memory = Memory(places={find(one, f"vcpu {n}").id: Wanted(cpus(str(8 + n)), exclusive=True) for n in (0, 1)})
    grown = replace(one, threads=(*one.threads, find(guest(vcpus=3), "vcpu 2")))

    assert vcpus_of(decide(by, grown, on=on, memory=memory)) == ["8", "9", "10"]


@pytest.mark.parametrize(
    ("numa", "nodes", "bound", "cpus_"),
    [
        ("preferred", "", "", ["1", "2"]),
        ("preferred", "1", "", ["4", "5"]),
        ("preferred", "0", "1", ["4", "5"]),  # what it is bound to counts more than where it lies
        ("strict", "1", "", ["4", "5"]),
        ("strict", "", "", ["1", "2"]),  # not known
        ("ignore", "1", "1", ["1", "2"]),
    ],
)
def test_pcpus_are_near_the_guests_memory(numa, nodes, bound, cpus_):
    """On the node of its memory: always, where there is room, or by chance."""
    one = guest(nodes=cpus(nodes), traits=Traits(nodes=cpus(bound)))

    assert vcpus_of(decide(smt("ignore", numa), one, on=host(**BIG))) == cpus_


def test_preferred_goes_elsewhere_when_its_node_is_full_and_strict_does_not():
    """Nine pCPUs are not on one node of eight."""
    large = guest(vcpus=9, nodes=cpus("1"))

    assert state(decide(smt(numa="preferred"), large, on=host(**BIG)))[0] is State.PLACED
    full = state(decide(smt(numa="strict"), large, on=host(**BIG)))
    assert full == (State.DEGRADED, "no free pCPU in 'realtime' near its memory (NUMA node 1) for vcpu 8")


def test_a_strict_pool_serves_who_has_no_memory_yet_from_one_node():
    """Its memory will lie where it runs. Who needs more waits until it lies on both."""
    by, on = smt(numa="strict"), host(**BIG)
    first = guest("a", vcpus=3, start=400)

    assert vcpus_of(decide(by, first, guest("b", pid=2000, vcpus=5), on=on), "b") == ["4", "5", "6", "7", "12"]
    large = guest("a", vcpus=9)
    short = decide(by, large, on=on)
    assert state(short, "a") == (State.DEGRADED, "no free pCPU in 'realtime' on one NUMA node for vcpu 8")
    assert state(decide(by, replace(large, nodes=cpus("0-1")), on=on), "a")[0] is State.PLACED


def test_a_guest_without_memory_goes_where_all_of_it_has_room():
    """Not to the fullest node that takes its vCPUs, where its emulator would find no pCPU."""
    on = host(**BIG)
    by = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}, emulator: {pool: realtime, exclusive: guest}}",
        pools='realtime: {cpus: "1-7,9-15", numa: strict}',
        on=on,
    )

    decision = decide(by, guest(vcpus=6), on=on)

    assert state(decision) == (State.PLACED, "")
    assert vcpus_of(decision) == ["4", "5", "6", "7", "12", "13"]
    assert where(decision)["emulator"] == "14"


def test_a_vcpu_plugged_into_a_guest_without_memory_joins_its_node():
    """Where that has no room, it stays with the helpers; the others keep their places."""
    by, on = smt(numa="strict"), host(**BIG)
    memory = Memory(places=decide(by, guest(vcpus=7), on=on).wanted())

    grown = decide(by, guest(vcpus=9), on=on, memory=memory)

    assert vcpus_of(grown) == ["4", "5", "6", "7", "12", "13", "14", "15", "0,8"]
    assert grown.guests[0].roomless == {find(guest(vcpus=9), "vcpu 8").id}


@pytest.mark.parametrize("siblings", ["ignore", "idle"])
@pytest.mark.parametrize("when_full", ["degrade", "leave"])
def test_a_guest_away_from_its_memory_is_said_and_follows_it_as_a_whole(siblings, when_full):
    """It keeps its places until all of it fits near its memory; then it goes there, and what it had is free."""
    by, on = smt(siblings, numa="strict", when_full=when_full), host(**BIG)
    first, other = guest("a", vcpus=2, start=400), guest("b", pid=2000, vcpus=3, nodes=cpus("1"))
    before = decide(by, first, other, on=on)
    memory = Memory(places=before.wanted())
    assert (vcpus_of(before, "a"), state(before, "a")) == (["1", "2"], (State.PLACED, ""))

    first = replace(first, nodes=cpus("1"))
    seen = applied(snapshot(first, other, host=on), before)
    if siblings == "ignore":  # without it there would be room
        other = guest("b", pid=2000, vcpus=7, nodes=cpus("1"))
        memory = Memory(places=decide(by, guest("a", vcpus=2, start=400), other, on=on).wanted())
        seen = applied(snapshot(first, other, host=on), decide(by, first, other, on=on, memory=memory))
    kept = place(by, seen, memory, Ledger())

    reason = "away from its memory (NUMA node 1): vcpu 0, vcpu 1; 'realtime' has no room for all of it there"
    assert (vcpus_of(kept, "a"), state(kept, "a")) == (["1", "2"], (State.REMOTE, reason))
    found = kept.guests[0]
    assert judge(find(found.guest, "vcpu 0"), found, kept, memory, seen) == (Verdict.NOT_PLACED, reason)
    assert judge(find(found.guest, "emulator"), found, kept, memory, seen)[0] is Verdict.OK
    said = [record.message for _, record in standing(seen, kept, Plan(), memory, ())]
    assert f"a: placed with a step lost: {reason}" in said

    alone = place(by, replace(seen, guests=seen.guests[:1]), memory, Ledger())
    assert (vcpus_of(alone, "a"), state(alone, "a")) == (["4", "5"], (State.PLACED, ""))


def test_a_guest_away_from_its_memory_loses_its_place_to_nobody():
    """Nor after a restart, when only the ledger tells that rtpind put it there; who was put there by hand moves."""
    by, on = smt(numa="strict"), host(**BIG)
    one = put(guest("a", vcpus=1, nodes=cpus("1")), {"vcpu 0": "1"})
    older = guest("b", pid=2000, start=1, vcpus=6, nodes=cpus("0"))
    there = {f"vcpu {number}": str(cpu) for number, cpu in enumerate(cpus("4-7,12-15"))}
    filler = put(guest("c", pid=3000, start=2, vcpus=8, nodes=cpus("1")), there)
    ours = Ledger().recording(one.threads)

    kept = decide(by, one, older, filler, on=on, ledger=ours)
    assert (vcpus_of(kept, "a"), state(kept, "a")[0]) == (["1"], State.REMOTE)
    assert state(kept, "b")[0] is State.DEGRADED
    by_hand = decide(by, one, older, filler, on=on)
    assert (state(by_hand, "a")[0], state(by_hand, "b")[0]) == (State.DEGRADED, State.PLACED)


def test_a_guest_whose_memory_is_on_a_node_without_pcpus_is_near_none():
    """It is as if nothing were known."""
    one = guest(nodes=cpus("5"))

    assert state(decide(smt(numa="strict"), one, on=host(**BIG))) == (State.PLACED, "")


def test_a_strict_pool_serves_helpers_from_the_guests_own_node():
    """Helpers float only over the pCPUs of their guest's node; where the pool has none there, over all."""
    on = host(online="0-15", isolated="1-3,5-7,9-15", topology=SMT)
    by = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread}, emulator: {pool: helpers}}",
        pools="realtime: isolated\n  helpers: {cpus: [0, 4], numa: strict}",
        on=on,
    )

    assert where(decide(by, guest(nodes=cpus("1")), on=on))["emulator"] == "4"
    assert where(decide(by, guest(nodes=cpus("0-1")), on=on))["emulator"] == "0,4"
    assert where(decide(by, guest(nodes=cpus("3")), on=on))["emulator"] == "0,4"


# Others on the host


def test_what_others_are_pinned_to_is_busy():
    """A pCPU that somebody's thread is pinned to is not given out; a vCPU that is there stays."""
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread}}")
    on = host(busy={2: "ptp4l (812)", 3: "dpdk (99)"})
    there = put(guest(vcpus=1), {"vcpu 0": "3"})
    memory = Memory(places={find(there, "vcpu 0").id: Wanted(cpus("3"), exclusive=True)})

    fresh = decide(by, guest(vcpus=1), on=on)

    assert where(fresh)["vcpu 0"] == "4"
    assert fresh.blocked == {2: "busy: ptp4l (812)", 3: "busy: dpdk (99)"}
    assert where(decide(by, there, on=on, memory=memory))["vcpu 0"] == "3"


def test_floating_vcpus_share_what_is_left():
    """A pool of both kinds: floaters leave a pCPU that is given out, and come back when it is free."""
    on = host(isolated="")
    by = policy(
        "c: {vcpu: {pool: guests, exclusive: thread}}\n  f: {vcpu: {pool: guests}}",
        pools="housekeeping: 0-1\n  guests: 2-7",
        rules='{name: "rt-*", class: c}\n  - {name: "*", class: f}',
        on=on,
    )
    floats = guest("web", pid=2000)

    assert where(decide(by, floats, on=on), "web")["vcpu 0"] == "2-7"
    both = decide(by, floats, guest(), on=on)
    assert where(both, "web")["vcpu 0"] == "4-7"
    assert where(both, "web")["emulator"] == "0-1"


def test_a_fence_inside_the_pool_is_where_the_vcpu_goes():
    """A vCPU that a cpuset refused its place gets one of the pool inside the cpuset; the narrowest fence first."""
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}}")
    one = guest(vcpus=3)
    fences = {"vcpu 0": "4-5", "vcpu 1": "4", "vcpu 2": "0-1"}
    threads = [
        replace(each, limits=Limits(fence=cpus(fences[each.label]))) if each.label in fences else each
        for each in one.threads
    ]

    assert vcpus_of(decide(by, replace(one, threads=tuple(threads)))) == ["5", "4", "2"]


# The schemes that ship

SHIPPED = (Path(__file__).parents[2] / "etc/rtpind.yaml").read_text()


def test_every_scheme_that_ships_is_one_of_these():
    """Each class of the shipped policy, its comments taken off, places a guest of three vCPUs."""
    text = SHIPPED.replace('  # - {name: "rt-*", class: realtime}', '  - {name: "CLASS", class: CLASS}')
    made, problems = load(SHIPPED, HOST)
    assert made is not None
    assert [problem for problem in problems if not problem.warning] == []
    for name in made.classes:
        by, problems = load(text.replace("CLASS", name), HOST)
        assert by is not None, problems
        decision = decide(by, guest(name, vcpus=3, traits=Traits(pins={0: cpus("4")})))
        assert state(decision, name) == (State.PLACED, ""), name
        assert len(where(decision, name)) == 5


def test_a_full_host_costs_no_placed_guest_its_place():
    """Whoever comes, in whatever number: who is placed stays."""
    by, on = smt("same-guest"), host(**BIG)
    first = [guest("a", vcpus=3, start=400), guest("b", pid=2000, vcpus=5, start=401)]
    before = decide(by, *first, on=on)
    seen = applied(snapshot(*first, host=on), before)
    crowd = [guest(f"z{n}", pid=5000 + 1000 * n, vcpus=1 + n % 3, start=300 + n) for n in range(12)]

    after = place(by, replace(seen, guests=(*seen.guests, *crowd)), Memory(places=before.wanted()), Ledger())

    for id_, wanted in before.wanted().items():
        if wanted.exclusive:
            assert after.wanted()[id_] == wanted


def test_the_empty_set_of_fixed_ids_is_no_id():
    """Ids that are inverted overlap with each other, and with what they do not take away."""
    by = policy('c: {vcpu: {ids: "^0", pool: realtime, exclusive: thread, missing_ids: clip}}')
    (entry,) = by.classes["c"].entries[Role.VCPU]

    assert (0 in entry.ids, 1 in entry.ids, str(entry.ids)) == (False, True, "^0")
    assert CpuSet([0]) == entry.ids.named
    assert fifo().priority == 1


# What a review found


def test_pins_are_asked_for_in_the_order_of_age():
    """A younger guest whose <cputune> names an older one's pCPU does not get it."""
    by = policy(
        f"{CPUTUNE}\n  d: {{vcpu: {{pool: realtime, exclusive: thread, scheduler: fifo}}}}",
        pools="realtime: 2",
        rules='{name: "rt-*", class: d}\n  - {name: "*", class: c}',
        on=host(isolated="2"),
    )
    traits = Traits(pins={0: cpus("2")}, realtime={0: 1})
    before = decide(by, guest(vcpus=1), on=host(isolated="2"))
    memory = Memory(places=before.wanted())

    after = decide(by, guest(vcpus=1), guest("x", pid=2000, start=900, vcpus=1, traits=traits), memory=memory)

    assert where(after)["vcpu 0"] == "2 fifo:1"
    assert where(after, "x")["vcpu 0"] != "2"


def test_a_pin_on_housekeeping_takes_it_from_nobody():
    """Nova's vCPUs that are not realtime are pinned where helpers are: these stay there."""
    traits = Traits(pins={0: cpus("0"), 1: cpus("1")})

    found = where(decide(policy(CPUTUNE), guest(traits=traits)))

    assert found == {"vcpu 0": "0", "vcpu 1": "1", "emulator": "0-1", "iothread 1": "0-1"}


def test_a_wide_pin_keeps_off_what_others_have():
    """Pinned to the whole pool, a vCPU is not beside somebody's FIFO vCPU."""
    by = policy(
        f"{CPUTUNE}\n  d: {{vcpu: {{pool: realtime, exclusive: thread, scheduler: fifo}}}}",
        rules='{name: "rt-*", class: d}\n  - {name: "*", class: c}',
    )
    placed = guest(vcpus=1)
    memory = Memory(places=decide(by, placed).wanted())
    wide = guest("x", pid=2000, start=900, vcpus=1, traits=Traits(pins={0: cpus("2-7")}))

    after = decide(by, placed, wide, memory=memory)

    assert where(after)["vcpu 0"] == "2 fifo:1"
    assert where(after, "x")["vcpu 0"] == "3-7"


def test_a_guest_without_room_gives_its_pins_back_too():
    """Degraded for want of a pCPU for its helpers, its pinned vCPU has no FIFO, and the next guest gets the pCPU."""
    by = policy(
        "c: {vcpu: {from: cputune}, emulator: {pool: own, exclusive: guest}}\n"
        "  d: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}}\n"
        "  e: {emulator: {pool: own, exclusive: guest}}",
        pools="realtime: 2\n  own: 3",
        rules='{name: "rt-*", class: c}\n  - {name: "full", class: e}\n  - {name: "*", class: d}',
    )
    full = guest("full", pid=500, start=1, vcpus=0, iothreads=0)
    mixed = guest(vcpus=1, iothreads=0, start=2, traits=Traits(pins={0: cpus("2")}, realtime={0: 1}))

    decision = decide(by, full, mixed, guest("d", pid=3000, vcpus=1, start=3))

    assert state(decision)[0] is State.DEGRADED
    assert where(decision)["vcpu 0"] == "0-1"
    assert where(decision, "d")["vcpu 0"] == "2 fifo:1"


def test_siblings_stay_kept_while_libvirt_has_not_told():
    """After a restart a guest that was placed by its flavor keeps its core, though its flavor is not known yet."""
    on = host(**BIG)
    by = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}}",
        pools='realtime: {cpus: "1-3,9-11", siblings: idle}',
        rules='{flavor: rt, class: c}\n  - {name: "*", class: c}',
        on=on,
    )
    before = [guest(f"f{n}", pid=1000 * n, start=n, vcpus=1, traits=Traits(flavor="rt")) for n in (1, 2, 3)]
    seen = applied(snapshot(*before, host=on), decide(by, *before, on=on))
    ledger = Ledger().recording(one for each in before for one in each.threads)
    untold = [replace(each, traits=None) for each in seen.guests]

    decision = decide(by, *untold, guest("z", pid=9000, vcpus=1, start=9, traits=Traits()), on=on, ledger=ledger)

    assert state(decision, "z")[0] is State.DEGRADED


def test_what_a_left_guest_is_narrowed_to_is_given_to_nobody():
    """Though the guest that would take it is older."""
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}}", when_full="leave")
    large = guest("large", pid=2000, start=900, vcpus=7, on="2-3")

    decision = decide(by, guest(vcpus=1), large)

    assert state(decision, "large")[0] is State.LEFT
    assert where(decision)["vcpu 0"] == "4 fifo:1"


def test_a_busy_sibling_moves_nobody():
    """A thread that is pinned beside a guest's pCPU leaves the guest where it is."""
    by = smt("idle")
    one = guest(vcpus=1, on="0-15")
    memory = Memory(places=decide(by, one, on=host(**BIG)).wanted())

    after = decide(by, one, on=host(**BIG, busy={9: "x (1)"}), memory=memory)

    assert vcpus_of(after) == ["1"]


def test_fixed_pcpus_belong_to_numbers():
    """Unplugged, a vCPU leaves its pCPU empty; the others stay."""
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread}}", rules='{name: "*", pcpus: "4-6", class: c}')
    whole = guest(vcpus=3)
    holed = replace(whole, threads=tuple(one for one in whole.threads if one.label != "vcpu 1"))

    assert where(decide(by, holed))["vcpu 2"] == "6"


def test_a_glob_for_everything_needs_something():
    """A guest without Nova's metadata matches no flavor."""
    by = policy("c: {vcpu: {pool: realtime, exclusive: thread}}", rules='{flavor: "*", class: c}')

    assert decide(by, guest(traits=Traits())).guests[0].state is State.UNMANAGED


def test_fifo_of_the_xml_without_a_pin_is_said_to_be_withheld():
    """Not taken silently."""
    one = guest(vcpus=1, traits=Traits(realtime={0: 1}))

    wanted = decide(policy(CPUTUNE), one).wanted()[find(one, "vcpu 0").id]

    assert wanted == Wanted(cpus("0-1"), withheld="its <cputune> pins it to no pCPU")


def test_what_has_nobody_to_share_with_by_role_is_no_room():
    """A guest without iothreads has no iothread's pCPU to share."""
    by = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread}, iothread: {pool: realtime, exclusive: guest},"
        " vhost: {share_with: iothread}}"
    )

    assert state(decide(by, guest(vhosts=1, iothreads=0)))[0] is State.DEGRADED
    assert where(decide(by, guest(vhosts=1, vcpus=1)))["vhost"] == "3"


def test_a_role_that_follows_emulator_shares_its_pcpu_by_name():
    """The vCPU follows the emulator; the iothread joins both."""
    by = policy("c: {emulator: {pool: realtime, exclusive: guest}, iothread: {share_with: emulator}}")

    assert where(decide(by, guest(vcpus=1))) == {"emulator": "2", "vcpu 0": "2", "iothread 1": "2"}


def test_a_former_place_takes_no_sibling_that_is_somebodys():
    """A guest that keeps a place beside a stranger, for want of another, does not hold the sibling that another has."""
    by = policy(
        "c: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}}",
        pools='realtime: {cpus: "1-3,9-11", siblings: idle}',
        rules='{name: none, class: unmanaged}\n  - {name: rt-1, pcpus: [1, 2], class: c}\n  - {name: "*", class: c}',
        on=host(**BIG),
    )
    fixed = guest(vcpus=2, start=700)
    beside = guest("b", pid=2000, start=1, vcpus=1)
    other, third = (guest(name, pid=pid, start=2, vcpus=1) for name, pid in (("d", 3000), ("e", 5000)))
    stranger = guest("none", pid=4000, start=3, vcpus=1, on="1")
    places = {find(fixed, "vcpu 0").id: "1", find(beside, "vcpu 0").id: "9", find(other, "vcpu 0").id: "2"}
    places |= {find(third, "vcpu 0").id: "3"}
    memory = Memory(places={id_: Wanted(cpus(place), 1, exclusive=True) for id_, place in places.items()})

    decision = decide(by, fixed, beside, other, third, stranger, on=host(**BIG), memory=memory)

    assert vcpus_of(decision, "b") == ["9"]
    assert decision.owners[9].startswith(beside.uuid)
