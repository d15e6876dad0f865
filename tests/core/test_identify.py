# SPDX-License-Identifier: GPL-2.0-or-later
"""Name and cgroup must agree on what a thread is, and nobody takes an id that is taken (promise 5)."""

import pytest
from factories import PID, START, cpus, fifo, sighting
from hypothesis import event, given, settings
from hypothesis import strategies as st

from rtpind.core.identify import SETTLE_S, Sighting, identify, settled
from rtpind.core.model import Kind, Placement, Role, ThreadId

unhurried = settings(deadline=None, max_examples=50)  # a busy machine is no failure

PROCESS = (PID, START)
OLD = SETTLE_S  # seconds: from here a name alone makes nobody wait
YOUNG = SETTLE_S / 2


def look(*sightings, incumbents=None, doubtful=()):
    return identify(
        uuid="u",
        name="rt-1",
        process=PROCESS,
        sightings=sightings,
        incumbents=incumbents or {},
        doubtful=frozenset((PROCESS, label) for label in doubtful),
    )


def only(sighted, **known):
    (thread,) = look(sighted, **known).threads
    return thread


def labels(guest):
    return {thread.id.tid: (thread.label, thread.settled) for thread in guest.threads}


def test_thread_keeps_what_was_seen_of_it():
    """A thread carries what the host showed, under its guest."""
    seen = Sighting(
        id=ThreadId(PID, START, 7, 8),
        kind=Kind.PROCESS,
        comm="virtiofsd",
        now=Placement(cpus("3"), fifo(4)),
        cgroup="a/b/emulator",
        movable=False,
    )

    guest = look(seen)

    assert (guest.uuid, guest.name, guest.process) == ("u", "rt-1", PROCESS)
    (thread,) = guest.threads
    assert (thread.id, thread.guest, thread.comm, thread.kind) == (seen.id, "u", "virtiofsd", Kind.PROCESS)
    assert (thread.now, thread.cgroup, thread.movable) == (seen.now, "a/b/emulator", False)
    assert (thread.role, thread.index, thread.settled, thread.limits) == (Role.EMULATOR, None, True, None)


@pytest.mark.parametrize(
    ("comm", "leaf", "label"),
    [
        ("CPU 0/KVM", "vcpu0", "vcpu 0"),
        ("CPU 127/KVM", "vcpu127", "vcpu 127"),
        ("CPU 3/TCG", "vcpu3", "vcpu 3"),
        ("IO iothread1", "iothread1", "iothread 1"),
        ("IO iothread12", "iothread12", "iothread 12"),
    ],
)
@pytest.mark.parametrize("age", [0.0, OLD])
def test_name_and_cgroup_that_agree_make_a_vcpu_or_iothread(comm, leaf, label, age):
    """A thread is a vCPU or an iothread at once, however old, where QEMU's name and libvirt's cgroup say the same."""
    thread = only(sighting(comm, leaf=leaf, age_s=age))

    assert (thread.label, thread.settled) == (label, True)
    assert thread.helper is (thread.role is not Role.VCPU)


@pytest.mark.parametrize(
    ("comm", "leaf"),
    [
        ("CPU 0/KVM", "vcpu1"),
        ("CPU 1/KVM", "vcpu10"),
        ("CPU 0/KVM", "iothread0"),
        ("IO iothread1", "vcpu1"),
        ("IO iothread1", "iothread2"),
        ("CPU 0/KVM", "vcpu"),
        ("CPU 0/KVM", "vcpu-1"),
        ("CPU 0/KVM", "vcpu0.scope"),
        ("CPU 0/KVM", "xvcpu0"),
        ("CPU 0/KVM", "vcpu٠"),
        ("qemu-system-x86", "vcpu0"),
        ("kvm-nx-lpage-re", "vcpu0"),
        ("IO mon_iothread", "iothread1"),
    ],
)
@pytest.mark.parametrize("age", [0.0, OLD])
def test_name_and_cgroup_that_disagree_make_a_helper(comm, leaf, age):
    """A thread in a vCPU's or iothread's cgroup under any other name is a helper, even a young one."""
    thread = only(sighting(comm, leaf=leaf, age_s=age))

    assert (thread.role, thread.index, thread.settled) == (Role.EMULATOR, None, True)


