# SPDX-License-Identifier: GPL-2.0-or-later
"""A policy file is read into a policy, or every problem of it is said at once, where it stands."""

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from rtpind import schemas
from rtpind.core import document, schemafaults
from rtpind.core.cpuset import CpuListError, CpuSet
from rtpind.core.model import Guest, Host, Role
from rtpind.core.policy import (
    HOUSEKEEPING,
    CpuList,
    Drift,
    Entry,
    Exclusive,
    GuestClass,
    Mode,
    Policy,
    Pool,
    Rule,
    Share,
    WhenFull,
)
from rtpind.core.policyfile import load
from rtpind.core.reading import parse_cpus

HERE = Path(__file__).parent
BAD = sorted((HERE / "policies" / "bad").glob("*.yaml"))
SHIPPED = (HERE.parents[1] / "etc" / "rtpind.yaml").read_text()


def make_host(online="0-7", possible="0-7", isolated="2-7"):
    return Host(online=CpuSet.parse(online), possible=CpuSet.parse(possible), isolated=CpuSet.parse(isolated))


HOST = make_host()
STOCK = make_host(online="0-3", possible="0-3", isolated="")

GOOD = """\
version: 1
mode: enforce
pools:
  housekeeping: 0-1
  helpers: {cpus: 0-1}
  realtime: "isolated,^7"
classes:
  realtime:
    vcpu:     {pool: realtime, exclusive: thread, scheduler: fifo, priority: 1}
    emulator: {pool: helpers}
  own-pcpu:
    vcpu:     {pool: realtime, exclusive: thread, scheduler: fifo, priority: 60}
    emulator: {pool: realtime, exclusive: guest}
    unsafe: true
  dpdk:
    vcpu:     {pool: realtime, exclusive: thread}
    emulator: {share_with: {vcpu: 0}}
    iothread: {pool: helpers}
guests:
  - {name: "infra-*", class: unmanaged}
  - {name: "rt-*", uuid: "0f4c2a5e-*", class: own-pcpu}
  - {name: "rt-*", class: realtime}
  - {uuid: "0f4c2a5e-*", class: dpdk}
drift: repair
when_full: degrade
cputune: respect
daemon: {uri: "qemu:///system", period: 500ms}
"""


#: Each line is nine times the line before it.
ALIASES = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join(['*' + before] * 9)}]\n" for before, name in pairwise("abcdefgh")
)


def texts(problems):
    return [problem.text("F").removeprefix("F:") for problem in problems]


def good(text, host=HOST, *, strict=True):
    """Return the policy of a text that must have no problem and no warning."""
    policy, problems = load(text, host, strict=strict)

    assert texts(problems) == []
    assert policy is not None
    return policy


def guest(name="rt-1", uuid="0f4c2a5e-0000-4000-8000-000000000001"):
    return Guest(uuid=uuid, name=name, pid=1, pid_start=1)


# Bad files


@pytest.mark.parametrize("path", BAD, ids=lambda path: path.stem)
def test_says_every_problem_of_a_bad_file(path):
    """Each bad file gives the problems that its first lines expect, all of them and no other."""
    text = path.read_text(encoding="utf-8")
    header = re.match(r"# host: online=(\S*) possible=(\S*) isolated=(\S*)\n", text)
    expected = re.findall(r"^# expect: (.*)$", text, re.MULTILINE)
    policy, problems = load(text, make_host(*header.groups()) if header else HOST, strict=True)

    assert expected
    assert texts(problems) == expected
    assert (policy is None) == any(not problem.warning for problem in problems)


