"""A look at guests: over fake trees whose threads are this test's own, and at a process that is made like QEMU."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from trees import V2, make_tree, process, stat_line, until

from rtpind.core.cpuset import CpuSet
from rtpind.core.memory import Memory, Refusal, Wanted
from rtpind.core.model import Kind, Role, ThreadId, Traits
from rtpind.core.offplace import Start
from rtpind.daemon.observe import Observer

HOST = {
    "proc/self/mountinfo": V2,
    "proc/uptime": "1000.0 0.0\n",
    "sys/devices/system/cpu/online": "0-1\n",
    "sys/devices/system/cpu/possible": "0-1\n",
}
HOME = "/machine.slice/rt.scope/libvirt"
BUDGETED = [Path("/sys/fs/cgroup") / name for name in ("cpuset", "cpu", "cpuacct")]

HOLD = """
import fcntl, sys
files = [open(path, "w") for path in sys.argv[1:]]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
print("held", flush=True)
sys.stdin.read()
"""

#: Locks a pid file as QEMU does, and has a thread of each given name; prints their ids.
LIKE_QEMU = """
import ctypes, fcntl, sys, threading
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
end = threading.Event()
def run(name, ready):
    ctypes.CDLL(None).prctl(15, name.encode(), 0, 0, 0)
    ready.set()
    end.wait()
for name in sys.argv[2:]:
    ready = threading.Event()
    thread = threading.Thread(target=run, args=(name, ready))
    thread.start()
    ready.wait()
    print(thread.native_id, flush=True)