@pytest.mark.parametrize(
    "comm",
    [
        "",
        "CPU 0",
        "CPU 0/",
        "CPU 0/kvm",
        "CPU  0/KVM",
        "CPU -1/KVM",
        "CPU 0/KVM ",
        " CPU 0/KVM",
        "CPU 0/KVM\n",
        "CPU ٠/KVM",
        "CPU 123456/KVM",
        "cpu 0/KVM",
        "CPU 0x0/KVM",
        "IO iothread",
        "IO iothread-1",
        "IO mon_iothread",
        "IO  iothread1",
        "IO iothread123456",
        "worker",
        "vhost-1000",
        "kvm-pit/1000",
        "vhost-",
    ],
)
@pytest.mark.parametrize("leaf", ["emulator", "", "vcpu0", "iothread1"])
def test_hostile_name_is_a_helper(comm, leaf):
    """A name that is not exactly one of QEMU's makes a thread of QEMU nothing but a helper, in any cgroup."""
    thread = only(sighting(comm, leaf=leaf))

    assert (thread.role, thread.index, thread.settled) == (Role.EMULATOR, None, True)


@pytest.mark.parametrize(("comm", "label"), [("CPU 2/KVM", "vcpu 2"), ("IO iothread1", "iothread 1")])
@pytest.mark.parametrize("leaf", ["emulator", ""])
def test_young_thread_that_libvirt_has_not_moved_is_waited_for(comm, label, leaf):
    """A fresh thread that QEMU named, still where every thread begins, is not settled rather than a helper."""
    thread = only(sighting(comm, leaf=leaf, age_s=YOUNG))

    assert (thread.label, thread.settled) == (label, False)


@pytest.mark.parametrize("comm", ["CPU 2/KVM", "IO iothread1"])
@pytest.mark.parametrize("leaf", ["emulator", ""])
def test_name_alone_makes_nobody_wait_for_ever(comm, leaf):
    """A thread that libvirt did not move in time is a helper like any other, whatever its name."""
    thread = only(sighting(comm, leaf=leaf, age_s=OLD))

    assert (thread.role, thread.index, thread.settled) == (Role.EMULATOR, None, True)


@pytest.mark.parametrize("kind", [Kind.PROCESS, Kind.KERNEL])
@pytest.mark.parametrize("leaf", ["vcpu0", "emulator"])
def test_only_a_thread_of_qemu_is_a_vcpu(kind, leaf):
    """A process beside QEMU or a kernel thread is no vCPU, and is not waited for, even with all the right names."""
    thread = only(sighting("CPU 0/KVM", leaf=leaf, kind=kind))

    assert (thread.role, thread.index, thread.settled) == (Role.EMULATOR, None, True)


@pytest.mark.parametrize(
    ("comm", "worker", "role"),
    [
        (f"vhost-{PID}", True, Role.VHOST),
        (f"kvm-pit/{PID}", True, Role.PIT),
        (f"vhost-{PID}", False, Role.EMULATOR),
        (f"kvm-pit/{PID}", False, Role.EMULATOR),
        (f"vhost-{PID + 1}", True, Role.EMULATOR),
        (f"kvm-pit/{PID + 1}", True, Role.EMULATOR),
        (f"vhost-{PID}0", True, Role.EMULATOR),
        (f"kvm-pit-{PID}", True, Role.EMULATOR),
        ("kvm-nx-lpage-re", True, Role.EMULATOR),
    ],
)
@pytest.mark.parametrize("kind", [Kind.KERNEL, Kind.QEMU])
def test_vhost_and_pit_are_made_by_the_kernel_for_this_guest(comm, worker, role, kind):
    """A vhost or pit thread is one that the kernel made and named after this guest's pid; others are helpers."""
    thread = only(sighting(comm, kind=kind, worker=worker))

    assert (thread.role, thread.index, thread.settled) == (role, None, True)


def test_second_claimant_is_a_helper():
    """A thread that claims the id of a known one gets nothing, however low its number; the known one keeps its id."""
    first = sighting("CPU 0/KVM", tid=2000, leaf="vcpu0", age_s=OLD)
    forger = sighting("CPU 0/KVM", tid=1500, leaf="vcpu0")

    guest = look(forger, first, incumbents={(PROCESS, "vcpu 0"): first.id}, doubtful=["vcpu 0"])

    assert labels(guest) == {1500: ("emulator", True), 2000: ("vcpu 0", True)}
    assert (guest.contested, guest.doubtful) == ((), ())