def test_bad_files_are_many():
    """The folder of bad files was found."""
    assert len(BAD) >= 45


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "1: the file is empty (a policy needs at least 'version: 1')"),
        ("~", "1: the file is empty (a policy needs at least 'version: 1')"),
        ("version: 1\r\nmode: no\r\n", "2: mode: 'no' is not 'observe' or 'enforce'"),
        ("version: 1\n...\nx: 1", "3: not YAML: expected a single document in the stream that begins on line 1, but"),
        ("a:  # b\n|\n\n", "1: not YAML: overlap in comment"),
        ("#" * 300_000, "1: the file is larger than 262144 characters (this is no policy file)"),
        ("[" * 4_000, "1: not a policy: nested too deeply"),
        ('a: "\\x"', "1: not YAML: while scanning a double-quoted scalar expected escape sequence of 2 hexdecimal"),
        ('"\\UFFFFFFFF"', "1: not YAML: "),
        ("version: 1\n? [a]\n: 3", "2: a key must be a plain word"),
        ("%YAML 1.1\n---\nversion: 1\nclasses: {a: {unsafe: yes}}", "4: classes.a.unsafe: 'yes' is not true or false"),
        ("version: 1\nmode: " + "x" * 100, "2: mode: '" + "x" * 57 + "...' is not 'observe' or 'enforce'"),
        (
            "version: 1\npools: {a: [" + "0," * 30_000 + "]}",
            "2: pools.a: nested too deeply, or too much for a policy (an alias may hold itself)",
        ),
        (
            ALIASES,
            "4: e[1]: nested too deeply, or too much for a policy (an alias may hold itself)",
        ),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_says_what_no_file_of_the_folder_can_hold(text, expected):
    """Texts that no commented file can hold give one problem that says what is wrong and where."""
    policy, problems = load(text, HOST)

    assert policy is None
    assert len(problems) == 1
    assert texts(problems)[0].startswith(expected)


def test_a_byte_order_mark_is_no_problem():
    """A file that an editor began with a byte order mark is read."""
    assert good("\ufeffversion: 1\n").mode is Mode.OBSERVE


def test_the_same_anchor_twice_is_no_problem():
    """An anchor may be given again, as YAML has it; each alias means the one before it."""
    policy = good("version: 1\npools: {a: &x 2, b: *x, c: &x 3, d: *x}\n")

    assert [str(policy.pool(name, HOST)) for name in "abcd"] == ["2", "2", "3", "3"]


def test_a_schema_word_without_words_of_its_own_is_still_a_problem():
    """What the schema may refuse one day, without a sentence for it here, never passes in silence."""
    (error,) = Draft202012Validator({"multipleOf": 2}).iter_errors(3)
    problems = list(schemafaults.explain(document.Document(3, {}), error))

    assert texts(problems) == ["1: 3 is not allowed (multipleOf: 2)"]


def test_a_problem_reads_as_one_line():
    """A problem is FILE:LINE: path: message (hint); path and hint only where there are any."""
    full = document.Problem(3, "pools.a", "is wrong", "put it right", warning=True)
    bare = document.Problem(1, "", "is wrong")

    assert full.text("/etc/rtpind.yaml") == "/etc/rtpind.yaml:3: pools.a: warning: is wrong (put it right)"
    assert bare.text("-") == "-:1: is wrong"


# Good files


def test_reads_a_whole_policy():
    """Every key of a good file arrives in the policy."""
    policy = good(GOOD)
    helpers, beside = (Entry(pool="helpers"),), (Entry(share_with=Share(Role.VCPU, 0)),)

    assert (policy.mode, policy.drift, policy.when_full) == (Mode.ENFORCE, Drift.REPAIR, WhenFull.DEGRADE)
    assert (policy.uri, policy.period_s) == ("qemu:///system", 0.5)
    assert {name: str(policy.pool(name, HOST)) for name in policy.pools} == {
        "housekeeping": "0-1", "helpers": "0-1", "realtime": "2-6",
    }  # fmt: skip
    assert policy.classes["realtime"] == GuestClass(
        name="realtime",
        entries=dict.fromkeys(Role, helpers)
        | {Role.VCPU: (Entry(pool="realtime", exclusive=Exclusive.THREAD, priority=1),)},
    )
    assert policy.classes["own-pcpu"] == GuestClass(
        name="own-pcpu",
        unsafe=True,
        entries=dict.fromkeys(Role, (Entry(pool="realtime", exclusive=Exclusive.GUEST),))
        | {Role.VCPU: (Entry(pool="realtime", exclusive=Exclusive.THREAD, priority=60),)},
    )
    assert policy.classes["dpdk"].entries == {
        Role.VCPU: (Entry(pool="realtime", exclusive=Exclusive.THREAD),),
        Role.EMULATOR: beside, Role.IOTHREAD: helpers, Role.VHOST: beside, Role.PIT: beside,
    }  # fmt: skip
    assert policy.rules[1] == Rule(number=2, line=21, class_name="own-pcpu", name="rt-*", uuid="0f4c2a5e-*")