sys.stdin.read()
end.set()
"""


@pytest.fixture
def tids():
    """Threads of this test that wait: the kernel knows where they may run, whatever a fake tree calls them."""
    end, ready = threading.Event(), threading.Barrier(5)
    threads = [threading.Thread(target=lambda: (ready.wait(), end.wait(60))) for _ in range(4)]
    for thread in threads:
        thread.start()
    ready.wait()
    yield [thread.native_id for thread in threads]
    end.set()
    for thread in threads:
        thread.join()


@pytest.fixture
def hold(tmp_path):
    """Start processes that hold the pid files of guests; ends them after the test."""
    children = []
    (tmp_path / "run").mkdir()

    def start(*names):
        files = [str(tmp_path / "run" / f"{name}.pid") for name in names]
        command = [sys.executable, "-I", "-S", "-c", HOLD, *files]
        children.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert children[-1].stdout.readline() == "held\n"
        return children[-1]

    yield start
    for child in children:
        child.communicate("")


def guest(pid, threads, home=HOME):
    """Return the files of a guest: ``pid`` is its QEMU, ``threads`` tid → (name, cgroup leaf)."""
    everybody = {pid: ("qemu-system-x86", "emulator")} | threads
    lines = {tid: stat_line(tid, name) for tid, (name, _) in everybody.items()}
    return process(pid, lines, {tid: f"0::{home}/{leaf}\n" for tid, (_, leaf) in everybody.items()})


def begin_anew(tmp_path, pid, start):
    """Have another process of the same number in the tree."""
    line = stat_line(pid, start=start)
    make_tree(tmp_path, {f"proc/{pid}/stat": line, f"proc/{pid}/task/{pid}/stat": line})


def observer(tmp_path, **files):
    return Observer(make_tree(tmp_path, HOST | files), tmp_path / "run")


def test_guests_are_seen_with_their_threads(tmp_path, hold, tids):
    """Each domain that runs is a guest with its threads and their roles, in the order of names."""
    second, first = hold("b"), hold("a")
    files = guest(first.pid, {tids[0]: ("CPU 0/KVM", "vcpu0"), tids[1]: ("IO iothread1", "iothread1")})
    files |= guest(second.pid, {tids[2]: ("worker", "emulator")})

    seen = observer(tmp_path, **files).look({"u2": "b", "u1": "a"}, Memory())

    assert [(one.name, one.uuid, one.pid) for one in seen.guests] == [("a", "u1", first.pid), ("b", "u2", second.pid)]
    labels = {thread.label for thread in seen.guests[0].threads}
    assert labels == {"emulator", "vcpu 0", "iothread 1"}
    mask = CpuSet(os.sched_getaffinity(0))
    assert {thread.now.cpus for thread in seen.threads()} == {mask}
    assert all(thread.limits is None for thread in seen.threads())
    assert seen.host.online == CpuSet([0, 1])
    assert abs(seen.time - time.monotonic()) < 60


def test_who_does_not_run_is_left_out(tmp_path, hold, tids):
    """No pid file, a stale one, a process that is gone from /proc, or one that is not in its cgroup: no guest."""
    child, early = hold("good", "vanished"), hold("early")
    (tmp_path / "run/stale.pid").write_text(f"{child.pid}\n")
    files = guest(early.pid, {}, home="/system.slice")
    files[f"proc/{early.pid}/task/{early.pid}/cgroup"] = "0::/system.slice/libvirtd.service\n"
    look = observer(tmp_path, **files, **guest(child.pid, {})).look

    domains = {"1": "good", "2": "stale", "3": "none", "4": "early", "5": "../good", "6": ""}
    seen = look(domains, Memory())

    assert [one.name for one in seen.guests] == ["good"]


def test_a_look_at_some_takes_the_others_as_they_were(tmp_path, hold, tids):
    """Only the guests named are read anew; those that ended meanwhile are gone when they are named."""
    first, second = hold("a"), hold("b")
    files = guest(first.pid, {tids[0]: ("worker", "emulator")}) | guest(second.pid, {tids[1]: ("worker", "emulator")})
    made = observer(tmp_path, **files)
    domains = {"u1": "a", "u2": "b"}
    before = made.look(domains, Memory())
    for pid, tid in ((first.pid, tids[2]), (second.pid, tids[3])):
        make_tree(tmp_path, guest(pid, {tid: ("late", "emulator")}))

    after = made.look(domains, Memory(), only={"u1"})
    second.communicate("")
    again = made.look(domains, Memory(), only={"u1"})
    named = made.look(domains, Memory(), only={"u2"})

    assert [len(one.threads) for one in before.guests] == [2, 2]
    assert [len(one.threads) for one in after.guests] == [3, 2]
    assert after.guests[1] is before.guests[1]
    assert [one.name for one in again.guests] == ["a", "b"]
    assert [one.name for one in named.guests] == ["a"]


def test_a_guest_that_is_new_is_seen_with_its_kernel_threads(tmp_path, hold, tids):
    """A look at one guest alone soon finds the kernel threads that began with it."""
    child = hold("a")
    made = observer(tmp_path, **guest(child.pid, {}))
    made.look({}, Memory())
    make_tree(
        tmp_path, process(tids[0], {tids[0]: stat_line(tids[0], f"kvm-pit/{child.pid}", flags=0x200000, parent=2)})
    )

    def found():
        (seen,) = made.look({"u1": "a"}, Memory(), only={"u1"}).guests
        return [(thread.role, thread.kind) for thread in seen.threads if thread.role is not Role.EMULATOR]

    until(found, "the kernel thread is seen")

    assert found() == [(Role.PIT, Kind.KERNEL)]


def test_a_guest_that_is_dropped_is_not_shown(tmp_path, hold, tids):
    """What is no longer a domain is in no later look, also not as last seen."""
    child = hold("a")
    made = observer(tmp_path, **guest(child.pid, {}))
    made.look({"u1": "a"}, Memory())

    assert made.look({}, Memory(), only=set()).guests == ()
    assert made.look({"u1": "a"}, Memory(), only=set()).guests == ()
    assert made.look({}, Memory()).guests == ()


def test_cpu_times_are_of_vcpus_that_are_looked_at(tmp_path, hold, tids):
    """Of guests seen as last time, and of vCPUs whose start is over, nothing is read; the guests stay the same."""
    first, second = hold("a"), hold("b")
    files = guest(first.pid, {tids[0]: ("CPU 0/KVM", "vcpu0"), tids[1]: ("IO iothread1", "iothread1")})
    files |= guest(second.pid, {tids[2]: ("CPU 0/KVM", "vcpu0")})
    files |= {f"proc/{pid}/task/{tid}/schedstat": f"{tid} 0 1\n" for pid, tid in ((first.pid, tids[0]),
                                                                              (second.pid, tids[2]))}  # fmt: skip
    made = observer(tmp_path, **files, **{"proc/uptime": "9.0 0.0\n"})
    domains = {"u1": "a", "u2": "b"}

    def ran(memory=None, **more):
        return {id_.tid: ran_ns for id_, ran_ns in made.look(domains, memory or Memory(), **more).ran.items()}

    assert ran() == {tids[0]: tids[0], tids[2]: tids[2]}
    assert ran(only={"u1"}) == {tids[0]: tids[0]}
    over = Start(over={ThreadId(first.pid, 500, tids[0], 500): None})
    assert ran(Memory(starts={(first.pid, 500): over})) == {tids[2]: tids[2]}
    before = made.look(domains, Memory())
    make_tree(tmp_path, {f"proc/{first.pid}/task/{tids[0]}/schedstat": "77 0 1\n"})
    after = made.look(domains, Memory())
    assert after.guests[0] is before.guests[0]
    assert 77 in after.ran.values()


def test_limits_are_read_for_refused_threads_alone(tmp_path, hold, tids):
    """What fences a thread in is looked up only where the kernel refused something."""
    child = hold("a")
    files = guest(child.pid, {tids[0]: ("CPU 0/KVM", "vcpu0"), tids[1]: ("CPU 1/KVM", "vcpu1")})
    files[f"sys/fs/cgroup{HOME}/vcpu0/cpuset.cpus.effective"] = "1\n"
    made = observer(tmp_path, **files)
    first = made.look({"u1": "a"}, Memory())
    refused = next(thread for thread in first.threads() if thread.id.tid == tids[0])
    refusal = Refusal(Wanted(CpuSet([0])), refused.now, None, (), affinity=True, text="")

    seen = made.look({"u1": "a"}, Memory(refused={refused.id: (refusal,)}))

    limits = {thread.id.tid: thread.limits for thread in seen.threads()}
    assert limits[tids[0]].fence == CpuSet([1])
    assert limits[tids[0]].fenced_by == f"{HOME}/vcpu0"
    assert [limits[tid] for tid in (child.pid, tids[1])] == [None, None]


def test_the_memory_decides_who_is_who(tmp_path, hold, tids):
    """A thread that was a vCPU before stays it, and a second claimant is a helper."""
    child = hold("a")
    made = observer(tmp_path, **guest(child.pid, {tids[0]: ("CPU 0/KVM", "vcpu0")}))
    first = made.look({"u1": "a"}, Memory())
    vcpu = next(thread for thread in first.threads() if thread.role is Role.VCPU)
    make_tree(tmp_path, guest(child.pid, {tids[1]: ("CPU 0/KVM", "vcpu0")}))
    known = Memory(incumbents={(first.guests[0].process, "vcpu 0"): vcpu.id})

    (seen,) = made.look({"u1": "a"}, known).guests

    assert {thread.id.tid: thread.label for thread in seen.threads if thread.id.tid in tids} == {
        tids[0]: "vcpu 0",
        tids[1]: "emulator",
    }


def test_what_is_in_doubt_is_looked_at_anew(tmp_path, hold, tids):
    """Two threads claim a vCPU at two looks: that nothing else has changed in between says nothing of them."""
    child = hold("a")
    made = observer(tmp_path, **guest(child.pid, {tids[0]: ("CPU 0/KVM", "vcpu0"), tids[1]: ("CPU 0/KVM", "vcpu0")}))
    (first,) = made.look({"u1": "a"}, Memory()).guests
    (second,) = made.look({"u1": "a"}, Memory(doubtful=frozenset({(first.process, "vcpu 0")}))).guests

    assert (first.doubtful, first.contested) == (("vcpu 0",), ())
    assert (second.doubtful, second.contested) == ((), ("vcpu 0",))


def test_traits_are_of_the_process_that_they_were_told_of(tmp_path, hold, tids):
    """They stay until the guest is another process, or no domain any more; another guest has none of them."""
    first, other = hold("a"), hold("b")
    made = observer(tmp_path, **guest(first.pid, {}), **guest(other.pid, {}))
    domains = {"u1": "a", "u2": "b"}
    traits = Traits(flavor="rt")

    def seen(**more):
        return [one.traits for one in made.look(domains, Memory(), **more).guests]

    assert seen() == [None, None]
    assert made.process_of("a") == (first.pid, 500)
    assert made.describe("u1", (first.pid, 500), traits)
    assert not made.describe("u1", (first.pid, 500), traits)
    assert made.describe("u2", (other.pid, 499), traits)
    assert seen(only={"u2"}) == [None, None]
    assert seen(only={"u1"}) == [traits, None]
    assert seen() == [traits, None]

    begin_anew(tmp_path, first.pid, 501)
    assert made.process_of("a") == (first.pid, 501)
    assert seen() == [None, None]

    begin_anew(tmp_path, first.pid, 500)
    assert seen() == [traits, None]
    made.look({"u2": "b"}, Memory())
    assert seen() == [None, None]


def test_a_definition_that_cannot_be_read_takes_nothing_back(tmp_path, hold):
    """What was read before stands, of the same process; else the guest tells why there are no traits."""
    child = hold("a")
    made = observer(tmp_path, **guest(child.pid, {}))
    process, traits = (child.pid, 500), Traits(flavor="rt")

    def seen():
        (one,) = made.look({"u1": "a"}, Memory()).guests
        return one.traits, one.unreadable

    assert made.describe("u1", process, "not XML")
    assert not made.describe("u1", process, "not XML")
    assert seen() == (None, "not XML")
    assert made.describe("u1", process, traits)
    assert seen() == (traits, "")
    assert not made.describe("u1", process, "not XML")
    assert seen() == (traits, "")
    assert made.describe("u1", (child.pid, 501), "not XML")
    assert seen() == (None, "")


def test_the_nodes_that_qemu_binds_memory_to_are_read_once(tmp_path, hold, tids):
    """At any look, and before where the memory lies; not before its vCPUs begin, when it may not be QEMU yet."""
    child = hold("a")
    two = {f"sys/devices/system/node/node{node}/cpulist": f"{node}\n" for node in (0, 1)}
    two["sys/devices/system/node/online"] = "0-1\n"
    where = f"proc/{child.pid}/cmdline"
    bound = "-object\0memory-backend-ram,id=a,host-nodes={},policy=bind\0"

    def began(ticks):
        return {f"proc/{child.pid}/{of}stat": stat_line(child.pid, start=ticks) for of in ("", f"task/{child.pid}/")}

    files = guest(child.pid, {}) | began(99_999)
    files[f"sys/fs/cgroup{HOME}/memory.numa_stat"] = f"anon N0=0 N1={2**30}\n"
    made = observer(tmp_path, **files, **two, **{where: bound.format(1)})

    def seen(**more):
        (one,) = made.look({"u1": "a"}, Memory(), **more).guests
        return one.starting, str(one.nodes)

    assert seen(only={"u1"}) == (True, "")
    vcpu = guest(child.pid, {tids[0]: ("CPU 0/KVM", "vcpu0")})
    make_tree(tmp_path, vcpu | began(99_999) | {where: bound.format(0)})
    assert seen(only={"u1"}) == (False, "0")
    make_tree(tmp_path, {where: bound.format(1)})
    assert seen() == (False, "0")

    make_tree(tmp_path, began(99_998) | {where: "qemu\0"})
    assert seen(only={"u1"}) == (False, "")
    assert seen() == (False, "1")


def test_the_nodes_of_memory_are_read_at_looks_at_everything(tmp_path, hold, tids):
    """Quick looks take them as they were, of the same process; huge pages, and a host with one node, tell nothing."""
    first, huge = hold("a"), hold("b")
    two = {f"sys/devices/system/node/node{node}/cpulist": f"{node}\n" for node in (0, 1)}
    two["sys/devices/system/node/online"] = "0-1\n"
    where = "sys/fs/cgroup/{}.scope/libvirt/memory.numa_stat"
    files = guest(first.pid, {}, "/a.scope/libvirt") | guest(huge.pid, {}, "/b.scope/libvirt")
    files |= {where.format(name): f"anon N0=0 N1={2**30}\n" for name in "ab"}
    files[f"proc/{huge.pid}/status"] = "Name:\tx\nHugetlbPages:\t 1048576 kB\n"
    files[f"proc/{first.pid}/status"] = "Name:\tx\nHugetlbPages:\t       0 kB\n"
    domains = {"u1": "a", "u2": "b"}
    made = observer(tmp_path, **files, **two)

    def seen(**more):
        return [str(one.nodes) for one in made.look(domains, Memory(), **more).guests]

    assert seen(only={"u1", "u2"}) == ["", ""]
    assert seen() == ["1", ""]
    make_tree(tmp_path, {where.format("a"): f"anon N0={2**30} N1=0\n"})
    assert seen(only={"u1"}) == ["1", ""]
    assert seen() == ["0", ""]

    begin_anew(tmp_path, first.pid, 501)
    assert seen(only={"u1"}) == ["", ""]

    (tmp_path / "sys/devices/system/node/online").write_text("0\n")
    one_node = Observer(tmp_path, tmp_path / "run")
    assert [str(one.nodes) for one in one_node.look(domains, Memory()).guests] == ["", ""]


def test_pinned_threads_of_others_are_looked_for_in_looks_at_everything(tmp_path, hold, tids):
    """A quick look shows what was found last. Guests are not among them, wherever they may run."""
    child, early = hold("a"), hold("early")
    pinned = max(os.sched_getaffinity(0))
    for tid in tids:
        os.sched_setaffinity(tid, {pinned})
    files = guest(child.pid, {tids[0]: ("CPU 0/KVM", "vcpu0")})
    files |= process(early.pid, {early.pid: stat_line(early.pid)}, "0::/system.slice/libvirtd.service\n")
    files |= process(tids[2], {tids[2]: stat_line(tids[2], "ptp4l")})
    files |= process(tids[1], {tids[1]: stat_line(tids[1], "virtiofsd")}, f"0::{HOME}/emulator\n")
    files[f"sys/fs/cgroup{HOME}/emulator/cgroup.threads"] = f"{child.pid}\n{tids[1]}\n"
    made = observer(tmp_path, **files)
    domains = {"u1": "a", "u2": "early"}

    assert made.look(domains, Memory(), only={"u1"}).host.busy == {}
    assert made.look(domains, Memory()).host.busy == {pinned: f"ptp4l ({tids[2]})"}
    os.sched_setaffinity(tids[2], os.sched_getaffinity(0))
    assert made.look(domains, Memory(), only={"u1"}).host.busy == {pinned: f"ptp4l ({tids[2]})"}


def test_who_does_not_run_is_no_process(tmp_path, hold):
    """No pid file, or one whose holder is gone from /proc."""
    hold("vanished")
    made = observer(tmp_path)

    assert made.process_of("none") is None
    assert made.process_of("vanished") is None


@pytest.fixture
def like_qemu(tmp_path):
    """A process that looks like QEMU: its lock, its threads, its cgroups. Yields its pid and the tids by name."""
    if os.geteuid() != 0 or not all(os.access(root / "tasks", os.W_OK) for root in BUDGETED):
        pytest.skip("needs root and version 1 hierarchies of cpuset, cpu and cpuacct")
    names = ["CPU 0/KVM", "CPU 1/KVM", "IO iothread1", "worker"]
    command = [sys.executable, "-I", "-S", "-c", LIKE_QEMU, str(tmp_path / "rt.pid"), *names]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    outer = [root / f"rtpind-test-{os.getpid()}" for root in BUDGETED]
    groups = [group for top in outer for group in (top, *(top / leaf for leaf in ("emulator", "vcpu0", "iothread1")))]
    try:
        found = {name: int(child.stdout.readline()) for name in names}
        for group in groups:
            group.mkdir()
            if (group / "cpuset.mems").exists():
                (group / "cpuset.mems").write_text((BUDGETED[0] / "cpuset.mems").read_text())
                (group / "cpuset.cpus").write_text((BUDGETED[0] / "cpuset.cpus").read_text())
        leaves = {child.pid: "emulator", **dict.fromkeys(found.values(), "emulator")}
        leaves |= {found["CPU 0/KVM"]: "vcpu0", found["IO iothread1"]: "iothread1"}
        for tid, leaf in leaves.items():
            for top in outer:
                (top / leaf / "tasks").write_text(str(tid))
        yield child.pid, found, outer
    finally:
        child.communicate("")
        for group in reversed(groups):
            if group.exists():
                until(lambda group=group: not (group / "tasks").read_text(), "the cgroup is empty")
                group.rmdir()


def test_a_real_process_is_observed_like_a_guest(tmp_path, like_qemu):
    """On the real host: lock, threads, cgroups and affinity of a live process, each as it is set there."""
    pid, tids, outer = like_qemu
    cpu = max(os.sched_getaffinity(0))
    os.sched_setaffinity(tids["CPU 0/KVM"], {cpu})
    made = Observer(run_dir=tmp_path)

    (seen,) = made.look({"u": "rt"}, Memory()).guests
    threads = {thread.id.tid: thread for thread in seen.threads}

    assert seen.pid == pid
    assert threads.keys() == {pid, *tids.values()}
    assert (threads[tids["CPU 0/KVM"]].label, threads[tids["CPU 0/KVM"]].settled) == ("vcpu 0", True)
    assert threads[tids["IO iothread1"]].label == "iothread 1"
    assert threads[tids["worker"]].label == "emulator"
    assert threads[tids["CPU 0/KVM"]].now.cpus == CpuSet([cpu])
    # libvirt has not moved this one yet, so that it is not in its place.
    assert not threads[tids["CPU 1/KVM"]].settled
    # Half moved: one hierarchy after the other, and not settled in between.
    (outer[0] / "emulator/tasks").write_text(str(tids["CPU 0/KVM"]))
    half = {thread.id.tid: thread for thread in made.look({"u": "rt"}, Memory()).threads()}
    assert not half[tids["CPU 0/KVM"]].settled


def test_a_real_process_that_ends_is_no_guest_any_more(tmp_path, like_qemu):
    """On the real host: once its holder is gone the pid file proves nothing."""
    pid, _, _ = like_qemu
    made = Observer(run_dir=tmp_path)
    before = made.look({"u": "rt"}, Memory()).guests
    os.kill(pid, 9)
    until(lambda: not made.look({"u": "rt"}, Memory()).guests, "it is seen to be gone")

    assert [one.pid for one in before] == [pid]


def test_the_real_host_has_facts():
    """On the real host: the facts alone, without any guest."""
    host = Observer().host()

    assert CpuSet(os.sched_getaffinity(0)) <= host.online <= host.possible
