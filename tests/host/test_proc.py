"""What a thread is and where it runs, from fake /proc trees and from this test's own threads and processes."""

import ctypes
import os
import shutil
import subprocess
import threading
import time

import psutil
import pytest
from trees import HYBRID, PF_KTHREAD, PF_NO_SETAFFINITY, PF_USER_WORKER, V1, V2, make_tree, process, stat_line, until

from rtpind.core.cpuset import CpuSet
from rtpind.core.identify import SETTLE_S
from rtpind.core.model import Kind, Sched, Scheduling, ThreadId
from rtpind.core.offplace import Start
from rtpind.host.cgroup import Cgroups
from rtpind.host.guestthreads import GuestThreads
from rtpind.host.proc import Proc, parse_stat

PID = 1000
HOME = "/machine.slice/rt.scope/libvirt/emulator"

NAMES = [
    b"plain",
    b"CPU 0/KVM",
    b"a) (b",
    b") (",
    b")) ((",
    b"x) R 1 1 1 1",
    b"new\nline",
    b"(",
    b")",
    b"",
    b" ",
    b"\x1b[31m",
]


def groups(leaf="emulator"):
    return f"0::{HOME.rpartition('/')[0]}/{leaf}\n"


def fake(root, **calls):
    calls = {"affinity": lambda tid: {tid % 8}, "scheduler": lambda _: 0} | calls
    return Proc(root, **calls)


def sightings(root, uptime=100.0, **calls):
    """Look at guest PID in the tree, with the kernel threads scanned; return its sightings by tid."""
    proc = fake(root, **calls)
    proc.kernel_threads.scan()
    found = GuestThreads(proc, Cgroups(root)).look(PID, uptime)
    return None if found is None else {one.id.tid: one for one in found[1]}


def guest_tree(root, **more):
    threads = {
        1000: stat_line(1000),
        1001: stat_line(1001, "CPU 0/KVM", start=510),
        1002: stat_line(1002, "IO iothread1"),
        1003: stat_line(1003, "IO mon_iothread"),
        1004: stat_line(1004, "vhost-1000", flags=PF_USER_WORKER),
    }
    leaves = {1001: "vcpu0", 1002: "iothread1"}
    files = process(PID, threads, {tid: groups(leaves.get(tid, "emulator")) for tid in threads})
    tasks = "".join(f"{tid}\n" for tid in (1000, 1003, 1004))
    files |= {"proc/self/mountinfo": V2, f"sys/fs/cgroup{HOME}/cgroup.threads": tasks}
    return make_tree(root, files | more)


@pytest.mark.parametrize("name", NAMES)
def test_a_stat_line_is_read_whatever_the_name_holds(name):
    """The name ends at the last bracket of the line; no name shifts the fields behind it."""
    stat = parse_stat(stat_line(7, name, parent=3, flags=64, start=12345, priority=42, policy=1))

    assert stat.comm == name.decode()
    assert (stat.parent, stat.flags, stat.start, stat.priority, stat.policy) == (3, 64, 12345, 42, 1)


def test_a_name_that_is_no_text_is_replaced():
    """Bytes that are not UTF-8 neither fail nor get lost silently."""
    assert parse_stat(stat_line(7, b"a\xff\xfeb")).comm == "a\ufffd\ufffdb"


@pytest.mark.parametrize(("flags", "kernel"), [(0, False), (PF_KTHREAD, True), (PF_USER_WORKER, False)])
def test_a_kernel_thread_is_known_by_its_flag(flags, kernel):
    """Only the kernel sets that flag, so that no name can claim to be one."""
    assert parse_stat(stat_line(7, "vhost-1", flags=flags)).kernel is kernel