@pytest.mark.parametrize(
    ("written", "cpus"),
    [
        ("3", "3"),
        ("2-4", "2-4"),
        ("2,4", "2,4"),
        ('"2-7,^4"', "2-3,5-7"),
        ("2-7,^4,^6-7", "2-3,5"),
        ("^4,2-7", "2-3,5-7"),
        ('"2-7, ^ 4"', "2-3,5-7"),
        ("2-7:1/2", "2,4,6"),
        ("[2, 3, 5]", "2-3,5"),
        ('[2, "4-7", "^6"]', "2,4-5,7"),
        ("\n    - 2\n    - 4-5\n", "2,4-5"),
        ("isolated", "2-7"),
        ("isolated,^7", "2-6"),
        ("[isolated, ^7]", "2-6"),
        ("0,isolated", "0,2-7"),
        ("^0", "1-7"),
        ("^isolated", "0-1"),
        ("{cpus: 3}", "3"),
        ('{cpus: "2-7,^4"}', "2-3,5-7"),
        ("{cpus: [2, 4-5]}", "2,4-5"),
        ("\n    cpus: 2,4\n", "2,4"),
        ("{cpus: isolated}", "2-7"),
    ],
)
def test_reads_every_form_of_a_cpu_list(written, cpus):
    """A pool is a number, a text, a YAML list or {cpus: ...} of these, with ``isolated`` and ``^``."""
    policy = good(f"version: 1\npools:\n  a: {written}\n")

    assert str(policy.pool("a", HOST)) == cpus


@pytest.mark.parametrize(
    ("value", "host", "cpus"),
    [
        ("isolated", make_host(isolated="4-5"), "4-5"),
        ("isolated", make_host(isolated=""), ""),
        ("^isolated", make_host(isolated="4-5"), "0-3,6-7"),
        ("^isolated", make_host(isolated=""), "0-7"),
        ("isolated,^isolated", HOST, ""),
        ("^0", make_host(online="0-1", possible="0-3", isolated=""), "1-3"),
        ("^0-7", HOST, ""),
        ("6-9", make_host(online="0-1"), "6-9"),
        ("2,^2", HOST, ""),
        ("^2,2", HOST, ""),
    ],
)
def test_resolves_a_cpu_list_on_a_host(value, host, cpus):
    """``isolated`` is what this host isolates; ``^`` always wins; only ``^`` is all that is possible but those."""
    assert str(parse_cpus(value).resolve(host)) == cpus


def test_named_are_the_pcpus_written_by_number():
    """What is added by number is named; not what is isolated, nor what is taken away."""
    assert str(parse_cpus("isolated,1,3-4,^4,^9").named()) == "1,3-4"


@pytest.mark.parametrize("value", ["", "^", "2,", [], ["2", ""], "010", None, True, 1.5])
def test_refuses_what_is_no_cpu_list(value):
    """A value that is no CPU list is refused, whatever its type."""
    with pytest.raises(CpuListError):
        parse_cpus(value)


@pytest.mark.parametrize("empty", ["", " {}", " null", " ~"])
def test_a_section_may_be_empty(empty):
    """A section whose every line is commented out is an empty one."""
    rules = empty.replace("{}", "[]")
    text = f"version: 1\npools:{empty}\n  # a: 2\nclasses:{empty}\nguests:{rules}\n# - {{name: a}}\ndaemon:{empty}\n"
    policy = good(text)

    assert policy == Policy(pools={}, classes={})


def test_what_the_host_cannot_have_is_a_warning_to_the_daemon():
    """A pCPU that this host cannot have shrinks the pool of a running daemon, and check-config refuses it."""
    text = "version: 1\npools: {a: 6-9}\n"
    policy, warnings = load(text, HOST, strict=False)
    refused, problems = load(text, HOST, strict=True)

    assert texts(warnings) == ["2: pools.a: warning: this host cannot have pCPU 8-9 (possible here: 0-7)"]
    assert policy is not None
    assert str(policy.pool("a", HOST)) == "6-7"
    assert texts(problems) == ["2: pools.a: this host cannot have pCPU 8-9 (possible here: 0-7)"]
    assert refused is None


@pytest.mark.parametrize("strict", [False, True])
def test_an_offline_pcpu_is_a_warning(strict):
    """A pCPU that is offline now shrinks its pool, with a warning."""
    host = make_host(online="0-5")
    policy, problems = load("version: 1\npools: {a: 4-7}\n", host, strict=strict)

    assert texts(problems) == ["2: pools.a: warning: pCPU 6-7 is offline (the pool goes without it)"]
    assert policy is not None
    assert str(policy.pool("a", host)) == "4-5"