def test_two_claimants_over_two_looks_refuse_the_id():
    """Two threads that claim a free id wait for one look; if both still do, both are helpers and the id is refused."""
    two = [sighting("CPU 0/KVM", tid=tid, leaf="vcpu0", age_s=OLD) for tid in (2000, 2001)]
    bystander = sighting("CPU 1/KVM", tid=2002, leaf="vcpu1")

    first = look(*two, bystander)
    second = look(*two, bystander, doubtful=first.doubtful)

    assert labels(first) == {2000: ("vcpu 0", False), 2001: ("vcpu 0", False), 2002: ("vcpu 1", True)}
    assert (first.contested, first.doubtful) == ((), ("vcpu 0",))
    assert labels(second) == {2000: ("emulator", True), 2001: ("emulator", True), 2002: ("vcpu 1", True)}
    assert (second.contested, second.doubtful) == (("vcpu 0",), ())


def test_doubt_ends_with_one_claimant():
    """The claimant that is left after a doubtful look has the id."""
    thread = only(sighting("CPU 0/KVM", leaf="vcpu0"), doubtful=["vcpu 0"])

    assert (thread.label, thread.settled) == ("vcpu 0", True)


def test_contested_and_doubtful_are_sorted():
    """Labels come in one order, whatever the order of the threads."""
    found = [
        sighting(f"IO iothread{index}", tid=tid, leaf=f"iothread{index}")
        for tid, index in enumerate([3, 1, 2, 3, 1, 2], 2000)
    ]

    assert look(*found).doubtful == ("iothread 1", "iothread 2", "iothread 3")
    assert look(*found, doubtful=["iothread 2", "iothread 1"]).contested == ("iothread 1", "iothread 2")


@pytest.mark.parametrize(
    "known",
    [
        {((PID, START + 1), "vcpu 0"): "self"},  # another run of a process of the same number
        {((PID, START), "vcpu 1"): "self"},
        {((PID, START), "vcpu 0"): ThreadId(PID, START, 2000, START + 1)},  # a reused thread number
        {((PID, START), "vcpu 0"): ThreadId(PID, START, 1999, START)},  # gone
    ],
)
def test_incumbent_is_that_very_thread(known):
    """An incumbent of another process, label or start time, or one that is gone, decides nothing."""
    two = [sighting("CPU 0/KVM", tid=tid, leaf="vcpu0") for tid in (2000, 2001)]
    incumbents = {key: two[0].id if id_ == "self" else id_ for key, id_ in known.items()}

    assert look(*two, incumbents=incumbents).doubtful == ("vcpu 0",)


def test_doubt_is_about_one_process():
    """A doubtful label of an earlier process of that guest starts no contest now."""
    two = [sighting("CPU 0/KVM", tid=tid, leaf="vcpu0") for tid in (2000, 2001)]

    guest = identify(
        uuid="u",
        name="rt-1",
        process=PROCESS,
        sightings=two,
        incumbents={},
        doubtful=frozenset({((PID, START - 1), "vcpu 0")}),
    )

    assert (guest.contested, guest.doubtful) == ((), ("vcpu 0",))


@pytest.mark.parametrize(
    ("ages", "young"),
    [({PID: YOUNG}, True), ({PID: OLD}, False), ({PID: OLD, 2000: YOUNG}, False), ({2000: YOUNG}, False), ({}, False)],
)
def test_guest_is_as_young_as_its_main_thread(ages, young):
    """A guest is young while its QEMU process is, whatever threads it starts later."""
    assert look(*(sighting(tid=tid, age_s=age) for tid, age in ages.items())).young is young


NAMED = sighting("CPU 0/KVM", tid=2000, age_s=YOUNG)
MOVED = sighting("CPU 0/KVM", tid=2000, leaf="vcpu0", age_s=YOUNG)
TWIN = sighting("CPU 0/KVM", tid=2001, leaf="vcpu0", age_s=YOUNG)


@pytest.mark.parametrize(
    ("age", "others", "doubtful", "starting"),
    [
        (YOUNG, [], [], True),
        (YOUNG, [NAMED], [], True),
        (YOUNG, [sighting("IO iothread1", tid=2000, leaf="iothread1")], [], True),
        (YOUNG, [MOVED], [], False),
        (YOUNG, [MOVED, TWIN], [], True),
        (YOUNG, [MOVED, TWIN], ["vcpu 0"], False),
        (OLD, [], [], False),
        (OLD, [NAMED], [], False),
    ],
)
def test_guest_is_starting_until_libvirt_moved_a_vcpu(age, others, doubtful, starting):
    """A young guest starts until one of its vCPUs is in its cgroup, or its ids are refused; an old one never does."""
    assert look(sighting(age_s=age), *others, doubtful=doubtful).starting is starting