@pytest.mark.parametrize(
    ("policy", "sched"),
    [
        (0, Sched.OTHER),
        (1, Sched.FIFO),
        (2, Sched.RR),
        (3, Sched.BATCH),
        (5, Sched.IDLE),
        (6, Sched.DEADLINE),
        (7, Sched.EXT),
        (99, Sched.OTHER),
    ],
)
@pytest.mark.parametrize("reset", [False, True])
def test_every_scheduling_policy_is_known(tmp_path, policy, sched, reset):
    """Policy and priority come from stat, RESET_ON_FORK from the system call; one of the future counts as OTHER."""
    proc = Proc(tmp_path, affinity=lambda _: {1, 3}, scheduler=lambda _: policy | (0x40000000 if reset else 0))

    found = proc.placement(7, parse_stat(stat_line(7, policy=policy, priority=4)))

    assert found.cpus == CpuSet([1, 3])
    assert found.scheduling == Scheduling(sched, 4, reset)


@pytest.mark.parametrize(
    ("text", "has"),
    [
        ("HugetlbPages:\t 2048 kB\n", True),
        ("HugetlbPages:\t    0 kB\n", False),
        ("Name:\tHugetlbPages: 1\n", False),
        ("", False),
        (None, False),
    ],
)
def test_pages_of_hugetlbfs_are_seen(tmp_path, text, has):
    """A process with any has them; one that is gone, or a kernel without, has none."""
    if text is not None:
        make_tree(tmp_path, {"proc/7/status": f"Name:\tx\n{text}"})

    assert Proc(tmp_path).has_hugetlb(7) is has


def test_a_guest_is_seen_with_all_its_threads(tmp_path):
    """Every thread of QEMU is there, with its name, its cgroup's leaf, its flags and its age."""
    seen = sightings(guest_tree(tmp_path))

    assert {tid: (one.comm, one.leaf, one.kind) for tid, one in seen.items()} == {
        1000: ("qemu-system-x86", "emulator", Kind.QEMU),
        1001: ("CPU 0/KVM", "vcpu0", Kind.QEMU),
        1002: ("IO iothread1", "iothread1", Kind.QEMU),
        1003: ("IO mon_iothread", "emulator", Kind.QEMU),
        1004: ("vhost-1000", "emulator", Kind.QEMU),
    }
    assert seen[1001].id == ThreadId(1000, 500, 1001, 510)
    assert seen[1001].now.cpus == CpuSet([1001 % 8])
    assert seen[1001].age_s == SETTLE_S
    assert [tid for tid, one in seen.items() if one.worker] == [1004]


@pytest.mark.parametrize(("text", "ran_ns"), [("123456 78 9\n", 123456), ("0 0 0\n", None), ("", None), (None, None)])
def test_the_cpu_time_of_a_vcpu_is_read(tmp_path, text, ran_ns):
    """The first field of schedstat, of vCPUs alone; a kernel that does not count says 0."""
    more = {} if text is None else {f"proc/{PID}/task/{tid}/schedstat": text for tid in (1000, 1001, 1002)}
    seen = sightings(guest_tree(tmp_path, **more), uptime=10.0)

    assert {tid: one.ran_ns for tid, one in seen.items() if tid != 1001} == dict.fromkeys({*seen} - {1001})
    assert seen[1001].ran_ns == ran_ns
    assert fake(tmp_path).ran_ns(seen[1001].id) == ran_ns


def test_the_cpu_time_of_a_vcpu_whose_start_is_over_is_not_read(tmp_path):
    """Of no other thread and no other process does that say anything."""
    root = guest_tree(tmp_path, **{f"proc/{PID}/task/1001/schedstat": "5 0 1\n"})
    vcpu = ThreadId(PID, 500, 1001, 510)

    def ran(process, *over):
        found = GuestThreads(fake(root), Cgroups(root)).look(PID, 10.0, {process: Start(over=dict.fromkeys(over))})
        return next(one.ran_ns for one in found[1] if one.id == vcpu)

    assert ran((PID, 500), vcpu) is None
    assert ran((PID, 500), vcpu._replace(start=511)) == 5
    assert ran((PID, 501), vcpu) == 5