@pytest.mark.parametrize(("written", "seconds"), [("50ms", 0.05), ("10s", 10), ("2m", 120), ("60m", 3600)])
def test_reads_a_period(written, seconds):
    """The period is a number with its unit, from 50ms to 60m."""
    assert good(f"version: 1\ndaemon: {{period: {written}}}\n").period_s == seconds


def test_metrics_are_off_unless_a_directory_is_named():
    """An empty default, and the path as it was written."""
    assert good("version: 1\n").metrics_dir == ""
    assert good("version: 1\ndaemon: {metrics_dir: /run/rtpind}\n").metrics_dir == "/run/rtpind"


@pytest.mark.parametrize(("written", "listens"), [("", True), ("proc_events: auto", True), ("proc_events: off", False)])
def test_the_proc_connector_is_listened_to_unless_it_is_off(written, listens):
    """``off`` is a word of YAML 1.2, not a boolean."""
    assert good(f"version: 1\ndaemon: {{{written}}}\n").proc_events is listens


OWN = """
version: 1
pools: {realtime: 2-7}
classes:
  plain: {vcpu: {pool: realtime, exclusive: thread}, emulator: {pool: housekeeping}}
  first: {vcpu: {pool: realtime, exclusive: thread, scheduler: fifo}, emulator: {pool: housekeeping}}
  above:
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo, priority: 3}
    emulator: {pool: housekeeping}
    pit: {share_with: {vcpu: 0}, scheduler: fifo, priority: 7}
  irqs:
    unsafe: true
    vcpu: {pool: realtime, exclusive: thread, scheduler: fifo, priority: 60}
    emulator: {pool: housekeeping}
  xml: {vcpu: {from: cputune}, emulator: {pool: housekeeping}}
"""


@pytest.mark.parametrize(
    ("classes", "written", "priority"),
    [
        ((), "", 1), (("plain",), "", 1), (("first",), "", 2), (("plain", "above", "first"), "", 8),
        (("irqs",), "", 49), (("xml",), "", 2), (("above",), "priority: 0", 0), (("above",), "priority: 3", 3),
    ],
)  # fmt: skip
def test_its_own_priority_is_one_above_all_that_it_gives(classes, written, priority):
    """To those that a rule names a class for; below interrupt threads; and as written, where it is."""
    rules = ", ".join(f"{{name: {name}, class: {name}}}" for name in classes)
    assert good(f"{OWN}guests: [{rules}]\ndaemon: {{{written}}}\n").own_priority() == priority


@pytest.mark.parametrize(
    ("written", "highest", "priority"), [("", 1, 2), ("", 5, 6), ("", 60, 49), ("priority: 2", 5, 2)]
)
def test_its_own_priority_is_above_what_guests_have(written, highest, priority):
    """By <vcpusched>, say, or by the last policy."""
    rules = "{name: x, class: xml}"
    assert good(f"{OWN}guests: [{rules}]\ndaemon: {{{written}}}\n").own_priority(highest) == priority


@pytest.mark.parametrize("uri", ["qemu:///system", "qemu+unix:///system", "qemu:///system?socket=/run/x"])
def test_takes_libvirts_system_connection(uri):
    """Each way to write libvirt's system connection is taken."""
    assert good(f'version: 1\ndaemon: {{uri: "{uri}"}}\n').uri == uri


def test_housekeeping_is_by_default_what_is_not_isolated():
    """Without a pool of that name, housekeeping is what is online and not isolated."""
    host = make_host(online="0-6", isolated="2-7")
    default = good("version: 1\n", host)
    written = good("version: 1\npools: {housekeeping: 1}\n", host)

    assert str(default.pool(HOUSEKEEPING, host)) == "0-1"
    assert str(written.pool(HOUSEKEEPING, host)) == "1"


def test_a_role_that_is_not_named_follows_emulator():
    """A role without an entry gets the emulator's, and the emulator by default housekeeping."""
    text = "version: 1\npools: {a: 0}\nclasses:\n  x: {emulator: {pool: a}}\n  y: {vcpu: {pool: a}}\n  z: {}\n"
    classes = good(text).classes
    a, housekeeping = (Entry(pool="a"),), (Entry(pool=HOUSEKEEPING),)

    assert classes["x"].entries == dict.fromkeys(Role, a)
    assert classes["y"].entries == dict.fromkeys(Role, housekeeping) | {Role.VCPU: a}
    assert classes["z"].entries == dict.fromkeys(Role, housekeeping)