COMMS = st.sampled_from(
    ["CPU 0/KVM", "CPU 1/KVM", "CPU 00/KVM", "IO iothread1", f"vhost-{PID}", f"kvm-pit/{PID}", "worker", "CPU 0/KV"]
) | st.text(max_size=15)
LEAVES = st.sampled_from(["vcpu0", "vcpu1", "vcpu00", "iothread1", "emulator", ""]) | st.text(max_size=8)


@st.composite
def crowds(draw):
    """Any threads at all, and what a daemon may remember of any of them."""
    crowd = [
        sighting(
            draw(COMMS),
            tid=2000 + number,
            leaf=draw(LEAVES),
            kind=draw(st.sampled_from(Kind)),
            worker=draw(st.booleans()),
            age_s=draw(st.sampled_from([0.0, YOUNG, OLD])),
        )
        for number in range(draw(st.integers(0, 6)))
    ]
    ids = [one.id for one in crowd]
    taken = st.sampled_from(["vcpu 0", "vcpu 1", "iothread 1"])
    incumbents = draw(st.dictionaries(taken, st.sampled_from(ids), max_size=2)) if ids else {}
    return crowd, {(PROCESS, label): id_ for label, id_ in incumbents.items()}, draw(st.frozensets(taken))


@unhurried
@given(crowds())
def test_nobody_is_a_vcpu_by_name_alone(crowd):
    """Whatever threads a guest makes: no two have one id, none without its cgroup has one, and none gets lost."""
    sightings, incumbents, doubtful = crowd
    by_id = {one.id: one for one in sightings}

    guest = look(*sightings, incumbents=incumbents, doubtful=doubtful)

    assert [thread.id for thread in guest.threads] == [one.id for one in sightings]
    numbered = [thread for thread in guest.threads if thread.settled and thread.index is not None]
    assert len({thread.label for thread in numbered}) == len(numbered)
    for thread in numbered:
        seen = by_id[thread.id]
        kind, number = seen.leaf.rstrip("0123456789"), int(seen.leaf.lstrip("vcpuiothread"))
        assert (seen.kind, kind, number) == (Kind.QEMU, str(thread.role), thread.index)
    assert all(thread.index is not None for thread in guest.threads if not thread.settled)
    assert not set(guest.contested) & {thread.label for thread in numbered}
    assert set(guest.contested) <= doubtful


@unhurried
@given(crowds(), st.randoms(use_true_random=False))
def test_order_of_the_threads_does_not_matter(crowd, random):
    """The same threads in another order have the same roles."""
    sightings, incumbents, doubtful = crowd
    other = random.sample(sightings, len(sightings))

    one = look(*sightings, incumbents=incumbents, doubtful=doubtful)
    two = look(*other, incumbents=incumbents, doubtful=doubtful)

    assert labels(one) == labels(two)
    assert (one.contested, one.doubtful) == (two.contested, two.doubtful)


@settings(deadline=None, max_examples=200)
@given(random=st.randoms(use_true_random=False))
def test_a_settled_guest_is_found_the_same_again(random):
    """The same sightings say the same, whatever else was learned, when everybody has his id already."""
    comms, leaves = ["CPU 0/KVM", "CPU 1/KVM", "IO iothread1", "worker"], ["vcpu0", "vcpu1", "iothread1", "emulator"]
    seen = [
        sighting(random.choice(comms), tid=PID + number, leaf=random.choice(leaves), age_s=random.choice([YOUNG, OLD]))
        for number in range(random.randint(1, 6))
    ]
    labels = ["vcpu 0", "vcpu 1", "iothread 1"]

    def known():
        incumbents = {(PROCESS, label): random.choice(seen).id for label in labels if random.randrange(2)}
        return {"incumbents": incumbents, "doubtful": [label for label in labels if random.randrange(2)]}

    guest, later = look(*seen, **known()), known()
    for thread in guest.threads if random.randrange(2) else ():
        if thread.settled and thread.index is not None:
            later["incumbents"][(PROCESS, thread.label)] = thread.id
    if settled(guest, later["incumbents"]):
        event("settled")
        assert look(*seen, **later) == guest