def test_the_other_processes_of_the_emulator_cgroup_belong_to_the_guest(tmp_path):
    """Processes that libvirt put there, and kernel threads there, are the guest's, each of its own kind."""
    more = {
        f"sys/fs/cgroup{HOME}/cgroup.threads": "1000\n1003\n2000\n2001\n3000\n0\n4000\n",  # 4000 is gone
        **process(2000, {2000: stat_line(2000, "virtiofsd"), 2001: stat_line(2001, "pool")}, groups()),
        "proc/2001/stat": stat_line(2001, "pool"),  # hidden, but there
        **process(3000, {3000: stat_line(3000, "vhost-1000", flags=PF_KTHREAD | PF_NO_SETAFFINITY)}, groups()),
    }

    seen = sightings(guest_tree(tmp_path, **more))

    assert {tid: seen[tid].kind for tid in seen.keys() - range(1000, 1010)} == {
        2000: Kind.PROCESS,
        2001: Kind.PROCESS,
        3000: Kind.KERNEL,
    }
    assert seen[2000].id == ThreadId(1000, 500, 2000, 500)
    assert [tid for tid, one in seen.items() if not one.movable] == [3000]


def kernel_thread(pid, name, flags=PF_KTHREAD, start=600):
    return process(pid, {pid: stat_line(pid, name, flags=flags, start=start, parent=2)}, "0::/\n")


def test_a_kernel_thread_belongs_to_the_guest_whose_pid_it_names(tmp_path):
    """The whole name counts: another pid that begins alike is another guest, and a program is no kernel thread."""
    more = {
        **kernel_thread(50, "kvm-pit/1000"),
        **kernel_thread(51, "vhost-1000"),
        **kernel_thread(52, "vhost-10001"),
        **kernel_thread(53, "kvm-pit/100"),
        **kernel_thread(54, "vhost-1000", flags=0),
        **kernel_thread(55, "kthreadd"),
    }

    seen = sightings(guest_tree(tmp_path, **more))

    assert {tid: seen[tid].kind for tid in seen if tid < 100} == {50: Kind.KERNEL, 51: Kind.KERNEL}


@pytest.mark.parametrize(
    "now",
    [
        stat_line(50, "kworker/0:1", flags=PF_KTHREAD, start=900),
        stat_line(50, "sshd", start=900),
        stat_line(50, "kvm-pit/1000", start=900),
        stat_line(50, "kvm-pit/1001", flags=PF_KTHREAD, start=900),
    ],
)
def test_a_number_that_was_reused_is_not_the_guests(tmp_path, now):
    """A kernel thread that ended since the last scan leaves its number to whoever comes, who is left alone."""
    root = guest_tree(tmp_path, **kernel_thread(50, "kvm-pit/1000"))
    proc = fake(root)
    proc.kernel_threads.scan()
    make_tree(root, {"proc/50/stat": now})

    _, found = GuestThreads(proc, Cgroups(root)).look(PID, 100.0)

    assert 50 not in {one.id.tid for one in found}


def test_kernel_threads_are_read_anew_now_and_then(tmp_path):
    """A number that was a program's and is a kernel thread's now is found in the end; one not named yet at once."""
    root = guest_tree(tmp_path, **kernel_thread(50, "bash", flags=0), **kernel_thread(60, "kthreadd"))
    proc = fake(root)
    proc.kernel_threads.scan()
    make_tree(root, kernel_thread(50, "vhost-1000") | kernel_thread(60, "kvm-pit/1000"))

    proc.kernel_threads.scan()
    soon = proc.kernel_threads.named("vhost-1000", "kvm-pit/1000")
    for _ in range(64):
        proc.kernel_threads.scan()
    late = proc.kernel_threads.named("vhost-1000", "kvm-pit/1000")

    assert (soon, late) == ([60], [50, 60])