def test_pools_that_no_rule_reaches_may_collide():
    """Only a class that a rule names is held against the others."""
    text = GOOD.replace('"isolated,^7"', "0-6")
    policy = good(re.sub(r"guests:\n(  - .*\n)+", "", text))
    refused, problems = load(text, HOST)

    assert policy.rules == ()
    assert refused is None
    assert any("pCPU 0-1" in text for text in texts(problems))


@pytest.mark.parametrize("priority", [49, 50, 99])
def test_a_high_priority_needs_unsafe(priority):
    """From 50, where interrupt threads are, a class must say that it is unsafe; it may say so anyway."""
    text = (
        "version: 1\npools: {r: 2-7}\nclasses:\n  x:\n"
        f"    vcpu: {{pool: r, exclusive: thread, scheduler: fifo, priority: {priority}}}\n"
    )
    policy, problems = load(text, HOST)

    assert (policy is not None) == (priority < 50) == (not problems)
    assert good(text + "    unsafe: true\n").classes["x"].entries[Role.VCPU][0].priority == priority


# The shipped file


@pytest.mark.parametrize("host", [STOCK, HOST, make_host(online="0", possible="0", isolated="")])
def test_the_shipped_file_changes_nothing(host):
    """As shipped the file is valid on any host, observes, and has no rule."""
    policy, problems = load(SHIPPED, host, strict=True)

    assert policy is not None
    assert all(problem.warning for problem in problems)
    assert policy.mode is Mode.OBSERVE
    assert policy.rules == ()


def test_the_shipped_file_warns_of_an_empty_pool_once():
    """On a host that isolates nothing, the shipped file says once that its pool is empty."""
    _, problems = load(SHIPPED, STOCK, strict=True)

    assert [(problem.path, problem.warning) for problem in problems] == [("pools.realtime", True)]


def test_the_shipped_suggestions_are_valid_without_their_hash():
    """Whoever takes the '# ' from the shipped pools and rules has a valid policy on a host with isolated pCPUs."""
    policy = good(re.sub(r"^(  )# (?=housekeeping|helpers|-)", r"\1", SHIPPED, flags=re.MULTILINE))

    classes = ["unmanaged", "realtime", "realtime", "dedicated", "from-xml", "from-xml"]
    assert [rule.class_name for rule in policy.rules] == classes
    assert policy.rules[1].pcpus == (6,)
    assert {name: str(policy.pool(name, HOST)) for name in policy.pools} == {
        "realtime": "2-7", "housekeeping": "0-1", "helpers": "0-1",
    }  # fmt: skip


def test_the_schema_accepts_itself():
    """The schema that ships is a valid JSON Schema, and editors find it beside the shipped file."""
    schema = schemas.load("policy")
    Draft202012Validator.check_schema(schema)

    assert json.loads((HERE.parents[1] / "etc" / "rtpind.schema.json").read_text()) == schema


# Defaults


def declared(schema):
    """Return a mapping of each property of a schema that declares a default, to it."""
    return {key: value["default"] for key, value in schema["properties"].items() if "default" in value}


def test_the_defaults_of_the_schema_are_what_an_empty_policy_gets():
    """Writing every declared default down gives the same policy as leaving every key out."""
    schema = schemas.load("policy")
    written = declared(schema) | {"version": 1, "daemon": declared(schema["properties"]["daemon"])}

    assert {"mode", "pools", "classes", "guests", "drift", "when_full", "cputune", "daemon"} < set(written)
    assert set(written["daemon"]) == {"uri", "period", "proc_events"}
    assert good(json.dumps(written)) == good("version: 1\n") == Policy(pools={}, classes={})


def test_the_defaults_of_the_schema_are_what_an_entry_gets():
    """A FIFO entry without a priority, and a class without unsafe, get the declared defaults."""
    schema = schemas.load("policy")["$defs"]
    text = "version: 1\npools: {r: 2-7}\nclasses: {x: {vcpu: {pool: r, exclusive: thread, scheduler: fifo}}}\n"
    made = good(text).classes["x"]

    assert declared(schema["entry"]) == {"priority": 1, "missing_ids": "refuse"}
    assert made.entries[Role.VCPU][0] == Entry(pool="r", exclusive=Exclusive.THREAD, priority=1, clip=False)
    assert declared(schema["class"]) == {"unsafe": made.unsafe, "cputune": "respect"}


