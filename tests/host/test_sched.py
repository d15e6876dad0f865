"""The two system calls that change a thread, on real threads of this test, read back without rtpind."""

import errno
import os
import subprocess
import threading
import warnings

import pytest
from trees import until

from rtpind.core.cpuset import CpuSet
from rtpind.core.model import OTHER, Sched, Scheduling
from rtpind.host import sched
from rtpind.host.proc import Proc

RESET = 0x40000000
NOBODY = 65534


@pytest.fixture
def tid():
    """A thread of this test that waits."""
    ready, end = threading.Event(), threading.Event()

    def run():
        ready.set()
        end.wait(60)

    thread = threading.Thread(target=run)
    thread.start()
    ready.wait(10)
    yield thread.native_id
    end.set()
    thread.join()


@pytest.fixture
def dead():
    """The tid of a thread that ended."""
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()  # which returns a little before the kernel is done with it
    until(lambda: not os.path.exists(f"/proc/self/task/{thread.native_id}"), "the thread is gone")
    return thread.native_id


def taskset(tid):
    done = subprocess.run(["taskset", "-cp", str(tid)], capture_output=True, text=True, check=True)
    return done.stdout.rsplit(": ", 1)[1].strip()


def chrt(tid):
    done = subprocess.run(["chrt", "-p", str(tid)], capture_output=True, text=True, check=True)
    return [line.rsplit(": ", 1)[1] for line in done.stdout.splitlines()]


def give(tid, scheduling):
    """Give a thread a realtime scheduling; skip where this user may not."""
    error = sched.set_scheduling(tid, scheduling)
    if error == errno.EPERM:
        pytest.skip("no CAP_SYS_NICE, or an RT_GROUP_SCHED cgroup without budget")
    return error


def test_affinity_is_set_for_one_thread_alone(tid):
    """Another program reads what was set, and no other thread is moved."""
    mine = os.sched_getaffinity(0)
    cpu = max(mine)

    assert sched.set_affinity(tid, CpuSet([cpu])) == 0
    assert taskset(tid) == str(cpu)
    assert os.sched_getaffinity(0) == mine


def test_affinity_may_be_wide(tid):
    """A mask of several pCPUs is set as it is."""
    wide = CpuSet(os.sched_getaffinity(0))
    sched.set_affinity(tid, CpuSet([wide.first()]))

    assert sched.set_affinity(tid, wide) == 0
    assert os.sched_getaffinity(tid) == set(wide)


@pytest.mark.parametrize("cpus", [CpuSet(), CpuSet([8191]), CpuSet([1000, 2000])])
def test_impossible_pcpus_are_refused(tid, cpus):
    """The kernel's EINVAL is handed back, and the thread stays where it was."""
    before = os.sched_getaffinity(tid)

    assert sched.set_affinity(tid, cpus) == errno.EINVAL
    assert os.sched_getaffinity(tid) == before


def test_a_mask_is_narrowed_in_silence(tid):
    """Success says nothing about pCPUs that are not there: read back."""
    cpu = min(os.sched_getaffinity(0))

    assert sched.set_affinity(tid, CpuSet([cpu, 8000])) == 0
    assert os.sched_getaffinity(tid) == {cpu}


def test_a_thread_that_ended_is_told(dead):
    """Both calls say ESRCH of a thread that is gone."""
    assert sched.set_affinity(dead, CpuSet([0])) == errno.ESRCH
    assert sched.set_scheduling(dead, OTHER) == errno.ESRCH


def test_a_kernel_thread_that_may_not_move_is_told():
    """The kernel's own per-CPU threads stay where they are: EINVAL, or EPERM without the right."""
    proc = Proc()
    proc.kernel_threads.scan()
    found = proc.kernel_threads.named("ksoftirqd/0")
    if not found:
        pytest.skip("this /proc shows no kernel threads (a container)")

    assert sched.set_affinity(found[0], CpuSet([0])) in (errno.EINVAL, errno.EPERM)


def test_fifo_is_given_with_reset_on_fork(tid):
    """Another program reads policy, priority and the flag; and a child does not inherit it."""
    assert give(tid, Scheduling(Sched.FIFO, 3, True)) == 0

    assert chrt(tid) == ["SCHED_FIFO|SCHED_RESET_ON_FORK", "3"]
    assert os.sched_getscheduler(tid) == os.SCHED_FIFO | RESET
    assert os.sched_getparam(tid).sched_priority == 3
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize(
    ("scheduling", "number"),
    [
        (Scheduling(Sched.FIFO, 1), os.SCHED_FIFO),
        (Scheduling(Sched.RR, 2, True), os.SCHED_RR | RESET),
        (Scheduling(Sched.BATCH), os.SCHED_BATCH),
        (Scheduling(Sched.IDLE), os.SCHED_IDLE),
        (Scheduling(Sched.OTHER, 0, True), os.SCHED_OTHER | RESET),
        (OTHER, os.SCHED_OTHER),
    ],
)
def test_every_scheduling_that_a_thread_had_can_be_put_back(tid, scheduling, number):
    """What may have been there before is given back exactly, also after FIFO."""
    give(tid, Scheduling(Sched.FIFO, 5, True))

    assert give(tid, scheduling) == 0
    assert os.sched_getscheduler(tid) == number
    assert os.sched_getparam(tid).sched_priority == scheduling.priority


@pytest.mark.parametrize("scheduling", [Scheduling(Sched.DEADLINE), Scheduling(Sched.FIFO, 100), Scheduling(Sched.RR)])
def test_a_scheduling_that_cannot_be_is_refused(tid, scheduling):
    """DEADLINE needs another call, and priorities end at 99: an errno, and the thread stays as it was."""
    assert sched.set_scheduling(tid, scheduling) == errno.EINVAL
    assert os.sched_getscheduler(tid) == os.SCHED_OTHER


def test_sched_ext_can_be_asked_for(tid):
    """A kernel with sched_ext takes it, any other says EINVAL; nothing is raised."""
    assert sched.set_scheduling(tid, Scheduling(Sched.EXT)) in (0, errno.EINVAL)


def test_without_the_right_both_calls_say_so(tid):
    """A user without CAP_SYS_NICE is told EPERM for a thread that is not his, or for FIFO."""
    if os.geteuid() != 0:
        assert sched.set_scheduling(tid, Scheduling(Sched.FIFO, 1)) == errno.EPERM
        return
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: this process has threads
        child = os.fork()
    if child == 0:  # system calls only: other threads of the test hold who knows what
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        errors = [sched.set_affinity(tid, CpuSet([0])), sched.set_scheduling(tid, Scheduling(Sched.FIFO, 1))]
        os.write(writer, bytes(errors))
        os._exit(0)
    os.waitpid(child, 0)
    errors = list(os.read(reader, 2))
    os.close(reader)
    os.close(writer)

    assert errors == [errno.EPERM, errno.EPERM]