def test_a_kernel_thread_that_ended_is_forgotten(tmp_path):
    """A scan keeps no number that is gone."""
    root = guest_tree(tmp_path, **kernel_thread(50, "vhost-1000"))
    proc = fake(root)
    proc.kernel_threads.scan()
    shutil.rmtree(root / "proc/50")
    proc.kernel_threads.scan()

    assert proc.kernel_threads.named("vhost-1000") == []


def test_the_lowest_guard_of_a_pcpu_counts(tmp_path):
    """The weakest of a pCPU's own threads decides; one without FIFO is 0, and a pCPU without any is not known."""
    files = {}
    for pid, name, priority in ((20, "rcuc/1", 10), (21, "ksoftirqd/1", 8), (22, "rcuc/11", 1), (23, "ksoftirqd/2", 0)):
        line = stat_line(pid, name, flags=PF_KTHREAD, priority=priority, policy=1 if priority else 0)
        files |= process(pid, {pid: line})
    files |= process(24, {24: stat_line(24, "rcuc/3", priority=50, policy=1)})  # a program of that name
    proc = fake(make_tree(tmp_path, files))
    proc.kernel_threads.scan()

    lowest = [proc.kernel_threads.lowest_priority(cpu, ("rcuc", "ktimers", "ksoftirqd")) for cpu in (1, 11, 2, 3)]

    assert lowest == [8, 1, 0, None]


@pytest.mark.parametrize("file", ["task/1001/stat", "task/1001/cgroup"])
def test_a_thread_that_ends_meanwhile_is_left_out(tmp_path, file):
    """It was listed and is gone when it is read; the others are still seen."""
    root = guest_tree(tmp_path)
    (root / "proc/1000" / file).unlink()

    assert set(sightings(root)) == {1000, 1002, 1003, 1004}


def test_a_thread_that_ends_before_its_affinity_is_read_is_left_out(tmp_path):
    """The system call may be the one to notice."""

    def affinity(tid):
        if tid == 1001:
            raise ProcessLookupError
        return {0}

    assert set(sightings(guest_tree(tmp_path), affinity=affinity)) == {1000, 1002, 1003, 1004}


@pytest.mark.parametrize("gone", ["proc/1000", "proc/1000/task", "proc/1000/task/1000/cgroup"])
def test_a_guest_that_ends_meanwhile_is_not_seen(tmp_path, gone):
    """A process that is gone is no guest, at whatever point it went."""
    root = guest_tree(tmp_path)
    path = root / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()

    assert sightings(root) is None


@pytest.mark.parametrize("leaf", ["vcpu0", "", "emulator2", "libvirtd.service"])
def test_a_process_outside_an_emulator_cgroup_is_not_seen(tmp_path, leaf):
    """Before libvirt has moved it there it still sets its affinity; and nobody else's process is a guest."""
    root = guest_tree(tmp_path, **{"proc/1000/task/1000/cgroup": groups(leaf)})

    assert sightings(root) is None


@pytest.mark.parametrize(("mountinfo", "extra"), [(V1, ""), (HYBRID, f"0::{HOME.rpartition('/libvirt')[0]}\n")])
def test_a_guest_is_seen_on_version_1(tmp_path, mountinfo, extra):
    """Version 1 too, also where systemd keeps the scope in version 2; a thread between two hierarchies has no leaf."""

    def text(cpuset, cpu):
        base = HOME.removesuffix("/emulator")
        return f"9:cpuset:{base}/{cpuset}\n8:cpu,cpuacct:{base}/{cpu}\n{extra}"

    threads = {1000: stat_line(1000), 1001: stat_line(1001, "CPU 0/KVM"), 1002: stat_line(1002, "CPU 1/KVM")}
    where = {1000: text("emulator", "emulator"), 1001: text("vcpu0", "vcpu0"), 1002: text("emulator", "vcpu1")}
    files = process(PID, threads, where) | {
        "proc/self/mountinfo": mountinfo,
        f"sys/fs/cgroup/cpuset{HOME}/tasks": "1000\n2000\n",
        "proc/2000/stat": stat_line(2000, "swtpm"),
    }

    seen = sightings(make_tree(tmp_path, files))

    assert {tid: one.leaf for tid, one in seen.items()} == {1000: "emulator", 1001: "vcpu0", 1002: "", 2000: "emulator"}


