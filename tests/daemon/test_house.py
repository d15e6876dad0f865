# SPDX-License-Identifier: GPL-2.0-or-later
"""The daemon's own threads: on housekeeping pCPUs and at their priority, set only when they are not, and said."""

import os
import subprocess

import pytest

from rtpind.core.audit import Kind, Level
from rtpind.core.cpuset import CpuSet
from rtpind.core.model import OTHER, Sched, Scheduling
from rtpind.daemon.house import Housekeeper, OwnThreads
from rtpind.host.proc import Proc

FIFO_2 = Scheduling(Sched.FIFO, 2, reset_on_fork=True)


class Threads:
    """Threads that a cpuset may keep from where they should be, and the kernel from being realtime."""

    def __init__(self, places):
        self.places = {tid: (CpuSet.parse(text), OTHER) for tid, text in places.items()}
        self.fence = CpuSet.parse("0-7")
        self.realtime = True
        self.calls = []
        self.records = []
        self.listed = None
        self.house = Housekeeper(self, self.records.append)

    def tids(self):
        return self.listed or list(self.places)

    def read(self, tid):
        if tid not in self.places:
            raise ProcessLookupError(tid)
        return self.places[tid]

    def set_affinity(self, tid, cpus):
        self.calls.append((tid, str(cpus)))
        if cpus & self.fence:
            self.move(tid, cpus & self.fence)

    def set_scheduling(self, tid, scheduling):
        self.calls.append((tid, str(scheduling)))
        if self.realtime or not scheduling.realtime:
            self.places[tid] = (self.places[tid][0], scheduling)

    def move(self, tid, cpus):
        self.places[tid] = (cpus, self.places[tid][1])

    def keep(self, text, priority=0):
        self.house.keep(CpuSet.parse(text), priority, {1, 2})


def test_every_thread_is_put_there_and_a_right_one_is_left():
    """One call for each that is elsewhere; at the next look none."""
    threads = Threads({1: "0-7", 2: "0-1", 3: "5"})
    threads.keep("0-1")
    threads.keep("0-1")

    assert threads.calls == [(1, "0-1"), (3, "0-1")]
    assert threads.records == []


def test_new_threads_and_a_changed_pool_are_followed():
    """What began since the last look, and all of them when other pCPUs keep house."""
    threads = Threads({1: "0"})
    threads.keep("0")
    threads.places[2] = (CpuSet.parse("0-7"), OTHER)
    threads.keep("0")
    threads.keep("0-1")

    assert threads.calls == [(2, "0"), (1, "0-1"), (2, "0-1")]


def test_urgent_threads_get_their_priority_and_a_right_one_is_left():
    """The others, and all of them when there is none any more, are what the process began with."""
    threads = Threads({1: "0", 2: "0", 3: "0"})
    batch = Scheduling(Sched.BATCH)
    threads.places = dict.fromkeys(threads.places, (CpuSet([0]), batch))
    threads.keep("0", 2)
    threads.places[4] = (CpuSet([0]), OTHER)
    threads.keep("0", 2)
    assert threads.calls == [(1, "fifo:2"), (2, "fifo:2"), (4, "batch")]
    assert [place for _, place in threads.places.values()] == [FIFO_2, FIFO_2, batch, batch]

    threads.keep("0", 0)
    threads.keep("0", 0)
    assert threads.calls[3:] == [(1, "batch"), (2, "batch")]
    assert threads.records == []


def test_without_housekeeping_pcpus_nothing_is_set():
    """An empty pool is no place."""
    threads = Threads({1: "0-7"})
    threads.keep("", 2)

    assert (threads.calls, threads.records) == ([], [])


def test_what_a_cpuset_forbids_is_said_once_and_tried_again_when_it_changes():
    """Not at each look; a thread that was moved since, or another pool, is something new."""
    threads = Threads({1: "4-7", 2: "4-7"})
    threads.fence = CpuSet.parse("1,4-7")
    for _ in range(3):
        threads.keep("0-1")

    assert threads.calls == [(1, "0-1"), (2, "0-1")]
    (record,) = threads.records
    assert (record.kind, record.level) == (Kind.DAEMON, Level.WARNING)
    assert "runs on pCPU 1 and not on housekeeping pCPU 0-1" in record.message

    threads.fence = CpuSet.parse("0-7")
    threads.move(2, CpuSet.parse("6"))
    threads.keep("0-1")
    assert threads.calls[2:] == [(2, "0-1")]
    assert len(threads.records) == 1


def test_a_priority_that_is_refused_is_said_once_and_tried_again_when_told_to():
    """At a reload: the operator may have given its cgroup a budget meanwhile. Until then it goes on without."""
    threads = Threads({1: "0", 2: "0"})
    threads.realtime = False
    for _ in range(3):
        threads.keep("0", 2)

    assert threads.calls == [(1, "fifo:2"), (2, "fifo:2")]
    (record,) = threads.records
    assert (record.kind, record.level) == (Kind.DAEMON, Level.WARNING)
    assert "is not fifo:2 but other" in record.message
    assert "CAP_SYS_NICE" in record.message

    threads.realtime = True
    threads.keep("0", 2)
    assert threads.calls[2:] == []
    threads.house.forget()
    threads.keep("0", 2)
    assert threads.calls[2:] == [(1, "fifo:2"), (2, "fifo:2")]


def test_another_priority_is_asked_for_where_one_was_refused():
    """It is another question."""
    threads = Threads({1: "0", 2: "0"})
    threads.realtime = False
    threads.keep("0", 2)
    threads.realtime = True
    threads.keep("0", 3)
    assert threads.calls[2:] == [(1, "fifo:3"), (2, "fifo:3")]
    assert len(threads.records) == 1


def test_a_thread_that_ends_meanwhile_is_no_trouble():
    """The list is older than the look."""
    threads = Threads({1: "0-7"})
    threads.listed = [9, 1]
    threads.keep("0")

    assert threads.calls == [(1, "0")]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two pCPUs")
def test_the_kernel_does_it():
    """On the real one: another user's process would do as well, with CAP_SYS_NICE."""
    first, records = min(os.sched_getaffinity(0)), []
    child = subprocess.Popen(["sleep", "60"])
    try:
        house = Housekeeper(OwnThreads(Proc(), lambda: [child.pid]), records.append)
        house.keep(CpuSet([first]), 2, {child.pid})
        assert os.sched_getaffinity(child.pid) == {first}
        if not records or os.geteuid() == 0:
            assert os.sched_getscheduler(child.pid) == os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
            assert os.sched_getparam(child.pid).sched_priority == 2
        house.keep(CpuSet([first]))
        assert os.sched_getscheduler(child.pid) == os.SCHED_OTHER
    finally:
        child.kill()
        child.wait()