# Rules


@pytest.mark.parametrize(
    ("name", "uuid", "class_name"),
    [
        ("infra-dns", "0f4c2a5e-1", "unmanaged"),
        ("rt-1", "0f4c2a5e-1", "own-pcpu"),
        ("rt-1", "0F4C2A5E-1", "own-pcpu"),
        ("rt-1", "1f4c2a5e-1", "realtime"),
        ("web", "0f4c2a5e-1", "dpdk"),
        ("web", "1f4c2a5e-1", None),
        ("RT-1", "1f4c2a5e-1", None),
        ("xrt-1", "1f4c2a5e-1", None),
    ],
)
def test_the_first_rule_that_matches_wins(name, uuid, class_name):
    """Rules are tried in their order, every key of a rule must match, and no match is no rule."""
    policy = good(GOOD)
    rule = policy.rule_for(guest(name, uuid))
    made = policy.class_of(rule)

    assert (rule.class_name if rule else None) == class_name
    assert (made.name if made else None) == (None if class_name == "unmanaged" else class_name)


@pytest.mark.parametrize(
    ("glob", "matched"),
    [
        ("*", True),
        ("rt-?", True),
        ("rt-[0-9]", True),
        ("rt-[!1]", False),
        ("rt-", False),
        ("*-1", True),
        ("r.*", False),
    ],
)
def test_names_are_globs(glob, matched):
    """A rule's name is a shell glob over the whole name of the guest."""
    rule = good(f'version: 1\nguests: [{{name: "{glob}", class: unmanaged}}]\n').rules[0]

    assert rule.matches(guest("rt-1")) is matched


def test_a_rule_says_where_it_stands():
    """A rule prints as its path, its keys and its class, and knows its line."""
    rules = good(GOOD).rules

    assert [str(rule) for rule in rules[:2]] == [
        "guests[0] name=infra-* → unmanaged",
        "guests[1] name=rt-* uuid=0f4c2a5e-* → own-pcpu",
    ]
    assert [rule.line for rule in rules] == [20, 21, 22, 23]


def test_pool_is_what_is_online():
    """A policy gives out only the pCPUs of a pool that are online."""
    policy = Policy(pools={"a": Pool(cpus=CpuList(((True, CpuSet.parse("0-3")),)))}, classes={})

    assert str(policy.pool("a", make_host(online="1-2"))) == "1-2"


# Whatever else comes


def check(text):
    """Hold what ``load`` makes of a text against what it promises."""
    for strict in (False, True):
        policy, problems = load(text, HOST, strict=strict)
        fatal = [problem for problem in problems if not problem.warning]

        assert (policy is None) == bool(fatal)
        assert problems == sorted(set(problems))
        assert all(problem.text("F").isprintable() for problem in problems)
        assert all(1 <= problem.line <= len(re.split(r"\r\n|[\r\n\x85\u2028\u2029]", text)) for problem in problems)
        if policy is not None:
            for made in policy.classes.values():
                for _, entry in made.every():
                    assert entry.share_with is not None or policy.pool(entry.pool, HOST) <= HOST.online
            for rule in policy.rules:
                assert (policy.class_of(rule) is None) == (rule.class_name == "unmanaged")


FUZZ = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

WORDS = [
    "version", "mode", "pools", "classes", "guests", "drift", "when_full", "cputune", "daemon", "uri", "period", "cpus",
    "metrics_dir", "proc_events",
    "vcpu", "emulator", "iothread", "vhost", "pit", "unsafe", "pool", "exclusive", "share_with", "scheduler",
    "priority", "name", "uuid", "class", "a", "b", "housekeeping", "unmanaged", "Bad Name", "0-3", "isolated", "",
]  # fmt: skip
VALUES = [
    "enforce", "observe", "thread", "guest", "fifo", "repair", "leave", "respect", "10s", "1ms", "99999m", "10s\n", "*",
    "^0", "isolated,^7", "2-7", "7-2", "0-99999", "qemu:///system", 0, 1, 2, 50, 100, -1, 10**30, 1.5,
    True, False, None, [], {},
]  # fmt: skip
TOKENS = [
    *WORDS, *map(str, VALUES), "{", "}", "[", "]", ",", ":", "- ", "\n", "  ", "\t", "#", "&x", "*x", "<<:", "? ",
    "!!int", "!t", '"', "'", "|", ">", "---", "...", "%YAML 1.1", "\0", "\ufeff", "\x85", "010", "0x3", "~", "null",
    "yes", "٣", ".inf", "2001-01-01",
]  # fmt: skip