@pytest.mark.parametrize(
    ("thread", "kind", "comm", "still"),
    [
        (ThreadId(1000, 500, 1001, 510), Kind.QEMU, "CPU 0/KVM", True),
        (ThreadId(1000, 500, 1001, 511), Kind.QEMU, "CPU 0/KVM", False),  # the number was reused
        (ThreadId(1000, 500, 50, 600), Kind.QEMU, "kvm-pit/1000", False),  # no thread of QEMU
        (ThreadId(1000, 500, 4000, 500), Kind.QEMU, "gone", False),
        (ThreadId(1000, 500, 50, 600), Kind.KERNEL, "kvm-pit/1000", True),
        (ThreadId(1000, 500, 50, 600), Kind.KERNEL, "kvm-pit/999", False),
        (ThreadId(1000, 500, 50, 601), Kind.KERNEL, "kvm-pit/1000", False),
        (ThreadId(1000, 500, 60, 600), Kind.KERNEL, "vhost-1000", False),  # a program of that name
        (ThreadId(1000, 500, 60, 600), Kind.PROCESS, "renamed since", True),
        (ThreadId(1000, 500, 60, 599), Kind.PROCESS, "vhost-1000", False),
        (ThreadId(1000, 500, 4000, 500), Kind.KERNEL, "gone", False),
    ],
)
def test_a_thread_is_proved_again(tmp_path, thread, kind, comm, still):
    """Start time and kind of belonging must both still be what was seen."""
    more = kernel_thread(50, "kvm-pit/1000") | kernel_thread(60, "vhost-1000", flags=0)
    proc = fake(guest_tree(tmp_path, **more))

    assert proc.is_still(thread, kind, comm) is still


class Named:
    """A thread of this process that names itself and waits."""

    def __init__(self, name: bytes) -> None:
        self.ready, self.end = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, args=(name,))
        self.thread.start()
        self.ready.wait(10)
        self.tid = self.thread.native_id

    def _run(self, name: bytes) -> None:
        ctypes.CDLL(None).prctl(15, name, 0, 0, 0)  # PR_SET_NAME
        self.ready.set()
        self.end.wait(60)

    def stop(self) -> None:
        self.end.set()
        self.thread.join()


@pytest.fixture(params=NAMES, ids=repr)
def named(request):
    """A real thread of that name."""
    made = Named(request.param)
    made.name = request.param
    yield made
    made.stop()


def test_a_real_thread_is_read_whatever_its_name(named):
    """On the real host: name, start and placement of a thread with a hostile name are right."""
    proc = Proc()
    stat = proc.stat(os.getpid(), named.tid)

    assert stat.comm == named.name.decode()[:15]
    assert stat.parent == os.getppid()
    assert not stat.kernel
    assert proc.placement(named.tid, stat).cpus == CpuSet(os.sched_getaffinity(named.tid))
    assert named.tid in proc.tids(os.getpid())
    assert proc.is_still(ThreadId(os.getpid(), 0, named.tid, stat.start), Kind.QEMU, "")


def test_the_real_cpu_time_of_a_thread_that_works_grows():
    """On the real host: what a thread used is counted when it sleeps, and of one that is gone nothing is known."""
    worker = Named(b"CPU 0/KVM")
    proc = Proc()
    id_ = ThreadId(os.getpid(), 0, worker.tid, 0)
    here = id_._replace(tid=threading.get_native_id())
    before, began = proc.ran_ns(here), time.thread_time()
    while time.thread_time() - began < 0.02:
        pass
    used = proc.ran_ns(here) - before
    assert proc.ran_ns(id_) > 0
    worker.stop()

    assert 10e6 < used < 10e9  # the last tick may not be counted
    until(lambda: proc.ran_ns(id_) is None, "the kernel has ended the thread")