@settings(FUZZ, max_examples=500)
@given(st.text(max_size=200) | st.lists(st.sampled_from(TOKENS), max_size=20).map(" ".join))
def test_any_text_is_a_policy_or_has_problems(text):
    """Any text at all gives a policy or problems, and never an exception."""
    check(text)


@settings(FUZZ, max_examples=500)
@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_a_policy_or_have_problems(data, after_a_good_start):
    """Any bytes, read as Latin-1, give a policy or problems, and never an exception."""
    check(("version: 1\npools:\n  a: " if after_a_good_start else "") + data.decode("latin-1"))


@st.composite
def mutated(draw):
    """Draw a good policy's text with a few lines or tokens dropped, doubled, swapped or replaced."""
    text = draw(st.sampled_from([GOOD, SHIPPED]))
    by_line = draw(st.booleans())
    parts = text.splitlines(keepends=True) if by_line else re.split(r"(\W)", text)
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(parts) - 1))
        match draw(st.sampled_from(["drop", "double", "move", "replace", "insert"])):
            case "drop":
                del parts[at]
            case "double":
                parts.insert(at, parts[at])
            case "move":
                parts.insert(draw(st.integers(0, len(parts) - 1)), parts.pop(at))
            case "replace":
                parts[at] = draw(st.sampled_from(TOKENS)) + ("\n" if by_line else "")
            case "insert":
                parts.insert(at, draw(st.sampled_from(TOKENS)))
    return "".join(parts)


@settings(FUZZ, max_examples=200)
@given(mutated())
def test_a_mutated_policy_is_a_policy_or_has_problems(text):
    """A good policy with broken lines and tokens gives a policy or problems, and never an exception."""
    check(text)


NESTED = st.recursive(
    st.sampled_from(VALUES) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(WORDS), inner, max_size=5),
    max_leaves=20,
)
ENTRY = NESTED | st.fixed_dictionaries(
    {},
    optional={
        "pool": st.sampled_from(["a", "b", "housekeeping", "missing", None]),
        "exclusive": st.sampled_from(["thread", "guest", "threads"]),
        "share_with": st.sampled_from([{"vcpu": 0}, {"vcpu": -1}, {}, {"vcpu": 1, "x": 1}, 0]),
        "scheduler": st.sampled_from(["fifo", "rr", None]),
        "priority": st.sampled_from([0, 1, 2, 50, 100, "1"]),
        "x": NESTED,
    },
)
CLASS = NESTED | st.dictionaries(st.sampled_from([*Role, "unsafe", "a"]), ENTRY | st.booleans(), max_size=4)
POOL = st.sampled_from(VALUES) | NESTED | st.fixed_dictionaries({}, optional={"cpus": NESTED, "a": NESTED})
RULE = NESTED | st.fixed_dictionaries(
    {},
    optional={
        "name": st.sampled_from(["*", "rt-*", "", 1, None]),
        "uuid": st.sampled_from(["*", "0f-*", "x", "", None]),
        "class": st.sampled_from(["a", "b", "unmanaged", "missing", "Bad Name", None]),
    },
)
NAMES = st.sampled_from(["a", "b", "housekeeping", "unmanaged", "Bad Name", "2-7", ""])
DATA = st.fixed_dictionaries(
    {"version": st.sampled_from([1, 1, 1, 2, "1", None])},
    optional={
        "mode": NESTED,
        "pools": st.dictionaries(NAMES, POOL, max_size=4) | NESTED,
        "classes": st.dictionaries(NAMES, CLASS, max_size=3) | NESTED,
        "guests": st.lists(RULE, max_size=4) | NESTED,
        "drift": NESTED,
        "daemon": st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(("uri", "period", "metrics_dir", "proc_events", "priority"), NESTED),
        )
        | NESTED,
        "a": NESTED,
    },
)


@settings(FUZZ, max_examples=300)
@given(DATA | NESTED)
def test_any_data_under_known_keys_is_a_policy_or_has_problems(data):
    """Any data under the keys that mean something gives a policy or problems, and never an exception."""
    check(json.dumps(data))