def test_a_real_start_time_is_that_of_psutil():
    """On the real host: the start time agrees with what another program makes of it."""
    process_ = psutil.Process()
    started = psutil.boot_time() + Proc().stat(os.getpid()).start / os.sysconf("SC_CLK_TCK")

    assert started == pytest.approx(process_.create_time(), abs=2)
    assert 0 < Proc().uptime() < 10 * 365 * 86400


def test_a_real_thread_that_ended_is_an_error_and_no_crash():
    """On the real host: what is gone raises OSError where that is said, and is simply not there elsewhere."""
    child = subprocess.Popen(["true"])
    child.wait()
    proc = Proc()

    for ask in (lambda: proc.stat(child.pid), lambda: proc.tids(child.pid), lambda: Cgroups().of(child.pid, child.pid)):
        with pytest.raises(OSError, match=str(child.pid)):
            ask()
    assert proc.cmdline(child.pid) == []
    assert GuestThreads(proc, Cgroups()).look(child.pid, proc.uptime()) is None
    assert child.pid not in proc.pids()


def test_a_real_zombie_is_no_guest():
    """On the real host: a process that ended and was not waited for has threads and files, and is no guest."""
    child = subprocess.Popen(["true"])
    until(lambda: psutil.Process(child.pid).status() == psutil.STATUS_ZOMBIE, "it is a zombie")

    seen = GuestThreads(Proc(), Cgroups()).look(child.pid, Proc().uptime())
    child.wait()

    assert seen is None


def test_real_scheduling_is_what_chrt_set():
    """On the real host: policy, priority and RESET_ON_FORK of a thread are what another program gave it."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        done = subprocess.run(["chrt", "-R", "-f", "-p", "7", str(child.pid)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"chrt: {done.stderr.strip()}")
        proc = Proc()
        found = proc.placement(child.pid, proc.stat(child.pid)).scheduling
    finally:
        child.kill()
        child.wait()

    assert found == Scheduling(Sched.FIFO, 7, True)


def test_real_command_lines_and_kernel_threads_are_found():
    """On the real host: this process knows its own arguments, and pid 2's children are kernel threads."""
    proc = Proc()
    proc.kernel_threads.scan()

    assert proc.cmdline(os.getpid())[:-1] == psutil.Process().cmdline()
    named = proc.kernel_threads.named("ksoftirqd/0")
    if not named:
        pytest.skip("this /proc shows no kernel threads (a container)")
    assert psutil.Process(named[0]).name() == "ksoftirqd/0"
    assert proc.kernel_threads.lowest_priority(0, ["ksoftirqd"]) == os.sched_getparam(named[0]).sched_priority


class Housed(Cgroups):
    """Cgroups in which every process is in an emulator cgroup of its own."""

    def text(self, pid, tid):
        return b"0::/guest/libvirt/emulator\n" if tid == pid else super().text(pid, tid)


def test_the_threads_of_this_process_vanish_while_they_are_read():
    """On the real host: reading threads that begin and end all the time never raises."""
    stop = threading.Event()

    def churn():
        while not stop.is_set():
            thread = threading.Thread(target=lambda: None)
            thread.start()
            thread.join()

    worker = threading.Thread(target=churn)
    worker.start()
    threads = GuestThreads(Proc(), Housed())
    try:
        seen = [threads.look(os.getpid(), 0.0) for _ in range(200)]
    finally:
        stop.set()
        worker.join()

    assert all(os.getpid() in {one.id.tid for one in sightings} for _, sightings in seen)
